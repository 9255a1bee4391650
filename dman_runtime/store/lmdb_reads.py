"""The readings of the LMDB store: everything in one block is of one moment. `lmdb` has the layout, and writes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import lmdb
import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.base import Events, RankingView, StoredUser, checked_id
from dman_runtime.store.environment import Environment, ReadTransaction
from dman_runtime.store.history import (
    CHUNK_EVENTS,
    Bytes,
    DamagedError,
    StoredHead,
    read_tail,
    unpack_chunk,
    unpack_head,
    unpack_seen,
)

U32 = struct.Struct(">I")
_NUMBER = struct.Struct("<I")
NO_SEEN = np.zeros(0, np.uint32)


class Databases(NamedTuple):
    """The databases of a store, under the names that they have in the file."""

    meta: lmdb._Database
    items: lmdb._Database
    item_numbers: lmdb._Database
    users: lmdb._Database
    seen: lmdb._Database
    history: lmdb._Database

    @classmethod
    def of(cls, databases: Mapping[str, lmdb._Database]) -> Self:
        return cls(**databases)


def record_key(key: bytes, number: int) -> bytes:
    """Key of a record (generation) or a chunk; ids hold no `\\0`, so that no user's keys lie among another's."""
    return key + b"\0" + U32.pack(number)


class LmdbSnapshot(ReadTransaction):
    """A `Snapshot`, to be used by one thread: a read transaction and what can be read in it."""

    __slots__ = ("_databases",)

    def __init__(self, env: Environment, databases: Databases) -> None:
        super().__init__(env)
        self._databases = databases

    # -- items -----------------------------------------------------------------------------------------------------

    def find_items(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        keys = [checked_id(item_id).encode() for item_id in item_ids]
        values = [self.txn.get(key, db=self._databases.item_numbers) for key in keys]
        return np.array([-1 if value is None else _NUMBER.unpack(value)[0] for value in values], np.int64)

    def item_ids(self, numbers: Sequence[int] | NDArray[np.integer]) -> list[str]:
        count = self.txn.stat(self._databases.items)["entries"]
        found = []
        for number in map(int, numbers):
            value = self.txn.get(U32.pack(number), db=self._databases.items) if 0 <= number < count else None
            if value is None:
                raise ValueError(f"item {number} was never given a number")
            found.append(bytes(value).decode())
        return found

    # -- users -----------------------------------------------------------------------------------------------------

    def get_many(self, user_ids: Sequence[str], generation: int) -> list[StoredUser | None]:
        return [self._stored(checked_id(user_id).encode(), generation) for user_id in user_ids]

    def _stored(self, key: bytes, generation: int) -> StoredUser | None:
        found = self._head(key)
        if found is None:
            return None
        record = self._record(key, generation)
        return StoredUser(found.head, None if record is None else bytes(record))

    def ranking_view(self, user_id: str, generation: int, record_bytes: int) -> RankingView | None:
        key = checked_id(user_id).encode()
        head = self.txn.get(record_key(key, 0), db=self._databases.users)
        if head is None:
            return None
        history_count, seen = read_tail(head)
        record = self._record(key, generation)
        seen = np.concatenate([self._seen_of_chunks(key), seen]) if history_count >= CHUNK_EVENTS else seen.copy()
        return RankingView(history_count, None if record is None else bytes(record[:record_bytes]), seen)

    def history(self, user_id: str, start: int = 0, stop: int | None = None) -> Events:
        if start < 0 or (stop is not None and stop < 0):
            raise ValueError(f"positions must be 0 or more, not {start} to {stop}")
        key = checked_id(user_id).encode()
        found = self._head(key)
        count = found.head.history_count if found else 0
        stop = count if stop is None else min(stop, count)
        if found is None or start >= stop:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        full = count // CHUNK_EVENTS  # chunks
        first, last = start // CHUNK_EVENTS, min(-(-stop // CHUNK_EVENTS), full)
        parts = [self._chunk(key, chunk) for chunk in range(first, last)]
        if stop > full * CHUNK_EVENTS:
            parts.append(found.tail)
        offset = min(first, full) * CHUNK_EVENTS
        events = np.concatenate(parts)[start - offset : stop - offset]
        return events["item"].astype(np.uint32), events["timestamp"].astype(np.int64)

    def seen(self, user_id: str) -> NDArray[np.uint32]:
        key = checked_id(user_id).encode()
        found = self._head(key)
        if found is None:
            return NO_SEEN
        return np.union1d(self._seen_of_chunks(key), found.tail["item"]).astype(np.uint32)

    # -- values ----------------------------------------------------------------------------------------------------

    def _head(self, key: bytes) -> StoredHead | None:
        value = self.txn.get(record_key(key, 0), db=self._databases.users)
        return None if value is None else unpack_head(value)

    def _record(self, key: bytes, generation: int) -> Bytes | None:
        return self.txn.get(record_key(key, generation), db=self._databases.users) if generation > 0 else None

    def _chunk(self, key: bytes, chunk: int) -> NDArray[np.void]:
        value = self.txn.get(record_key(key, chunk), db=self._databases.history)
        if value is None:
            raise DamagedError("a history is shorter than its head says")
        return unpack_chunk(value)

    def _seen_of_chunks(self, key: bytes) -> NDArray[np.uint32]:
        value = self.txn.get(key, db=self._databases.seen)
        return NO_SEEN if value is None else unpack_seen(value)
