"""Top-K search for large catalogues: candidates from an index, scored exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dman_runtime.retrieval.base import NO_ITEMS, Added, Allowed, Hits
from dman_runtime.retrieval.exact import ExactRetriever, top_k
from dman_runtime.retrieval.index import ItemIndex

FETCHED = 2  # candidates by the number of items wanted: the index ranks them by vectors in 8 bits
MAX_SHARE = 8  # at most one item in so many is fetched; who needs more gets exact search


class ApproximateRetriever:
    """A `Retriever` whose hits have the scores of exact search, but of the k best items some may be missing.

    How many, the exporter measured (`search` in the manifest). Search is exact where the index does not help: among
    candidates, where few items are allowed, and where the index finds fewer than k items. Items that the index does not
    know, as they were added at run time, and those in `added` are always looked at.
    """

    def __init__(self, item_embeddings: np.ndarray, index: ItemIndex) -> None:
        """`item_embeddings`: (V, D) float32; the index knows the first of them, or all."""
        self._table, self._index, self._exact = item_embeddings, index, ExactRetriever(item_embeddings)
        self._later = np.arange(index.items, len(item_embeddings))

    def quick(self, allowed: Allowed | None) -> bool:
        """As in `Retriever`."""
        return allowed is None or allowed.items is None or self._exact.quick(allowed)

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
        hits = dict[int, Hits]()
        for row, limit in enumerate(candidates):
            if limit is None and (found := self.find(users[row], k, exclude[row], allowed[row], added[row])):
                hits[row] = found
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

    def find(
        self,
        user: np.ndarray,
        k: int,
        exclude: np.ndarray = NO_ITEMS,
        allowed: Allowed | None = None,
        added: Added | None = None,
    ) -> Hits | None:
        """k hits for a (D) user embedding from the index; None where exact search has to say."""
        wanted = FETCHED * k + len(exclude)
        if allowed is not None:
            if allowed.items is not None:
                return None
            wanted = wanted * len(allowed.mask) // allowed.count
        if wanted * MAX_SHARE > len(self._table):
            return None
        found = np.concatenate([self._index.find(user, wanted), self._later])
        if added is not None:
            found = np.concatenate([found, added.items])
        items = np.unique(found)  # ascending, so that ties break as in exact search
        if allowed is not None:
            items = items[allowed.mask[items]]
        items = _without(items, exclude)
        scores = self._table[items] @ user
        if added is not None:
            _, mine, theirs = np.intersect1d(items, added.items, assume_unique=True, return_indices=True)
            scores[mine] += added.scores[theirs]
        chosen, best = top_k(scores, k)
        return Hits(items[chosen], best) if len(chosen) == k else None


def _without(items: np.ndarray, exclude: np.ndarray) -> np.ndarray:
    """Ascending item indices without some."""
    if not len(items) or not len(exclude):
        return items
    places = np.searchsorted(items, exclude)
    places[places == len(items)] = 0
    keep = np.ones(len(items), bool)
    keep[places[items[places] == exclude]] = False
    return items[keep]
