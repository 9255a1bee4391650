"""Top-K search for large catalogues: candidates from a finder, scored exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dman_runtime.retrieval.base import NO_ITEMS, Added, Allowed, Finder, Hits
from dman_runtime.retrieval.exact import ExactRetriever

MAX_SHARE = 8  # at most one item in so many is fetched; who needs more gets exact search


class CandidateRetriever:
    """A `Retriever` whose hits have the scores of exact search. Of the k best it misses what its finder misses.

    How many an index misses, the exporter measured (`search` in the manifest). Search is exact where a finder does not
    help: among candidates, where few items are allowed, and where fewer than k items are found. Items that the finder
    does not know, as they were added at run time, and those in `added` are always looked at.
    """

    def __init__(self, item_embeddings: np.ndarray, finder: Finder) -> None:
        """`item_embeddings`: (V, D) float32; the finder knows the first of them, or all."""
        self._items, self._finder, self._exact = len(item_embeddings), finder, ExactRetriever(item_embeddings)
        self._later = np.arange(finder.items, self._items)

    def quick(self, allowed: Allowed | None) -> bool:
        """As in `Retriever`."""
        if allowed is not None and allowed.items is not None:
            return self._exact.quick(allowed)
        return self._finder.quick

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
        """As in `Retriever`."""
        none = [None] * len(users)
        candidates, allowed, added = candidates or none, allowed or none, added or none
        counts = {
            row: count
            for row, limit in enumerate(candidates)
            if limit is None and (count := self._count(k, exclude[row], allowed[row]))
        }
        hits = dict[int, Hits]()
        if counts:
            found = self._finder.find(users[list(counts)], list(counts.values()))
            for row, items in zip(counts, found, strict=True):
                if one := self._best(users[row], k, items, exclude[row], allowed[row], added[row]):
                    hits[row] = one
        rest = [row for row in range(len(users)) if row not in hits]
        if rest:
            exact = self._exact.search(
                users[rest],
                k,
                exclude=[exclude[row] for row in rest],
                candidates=[candidates[row] for row in rest],
                allowed=[allowed[row] for row in rest],
                added=[added[row] for row in rest],
            )
            hits.update(zip(rest, exact, strict=True))
        return [hits[row] for row in range(len(users))]

    def found(self, user: np.ndarray, k: int) -> Hits | None:
        """k hits for a (D) user embedding who may get all items; None where only exact search finds as many."""
        count = self._count(k, NO_ITEMS, None)
        if not count:
            return None
        return self._best(user, k, self._finder.find(user[None], [count])[0], NO_ITEMS, None, None)

    def _count(self, k: int, exclude: np.ndarray, allowed: Allowed | None) -> int:
        """How many candidates a search needs; 0 where exact search is better."""
        wanted = self._finder.fetched(k) + len(exclude)
        if allowed is not None:
            if allowed.items is not None:
                return 0
            wanted = wanted * len(allowed.mask) // allowed.count
        return wanted if wanted * MAX_SHARE <= self._items else 0

    def _best(
        self,
        user: np.ndarray,
        k: int,
        found: np.ndarray,
        exclude: np.ndarray,
        allowed: Allowed | None,
        added: Added | None,
    ) -> Hits | None:
        """The k best for a (D) user embedding; None where, of what was found, too little is left to be sure of them."""
        found = _left(np.sort(found), exclude, allowed)
        if len(found) < k:  # better ones may be among those that were not found
            return None
        more = self._later if added is None else np.concatenate([self._later, added.items])
        # Ascending, so that ties break as in exact search.
        items = np.union1d(found, _left(np.unique(more), exclude, allowed))
        best = self._exact.best_of(user, k, items, added)
        return best if len(best.items) == k else None


def _left(items: np.ndarray, exclude: np.ndarray, allowed: Allowed | None) -> np.ndarray:
    """Ascending item indices, without those that must not appear."""
    if allowed is not None:
        items = items[allowed.mask[items]]
    if not len(items) or not len(exclude):
        return items
    places = np.searchsorted(items, exclude)
    places[places == len(items)] = 0
    keep = np.ones(len(items), bool)
    keep[places[items[places] == exclude]] = False
    return items[keep]
