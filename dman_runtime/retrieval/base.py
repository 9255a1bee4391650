"""What the engine needs of a top-K search over the items of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np

NO_ITEMS = np.zeros(0, np.int64)
FEW = 8  # where at most one item in so many is allowed, they are listed too: scoring only those is cheaper


class Hits(NamedTuple):
    """The best items for one user, best first; fewer than k where fewer are left."""

    items: np.ndarray  # (n) int64 item indices
    scores: np.ndarray  # (n) float


class Added(NamedTuple):
    """What is added to the scores of some items for one user."""

    items: np.ndarray  # (n) int64 item indices, distinct
    scores: np.ndarray  # (n) float


@dataclass(frozen=True, slots=True, eq=False)
class Allowed:
    """The only items that may appear. Make one with `Allowed.of`; queries that share one are searched together."""

    mask: np.ndarray  # (V) bool
    items: np.ndarray | None  # (n) int64 item indices, ascending: the same, if they are few
    count: int  # n

    @classmethod
    def of(cls, mask: np.ndarray) -> Self:
        count = int(np.count_nonzero(mask))
        return cls(mask, np.flatnonzero(mask) if count * FEW <= len(mask) else None, count)

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self.mask.nbytes + (0 if self.items is None else self.items.nbytes))


class Finder(Protocol):
    """Finds items that score high, of the first `items` of a table. Thread-safe where it is quick."""

    @property
    def items(self) -> int: ...

    @property
    def quick(self) -> bool:
        """Whether any thread may ask, and others may wait for the answer."""
        ...

    def fetched(self, k: int) -> int:
        """How many items to ask for so that the k best are among them."""
        ...

    def find(self, users: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """For each of (B, D) float32 user embeddings, about so many different item indices (n) int64 or more.

        Fewer where it finds no more.
        """
        ...


class Retriever(Protocol):
    """Always a batch: one user is B = 1. Thread-safe."""

    def quick(self, allowed: Allowed | None) -> bool:
        """Whether a search for one user is so short, a few milliseconds at most, that others may wait for it."""
        ...

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
        """The k best items for each of (B, D) user embeddings, by inner product and `added`; ties by item index.

        Args:
            users: (B, D) float32.
            k: At least 1.
            exclude: B x (e) item indices that must not appear; may hold repeats.
            candidates: B x None or (c) item indices: the only ones that may appear. None: no user has any.
            allowed: B x None or the only items that may appear; where there are candidates, those in both.

        An item whose score is not finite never appears.
        """
        ...
