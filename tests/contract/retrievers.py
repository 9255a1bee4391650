"""Every implementation of `Retriever`: add a factory here, and the contract suite runs over it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dman_runtime.retrieval.approximate import ApproximateRetriever
from dman_runtime.retrieval.base import Retriever
from dman_runtime.retrieval.exact import ExactRetriever


class BestFirst:
    """An index that knows the true order of the first `items`, and counts how often it is asked."""

    def __init__(self, table: np.ndarray, items: int) -> None:
        self._table, self.items, self.asked = table[:items], items, 0

    def find(self, user: np.ndarray, count: int) -> np.ndarray:
        self.asked += 1
        return np.argsort(-(self._table @ user), kind="stable")[:count]


RETRIEVERS: dict[str, Callable[[np.ndarray], Retriever]] = {  # from (V, D) float32 item embeddings
    "exact": ExactRetriever,
    "approximate": lambda table: ApproximateRetriever(table, BestFirst(table, len(table))),  # type: ignore[arg-type]
}
