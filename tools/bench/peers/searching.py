"""FAISS and USearch beside our search, on one item table. Runs in an environment with numpy and both of them.

    python -m tools.bench.peers.searching SETTINGS

Everything is timed in one process with one thread, in turns; indexes are built with all cores.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dman_runtime.retrieval.base import NO_ITEMS, Retriever
from dman_runtime.retrieval.candidates import CandidateRetriever
from dman_runtime.retrieval.exact import ExactRetriever
from dman_runtime.retrieval.index import ItemIndex

BEST = 100  # recall is of the best 100
INDEXED_ITEMS = 50_000  # from which on the export builds an index
GRAPH_ITEMS = 200_000  # building a graph of more takes minutes
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # of a search: cells that it looks at, or nodes that it keeps
SCAN_ROWS = 1 << 18


class Index(NamedTuple):
    """A way of searching."""

    name: str
    search: Callable[[np.ndarray], np.ndarray]  # (B, D) users -> (B, BEST) item indices
    build_seconds: float
    set_effort: Callable[[int], None] | None = None  # None: exact


def exact(items: np.ndarray) -> Index:
    """Our exact search."""
    return Index("numpy, exact (ours)", _our_search(ExactRetriever(items)), 0.0)


def indexed(items: np.ndarray) -> Index:
    """Ours for large catalogues: candidates from an index of FAISS, with exact scores."""
    began = time.perf_counter()
    index = ItemIndex.build(items)
    taken = time.perf_counter() - began

    def read(lists: int) -> None:
        index.probes = min(lists, index.lists)

    return Index("index of a bundle (ours)", _our_search(CandidateRetriever(items, index)), taken, read)


def _our_search(retriever: Retriever) -> Callable[[np.ndarray], np.ndarray]:
    def search(users: np.ndarray) -> np.ndarray:
        return np.stack([hits.items for hits in retriever.search(users, BEST, exclude=[NO_ITEMS] * len(users))])

    return search


def faiss_indexes(items: np.ndarray) -> Iterator[Index]:
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    for name, (factory, parameter) in _factories(len(items)).items():
        began = time.perf_counter()
        index = faiss.index_factory(items.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        sample = max(40 * _cells(len(items)), 10_000)
        index.train(items[np.random.default_rng(0).permutation(len(items))[:sample]])
        index.add(items)
        taken = time.perf_counter() - began
        yield Index(f"FAISS {name}", _faiss_search(index), taken, _faiss_effort(index, parameter))


def _faiss_search(index: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda users: index.search(users, BEST)[1]


def _faiss_effort(index: Any, parameter: str) -> Callable[[int], None] | None:
    import faiss

    return (lambda effort: faiss.ParameterSpace().set_index_parameter(index, parameter, effort)) if parameter else None


def _cells(items: int) -> int:
    return 1 << round(math.log2(4 * math.sqrt(items)))


def _factories(items: int) -> dict[str, tuple[str, str]]:
    """What to build, and what sets the effort of a search."""
    found = {"Flat, exact": ("Flat", ""), "IVF, 8 bits": (f"IVF{_cells(items)},SQ8", "nprobe")}
    return found | ({"HNSW32": ("HNSW32,Flat", "efSearch")} if items <= GRAPH_ITEMS else {})


def usearch_indexes(items: np.ndarray) -> Iterator[Index]:
    from usearch.index import Index as Graph

    if len(items) > GRAPH_ITEMS:
        return
    began = time.perf_counter()
    graph = Graph(ndim=items.shape[1], metric="ip", dtype="f32", connectivity=32)
    graph.add(np.arange(len(items)), items, threads=os.cpu_count() or 1)

    def search(users: np.ndarray) -> np.ndarray:
        return np.atleast_2d(graph.search(users, BEST, threads=1).keys).astype(np.int64)

    def set_effort(effort: int) -> None:
        graph.expansion_search = effort

    yield Index("USearch HNSW32", search, time.perf_counter() - began, set_effort)


def recall(found: np.ndarray, right: np.ndarray) -> float:
    """Of (N, BEST) items found, the share that is in the (N, BEST) right ones."""
    shared = [len(np.intersect1d(some, best)) for some, best in zip(found, right, strict=True)]
    return float(np.mean(shared) / right.shape[1])


def chosen_effort(index: Index, users: np.ndarray, right: np.ndarray, floor: float) -> int | None:
    """The least effort that has the recall on these users, or the most there is. None for an exact index."""
    if index.set_effort is None:
        return None
    for effort in EFFORTS:
        index.set_effort(effort)
        if recall(index.search(users), right) >= floor:
            return effort
    return EFFORTS[-1]


def measure(items: np.ndarray, users: np.ndarray, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each index: recall on the second half of the users, where the first one chose its effort, and seconds."""
    choosing, testing = users[: len(users) // 2], users[len(users) // 2 :]
    ours = exact(items)
    right, tested = (np.concatenate([ours.search(user[None]) for user in part]) for part in (choosing, testing))
    indexes = [ours, *([indexed(items)] if len(items) >= INDEXED_ITEMS else [])]
    indexes += [*faiss_indexes(items), *usearch_indexes(items)]
    efforts = [chosen_effort(index, choosing, right, settings["recall"]) for index in indexes]
    _one_thread()
    found: list[dict[str, Any]] = [
        {
            "index": index.name,
            "effort": effort,
            "build_seconds": index.build_seconds,
            "recall": recall(np.concatenate([index.search(user[None]) for user in testing]), tested),
            "seconds": {str(batch): [] for batch in settings["batches"]},
        }
        for index, effort in zip(indexes, efforts, strict=True)
    ]
    for _ in range(settings["rounds"]):
        for batch in settings["batches"]:
            for index, one in zip(indexes, found, strict=True):
                one["seconds"][str(batch)].append(_seconds(index, testing, batch, settings["seconds"]))
    return found


def _one_thread() -> None:
    import faiss

    faiss.omp_set_num_threads(1)


def _seconds(index: Index, users: np.ndarray, batch: int, seconds: float) -> float:
    """Median time of a search for so many users, of those that fit into this time; at least three."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        first = len(times) * batch % (len(users) - batch + 1)
        started = time.perf_counter()
        index.search(users[first : first + batch])
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def enlarged(table: np.ndarray, count: int) -> np.ndarray:
    """(count, D) items like those of a (V, D) trained table: its rows, and points between rows and near ones.

    A point lies between a row and one of its ten nearest, with a tenth of the distance as noise: it keeps the clusters
    and the norms of the table, on which recall depends.
    """
    random = np.random.default_rng(0)
    if count <= len(table):
        return np.ascontiguousarray(table[random.permutation(len(table))[:count]])
    near = _nearest(table, 10)
    made = np.empty((count, table.shape[1]), np.float32)
    made[: len(table)] = table
    for start in range(len(table), count, SCAN_ROWS):
        rows = random.integers(0, len(table), min(SCAN_ROWS, count - start))
        others = table[near[rows, random.integers(0, near.shape[1], len(rows))]]
        way = others - table[rows]
        noise = random.standard_normal(way.shape, np.float32)
        noise *= 0.1 * np.linalg.norm(way, axis=1, keepdims=True) / math.sqrt(way.shape[1])
        made[start : start + len(rows)] = table[rows] + random.random((len(rows), 1), np.float32) * way + noise
    return made


def _nearest(table: np.ndarray, count: int) -> np.ndarray:
    """(V, count) the nearest other rows of each."""
    squares, found = (table**2).sum(axis=1), []
    for start in range(0, len(table), 1024):
        part = table[start : start + 1024]
        distances = squares - 2 * part @ table.T
        distances[np.arange(len(part)), np.arange(start, start + len(part))] = np.inf
        found.append(np.argpartition(distances, count, axis=1)[:, :count])
    return np.concatenate(found)


def main(arguments: Sequence[str]) -> None:
    settings = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    table, users = np.load(settings["table"]), np.load(settings["users"])
    for count in settings["items"]:
        print(json.dumps({"items": count, "indexes": measure(enlarged(table, count), users, settings)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
