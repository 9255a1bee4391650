"""The readings of the LMDB store: everything in one block is of one moment. `lmdb` has the layout, and writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from zlib import crc32

import lmdb
import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.base import NO_EVENTS, Events, Expected, RankingView, StoredRecord, StoredUser
from dman_runtime.store.checks import check_positions, checked_id
from dman_runtime.store.environment import Environment, ReadTransaction
from dman_runtime.store.history import (
    CHECKSUM,
    CHUNK_EVENTS,
    RECORD_TAG,
    Bytes,
    DamagedError,
    StoredHead,
    read_head_only,
    read_ids,
    read_tail,
    record_start,
    seed_of,
    stored_events,
    unpack_chunk,
    unpack_head,
    unpack_seen,
)
from dman_runtime.store.lmdb_absence import check_no_user
from dman_runtime.store.lmdb_items import find_ids, find_numbers, item_count
from dman_runtime.store.lmdb_layout import HEAD_SUFFIX, Databases, decoded, numbered_key, user_of
from dman_runtime.store.lmdb_shown import read_shown
from dman_runtime.store.producers import find_sequences
from dman_runtime.store.request_ids import find_requests
from dman_runtime.store.shown import still_shown, unpacked_shown

NO_SEEN = np.zeros(0, np.uint32)

logger = logging.getLogger(__name__)


def read_head(txn: lmdb.Transaction, databases: Databases, user: bytes) -> StoredHead | None:
    """The head of a user; None only where nothing of the user is there. Raises DamagedError."""
    value = txn.get(user + HEAD_SUFFIX, db=databases.users)
    if value is None:
        check_no_user(txn, databases, user)
        return None
    return unpack_head(value, seed_of(user), databases.legacy)


def read_chunk(txn: lmdb.Transaction, databases: Databases, user: bytes, seed: int, chunk: int) -> NDArray[np.void]:
    """A piece of a history that its head counts. Raises DamagedError."""
    value = txn.get(numbered_key(user, chunk), db=databases.history)
    if value is None:
        raise DamagedError("a history is shorter than its head says")
    return unpack_chunk(value, seed, chunk, databases.legacy)


def read_seen(txn: lmdb.Transaction, databases: Databases, user: bytes) -> Bytes:
    """The set of a user who has chunks. Raises DamagedError."""
    value = txn.get(user, db=databases.seen)
    if value is None:
        raise DamagedError("a set of seen items is missing")
    return value


def read_records(cursor: lmdb.Cursor, user_id: str, record_bytes: int, legacy: bool) -> list[StoredRecord]:
    """The records of a user, damaged ones left out; none for a user who has gone. Raises DamagedError."""
    user, found = user_id.encode(), list[StoredRecord]()
    if not cursor.set_key(user + HEAD_SUFFIX):
        return found
    seed = seed_of(user)
    count = read_head_only(cursor.value(), seed, legacy).history_count
    while cursor.next() and bytes(cursor.key()).startswith(user + b"\0"):
        generation, value = user_of(bytes(cursor.key()))[1], cursor.value()
        with suppress(DamagedError):
            start = record_start(value, seed, generation, legacy)
            record = bytes(value[start : start + record_bytes])
            found.append(StoredRecord(user_id, generation, count, len(value) - start, record))
    return found


class LmdbSnapshot(ReadTransaction):
    """A `Snapshot`, to be used by one thread: a read transaction and what can be read in it."""

    __slots__ = ("_clock", "_databases")

    def __init__(self, env: Environment, databases: Databases, clock: Callable[[], float]) -> None:
        self._env, self._databases, self._clock = env, databases, clock

    def expect(self, users: Mapping[str, Expected]) -> None:
        """Nothing: all is at hand."""

    # -- items -----------------------------------------------------------------------------------------------------

    def find_items(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        items = [checked_id(item_id).encode() for item_id in item_ids]
        return np.array(find_numbers(self.txn, self._databases, items), np.int64)

    def item_ids(self, numbers: Sequence[int] | NDArray[np.integer]) -> list[str]:
        count, wanted = item_count(self.txn, self._databases), np.asarray(numbers).tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) < count:
            raise ValueError(f"one of the items {wanted[:10]} was never given a number")
        return find_ids(self.txn, self._databases, wanted)

    # -- users -----------------------------------------------------------------------------------------------------

    def get_many(
        self, user_ids: Sequence[str], generation: int, record_bytes: int | None = None
    ) -> list[StoredUser | None]:
        return [self._stored(checked_id(user_id).encode(), generation, record_bytes) for user_id in user_ids]

    def _stored(self, user: bytes, generation: int, record_bytes: int | None) -> StoredUser | None:
        value = self.txn.get(user + HEAD_SUFFIX, db=self._databases.users)
        if value is None:
            check_no_user(self.txn, self._databases, user)
            return None
        seed = crc32(user)
        head = read_head_only(value, seed, self._databases.legacy)
        return StoredUser(head, self._record(user, seed, generation, record_bytes))

    def ranking_view(self, user_id: str, generation: int, record_bytes: int) -> RankingView | None:
        databases, user = self._databases, checked_id(user_id).encode()
        value = self.txn.get(user + HEAD_SUFFIX, db=databases.users)
        if value is None:
            check_no_user(self.txn, databases, user)
            return None
        seed = crc32(user)
        history_count, seen = read_tail(value, seed, databases.legacy)
        if history_count >= CHUNK_EVENTS:
            chunks = unpack_seen(read_seen(self.txn, databases, user), seed, databases.legacy)
            seen = np.concatenate([chunks, seen])
        else:
            seen = seen.copy()
        if databases.shown is not None and (shown := self.txn.get(user, db=databases.shown)) is not None:
            seen = np.concatenate([seen, still_shown(unpacked_shown(user, shown), self._clock())[0]])
        value = self.txn.get(numbered_key(user, generation), db=databases.users) if generation > 0 else None
        if value is None:
            return RankingView(history_count, None, seen)
        size = len(value) - 4  # as in `record_start`, without the calls
        if size < 0 or CHECKSUM.unpack_from(value)[0] != seed ^ RECORD_TAG ^ generation ^ (size << 8 & 0xFFFFFFFF):
            return RankingView(history_count, self._record(user, seed, generation, record_bytes), seen)
        return RankingView(history_count, bytes(value[4 : 4 + record_bytes]), seen)

    def _record(self, user: bytes, seed: int, generation: int, most: int | None) -> bytes | None:
        """The first bytes of a record. One that is not the right one counts as missing: the history makes it anew."""
        if generation < 1:  # 0 is the head
            return None
        value = self.txn.get(numbered_key(user, generation), db=self._databases.users)
        if value is None:
            return None
        try:
            start = record_start(value, seed, generation, self._databases.legacy)
        except DamagedError:
            logger.warning("the record of user %r is damaged; it counts as missing", user.decode())
            return None
        return bytes(value[start:] if most is None else value[start : start + most])

    def history(self, user_id: str, start: int = 0, stop: int | None = None) -> Events:
        check_positions(start, stop)
        user = checked_id(user_id).encode()
        found, seed = read_head(self.txn, self._databases, user), seed_of(user)

        def chunks(first: int, last: int) -> list[NDArray[np.void]]:
            return [read_chunk(self.txn, self._databases, user, seed, number) for number in range(first, last)]

        return NO_EVENTS if found is None else stored_events(found, start, stop, chunks)

    def seen(self, user_id: str) -> NDArray[np.uint32]:
        user = checked_id(user_id).encode()
        found = read_head(self.txn, self._databases, user)
        if found is None:
            return NO_SEEN
        if found.head.history_count < CHUNK_EVENTS:
            return np.unique(found.tail["item"]).astype(np.uint32)
        chunks = unpack_seen(read_seen(self.txn, self._databases, user), seed_of(user), self._databases.legacy)
        return np.union1d(chunks, found.tail["item"]).astype(np.uint32)

    def shown(self, user_id: str) -> Events:
        user = checked_id(user_id).encode()
        return still_shown(read_shown(self.txn, self._databases, user), self._clock())

    def applied(self, user_id: str, request_ids: Collection[int]) -> set[int]:
        if not request_ids:
            return set()
        user, asked, known, last = checked_id(user_id).encode(), set(request_ids), set[int](), None
        value = self.txn.get(user + HEAD_SUFFIX, db=self._databases.users)
        if value is not None:
            recent, last = read_ids(value, crc32(user), self._databases.legacy)
            known = asked.intersection(recent)
            if not last:
                return known
        others = asked - known
        return known | find_requests(self.txn, self._databases, user, others, now=self._clock(), last=last)

    def sequences(self, user_id: str, producers: Collection[int]) -> dict[int, int]:
        user = checked_id(user_id).encode()
        found = find_sequences(self.txn, self._databases.producers, user, self._env.store_id) if producers else {}
        return {producer: found[producer] for producer in producers if producer in found}


def users_from(cursor: lmdb.Cursor, start: bytes) -> Iterator[tuple[bytes, str]]:
    """The users from a key on, in bytes and as text. DamagedError where one has no head, or keys are out of order."""
    last_user, last_key = b"", b""
    for view in cursor.iternext(values=False) if cursor.set_range(start) else ():
        key = bytes(view)
        user, number = user_of(key)
        if key <= last_key:
            raise DamagedError("keys are out of order")
        if number == 0:
            yield user, decoded(user)
        elif user != last_user:
            raise DamagedError("a user's head is missing")
        last_user, last_key = user, key
