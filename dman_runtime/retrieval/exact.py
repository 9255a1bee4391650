"""Exact top-K search over the item table. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dman_runtime.retrieval.base import NO_ITEMS, Added, Hits

GROUP = 16  # scores whose maximum stands for them in the first pass of `top_k`
SCORES_PER_BLOCK = 4 << 20  # scores held at a time: 16 MB
TURNED_ITEMS = (
    100_000  # tables up to here are kept by dimension too, which makes the product for one user a third faster
)


def top_k(scores: np.ndarray, k: int, *, exclude: np.ndarray = NO_ITEMS) -> Hits:
    """The k best of (N) scores, best first, ties by position. `scores` is overwritten where excluded or not finite.

    Excluded and non-finite ones never appear.
    """
    scores[exclude] = -np.inf
    rest = max(0, len(scores) - k)
    chosen = np.flatnonzero(scores >= _lower_bound(scores, k)) if rest else np.arange(len(scores))
    best = scores[chosen]
    order = np.argsort(-best, kind="stable")[:k]  # equal scores stay in order of position
    if rest and (len(best) < k or best[order[0]] == np.inf):  # NaN or infinity takes the place of others
        scores[~np.isfinite(scores)] = -np.inf
        return top_k(scores, k)
    if rest == 0 or best[order[-1]] == -np.inf:
        order = order[np.isfinite(best[order])]
    return Hits(chosen[order], best[order])


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
) -> Hits:
    """`top_k` over (V) scores of all items, limited to `candidates` when given. Does not change `scores`."""
    if candidates is None:
        return top_k(scores.copy(), k, exclude=exclude)
    candidates = np.setdiff1d(candidates, exclude)  # sorted and distinct, so that ties break as in the full search
    chosen, best = top_k(scores[candidates], k)
    return Hits(candidates[chosen], best)


class ExactRetriever:
    """Inner products with all items: a `Retriever`, and the reference for others."""

    def __init__(self, item_embeddings: np.ndarray) -> None:
        """`item_embeddings`: (V, D) float32; may be memory-mapped."""
        self._table = item_embeddings
        small = len(item_embeddings) <= TURNED_ITEMS
        self._by_dimension = np.ascontiguousarray(item_embeddings.T) if small else item_embeddings.T  # (D, V)

    def scores(self, users: np.ndarray) -> np.ndarray:
        """(B, D) user embeddings -> (B, V) scores."""
        if len(users) == 1:
            return (users[0] @ self._by_dimension)[None]
        return users @ self._table.T

    def search(
        self,
        users: np.ndarray,
        k: int,
        *,
        exclude: Sequence[np.ndarray],
        candidates: Sequence[np.ndarray | None] | None = None,
        added: Sequence[Added | None] | None = None,
    ) -> list[Hits]:
        """As in `Retriever`. One matrix product for a block of users without candidates."""
        if len(users) == 1 and not candidates:
            scores = users[0] @ self._by_dimension
            _add(scores, added[0] if added else None)
            return [top_k(scores, k, exclude=exclude[0])]
        hits: dict[int, Hits] = {}
        for row, limit in enumerate(candidates or ()):
            if limit is not None:
                hits[row] = self._search_candidates(users[row], k, exclude[row], limit, added[row] if added else None)
        rows = [row for row in range(len(users)) if row not in hits]
        step = max(1, SCORES_PER_BLOCK // max(1, len(self._table)))
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            chosen = users if len(block) == len(users) else users[block]
            for row, scores in zip(block, self.scores(chosen), strict=True):
                _add(scores, added[row] if added else None)
                hits[row] = top_k(scores, k, exclude=exclude[row])
        return [hits[row] for row in range(len(users))]

    def _search_candidates(
        self, user: np.ndarray, k: int, exclude: np.ndarray, candidates: np.ndarray, added: Added | None
    ) -> Hits:
        candidates = np.setdiff1d(candidates, exclude)
        scores = self._table[candidates] @ user
        if added is not None:
            _, mine, theirs = np.intersect1d(candidates, added.items, assume_unique=True, return_indices=True)
            scores[mine] += added.scores[theirs]
        chosen, best = top_k(scores, k)
        return Hits(candidates[chosen], best)


def _add(scores: np.ndarray, added: Added | None) -> None:
    if added is not None:
        scores[added.items] += added.scores
