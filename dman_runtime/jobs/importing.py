"""Merges a log into a store: events that it holds already are recognised, the others go to their places."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from dman_runtime.data.interactions import Interactions
from dman_runtime.data.logs import Log
from dman_runtime.engine import COMMIT_ATTEMPTS, Engine, conflict_pause
from dman_runtime.errors import ConflictError
from dman_runtime.id_types import remember_id_types
from dman_runtime.jobs.encoding import advanced
from dman_runtime.jobs.partitions import by_length
from dman_runtime.jobs.spreading import HERE, Spread
from dman_runtime.opened import OpenUser


@dataclass
class ImportResult:
    users: int = 0  # in the file
    new_users: int = 0  # that the store did not know
    events: int = 0  # stored now
    recognised_events: int = 0  # in the store already
    rebuilt_users: int = 0  # whose history was put in order anew, as events of the file belong before its end
    unknown_events: int = 0  # of those stored now: of items that the bundle does not know

    def add(self, other: ImportResult) -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def summary(self) -> str:
        """For people, beside users and events."""
        return (
            f"{self.new_users} users are new, {self.recognised_events} events were there already, "
            f"{self.rebuilt_users} histories were put in order anew, {self.unknown_events} of the imported events are "
            "of items that the bundle does not know"
        )


@dataclass(frozen=True, eq=False)
class _Batch:
    """Users of a log, with the events that it has of them."""

    partition: Interactions
    numbers: np.ndarray  # (N,) uint32, of every event of the partition
    rows: np.ndarray  # of the users in the partition
    keep_order: bool
    users: list[OpenUser]  # those who get new events
    result: ImportResult  # once they are committed

    @classmethod
    def opened(
        cls, engine: Engine, partition: Interactions, numbers: np.ndarray, rows: np.ndarray, *, keep_order: bool
    ) -> _Batch:
        """Reads the users, and gives them the events that the store lacks."""
        result, changed = ImportResult(users=len(rows)), list[OpenUser]()
        for row, user in zip(rows, engine.open_users([partition.user_ids[row] for row in rows]), strict=True):
            events = slice(partition.offsets[row], partition.offsets[row + 1])
            merged = engine.merge(user, numbers[events], partition.timestamps[events], keep_order=keep_order)
            if merged.added:
                changed.append(user)
            result.new_users += not user.head.version
            result.events += merged.added
            result.recognised_events += int(events.stop - events.start) - merged.added
            result.rebuilt_users += merged.rebuilt
            result.unknown_events += merged.added - merged.known
        return cls(partition, numbers, rows, keep_order, changed, result)

    def again(self, engine: Engine) -> _Batch:
        return _Batch.opened(engine, self.partition, self.numbers, self.rows, keep_order=self.keep_order)

    @property
    def events(self) -> int:
        """Of the log."""
        return int((self.partition.offsets[self.rows + 1] - self.partition.offsets[self.rows]).sum())


def import_histories(log: Log, engine: Engine, spread: Spread = HERE, *, threads: int = 1) -> ImportResult:
    """Stores and encodes what a log has and the store lacks, one durable commit per batch of users.

    Events are recognised by user, item and time, so the same log twice changes nothing, and an interrupted import can
    be repeated. Events go to their places by time; those of one log that time does not order keep its order. A user
    without new events is not written. A server may use the store meanwhile.

    `spread` says where users are encoded, with so many `threads` in a graph run; this process reads, merges and
    commits. The store is the same to the bit. Raises InputError, ConflictError, StoreError, and the errors of
    `Spread.results`.
    """
    result = ImportResult()
    remember_id_types(engine.store, engine.projection.bundle.manifest)
    with (
        tqdm(unit="ev", unit_scale=True, desc="import", disable=None) as bar,
        closing(advanced(engine, _batches(log, engine), spread, threads=threads)) as batches,
    ):
        for batch in batches:
            result.add(_committed(engine, batch))
            bar.update(batch.events)
    return result


def _batches(log: Log, engine: Engine) -> Iterator[_Batch]:
    keep_order = log.options.order_by != "time"
    for partition in log.parts():
        numbers = engine.store.add_items(partition.item_ids)[partition.items]  # of every event
        for rows in by_length(np.diff(partition.offsets), partition.user_ids):
            yield _Batch.opened(engine, partition, numbers, rows, keep_order=keep_order)


def _committed(engine: Engine, batch: _Batch) -> ImportResult:
    """Commits advanced users; those whom a server has changed since they were read are read again, with all of the
    batch. Returns what became of the events."""
    for attempt in range(COMMIT_ATTEMPTS):
        if not engine.commit(batch.users):
            return batch.result
        time.sleep(conflict_pause(attempt))
        batch = batch.again(engine)
        engine.advance(batch.users)
    raise ConflictError("a server keeps updating users of this file", "stop it, or import when it is quiet")
