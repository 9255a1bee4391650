"""What the engine needs of a top-K search over the items of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

NO_ITEMS = np.zeros(0, np.int64)


class Hits(NamedTuple):
    """The best items for one user, best first; fewer than k where fewer are left."""

    items: np.ndarray  # (n) int64 item indices
    scores: np.ndarray  # (n) float


class Added(NamedTuple):
    """What is added to the scores of some items for one user."""

    items: np.ndarray  # (n) int64 item indices, distinct
    scores: np.ndarray  # (n) float


class Retriever(Protocol):
    """Always a batch: one user is B = 1. Thread-safe."""

    def search(
        self,
        users: np.ndarray,
        k: int,
        *,
        exclude: Sequence[np.ndarray],
        candidates: Sequence[np.ndarray | None] | None = None,
        added: Sequence[Added | None] | None = None,
    ) -> list[Hits]:
        """The k best items for each of (B, D) user embeddings, by inner product and `added`; ties by item index.

        Args:
            users: (B, D) float32.
            k: At least 1.
            exclude: B x (e) item indices that must not appear; may hold repeats.
            candidates: B x None or (c) item indices: the only ones that may appear. None: no user has any.

        An item whose score is not finite never appears.
        """
        ...
