"""Stores events as they come, from a topic or a file, each once: the loop between a `Source` and the engine.

    read -> check -> update (one durable commit) -> reject what cannot be stored -> commit positions

Each event is an update of its own, with the producer and the sequence of its place, so what was stored before is
recognised whichever way events are cut into batches. Whatever fails for now is tried again, while nothing more is
read; whatever fails for good ends the loop with everything before it settled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from dman_runtime.engine import Engine
from dman_runtime.errors import (
    ConflictError,
    DmanError,
    InputError,
    SourceUnavailableError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
    StoreGoneError,
    StoreUnavailableError,
    TooManyProducersError,
)
from dman_runtime.ingest.base import Message, Rejected, Source
from dman_runtime.ingest.events import EventReader, UnusableError
from dman_runtime.log_lines import RateLimited
from dman_runtime.metrics import IngestCounts
from dman_runtime.requests import Update, UpdateOutcome

logger = logging.getLogger(__name__)
Done = TypeVar("Done")
BATCH_BYTES = 32 << 20  # of messages in hand
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before something is tried again
REPORT_SECONDS = 10.0  # between lines of the log
LOOK_SECONDS = 1.0  # between looks at the lag
_FOR_NOW = (ConflictError, StoreFullError, StoreUnavailableError, SourceUnavailableError)
_FOR_GOOD = (StoreDamagedError, StoreGoneError)


class Ingester:
    """Runs once, in one thread. `counts` is what it has done."""

    def __init__(
        self,
        engine: Engine,
        source: Source,
        reader: EventReader,
        *,
        batch_events: int = 1000,
        batch_seconds: float = 0.2,
        stop_at_bad: bool = True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """A batch has at most so many events, the first of which waits at most so long for others. With `stop_at_bad`
        the first message that can never be stored ends it, else it is given to the source. `stopped` is asked all the
        time.
        """
        self.counts = IngestCounts()
        self._engine, self._source, self._reader = engine, source, reader
        self._batch_events, self._batch_seconds = batch_events, batch_seconds
        self._stop_at_bad, self._stopped = stop_at_bad, stopped
        self._batch: list[Message] = []  # in hand
        self._settling = False
        self._gone: set[int] = set()  # partitions that went away while the batch could not be settled
        self._error: DmanError | None = None  # met where it could not be raised
        self._limited = RateLimited(logger)
        self._told, self._said, self._looked = time.monotonic(), (0, 0, 0), 0.0
        self._answering = ""  # the bundle of the servers, as seen last

    def run(self) -> IngestCounts:
        """Until it is stopped, or the source has ended. What is in hand then is settled.

        Raises InputError for a message that can never be stored, SourceError, StoreError.
        """
        self._source.leaving = self._leave
        try:
            while not (self._stopped() or self._source.ended):
                self._gather()
                self._settle()
                self._report()
            self._looked = 0.0
            self._look()
        finally:
            self._source.leaving = lambda _partitions: None
        return self.counts

    # -- a batch -----------------------------------------------------------------------------------------------------

    def _gather(self) -> None:
        """Takes what is there, and waits for more for a short time only."""
        deadline, size = time.monotonic() + self._batch_seconds, 0
        while len(self._batch) < self._batch_events and size < BATCH_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or self._stopped() or self._source.ended:
                return
            messages = self._tried(partial(self._source.read, self._batch_events - len(self._batch), left))
            self._raise_met()
            self._batch += messages
            size += sum(len(message.value or b"") for message in messages)

    def _leave(self, partitions: Collection[int]) -> None:
        """Settles what is in hand before partitions go to somebody else, or lets go of theirs, to be read again."""
        if self._settling:  # and it fails for now
            self._gone.update(partitions)
            return
        try:
            self._settle(patient=False)
        except _FOR_NOW as error:
            logger.warning("what is in hand of partitions that go away is left to their next reader: %s", error)
        except DmanError as error:
            self._error = error
        self._batch = [message for message in self._batch if message.partition not in partitions]

    def _raise_met(self) -> None:
        if self._error is not None:
            raise self._error

    def _settle(self, *, patient: bool = True) -> None:
        """Stores the events in hand, puts the others where they belong, and commits the positions behind all."""
        self._settling = True
        try:
            tried = self._tried if patient else _once
            bad: list[Rejected] = []
            outcomes = tried(lambda: self._store(bad))
            self._count(outcomes)
            if bad and not self._stop_at_bad:
                tried(lambda: self._source.reject(bad))
                self._note_rejected(bad)
            settled, self._batch = self._batch, []
            if bad and self._stop_at_bad:  # some behind it may be stored, and will be recognised
                del settled[min(settled.index(one.message) for one in bad) :]
            self._commit(settled)
        finally:
            self._settling = False
        if bad and self._stop_at_bad:
            raise InputError(
                f"{self._source.place(bad[0].message)}: {bad[0].reason}",
                "to go on, name a place for dead letters, or have such events skipped",
                parameter="bad_events",
            )

    def _store(self, bad: list[Rejected]) -> list[UpdateOutcome]:
        """One attempt to store what is in hand. `bad` gets what cannot be stored; where that ends everything, only what
        comes before the first one is looked at."""
        bad.clear()
        self._batch = [message for message in self._batch if message.partition not in self._gone]
        self._gone.clear()
        updates: list[Update] = []
        good: list[Message] = []
        for message in self._batch:
            try:
                event = self._reader.read(message)
            except UnusableError as error:
                bad.append(Rejected(message, str(error)))
                if self._stop_at_bad:
                    break
                continue
            update = Update(event.user_id, (event.item_id,), (event.timestamp,),
                            producer=message.producer, sequence=message.sequence)  # fmt: skip
            updates.append(update)
            good.append(message)
        if not updates:
            return []
        try:
            return self._engine.update(updates)
        except TooManyProducersError:
            return self._store_by_user(updates, good, bad)

    def _store_by_user(
        self, updates: Sequence[Update], messages: Sequence[Message], bad: list[Rejected]
    ) -> list[UpdateOutcome]:
        """Where a user has too many producers, which never changes: the others are stored without."""
        by_user: dict[str, list[int]] = {}
        for position, update in enumerate(updates):
            by_user.setdefault(update.user_id, []).append(position)
        outcomes: list[UpdateOutcome] = []
        for positions in by_user.values():
            try:
                outcomes += self._engine.update([updates[position] for position in positions])
            except TooManyProducersError as error:
                bad += [Rejected(messages[position], str(error)) for position in positions]
        return outcomes

    def _note_rejected(self, bad: Sequence[Rejected]) -> None:
        self.counts.rejected += len(bad)
        for one in bad:
            kind = one.reason.partition("'")[0]  # without the value
            self._limited.warning(kind, "%s: %s", self._source.place(one.message), one.reason)

    def _commit(self, settled: Sequence[Message]) -> None:
        """A position that cannot be committed now is with the next batch."""
        positions = {message.partition: message.after for message in settled if message.partition not in self._gone}
        self._gone.clear()
        if not positions:
            return
        try:
            self._source.commit(positions)
        except SourceUnavailableError as error:
            self._limited.warning("commit", "%s", error)

    def _count(self, outcomes: Sequence[UpdateOutcome]) -> None:
        counts = self.counts
        counts.batches += bool(outcomes)
        for outcome in outcomes:
            counts.repeats += outcome.duplicate
            counts.dropped_late += outcome.late.dropped
            stored = not outcome.duplicate and not outcome.late.dropped
            counts.events += stored
            counts.unknown += stored and outcome.unknown_count

    # -- patience ----------------------------------------------------------------------------------------------------

    def _tried(self, action: Callable[[], Done]) -> Done:
        """The result of an action, which is tried again, after longer and longer pauses, while it fails for now."""
        pause = FIRST_PAUSE
        while True:
            try:
                done = action()
            except _FOR_GOOD:
                raise
            except _FOR_NOW as error:
                self.counts.retries += 1
                self._limited.warning("retry", "%s; nothing is lost, it is tried again in %.1f s", error, pause)
                self._pause(pause, error)
                pause = min(LONGEST_PAUSE, 2 * pause)
            else:
                if pause > FIRST_PAUSE:
                    logger.info("it goes on")
                return done

    def _pause(self, seconds: float, error: DmanError) -> None:
        """Raises the error where nobody wants to wait for better times."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._stopped():
                raise error
            self._source.wait(min(left, LOOK_SECONDS))
            self._raise_met()
            self._look()

    # -- reports -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            self.counts.lags = dict(self._source.lags())

    def _report(self) -> None:
        """From time to time: a line in the log where there is news, and what a store wants done."""
        self._look()
        counts, now = self.counts, time.monotonic()
        if (seconds := now - self._told) < REPORT_SECONDS:
            return
        said = counts.events, counts.repeats, counts.rejected
        if said != self._said:
            rate = (counts.events - self._said[0]) / seconds
            logger.info("%s; %.0f events/s, lag %d %s", counts.summary(), rate, counts.lag, self._source.unit)
        self._told, self._said = now, said
        with suppress(StoreError):  # the next commit says more
            self._engine.store.maintain()
            self._look_at_rollout()

    def _look_at_rollout(self) -> None:
        own = self._engine.projection.bundle.bundle_id
        answering = self._engine.store.standing().rollout.answering(own)
        if answering not in (own, self._answering):
            logger.warning(
                "servers answer with bundle %s, and this keeps the states of %s: theirs are brought up to date when "
                "their users are touched; restart this with their bundle", answering, own,
            )  # fmt: skip
        self._answering = answering


def _once(action: Callable[[], Done]) -> Done:
    return action()
