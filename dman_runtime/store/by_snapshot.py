"""The reading methods of a store by way of its snapshots."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.base import Events, Expected, RankingView, Snapshot, StoredUser


class ReadsBySnapshot:
    """The reading methods of a store, each in a snapshot of its own."""

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        raise NotImplementedError

    def expect(self, users: Mapping[str, Expected]) -> None:
        """Nothing: each reading has a snapshot of its own."""

    def find_items(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        with self.snapshot() as snapshot:
            return snapshot.find_items(item_ids)

    def item_ids(self, numbers: Sequence[int] | NDArray[np.integer]) -> list[str]:
        with self.snapshot() as snapshot:
            return snapshot.item_ids(numbers)

    def get_many(
        self, user_ids: Sequence[str], generation: int, record_bytes: int | None = None
    ) -> list[StoredUser | None]:
        with self.snapshot() as snapshot:
            return snapshot.get_many(user_ids, generation, record_bytes)

    def ranking_view(self, user_id: str, generation: int, record_bytes: int) -> RankingView | None:
        with self.snapshot() as snapshot:
            return snapshot.ranking_view(user_id, generation, record_bytes)

    def history(self, user_id: str, start: int = 0, stop: int | None = None) -> Events:
        with self.snapshot() as snapshot:
            return snapshot.history(user_id, start, stop)

    def seen(self, user_id: str) -> NDArray[np.uint32]:
        with self.snapshot() as snapshot:
            return snapshot.seen(user_id)

    def shown(self, user_id: str) -> Events:
        with self.snapshot() as snapshot:
            return snapshot.shown(user_id)

    def applied(self, user_id: str, request_ids: Collection[int]) -> set[int]:
        with self.snapshot() as snapshot:
            return snapshot.applied(user_id, request_ids)

    def sequences(self, user_id: str, producers: Collection[int]) -> dict[int, int]:
        with self.snapshot() as snapshot:
            return snapshot.sequences(user_id, producers)
