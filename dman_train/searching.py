"""The index that a bundle of a large catalogue is searched through, measured on validation users before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dman_runtime.retrieval.base import NO_ITEMS
from dman_runtime.retrieval.candidates import CandidateRetriever
from dman_runtime.retrieval.exact import ExactRetriever
from dman_runtime.retrieval.index import ItemIndex

MIN_ITEMS = 50_000  # smaller catalogues are searched exactly in about a millisecond
MIN_USERS = 100  # whose answers say enough about the recall
K = 100  # items of an answer whose recall is measured
FLOOR = 0.99  # recall that an index must have
MAX_READ = 4  # at most one list in so many is read: beyond that, exact search is hardly slower


class Indexed(NamedTuple):
    """An index, and what it is worth: the field `search` of a manifest."""

    item_index: ItemIndex
    quality: dict[str, Any]


def build_index(table: np.ndarray, users: np.ndarray, *, floor: float = FLOOR) -> Indexed:
    """The index of a (V, D) item table that reads as few lists as give the recall.

    The number is chosen on one half of (N, D) user embeddings; the recall on the other half decides.

    Raises:
        ValueError: There are too few users to tell, or no index of that recall is quicker than exact search.
        ImportError: FAISS is not installed.
    """
    if len(users) < MIN_USERS:
        raise ValueError(f"{len(users)} validation users are too few to measure its recall; {MIN_USERS} are needed")
    index, exact = ItemIndex.build(table), ExactRetriever(table)
    best = [hits.items for hits in exact.search(users, K, exclude=[NO_ITEMS] * len(users))]
    searched, recall = CandidateRetriever(table, index), 0.0
    for lists_read in _numbers_of_lists(index.lists // MAX_READ):
        index.probes = lists_read
        recall = _recall(searched, users[::2], best[::2])
        if recall >= floor and (recall := _recall(searched, users[1::2], best[1::2])) >= floor:
            about = {"lists": index.lists, "lists_read": index.probes, "users": len(users) // 2}
            return Indexed(index, about | {"k": K, "recall": recall, "floor": floor})
    raise ValueError(f"its recall@{K} is {recall:.3f} where it reads one list in {MAX_READ}, less than {floor}")


def _numbers_of_lists(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`."""
    return sorted({count for power in range(20) for count in (1 << power, 3 << power) if count <= most})


def _recall(searched: CandidateRetriever, users: np.ndarray, best: Sequence[np.ndarray]) -> float:
    """The share of what (N) users should get that the index finds; of an answer that it cannot give, nothing."""
    shares = []
    for user, items in zip(users, best, strict=True):
        found = searched.found(user, min(K, len(items)))
        shares.append(0.0 if found is None else len(np.intersect1d(items, found.items)) / len(items))
    return float(np.mean(shares))
