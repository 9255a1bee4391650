"""Top-K search: FAISS and USearch beside ours, from 3,416 to a million items."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dman_runtime.data.logs import read_interactions
from dman_runtime.errors import UsageError
from dman_runtime.model.events import without_times
from dman_runtime.model.generation import Generation
from tools.bench.blocks import Spread
from tools.bench.peers.environments import UnavailableError, pinned, python_of
from tools.bench.peers.running import QUIET
from tools.bench.report import Claim, Section
from tools.bench.servers import ROOT
from tools.bench.setting import Bench

NAME = "search"  # of the requirements
USERS = 200
CLOSE = 0.98  # recall on other users than those that chose the effort, to count for a claim
HEADS = ("items", "index", "build s", "effort", "recall@100")
SEARCH_SECONDS = 1800


@dataclass(frozen=True)
class Effort:
    """What is measured."""

    items: tuple[int, ...] = (3_416, 20_000, 100_000, 1_000_000)
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 3
    seconds: float = 0.5  # of each index and batch in a round
    recall: float = 0.99  # that an approximate search is given the effort for


QUICK = Effort(items=(500, 2_000), rounds=1, seconds=0.02)


def search(bench: Bench, effort: Effort, cache: Path, data: Path | None) -> Section:
    """Our search, FAISS and USearch: time and recall@100."""
    try:
        python = python_of(NAME, cache)
    except UnavailableError as error:
        return Section("Search", f"Not measured: {error}.", [Claim("search in FAISS and USearch", "not measured")])
    table, users = bench.scratch / "table.npy", bench.scratch / "users.npy"
    np.save(table, bench.bundle.item_embeddings)
    np.save(users, _users(bench, data))
    settings = bench.scratch / "search.json"
    settings.write_text(json.dumps(asdict(effort) | {"table": str(table), "users": str(users)}), encoding="utf-8")
    found = [json.loads(line) for line in _run(python, settings)]
    versions = pinned(NAME)
    whose = "of users of the log" if data else "of random histories"
    return Section(
        "Search",
        f"The best 100 for (batch, {bench.bundle.manifest.state.width}) user embeddings {whose}, one thread, nothing "
        f"excluded; FAISS {versions['faiss-cpu']}, USearch {versions['usearch']}. The items are the bundle's; beyond "
        "these, points between an item and one of its ten nearest. An approximate index gets the least effort (cells "
        f"or nodes looked at) with recall@100 >= {effort.recall} on half of the {USERS} users; its recall is that on "
        "the other half. From 50,000 items on, the export builds an index if it has this recall. A graph (HNSW) is "
        "built for up to 200,000 items: more take minutes.",
        _claims(found),
        [*HEADS, *(f"ms, batch {batch}" for batch in effort.batches)],
        _rows(found),
        {"found": found},
    )


def _users(bench: Bench, data: Path | None) -> np.ndarray:
    """(USERS, D) float32."""
    generation = Generation.open(bench.bundle.path, provider="cpu")
    if data is None:
        histories = [bench.history(f"search-{i}", bench.sizes.events) for i in range(USERS)]
    else:
        histories = _histories(data)
    known = [indices for items in histories if len(indices := bench.bundle.items.indices(items)[0])]
    if len(known) < USERS // 2:
        raise UsageError("the log has too few users with items of the bundle", "take another one", parameter="data")
    return np.stack([state.user_embedding for state in generation.replay(without_times(known))])


def _histories(data: Path) -> list[list[str]]:
    log = read_interactions(data)
    chosen = np.random.default_rng(0).permutation(log.num_users)[:USERS]
    return [[log.item_ids[item] for item in log.history(user).tolist()] for user in chosen]


def _run(python: Path, settings: Path) -> list[str]:
    environment = os.environ | QUIET | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [str(python), "-m", "tools.bench.peers.searching", str(settings)]
    try:
        ended = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=SEARCH_SECONDS, env=environment, cwd=ROOT
        )
    except subprocess.CalledProcessError as error:
        raise UsageError(f"the search failed: {(error.stderr.strip().splitlines() or ['no message'])[-1]}") from None
    return ended.stdout.splitlines()


def _claims(found: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Our time by that of the fastest other one, ours as the export would choose it."""
    claims = []
    for one in found:
        mine = [index for index in one["indexes"] if index["index"].endswith("(ours)")]
        ours = next((index for index in mine[1:] if index["recall"] >= CLOSE), mine[0])
        others = [index for index in one["indexes"] if index not in mine and index["recall"] >= CLOSE]
        for batch, times in ours["seconds"].items():
            best = min(others, key=lambda index: float(np.median(index["seconds"][batch])))
            ratio = Spread(tuple(a / b for a, b in zip(times, best["seconds"][batch], strict=True)))
            spread = f"{ratio.median:.2f}x ({min(ratio.values):.2f} to {max(ratio.values):.2f})"
            claims.append(
                Claim(
                    f"{one['items']:,} items, batch {batch}: time of {ours['index']} by the fastest other",
                    f"{spread} that of {best['index']}",
                )
            )
    return claims


def _rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{one['items']:,}",
            index["index"],
            f"{index['build_seconds']:.1f}" if index["build_seconds"] else "-",
            str(index["effort"] or "-"),
            f"{index['recall']:.4f}",
            *(str(Spread(tuple(1e3 * value for value in times))) for times in index["seconds"].values()),
        ]
        for one in found
        for index in one["indexes"]
    ]
