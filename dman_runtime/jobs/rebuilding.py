"""Encodes all histories of a store under a bundle, while a server may serve another one over it.

A user's record is done when it covers the history and lacks no event of it, so an interrupted rebuild goes on where it
was, and what servers change meanwhile is found by looking again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dman_runtime.engine import COMMIT_ATTEMPTS, Engine, conflict_pause
from dman_runtime.errors import StateError, StoreFullError
from dman_runtime.jobs.encoding import Throttle, advanced
from dman_runtime.jobs.spreading import FEW_EVENTS, HERE, Spread
from dman_runtime.model.events import NO_EVENTS
from dman_runtime.model.record import head_bytes, read_head, record_bytes
from dman_runtime.opened import OpenUser
from dman_runtime.projection import Projection
from dman_runtime.store.base import StoredUser, StoreStats

logger = logging.getLogger(__name__)
MAX_PASSES = 4
WINDOW_USERS = 4096  # whose records are looked at together
BATCH_USERS = 64  # in one commit of about a megabyte: a server may wait for it
BATCH_EVENTS = 200_000  # so many are in memory, but for a longer history of one user
PROGRESS_SECONDS = 10.0  # between lines of the log
_PAGE_BYTES = 4096  # what stores give to a record comes in pages
_SPARE_BYTES = 256 << 20  # of the disk, for servers


@dataclass
class RebuildResult:
    users: int = 0  # of the store
    rebuilt: int = 0  # users whose record was made or brought up to the history, each time
    events: int = 0  # encoded for that
    lagging: int = 0  # users whose record does not cover the history at the end: servers have changed them since

    def summary(self) -> str:
        """For people, beside users and events."""
        if not self.lagging:
            return "all records cover their histories"
        return (
            f"{self.lagging} of {self.users} users changed meanwhile, and are caught up when they are first touched, "
            "or by the next rebuild where late events came"
        )


class _Lag(NamedTuple):
    """A user whose record does not cover the history, or lacks late events of it."""

    user_id: str
    events: int  # to be encoded, as far as the history says it
    new_bytes: int  # that the record will take, where there is none yet


@dataclass
class _Work:
    """What there is to do."""

    store: StoreStats
    lagging: int = 0
    events: int = 0
    new_bytes: int = 0


class _ProgressLog:
    """Says in the log how much is done, behind the first piece of work and then from time to time."""

    clock = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._began, self._told = self.clock(), float("-inf")

    def __call__(self, done: int, total: int) -> None:
        now = self.clock()
        if done and now - self._told >= PROGRESS_SECONDS:
            self._told = now
            left = (now - self._began) * (total - done) / done
            logger.info("%d of %d events are encoded, about %.0f s left", done, total, left)


def rebuild(
    engine: Engine,
    *,
    path: Path | None = None,
    max_share: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    spread: Spread = HERE,
    threads: int = 1,
) -> RebuildResult:
    """Makes the records of the engine's generation cover all histories, in durable commits of some users each.

    What servers change in the meantime is looked for again, until little or nothing is left.

    Args:
        path: Directory of the store, whose disk must have room; None for a store without one.
        max_share: Of one core, 0 < share <= 1; each process keeps to it.
        progress: Called with the events that are done, and with all of them. Without it, a terminal shows a bar, and
            where there is none, the log has a line every ten seconds.
        spread: Where users are encoded, with so many `threads` in a graph run; this process reads and commits. What
            servers change meanwhile is encoded here, if it is little. The records are the same to the bit.

    Raises StoreError; StoreFullError before anything is written where the new records do not fit; the errors of
    `Spread.results`.
    """
    throttle, result, done, total = Throttle(max_share), RebuildResult(), 0, 0
    with tqdm(unit="ev", unit_scale=True, desc="rebuild", disable=True if progress else None) as bar:
        report = progress or (_ProgressLog() if bar.disable else lambda _done, _total: None)
        for number in range(MAX_PASSES):
            work = _work(engine)
            result.users, result.lagging = work.store.users, work.lagging
            if work.lagging <= (BATCH_USERS if number else 0):
                break
            _require_room(engine, work, path)
            logger.info("%d of %d users need %d events encoded", work.lagging, result.users, work.events)
            bar.total = total = total + work.events
            report(done, total)
            where = spread if not number or work.events > FEW_EVENTS else HERE
            opened = (_Batch(engine, batch) for lags in _windows(engine) for batch in _batches(lags))
            with closing(advanced(engine, opened, where, threads=threads, throttle=throttle)) as batches:
                for batch in batches:
                    result.events += _commit(engine, batch, throttle)
                    result.rebuilt += len(batch.users)
                    done += batch.events
                    bar.update(batch.events)
                    report(done, total)
        else:
            result.lagging = _work(engine).lagging
    return result


def catch_up(engine: Engine, *, seconds: float, max_share: float = 0.5) -> int:
    """Brings records up to date that lack something, for so many seconds at most; returns how many.

    Users without a record stay for `rebuild`, or for when they are first touched. Raises StoreError.
    """
    throttle, deadline, count = Throttle(max_share), time.monotonic() + seconds, 0
    for lags in _windows(engine) if seconds > 0 else ():
        for batch in _batches([lag for lag in lags if not lag.new_bytes]):
            if time.monotonic() >= deadline:
                return count
            for opened in advanced(engine, [_Batch(engine, batch)], HERE, throttle=throttle):
                _commit(engine, opened, throttle)
            count += len(batch)
        if time.monotonic() >= deadline:
            break
    return count


def _work(engine: Engine) -> _Work:
    work = _Work(engine.store.stats())
    for lags in _windows(engine):
        work.lagging += len(lags)
        work.events += sum(lag.events for lag in lags)
        work.new_bytes += sum(lag.new_bytes for lag in lags)
    return work


def _windows(engine: Engine) -> Iterator[list[_Lag]]:
    """The users to be rebuilt among some users at a time."""
    users = engine.store.scan()
    projection = engine.current
    size = head_bytes(projection.bundle.manifest.state)
    while user_ids := list(islice(users, WINDOW_USERS)):
        found = zip(user_ids, engine.store.get_many(user_ids, projection.number, size), strict=True)
        yield [lag for user_id, stored in found if stored and (lag := _lag(engine, projection, user_id, stored))]


def _lag(engine: Engine, projection: Projection, user_id: str, stored: StoredUser) -> _Lag | None:
    """None for a user whose record is current."""
    count, covered = stored.head.history_count, 0
    with suppress(StateError):  # it will be made anew
        head = read_head(stored.record, projection.bundle) if stored.record else None
        covered = head.history_count if head and not head.lacks else 0
        if head and head.vocabulary < projection.bundle.manifest.vocabulary:
            covered *= not projection.holds_later(engine.store.seen(user_id), head.vocabulary)
    if covered == count:
        return None
    size = record_bytes(count, engine.projection.bundle.manifest.state)
    new_bytes = 0 if stored.record else -(-size // _PAGE_BYTES) * _PAGE_BYTES
    return _Lag(user_id, count - covered if covered < count else count, new_bytes)


def _require_room(engine: Engine, work: _Work, path: Path | None) -> None:
    """StoreFullError where the new records would fill the store or its disk: servers could then store nothing."""
    stats, bundle_id = work.store, engine.projection.bundle.bundle_id
    needed = work.new_bytes + work.new_bytes // 16
    room = stats.map_size - stats.map_size // 8 - stats.bytes_used if stats.map_size else needed
    if needed > room:
        raise StoreFullError(
            f"the records of bundle {bundle_id} take about {needed >> 20} MiB, and the state store has "
            f"{max(0, room) >> 20} left",
            "give all processes a larger map, or drop the records of a bundle that is no longer served",
            parameter="map_size_mib",
        )
    growth = needed - max(0, stats.file_bytes - stats.bytes_used)
    if path is not None and growth + _SPARE_BYTES > (free := shutil.disk_usage(path).free) and growth > 0:
        raise StoreFullError(
            f"the records of bundle {bundle_id} take about {needed >> 20} MiB, and the disk of {path} "
            f"has {free >> 20} free, of which servers need {_SPARE_BYTES >> 20}",
            "free disk space, or drop the records of a bundle that is no longer served",
        )


def _batches(lags: Sequence[_Lag]) -> Iterator[list[_Lag]]:
    """Users with similar numbers of events, which are encoded together without much padding; the longest first."""
    batch, events = list[_Lag](), 0
    for lag in sorted(lags, key=lambda lag: -lag.events):
        if batch and (len(batch) == BATCH_USERS or events + lag.events > BATCH_EVENTS):
            yield batch
            batch, events = [], 0
        batch.append(lag)
        events += lag.events
    if batch:
        yield batch


class _Batch:
    """Users who are encoded together, and committed together."""

    def __init__(self, engine: Engine, lags: Sequence[_Lag]) -> None:
        self.events = sum(lag.events for lag in lags)  # to be encoded, as far as the histories said it
        self.encodings = [_Encoding(user) for user in _open(engine, [lag.user_id for lag in lags])]
        self.encoded = sum(one.begin() for one in self.encodings)  # once they are advanced

    @property
    def users(self) -> list[OpenUser]:
        return [one.open for one in self.encodings]

    def reopen(self, engine: Engine, user_ids: Collection[str]) -> list[OpenUser]:
        """Reads some of the users again, whom others have changed, and returns them: they are to be advanced again."""
        changed = [one for one in self.encodings if one.open.user_id in user_ids]
        for one, again in zip(changed, _open(engine, [str(one.open.user_id) for one in changed]), strict=True):
            one.reopen(again)
        self.encoded += sum(one.begin() for one in changed)
        return [one.open for one in changed]


def _commit(engine: Engine, batch: _Batch, throttle: Throttle) -> int:
    """Stores the records of some advanced users; returns how many events were encoded.

    A user whom servers keep changing is left lagging after many attempts.
    """
    for attempt in range(COMMIT_ATTEMPTS):
        if not (conflicts := engine.commit(batch.users)):
            break
        time.sleep(conflict_pause(attempt))
        engine.advance(batch.reopen(engine, set(conflicts)), throttle.rest)
    throttle.rest()
    return batch.encoded


def _open(engine: Engine, user_ids: Sequence[str]) -> list[OpenUser]:
    """Users whose records will lack nothing. A history that has changed since its user was opened fails the commit."""
    users = engine.open_users(user_ids)
    for user_id, user in zip(user_ids, users, strict=True):
        if user.state.lacking:
            user.renew(engine.store.history(user_id, 0, user.head.history_count))
    return users


class _Encoding:
    """A user on the way to a current record. What was encoded is kept while the history only grows.

    So a long history is done at some time, however often events are added to it.
    """

    def __init__(self, user: OpenUser) -> None:
        self.open = user
        self._start = user.state.event_count  # events in its record
        self._encoded = NO_EVENTS  # those behind them

    def begin(self) -> int:
        """Notes that all that is left will be encoded now; returns how many events that are."""
        self._encoded += self.open.left
        return len(self.open.left)

    def reopen(self, user: OpenUser) -> None:
        """The same user as read again, after somebody has changed it."""
        same = user.left[: len(self._encoded)]
        grown = np.array_equal(same.items, self._encoded.items) and np.array_equal(same.times, self._encoded.times)
        if grown and user.state.event_count == self._start:
            user.state, user.left = self.open.state, user.left[len(same) :]
        else:
            self._start, self._encoded = user.state.event_count, NO_EVENTS
        self.open = user
