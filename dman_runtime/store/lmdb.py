"""The embedded store: durable, on LMDB. Values are laid out in `history`.

| database | key | value |
|---|---|---|
| meta | `info`; `generations` | JSON: the format; the bundle ids in order, the first is generation 1 |
| items | item number, u32 big-endian | external id, UTF-8 |
| item_numbers | external id, UTF-8 | item number, u32 little-endian |
| users | user id, `\\0`, generation u32 big-endian | the record; with generation 0, the head |
| seen | user id | set of item numbers |
| history | user id, `\\0`, chunk number u32 big-endian | chunk of events |

Head and record are neighbours in one B-tree, because each further B-tree that a commit touches costs about 14 % more.
The version of a user is the number of the transaction that wrote it. Any number of threads and processes may read and
write.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import lmdb
import numpy as np
from numpy.typing import NDArray

from dman_runtime.errors import StoreMismatchError
from dman_runtime.store.base import (
    Events,
    Head,
    RankingView,
    StoredUser,
    StoreStats,
    Write,
    checked_id,
    checked_writes,
)
from dman_runtime.store.environment import Environment
from dman_runtime.store.history import (
    CHUNK_EVENTS,
    DamagedError,
    StoredHead,
    add_seen,
    count_of,
    events_of,
    pack_chunk,
    pack_head,
    read_tail,
    split_events,
    unpack_chunk,
    unpack_head,
    unpack_seen,
    version_of,
)

FORMAT_VERSION = 3
DEFAULT_MAP_SIZE = 64 << 30  # bytes of address space; the disk holds only what is used
_DATABASES = ("meta", "items", "item_numbers", "users", "seen", "history")
_SCAN_USERS = 1000  # user ids per read transaction of `scan`
_DROPPED_PER_COMMIT = 1000  # records per transaction of `drop_records`
_U32, _NUMBER = struct.Struct(">I"), struct.Struct("<I")
_NO_SEEN = np.zeros(0, np.uint32)


class LmdbStore:
    """A `StateStore` in a directory. Make one with `LmdbStore.open`; close it after the last call has returned."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment
        databases = environment.databases
        self._meta, self._items, self._item_numbers = (databases[name] for name in _DATABASES[:3])
        self._users, self._seen, self._history = (databases[name] for name in _DATABASES[3:])

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        map_size: int = DEFAULT_MAP_SIZE,
        readonly: bool = False,
        must_exist: bool = False,
    ) -> LmdbStore:
        """Opens the store in the directory `path`, and creates it where there is none (not if `readonly`).

        `map_size` in bytes bounds the file, unless the file is larger already; use the same in every process. A
        readonly store writes nothing and may be opened while a server has it open. Raises StoreMismatchError,
        StoreFullError or StoreUnavailableError.
        """
        path = Path(path)

        def check(txn: lmdb.Transaction, meta: lmdb._Database) -> None:
            if (found := _format_of(bytes(txn.get(b"info", b"", db=meta)))) != FORMAT_VERSION:
                raise StoreMismatchError(
                    f"the state store {path} has format {found}, this release reads {FORMAT_VERSION}",
                    "import the log again into another directory",
                    parameter="state",
                )

        return cls(
            Environment.open(path, names=_DATABASES, create=_create, check=check, map_size=map_size, readonly=readonly)
        )

    @property
    def path(self) -> Path:
        return self._env.path

    # -- items and generations -------------------------------------------------------------------------------------

    def add_items(self, item_ids: Sequence[str]) -> NDArray[np.uint32]:
        found = self.find_items(item_ids)
        if (found < 0).any():
            with self._env.write() as txn:
                count = next_number = txn.stat(self._items)["entries"]
                for position in np.flatnonzero(found < 0).tolist():
                    key = item_ids[position].encode()
                    stored = txn.get(key, db=self._item_numbers)  # another process may have been first
                    if stored is None:
                        txn.put(_U32.pack(next_number), key, db=self._items, append=True)
                        txn.put(key, _NUMBER.pack(next_number), db=self._item_numbers)
                        found[position], next_number = next_number, next_number + 1
                    else:
                        (found[position],) = _NUMBER.unpack(stored)
                if next_number > count:
                    self._env.keep_reserve(txn, 0)
        return found.astype(np.uint32)

    def find_items(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        keys = [checked_id(item_id).encode() for item_id in item_ids]
        with self._env.read() as txn:
            values = [txn.get(key, db=self._item_numbers) for key in keys]
            return np.array([-1 if value is None else _NUMBER.unpack(value)[0] for value in values], np.int64)

    def item_ids(self, numbers: Sequence[int] | NDArray[np.integer]) -> list[str]:
        with self._env.read() as txn:
            count = txn.stat(self._items)["entries"]
            found = []
            for number in map(int, numbers):
                value = txn.get(_U32.pack(number), db=self._items) if 0 <= number < count else None
                if value is None:
                    raise ValueError(f"item {number} was never given a number")
                found.append(bytes(value).decode())
        return found

    def add_generation(self, bundle_id: str) -> int:
        known = self.generations()
        if bundle_id in known:
            return known[bundle_id]
        with self._env.write() as txn:
            bundle_ids = _bundle_ids(txn, self._meta)  # another process may have been first
            if bundle_id not in bundle_ids:
                bundle_ids.append(bundle_id)
                txn.put(b"generations", json.dumps(bundle_ids).encode(), db=self._meta)
        return bundle_ids.index(bundle_id) + 1

    def generations(self) -> dict[str, int]:
        with self._env.read() as txn:
            return {bundle_id: number for number, bundle_id in enumerate(_bundle_ids(txn, self._meta), start=1)}

    def drop_records(self, generation: int) -> int:
        if generation < 1:
            raise ValueError(f"generations are numbered from 1, not {generation}")
        dropped, suffix, users = 0, _record_key(b"", generation), self.scan()
        # Each user may need a page of the reserve of a full map, and those of the last commit are not free yet.
        while user_ids := list(islice(users, max(1, min(_DROPPED_PER_COMMIT, self._env.map_size >> 18)))):
            with self._env.write() as txn:
                dropped += sum(txn.delete(user_id.encode() + suffix, db=self._users) for user_id in user_ids)
        return dropped

    # -- reading users ---------------------------------------------------------------------------------------------

    def get_many(self, user_ids: Sequence[str], generation: int) -> list[StoredUser | None]:
        keys = [checked_id(user_id).encode() for user_id in user_ids]
        with self._env.read() as txn:
            return [self._stored(txn, key, generation) for key in keys]

    def _stored(self, txn: lmdb.Transaction, key: bytes, generation: int) -> StoredUser | None:
        found = self._head(txn, key)
        if found is None:
            return None
        record = txn.get(_record_key(key, generation), db=self._users) if generation > 0 else None  # 0: the head
        return StoredUser(found.head, None if record is None else bytes(record))

    def ranking_view(self, user_id: str, generation: int, record_bytes: int) -> RankingView | None:
        key = checked_id(user_id).encode()
        with self._env.read() as txn:
            head = txn.get(_record_key(key, 0), db=self._users)
            if head is None:
                return None
            history_count, seen = read_tail(head)
            record = txn.get(_record_key(key, generation), db=self._users) if generation > 0 else None
            if history_count >= CHUNK_EVENTS:
                seen = np.concatenate([self._seen_of_chunks(txn, key), seen])
            else:
                seen = seen.copy()
            return RankingView(history_count, None if record is None else bytes(record[:record_bytes]), seen)

    def history(self, user_id: str, start: int = 0, stop: int | None = None) -> Events:
        if start < 0 or (stop is not None and stop < 0):
            raise ValueError(f"positions must be 0 or more, not {start} to {stop}")
        key = checked_id(user_id).encode()
        with self._env.read() as txn:
            found = self._head(txn, key)
            count = found.head.history_count if found else 0
            stop = count if stop is None else min(stop, count)
            if found is None or start >= stop:
                return np.zeros(0, np.uint32), np.zeros(0, np.int64)
            full = count // CHUNK_EVENTS  # chunks
            first, last = start // CHUNK_EVENTS, min(-(-stop // CHUNK_EVENTS), full)
            parts = [self._chunk(txn, key, chunk) for chunk in range(first, last)]
            if stop > full * CHUNK_EVENTS:
                parts.append(found.tail)
            offset = min(first, full) * CHUNK_EVENTS
            events = np.concatenate(parts)[start - offset : stop - offset]
        return events["item"].astype(np.uint32), events["timestamp"].astype(np.int64)

    def seen(self, user_id: str) -> NDArray[np.uint32]:
        key = checked_id(user_id).encode()
        with self._env.read() as txn:
            found = self._head(txn, key)
            if found is None:
                return _NO_SEEN
            return np.union1d(self._seen_of_chunks(txn, key), found.tail["item"]).astype(np.uint32)

    def scan(self, partition: int = 0, partitions: int = 1) -> Iterator[str]:
        if not 0 <= partition < partitions:
            raise ValueError(f"partition {partition} of {partitions} does not exist")
        start, suffix = b"\0", _record_key(b"", 0)
        while True:
            with self._env.read() as txn, txn.cursor(db=self._users) as cursor:
                keys = cursor.iternext(values=False) if cursor.set_range(start) else iter(())
                heads = (bytes(key[: -len(suffix)]) for key in keys if key[-len(suffix) :] == suffix)
                found = list(islice(heads, _SCAN_USERS))
            yield from (key.decode() for key in found if zlib.crc32(key) % partitions == partition)
            if len(found) < _SCAN_USERS:
                return
            start = found[-1] + b"\1"  # behind all records of that user

    def _head(self, txn: lmdb.Transaction, key: bytes) -> StoredHead | None:
        value = txn.get(_record_key(key, 0), db=self._users)
        return None if value is None else unpack_head(value)

    def _chunk(self, txn: lmdb.Transaction, key: bytes, chunk: int) -> NDArray[np.void]:
        value = txn.get(_record_key(key, chunk), db=self._history)
        if value is None:
            raise DamagedError("a history is shorter than its head says")
        return unpack_chunk(value)

    def _seen_of_chunks(self, txn: lmdb.Transaction, key: bytes) -> NDArray[np.uint32]:
        value = txn.get(key, db=self._seen)
        return _NO_SEEN if value is None else unpack_seen(value)

    # -- writing users ---------------------------------------------------------------------------------------------

    def commit(self, writes: Sequence[Write]) -> list[str]:
        keys = [checked_id(write.user_id).encode() for write in writes]
        with self._env.write() as txn:
            checked_writes(writes, txn.stat(self._items)["entries"])
            heads = [txn.get(_record_key(key, 0), db=self._users) for key in keys]
            versions = [0 if head is None else version_of(head) for head in heads]
            conflicts = [w.user_id for w, found in zip(writes, versions, strict=True) if found != w.expected_version]
            if not conflicts:
                new_bytes = sum(
                    self._put(txn, key, write, None if head is None else unpack_head(head))
                    for key, write, head in zip(keys, writes, heads, strict=True)
                )
                self._env.keep_reserve(txn, new_bytes)
        return conflicts

    def _put(self, txn: lmdb.Transaction, key: bytes, write: Write, before: StoredHead | None) -> int:
        """Puts one user's records and new events behind the old ones; returns the bytes put."""
        count, tail = (before.head.history_count, before.tail) if before else (0, events_of(_NO_SEEN, _NO_SEEN))
        chunks, tail = split_events(tail, events_of(write.items, write.timestamps))
        put = self._put_chunks(txn, key, count // CHUNK_EVENTS, chunks) if len(chunks) else 0
        generation = max(write.records) if write.records else before.head.generation if before else 0
        head = Head(txn.id(), count + len(write.items), tuple(write.request_ids), generation)
        values = {0: pack_head(head, tail)} | dict(write.records)
        for number, value in values.items():
            txn.put(_record_key(key, number), value, db=self._users)
        return put + sum(map(len, values.values()))

    def _put_chunks(self, txn: lmdb.Transaction, key: bytes, first: int, events: NDArray[np.void]) -> int:
        values = [pack_chunk(events[start : start + CHUNK_EVENTS]) for start in range(0, len(events), CHUNK_EVENTS)]
        for number, value in enumerate(values, start=first):
            txn.put(_record_key(key, number), value, db=self._history)
        seen = add_seen(txn.get(key, db=self._seen), events["item"])
        if seen is not None:
            txn.put(key, seen, db=self._seen)
        return sum(map(len, values)) + len(seen or b"")

    def delete(self, user_id: str) -> int | None:
        """As in `StateStore`. Later commits reuse the freed pages; until then the bytes remain in the file."""
        key = checked_id(user_id).encode()
        with self._env.write() as txn:
            head = txn.get(_record_key(key, 0), db=self._users)
            if head is None:
                return None
            for database in (self._users, self._history):
                _delete_prefix(txn, database, key + b"\0")
            txn.delete(key, db=self._seen)
        return count_of(head)

    # -- the store itself ------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """As in `StateStore`; users are counted one by one."""
        users = sum(1 for _ in self.scan())
        with self._env.read() as txn:
            items, live = txn.stat(self._items)["entries"], self._env.live_bytes(txn)
        return StoreStats(users, items, live, self._env.file_bytes_on_disk(), self._env.map_size)

    def check(self):
        pass

    def maintain(self):
        return 0

    def flush(self) -> None:
        self._env.flush()

    def close(self) -> None:
        """As in `StateStore`; does nothing in a forked child."""
        self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _record_key(key: bytes, number: int) -> bytes:
    """Key of a record (generation) or a chunk; ids hold no `\\0`, so that no user's keys lie among another's."""
    return key + b"\0" + _U32.pack(number)


def _create(txn: lmdb.Transaction, databases: Mapping[str, lmdb._Database]) -> None:
    txn.put(b"info", json.dumps({"format_version": FORMAT_VERSION}).encode(), db=databases["meta"])


def _format_of(info: bytes) -> object:
    """The format version in a description, which may be of another program."""
    try:
        return json.loads(info)["format_version"]
    except (ValueError, LookupError, TypeError):
        return "unknown"


def _bundle_ids(txn: lmdb.Transaction, meta: lmdb._Database) -> list[str]:
    return list(json.loads(bytes(txn.get(b"generations", b"[]", db=meta))))


def _delete_prefix(txn: lmdb.Transaction, database: lmdb._Database, prefix: bytes) -> None:
    with txn.cursor(db=database) as cursor:
        found = cursor.set_range(prefix)
        while found and bytes(cursor.key()).startswith(prefix):
            found = cursor.delete()
