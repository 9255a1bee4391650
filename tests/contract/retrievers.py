"""Every implementation of `Retriever`: add a factory here, and the contract suite runs over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dman_runtime.model.device_items import DeviceItems
from dman_runtime.model.sessions import CPU
from dman_runtime.retrieval.base import Retriever
from dman_runtime.retrieval.candidates import CandidateRetriever
from dman_runtime.retrieval.exact import ExactRetriever
from dman_train.graphs import search_graph


class BestFirst:
    """A finder that knows the true order of the first `items`, and counts for how many users it is asked."""

    quick = True

    def __init__(self, table: np.ndarray, items: int) -> None:
        self._table, self.items, self.asked = table[:items], items, 0

    def fetched(self, k: int) -> int:
        return k

    def find(self, users: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        self.asked += len(users)
        pairs = zip(users, counts, strict=True)
        return [np.argsort(-(self._table @ user), kind="stable")[:count] for user, count in pairs]


def on_device(table: np.ndarray) -> Retriever:
    """The search of a device, on the CPU."""
    items = DeviceItems(search_graph(table.shape[1]), table, Path("item_search.onnx"), provider=CPU)
    return CandidateRetriever(table, items)


RETRIEVERS: dict[str, Callable[[np.ndarray], Retriever]] = {  # from (V, D) float32 item embeddings
    "exact": ExactRetriever,
    "approximate": lambda table: CandidateRetriever(table, BestFirst(table, len(table))),
    "on a device": on_device,
}
