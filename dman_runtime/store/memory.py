"""A store in dictionaries: nothing outlives the process. The reference that other stores are compared with."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dman_runtime.errors import StoreError
from dman_runtime.store import checks
from dman_runtime.store.base import (
    NOTHING_SHOWN,
    REMEMBER_SECONDS,
    UNKNOWN_TYPES,
    Events,
    Expected,
    Head,
    IdTypes,
    RankingView,
    StoredRecord,
    StoredUser,
    StoreStats,
    Write,
)
from dman_runtime.store.by_snapshot import ReadsBySnapshot
from dman_runtime.store.catalogue import Addition, Catalogue, Standing
from dman_runtime.store.checks import (
    PERIOD_SECONDS,
    check_additions,
    check_positions,
    check_producers,
    check_replacement,
    checked_id,
    checked_numbers,
    checked_types,
    checked_writes,
    differ,
    too_many_request_ids,
)
from dman_runtime.store.rollout import NO_ROLLOUT, Rollout, checked_rollout
from dman_runtime.store.shown import joined_shown, still_shown

_NO_HEAD = Head(0, 0, 0)
Ids = Mapping[int, float]  # when each request id was applied
Sequences = Mapping[int, int]  # the last one of each producer


@dataclass(frozen=True)
class _User:
    """Never changed: a write puts another in its place, so that snapshots keep theirs."""

    head: Head = _NO_HEAD
    items: tuple[int, ...] = ()
    timestamps: tuple[int, ...] = ()
    records: Mapping[int, bytes] = field(default_factory=dict)

    def stored(self, generation: int, record_bytes: int | None) -> StoredUser:
        record = self.records.get(generation)
        return StoredUser(self.head, None if record is None else record[:record_bytes])


class MemorySnapshot:
    """A `Snapshot` of dictionaries that nobody changes any more."""

    def __init__(
        self,
        numbers: dict[str, int],
        users: dict[str, _User],
        ids: dict[str, Ids],
        sequences: dict[str, Sequences],
        shown: dict[str, Events],
        now: float,
    ) -> None:
        self._numbers, self._users, self._ids, self._sequences = numbers, users, ids, sequences
        self._shown, self._now = shown, now

    def expect(self, users: Mapping[str, Expected]) -> None:
        """Nothing: all is at hand."""

    def find_items(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        return np.array([self._numbers.get(checked_id(item_id), -1) for item_id in item_ids], np.int64)

    def item_ids(self, numbers: Sequence[int] | NDArray[np.integer]) -> list[str]:
        by_number = list(self._numbers)  # insertion order is the order of the numbers
        if len(numbers) and not 0 <= min(numbers) <= max(numbers) < len(by_number):
            raise ValueError(f"one of the items {list(numbers)[:10]} was never given a number")
        return [by_number[number] for number in numbers]

    def get_many(
        self, user_ids: Sequence[str], generation: int, record_bytes: int | None = None
    ) -> list[StoredUser | None]:
        users = [self._users.get(checked_id(user_id)) for user_id in user_ids]
        return [None if user is None else user.stored(generation, record_bytes) for user in users]

    def ranking_view(self, user_id: str, generation: int, record_bytes: int) -> RankingView | None:
        user = self._users.get(checked_id(user_id))
        if user is None:
            return None
        record = user.records.get(generation)
        seen = np.concatenate([np.array(user.items, np.uint32), self.shown(user_id)[0]])
        return RankingView(user.head.history_count, None if record is None else record[:record_bytes], seen)

    def history(self, user_id: str, start: int = 0, stop: int | None = None) -> Events:
        check_positions(start, stop)
        user = self._users.get(checked_id(user_id), _User())
        part = slice(start, stop)
        return np.array(user.items[part], np.uint32), np.array(user.timestamps[part], np.int64)

    def seen(self, user_id: str) -> NDArray[np.uint32]:
        return np.unique(self.history(user_id)[0])

    def shown(self, user_id: str) -> Events:
        return still_shown(self._shown.get(checked_id(user_id), NOTHING_SHOWN), self._now)

    def applied(self, user_id: str, request_ids: Collection[int]) -> set[int]:
        times = self._ids.get(checked_id(user_id), {})
        return {one for one in request_ids if one in times and times[one] >= self._now - REMEMBER_SECONDS}

    def sequences(self, user_id: str, producers: Collection[int]) -> dict[int, int]:
        found = self._sequences.get(checked_id(user_id), {})
        return {producer: found[producer] for producer in producers if producer in found}


class MemoryStore(ReadsBySnapshot):
    """A `StateStore` without a disk. One lock guards everything: every call is one moment."""

    commits_together, waits = True, False

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._lock, self._clock = threading.RLock(), clock
        self._numbers: dict[str, int] = {}
        self._generations: dict[str, int] = {}
        self._id_types, self._rollout = UNKNOWN_TYPES, NO_ROLLOUT
        self._catalogue = Catalogue()
        self._users: dict[str, _User] = {}
        self._ids: dict[str, Ids] = {}  # by user, also of deleted ones
        self._sequences: dict[str, Sequences] = {}  # by user, also of deleted ones
        self._shown: dict[str, Events] = {}  # by user, also of unknown ones
        self._last_version = 0
        self._closed = False

    @contextmanager
    def snapshot(self) -> Iterator[MemorySnapshot]:
        with self._open():
            copies = self._numbers.copy(), self._users.copy(), self._ids.copy(), self._sequences.copy()
            snapshot = MemorySnapshot(*copies, self._shown.copy(), self._clock())
        yield snapshot

    def add_items(self, item_ids: Sequence[str]) -> NDArray[np.uint32]:
        ids = [checked_id(item_id) for item_id in item_ids]
        with self._open():
            numbers = [self._numbers.setdefault(item_id, len(self._numbers)) for item_id in ids]
        return np.array(numbers, np.uint32)

    def add_generation(self, bundle_id: str) -> int:
        with self._open():
            return self._generations.setdefault(bundle_id, len(self._generations) + 1)

    def generations(self) -> dict[str, int]:
        with self._open():
            return dict(self._generations)

    def drop_records(self, generation: int) -> int:
        if generation < 1:
            raise ValueError(f"generations are numbered from 1, not {generation}")
        with self._open():
            holders = [(user_id, user) for user_id, user in self._users.items() if generation in user.records]
            for user_id, user in holders:
                records = {number: record for number, record in user.records.items() if number != generation}
                self._users[user_id] = replace(user, records=records)
        return len(holders)

    def id_types(self) -> IdTypes:
        with self._open():
            return self._id_types

    def remember_id_types(self, types: IdTypes) -> None:
        with self._open():
            self._id_types = checked_types(types)

    def standing(self) -> Standing:
        with self._open():
            return Standing(self._rollout, self._catalogue.revision)

    def rollout(self) -> Rollout:
        return self.standing().rollout

    def set_rollout(self, rollout: Rollout) -> bool:
        checked_rollout(rollout)
        with self._open():
            if rollout.revision != self._rollout.revision + 1:
                return False
            self._rollout = rollout
        return True

    def catalogue(self) -> Catalogue:
        with self._open():
            return self._catalogue

    def switch_items(self, numbers: Sequence[int] | NDArray[np.integer], *, off: bool) -> int:
        with self._open():
            wanted, before = set(checked_numbers(numbers, len(self._numbers))), self._catalogue
            were_off = set(before.off.tolist())
            changed = wanted - were_off if off else wanted & were_off
            if changed:
                now_off = sorted(were_off ^ changed)
                self._catalogue = Catalogue(before.revision + 1, np.array(now_off, np.uint32), before.added)
        return len(changed)

    def append_additions(self, additions: Sequence[Addition]) -> int:
        with self._open():
            before = self._catalogue
            check_additions(additions, len(before.added), len(self._numbers))
            if additions:
                self._catalogue = Catalogue(before.revision + 1, before.off, (*before.added, *additions))
            return len(self._catalogue.added)

    def commit(self, writes: Sequence[Write]) -> list[str]:
        with self._open():
            checked_writes(writes, len(self._numbers))
            versions = [(self._users[w.user_id].head.version if w.user_id in self._users else 0) for w in writes]
            conflicts = [
                write.user_id
                for write, found in zip(writes, versions, strict=True)
                if found != write.expected_version
                or (not found and self.applied(write.user_id, write.request_ids))
                or differ(self._sequences.get(write.user_id, {}), write.sequences)
            ]
            if not conflicts and writes:
                for write in writes:
                    check_replacement(write, len(self._users.get(write.user_id, _User()).items))
                ids = {write.user_id: self._ids_with(write) for write in writes if write.request_ids}
                sequences = {write.user_id: self._sequences_with(write) for write in writes if write.sequences}
                self._ids.update(ids)
                self._sequences.update(sequences)
                self._last_version += 1
                for write in writes:
                    self._put(write)
        return conflicts

    def _ids_with(self, write: Write) -> Ids:
        """The request ids of a user with those of a write. Raises TooManyRequestIdsError."""
        now = self._clock()
        ids = {one: when for one, when in self._ids.get(write.user_id, {}).items() if when >= now - REMEMBER_SECONDS}
        ids |= dict.fromkeys(write.request_ids, now)
        if sum(when // PERIOD_SECONDS == now // PERIOD_SECONDS for when in ids.values()) > checks.MAX_IDS:
            raise too_many_request_ids(write.user_id, checks.MAX_IDS)
        return ids

    def _sequences_with(self, write: Write) -> Sequences:
        """The sequences of a user after the steps of a write. Raises TooManyProducersError."""
        after = {**self._sequences.get(write.user_id, {}), **{one: step.last for one, step in write.sequences.items()}}
        check_producers(write.user_id, after)
        return after

    def _put(self, write: Write) -> None:
        if len(write.shown[0]):
            before = self._shown.get(write.user_id, NOTHING_SHOWN)
            self._shown[write.user_id] = joined_shown(before, write.shown, self._clock())
        if write.only_shows:
            return
        user = self._users.get(write.user_id, _User())
        if (start := write.replace_from) is not None:
            user = _User(user.head, user.items[:start], user.timestamps[:start])
        items = user.items + tuple(np.asarray(write.items).tolist())
        timestamps = user.timestamps + tuple(np.asarray(write.timestamps).tolist())
        generation = max(write.records, default=user.head.generation)
        head = Head(self._last_version, len(items), generation)
        self._users[write.user_id] = _User(head, items, timestamps, {**user.records, **write.records})

    def delete(self, user_id: str, *, expected_version: int | None = None) -> int | None:
        with self._open():
            user = self._users.get(checked_id(user_id))
            if user is not None and expected_version not in (None, user.head.version):
                return None
            self._users.pop(user_id, None)
            self._shown.pop(user_id, None)
        return None if user is None else len(user.items)

    def scan(self, partition: int = 0, partitions: int = 1) -> Iterator[str]:
        if not 0 <= partition < partitions:
            raise ValueError(f"partition {partition} of {partitions} does not exist")
        with self._open():
            users = list(self._users)
        return iter([user for user in users if zlib.crc32(user.encode()) % partitions == partition])

    def records(self, record_bytes: int) -> Iterator[StoredRecord]:
        with self._open():
            users = self._users.copy()
        for user_id, user in users.items():
            for generation, record in sorted(user.records.items()):
                yield StoredRecord(user_id, generation, user.head.history_count, len(record), record[:record_bytes])

    def stats(self) -> StoreStats:
        with self._open():
            return StoreStats(len(self._users), len(self._numbers), len(self._sequences))

    def maintain(self) -> int:
        with self._open():
            oldest = self._clock() - REMEMBER_SECONDS
            self._ids = {user: ids for user, ids in self._ids.items() if max(ids.values()) >= oldest}
            self._shown = {user: shown for user, shown in self._shown.items() if shown[1].max() > self._clock()}
        return 0

    def flush(self) -> None:
        with self._open():
            pass

    def close(self) -> None:
        self._closed = True

    def _open(self) -> threading.RLock:
        """The lock, to be entered. Raises StoreError once the store is closed."""
        if self._closed:
            raise StoreError("the state store in memory is closed", "make a new one")
        return self._lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
