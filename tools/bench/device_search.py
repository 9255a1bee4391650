"""Search of large catalogues on a device beside the CPU, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dman_runtime.model.bundle import SEARCH
from dman_runtime.model.device_items import DeviceItems
from dman_runtime.retrieval.base import NO_ITEMS, Hits, Retriever
from dman_runtime.retrieval.candidates import CandidateRetriever
from dman_runtime.retrieval.exact import ExactRetriever
from dman_train.graphs import search_graph
from tools.bench.blocks import Spread
from tools.bench.report import Claim, Section

ITEMS, WIDTH, BATCHES = (20_000, 200_000, 1_000_000), 128, (1, 64)
K, REPEATS, RUNS = 20, 5, 3


def device_search(provider: str, items: Sequence[int] = ITEMS, batches: Sequence[int] = BATCHES) -> Section:
    """The best items of random users among random items, on a provider of ONNX Runtime and on one core."""
    random, rows, claims = np.random.default_rng(0), [], []
    graph = search_graph(WIDTH)
    for count in items:
        table = random.standard_normal((count, WIDTH), np.float32)
        exact = ExactRetriever(table)
        device = CandidateRetriever(table, DeviceItems(graph, table, Path(SEARCH), provider=provider))
        for batch in batches:
            users = random.standard_normal((batch, WIDTH), np.float32)
            same = sum(
                np.array_equal(one.items, other.items)
                for one, other in zip(_search(device, users), _search(exact, users), strict=True)
            )
            pairs = [(_milliseconds(device, users), _milliseconds(exact, users)) for _ in range(REPEATS)]
            on_device, on_cpu = (Spread(tuple(pair[which] for pair in pairs)) for which in (0, 1))
            gain = Spread(tuple(cpu / gpu for gpu, cpu in pairs))
            rows.append([f"{count:,}", str(batch), str(on_device), str(on_cpu), str(gain), f"{same} of {batch}"])
        claims.append(
            Claim(f"search of {count:,} items on {provider} by one core, {batch} users", f"{gain.median:.1f} times")
        )
    return Section(
        "Search",
        f"The {K} best of random items of width {WIDTH}, with the item table on the device; copies of users and "
        "results, and their exact scores on the CPU, are included. The last column counts users with the same items in "
        "the same order.",
        claims,
        ("items", "users", "device ms", "one core ms", "speed", "equal"),
        rows,
        {"runs": rows},
    )


def _search(retriever: Retriever, users: np.ndarray) -> list[Hits]:
    return retriever.search(users, K, exclude=[NO_ITEMS] * len(users))


def _milliseconds(retriever: Retriever, users: np.ndarray) -> float:
    began = time.perf_counter()
    for _ in range(RUNS):
        _search(retriever, users)
    return 1000 * (time.perf_counter() - began) / RUNS
