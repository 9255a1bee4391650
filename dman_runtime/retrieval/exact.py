"""Exact top-K search over the item table. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dman_runtime.retrieval.base import NO_ITEMS, Added, Allowed, Hits

GROUP = 16  # scores whose maximum stands for them in the first pass of `top_k`
SCORES_PER_BLOCK = 4 << 20  # scores held at a time: 16 MB
TURNED_ITEMS = (
    100_000  # tables up to here are kept by dimension too, which makes the product for one user a third faster
)
QUICK_ITEMS, QUICK_ROWS = 100_000, 12_500  # that one search multiplies at most to be quick: all, or rows picked out


def multiply_on_one_thread() -> None:
    """From now on in this process. A search is so short that a second thread hardly helps; where cores are busy,
    waiting for it takes 8 ms."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=1, user_api="blas")


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
    scores: np.ndarray, k: int, *, exclude: np.ndarray, candidates: np.ndarray, allowed: Allowed | None = None
) -> Hits:
    """`top_k` over (V) scores, limited to `candidates`, and `allowed` when given. Does not change them."""
    candidates = np.setdiff1d(_among(candidates, allowed), exclude)  # sorted and distinct: ties as in the full search
    chosen, best = top_k(scores[candidates], k)
    return Hits(candidates[chosen], best)


def first_of(
    order: np.ndarray, scores: np.ndarray, k: int, *, exclude: np.ndarray = NO_ITEMS, allowed: Allowed | None = None
) -> Hits:
    """`top_k` over (V) scores whose `order` (V), best first and ties by index, is known: reads its beginning only."""
    length = k + len(exclude)
    while True:
        items = order[:length]
        if allowed is not None:
            items = items[allowed.mask[items]]
        items = items[~np.isin(items, exclude)][:k]
        if len(items) == k or length >= len(order):
            return Hits(items, scores[items])
        length *= 4


class ExactRetriever:
    """Inner products with all items: a `Retriever`, and the reference for others."""

    def __init__(self, item_embeddings: np.ndarray) -> None:
        """`item_embeddings`: (V, D) float32; may be memory-mapped."""
        self._table = item_embeddings
        small = len(item_embeddings) <= TURNED_ITEMS
        self._by_dimension = np.ascontiguousarray(item_embeddings.T) if small else item_embeddings.T  # (D, V)

    def quick(self, allowed: Allowed | None) -> bool:
        """As in `Retriever`."""
        if allowed is not None and allowed.items is not None:
            return len(allowed.items) <= QUICK_ROWS
        return len(self._table) <= QUICK_ITEMS

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
        allowed: Sequence[Allowed | None] | None = None,
        added: Sequence[Added | None] | None = None,
    ) -> list[Hits]:
        """As in `Retriever`. One matrix product for a block of users without candidates who may get the same items."""
        none = [None] * len(users)
        allowed, added = allowed or none, added or none
        if len(users) == 1 and not candidates:
            return [self._search_together(users, k, exclude, allowed[0], added)[0]]
        hits: dict[int, Hits] = {}
        groups: dict[Allowed | None, list[int]] = {}  # rows that are searched together
        for row, limit in enumerate(candidates or none):
            one = allowed[row]
            if limit is not None:
                items = np.setdiff1d(_among(limit, one), exclude[row])
                hits[row] = self.best_of(users[row], k, items, added[row])
            else:
                groups.setdefault(one, []).append(row)
        for one, rows in groups.items():
            searched = len(self._table) if one is None or one.items is None else len(one.items)
            step = max(1, SCORES_PER_BLOCK // max(1, searched))
            for start in range(0, len(rows), step):
                block = rows[start : start + step]
                found = self._search_together(
                    users if len(block) == len(users) else users[block],
                    k,
                    [exclude[row] for row in block],
                    one,
                    [added[row] for row in block],
                )
                hits.update(zip(block, found, strict=True))
        return [hits[row] for row in range(len(users))]

    def _search_together(
        self,
        users: np.ndarray,
        k: int,
        exclude: Sequence[np.ndarray],
        allowed: Allowed | None,
        added: Sequence[Added | None],
    ) -> list[Hits]:
        """(B, D) users who may get the same items, but for those that each of them excludes."""
        if allowed is not None and allowed.items is not None:
            return self._search_few(users, k, exclude, allowed, allowed.items, added)
        found = []
        for scores, left_out, more in zip(self.scores(users), exclude, added, strict=True):
            if more is not None:
                scores[more.items] += more.scores
            if allowed is not None:
                np.copyto(scores, -np.inf, where=~allowed.mask)
            found.append(top_k(scores, k, exclude=left_out))
        return found

    def _search_few(
        self,
        users: np.ndarray,
        k: int,
        exclude: Sequence[np.ndarray],
        allowed: Allowed,
        items: np.ndarray,
        added: Sequence[Added | None],
    ) -> list[Hits]:
        """Scores only the (n) items that are allowed."""
        found = []
        for scores, left_out, more in zip(users @ self._table[items].T, exclude, added, strict=True):
            if more is not None:
                inside = allowed.mask[more.items]
                scores[np.searchsorted(items, more.items[inside])] += more.scores[inside]
            positions = np.searchsorted(items, left_out[allowed.mask[left_out]])
            chosen, best = top_k(scores, k, exclude=positions)
            found.append(Hits(items[chosen], best))
        return found

    def best_of(self, user: np.ndarray, k: int, items: np.ndarray, added: Added | None) -> Hits:
        """The k best of (n) items, ascending and distinct, for a (D) user embedding."""
        scores = self._table[items] @ user
        if added is not None:
            _, mine, theirs = np.intersect1d(items, added.items, assume_unique=True, return_indices=True)
            scores[mine] += added.scores[theirs]
        chosen, best = top_k(scores, k)
        return Hits(items[chosen], best)


def _among(candidates: np.ndarray, allowed: Allowed | None) -> np.ndarray:
    return candidates if allowed is None else candidates[allowed.mask[candidates]]
