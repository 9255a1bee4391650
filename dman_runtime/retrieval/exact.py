"""Exact top-K search over the item table. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NO_ITEMS = np.zeros(0, np.int64)
GROUP = 16  # scores whose maximum stands for them in the first pass of `top_k`


def top_k(scores: np.ndarray, k: int, *, exclude: np.ndarray = NO_ITEMS) -> tuple[np.ndarray, np.ndarray]:
    """The k best of (N) scores, best first, ties by position. `scores` is overwritten where excluded.

    Returns positions (n) int64 and their scores (n), n <= k: excluded and non-finite ones never appear.
    """
    scores[exclude] = -np.inf
    rest = max(0, len(scores) - k)
    chosen = np.flatnonzero(scores >= _lower_bound(scores, k)) if rest else np.arange(len(scores))
    best = scores[chosen]
    order = np.argsort(-best, kind="stable")[:k]  # equal scores stay in order of position
    if rest == 0 or best[order[-1]] == -np.inf:
        order = order[np.isfinite(best[order])]
    return chosen[order], best[order]


def _lower_bound(scores: np.ndarray, k: int) -> np.floating[Any]:
    """A value that the k-th best of more than k scores reaches, and few others do.

    At least k scores reach the k-th best of the maxima of disjoint groups: many fewer values to sort partially.
    """
    groups = len(scores) // GROUP
    if groups <= k:
        return np.partition(scores, -k)[-k]
    return np.partition(scores[: groups * GROUP].reshape(GROUP, groups).max(axis=0), -k)[-k]


def search_scores(
    scores: np.ndarray, k: int, *, exclude: np.ndarray = NO_ITEMS, candidates: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`top_k` over (V) scores of all items, limited to `candidates` when given. Does not change `scores`."""
    if candidates is None:
        return top_k(scores.copy(), k, exclude=exclude)
    candidates = np.setdiff1d(candidates, exclude)  # sorted and distinct, so that ties break as in the full search
    chosen, best = top_k(scores[candidates], k)
    return candidates[chosen], best


class ExactRetriever:
    """Inner-product search over all items."""

    def __init__(self, item_embeddings: np.ndarray) -> None:
        """`item_embeddings`: (V, D) float32; may be memory-mapped."""
        self._table = item_embeddings

    def scores(self, users: np.ndarray) -> np.ndarray:
        """(B, D) user embeddings -> (B, V) scores."""
        return users @ self._table.T

    def search(
        self,
        user: np.ndarray,
        k: int,
        *,
        exclude: np.ndarray = NO_ITEMS,
        candidates: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items for one user embedding (D): indices and scores, best first.

        Args:
            exclude: item indices that must not appear.
            candidates: when given, the only item indices that may appear.
        """
        if candidates is None:
            return top_k(self._table @ user, k, exclude=exclude)
        candidates = np.setdiff1d(candidates, exclude)
        chosen, scores = top_k(self._table[candidates] @ user, k)
        return candidates[chosen], scores

    def search_many(
        self, users: np.ndarray, k: int, *, exclude: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """`search` for (B, D) users at once, each with its own exclusions."""
        return [top_k(row, k, exclude=seen) for row, seen in zip(self.scores(users), exclude, strict=True)]
