"""The embedded store: durable, on LMDB. Values are laid out in `history`, `request_ids` and
`producers`.

| database | key | value |
|---|---|---|
| meta | `info`; `generations`; `id_types`; `rollout` | JSON: format and id of the store; the bundle ids in order, the \
first is generation 1; what user ids and item ids are; which bundle serves whom |
| items | item number, u32 big-endian | external id, UTF-8; checksum |
| item_numbers | external id, UTF-8 | item number, u32 little-endian; checksum |
| users | user id, `\\0`, generation u32 big-endian | the record; with generation 0, the head |
| seen | user id | set of item numbers |
| history | user id, `\\0`, chunk number u32 big-endian | chunk of events |
| catalogue | kind, item number or slot | which items are switched off or were added: `lmdb_catalogue` |
| shown | user id | the items that the user was shown, and until when each counts |
| requests | period u32 big-endian, hash of the user id (16 bytes), request id u64 big-endian | checksum |
| producers | keyed hash of the user id | the last sequence of each producer |

Head and record are neighbours in one B-tree, because each further B-tree that a commit touches costs about 14 % more.
The version of a user is the number of the transaction that wrote it. Any number of threads and processes may read and
write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Self
from zlib import crc32

import lmdb
import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.base import IdTypes, RankingView, StoredRecord, StoreStats, Write
from dman_runtime.store.by_snapshot import ReadsBySnapshot
from dman_runtime.store.catalogue import NOTHING_STANDS, Addition, Catalogue, Standing
from dman_runtime.store.checks import (
    check_additions,
    checked_id,
    checked_numbers,
    checked_types,
    checked_writes,
    differ,
)
from dman_runtime.store.environment import Environment
from dman_runtime.store.history import MAX_HEAD_BYTES, DamagedError, version_of
from dman_runtime.store.lmdb_absence import check_nothing_left
from dman_runtime.store.lmdb_catalogue import put_additions, put_switches, read_catalogue, read_revision
from dman_runtime.store.lmdb_items import append_items, free_numbers, item_count
from dman_runtime.store.lmdb_layout import (
    FORMAT_VERSION,
    HEAD_SUFFIX,
    NOTHING_SET,
    Databases,
    numbered_key,
    read_generations,
    read_id_types,
    read_rollout,
    write_generations,
    write_id_types,
    write_rollout,
)
from dman_runtime.store.lmdb_reads import LmdbSnapshot, read_records, users_from
from dman_runtime.store.lmdb_shown import drop_expired, expired_users
from dman_runtime.store.lmdb_users import delete_user, put_user
from dman_runtime.store.producers import find_sequences, put_sequences
from dman_runtime.store.request_ids import find_requests, has_expired, sweep
from dman_runtime.store.rollout import Rollout, checked_rollout

DEFAULT_MAP_SIZE = 64 << 30  # bytes of address space; the disk holds only what is used
_SCAN_USERS = 1000  # user ids per read transaction of `scan`
_DROPPED_PER_COMMIT = 1000  # records per transaction of `drop_records`
_SWEEPS, _SWEPT_PER_SWEEP = 10, 1000  # transactions of `maintain`, and request ids in each


class LmdbStore(ReadsBySnapshot):
    """A `StateStore` in a directory. Make one with `LmdbStore.open`; close it after the last call has returned."""

    commits_together, waits, format_version = True, False, FORMAT_VERSION

    def __init__(self, environment: Environment, *, clock: Callable[[], float] = time.time) -> None:
        self._env, self._clock = environment, clock
        self._databases = Databases.of(environment.databases, legacy=environment.legacy, hash_key=environment.hash_key)
        self._rollout = NOTHING_SET  # as it was read last
        self._swept_to = b""  # what users were shown is swept from here on
        self._standing = (-1, NOTHING_STANDS)  # with the number of the transaction that left it

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        map_size: int = DEFAULT_MAP_SIZE,
        readonly: bool = False,
        must_exist: bool = False,
        alone: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> LmdbStore:
        """Opens the store in the directory `path`, and creates it where there is none (not if `readonly` or
        `must_exist`). One of format 3 is upgraded when it is opened for writing.

        `map_size` in bytes bounds the file; use the same in every process. If four fifths of it are filled, the first
        process that opens the store takes a multiple of it, and the others do as it does. A readonly store writes
        nothing, maps no more than the file holds, and may be opened while a server has it open.
        With `alone`, no other process may have it open, nor open it before it is closed.
        `clock` gives seconds since 1970.
        Raises StoreMismatchError, StoreFullError or StoreUnavailableError.
        """
        environment = Environment.open(
            Path(path), map_size=map_size, readonly=readonly, must_exist=must_exist, alone=alone
        )
        return cls(environment, clock=clock)

    @property
    def path(self) -> Path:
        return self._env.path

    # -- items and generations -------------------------------------------------------------------------------------

    def add_items(self, item_ids: Sequence[str]) -> NDArray[np.uint32]:
        found = self.find_items(item_ids)
        if (found < 0).any():
            unknown = np.flatnonzero(found < 0)
            with self._env.write() as txn:
                items = [item_ids[position].encode() for position in unknown.tolist()]
                found[unknown], added = append_items(txn, self._databases, items)
                if added:
                    self._env.keep_reserve(txn, 0)
        return found.astype(np.uint32)

    def add_generation(self, bundle_id: str) -> int:
        known = self.generations()
        if bundle_id in known:
            return known[bundle_id]
        meta, legacy = self._databases.meta, self._databases.legacy
        with self._env.write() as txn:
            bundle_ids = read_generations(txn, meta, legacy=legacy)  # another process may have been first
            if bundle_id not in bundle_ids:
                bundle_ids.append(bundle_id)
                write_generations(txn, meta, bundle_ids)
        return bundle_ids.index(bundle_id) + 1

    def generations(self) -> dict[str, int]:
        with self._env.read() as reading:
            bundle_ids = read_generations(reading.txn, self._databases.meta, legacy=self._databases.legacy)
        return {bundle_id: number for number, bundle_id in enumerate(bundle_ids, start=1)}

    def id_types(self) -> IdTypes:
        with self._env.read() as reading:
            return read_id_types(reading.txn, self._databases.meta)

    def remember_id_types(self, types: IdTypes) -> None:
        checked_types(types)
        with self._env.write() as txn:
            write_id_types(txn, self._databases.meta, types)

    def standing(self) -> Standing:
        with self._env.read() as reading:
            moment, last = reading.txn.id(), self._standing
            if moment == last[0]:  # nobody has committed anything since
                return last[1]
            rollout = self._rollout = read_rollout(reading.txn, self._databases.meta, self._rollout)
            standing = Standing(rollout[1], read_revision(reading.txn, self._databases).revision)
        self._standing = moment, standing
        return standing

    def rollout(self) -> Rollout:
        return self.standing().rollout

    def set_rollout(self, rollout: Rollout) -> bool:
        checked_rollout(rollout)
        with self._env.write() as txn:
            _, before = read_rollout(txn, self._databases.meta, self._rollout)
            if rollout.revision != before.revision + 1:
                return False
            write_rollout(txn, self._databases.meta, rollout)
        return True

    def catalogue(self) -> Catalogue:
        with self._env.read() as reading:
            return read_catalogue(reading.txn, self._databases)

    def switch_items(self, numbers: Sequence[int] | NDArray[np.integer], *, off: bool) -> int:
        with self._env.write() as txn:
            wanted = checked_numbers(numbers, item_count(txn, self._databases))
            changed = put_switches(txn, self._databases, wanted, off=off)
            if changed and off:
                self._env.keep_reserve(txn, 0)
        return changed

    def append_additions(self, additions: Sequence[Addition]) -> int:
        with self._env.write() as txn:
            slots = read_revision(txn, self._databases).added
            check_additions(additions, slots, item_count(txn, self._databases))
            if additions:
                put_additions(txn, self._databases, additions)
                self._env.keep_reserve(txn, 0)
        return slots + len(additions)

    def drop_records(self, generation: int) -> int:
        if generation < 1:
            raise ValueError(f"generations are numbered from 1, not {generation}")
        dropped, users = 0, self.scan()
        # Each user may need a page of the reserve of a full map, and those of the last commit are not free yet.
        while user_ids := list(islice(users, max(1, min(_DROPPED_PER_COMMIT, self._env.map_size >> 18)))):
            with self._env.write() as txn:
                keys = [numbered_key(user_id.encode(), generation) for user_id in user_ids]
                dropped += sum(txn.delete(key, db=self._databases.users) for key in keys)
        return dropped

    # -- reading users ---------------------------------------------------------------------------------------------

    def snapshot(self) -> LmdbSnapshot:
        return LmdbSnapshot(self._env, self._databases, self._clock)

    def ranking_view(self, user_id: str, generation: int, record_bytes: int) -> RankingView | None:
        # One call less than the inherited one: every recommendation passes here.
        with LmdbSnapshot(self._env, self._databases, self._clock) as snapshot:
            return snapshot.ranking_view(user_id, generation, record_bytes)

    def scan(self, partition: int = 0, partitions: int = 1) -> Iterator[str]:
        if not 0 <= partition < partitions:
            raise ValueError(f"partition {partition} of {partitions} does not exist")
        start = b"\0"
        while True:
            with self._env.read() as reading, reading.txn.cursor(db=self._databases.users) as cursor:
                found = list(islice(users_from(cursor, start), _SCAN_USERS))
            yield from (text for user, text in found if crc32(user) % partitions == partition)
            if len(found) < _SCAN_USERS:
                return
            start = found[-1][0] + b"\1"  # behind all records of that user

    def records(self, record_bytes: int) -> Iterator[StoredRecord]:
        users = self.scan()
        while user_ids := list(islice(users, _SCAN_USERS)):
            with self._env.read() as reading, reading.txn.cursor(db=self._databases.users) as cursor:
                found = [read_records(cursor, user_id, record_bytes, self._databases.legacy) for user_id in user_ids]
            yield from chain.from_iterable(found)

    # -- writing users ---------------------------------------------------------------------------------------------

    def commit(self, writes: Sequence[Write]) -> list[str]:
        now, producers, store_id = self._clock(), self._databases.producers, self._env.store_id
        with self._env.write() as txn:
            checked_writes(writes, item_count(txn, self._databases))
            users = [write.user_id.encode() for write in writes]
            heads = [self._head_value(txn, user) for user in users]
            conflicts = [
                write.user_id
                for user, write, head in zip(users, writes, heads, strict=True)
                if (0 if head is None else version_of(head)) != write.expected_version
                or (head is None and self._came_before(txn, user, write, now))
                or (write.sequences and differ(find_sequences(txn, producers, user, store_id), write.sequences))
            ]
            if not conflicts:
                new_bytes = sum(
                    put_user(txn, self._databases, write, head, now) for write, head in zip(writes, heads, strict=True)
                )
                new_bytes += sum(put_sequences(txn, producers, write, store_id) for write in writes if write.sequences)
                self._env.keep_reserve(txn, new_bytes)
        return conflicts

    def _head_value(self, txn: lmdb.Transaction, user: bytes) -> bytes | None:
        """A copy, as each put moves what is stored. Raises DamagedError."""
        value = txn.get(user + HEAD_SUFFIX, db=self._databases.users)
        if value is None:
            check_nothing_left(txn, self._databases, user)  # whoever read the version has looked at more
            return None
        if len(value) > MAX_HEAD_BYTES:
            raise DamagedError("a user's head has the wrong length")
        return bytes(value)

    def _came_before(self, txn: lmdb.Transaction, user: bytes, write: Write, now: float) -> bool:
        """Whether a new user was there since the write was prepared, took one of its updates, and was deleted."""
        ids = write.request_ids
        return bool(ids and find_requests(txn, self._databases, user, ids, now=now, last=None))

    def delete(self, user_id: str, *, expected_version: int | None = None) -> int | None:
        """As in `StateStore`. Later commits reuse the freed pages; until then the bytes remain in the file."""
        user = checked_id(user_id).encode()
        with self._env.write() as txn:
            if expected_version is not None:
                head = self._head_value(txn, user)
                if head is None or version_of(head) != expected_version:
                    return None
            return delete_user(txn, self._databases, user, self._clock())

    # -- the store itself ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """StoreGoneError if the files were removed, replaced or cut since they were opened. Every write does this."""
        self._env.check()

    def maintain(self) -> int:
        """As in `StateStore`; a readonly store removes nothing."""
        stale = self._env.free_stale_readers()
        if not self._env.readonly:
            for _ in range(_SWEEPS):
                with self._env.read() as reading:
                    if not has_expired(reading.txn, self._databases.requests, self._clock()):
                        break
                with self._env.write() as txn:
                    sweep(txn, self._databases.requests, self._clock(), _SWEPT_PER_SWEEP)
            self._sweep_shown()
        return stale

    def _sweep_shown(self) -> None:
        """Looks at some users, and the next time at the next ones."""
        now = self._clock()
        with self._env.read() as reading:
            *users, self._swept_to = expired_users(reading.txn, self._databases, self._swept_to, now, _SWEPT_PER_SWEEP)
        if users:
            with self._env.write() as txn:
                drop_expired(txn, self._databases, users, now)

    def stats(self) -> StoreStats:
        """As in `StateStore`; users are counted one by one."""
        users = sum(1 for _ in self.scan())
        with self._env.read() as reading:
            items = item_count(reading.txn, self._databases) - len(free_numbers(reading.txn, self._databases))
            live = self._env.live_bytes(reading.txn)
            producers = self._databases.producers
            producer_users = 0 if producers is None else reading.txn.stat(producers)["entries"]
        return StoreStats(users, items, producer_users, live, self._env.file_bytes_on_disk(), self._env.map_size)

    def sizes(self) -> tuple[int, int, int]:
        """Bytes of live pages, of the file, and of the map: what there is to watch, without counting users."""
        with self._env.read() as reading:
            return self._env.live_bytes(reading.txn), self._env.file_bytes_on_disk(), self._env.map_size

    def copy_to(self, directory: Path) -> None:
        """Copies the live pages of one moment to a `data.mdb` in an existing directory."""
        self._env.copy_to(directory)

    def flush(self) -> None:
        self._env.flush()

    def close(self) -> None:
        """As in `StateStore`; does nothing in a forked child."""
        self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
