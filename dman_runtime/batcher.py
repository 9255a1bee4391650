"""The engine's only door in a server: gathers concurrent requests into batches and cuts long work into slices.

Requests that need no graph are answered on the caller's own thread. All else runs in *turns*, one at a time:

1. what is short (at most SLICE_EVENTS events to encode) and waiting is encoded together, committed together and
   answered. It never waits to fill a batch.
2. what is long gets one slice of about SLICE_EVENTS events, in which the long requests take turns.

So nobody waits for more than one slice of somebody else's long request. Updates of one user are applied in the order
of their arrival: an update waits while an earlier one of the same user is under way.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dman_runtime.engine import COMMIT_ATTEMPTS, Engine
from dman_runtime.errors import ConflictError, StoppedError, StoreFullError
from dman_runtime.model.recurrence import Piece
from dman_runtime.opened import OpenQuery, OpenUpdates, OpenUser, catch_up_updates
from dman_runtime.requests import Answer, Query, Update, UpdateOutcome, check_update

logger = logging.getLogger(__name__)
SLICE_EVENTS = 128  # a long request holds up others for the time of this many events
SHORT_EVENTS_PER_TURN = 2048  # short requests beyond it wait for the next turn
MAX_LONG_USERS = 1024  # open at a time: each holds a state in memory


@dataclass(slots=True, eq=False)
class _Job:
    """A request that waits or runs."""

    updates: Sequence[Update] = ()
    queries: Sequence[OpenQuery] = ()  # instead of updates
    result: Future[Any] = field(default_factory=Future)
    attempts: int = 0
    opened: OpenUpdates | None = None
    waiting: deque[OpenUser] = field(default_factory=deque)  # users that have events left

    @property
    def user_ids(self) -> set[str]:
        """The users that this changes."""
        return {update.user_id for update in self.updates}

    @property
    def users(self) -> list[OpenUser]:
        if self.opened is not None:
            return self.opened.users
        return [one.user for one in self.queries if one.user is not None]

    @property
    def events(self) -> int:
        """Events to encode, as far as it is known before the users are opened."""
        left = sum(len(one.user.left) for one in self.queries if one.user is not None)
        return left + sum(len(update.item_ids) for update in self.updates)


class Batcher:
    """Runs the requests of many threads in turns. Every call blocks until its own request is done."""

    def __init__(self, engine: Engine, *, one_thread: bool | None = None) -> None:
        """With `one_thread`, all turns run on one thread, as CUDA wants it; the default asks the graphs.

        Without, a short request that finds nothing running or waiting is run by its own thread, which saves two thread
        switches.
        """
        self._engine = engine
        self._one_thread = engine.generation.graphs.on_cuda if one_thread is None else one_thread
        self._queue: deque[_Job] = deque()
        self._running = self._closed = False
        self._changed = threading.Condition()  # guards the three above
        self._long: list[_Job] = []  # opened, with events left; of the thread whose turn it is
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    # -- what callers ask ------------------------------------------------------------------------------------------

    def update(self, updates: Sequence[Update]) -> list[UpdateOutcome]:
        """`Engine.update`, sharing batch and commit with others. Raises what it raises, and StoppedError."""
        for update in updates:
            check_update(update)
        return self._submit(_Job(updates=updates)) if updates else []

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """`Engine.recommend`: one matrix product for all queries, graph runs shared with concurrent callers."""
        opened = self._engine.open_queries(queries)
        if updates := catch_up_updates(opened):
            with suppress(StoreFullError, ConflictError):  # the answer does not depend on it
                self._submit(_Job(updates=updates))
            opened = self._engine.open_queries(queries, catch_up=False)
        if any(one.user is not None for one in opened):
            return self._submit(_Job(queries=opened))
        return self._engine.answer(opened)

    def close(self) -> None:
        """Finishes what waits and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # -- whose turn it is ------------------------------------------------------------------------------------------

    def _submit(self, job: _Job) -> Any:
        """Waits for the result of a job. A short one that finds nothing running or waiting gets a turn right here."""
        with self._changed:
            if self._closed:
                raise StoppedError("the server is stopping", "try another one or again later")
            busy = self._one_thread or self._running or self._queue or self._long
            here = not busy and job.events <= SLICE_EVENTS
            if here:
                self._running = True
            else:
                self._queue.append(job)
                self._changed.notify_all()
        if here:
            self._turn([job])
            self._end_turn()
        return job.result.result()

    def _end_turn(self) -> None:
        with self._changed:
            self._running = False
            if self._queue or self._closed or self._long:
                self._changed.notify_all()

    def _run(self) -> None:
        while self._begin_turn():
            self._turn(self._admit())
            self._end_turn()

    def _begin_turn(self) -> bool:
        """Waits for work; False when closed and all work is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running and (self._queue or self._long or self._closed))
            self._running = bool(self._queue or self._long)
            return self._running

    # -- one turn --------------------------------------------------------------------------------------------------

    def _turn(self, jobs: list[_Job]) -> None:
        """Finishes the short ones of some jobs, and gives the long ones, old and new, a slice."""
        try:
            short: list[_Job] = []
            for job in self._open(jobs):
                left = sum(len(user.left) for user in job.waiting)
                (short if left <= SLICE_EVENTS else self._long).append(job)
            self._finish(self._advance(short))
            if self._long:
                self._finish(self._slice())
        except Exception as error:  # a fault of this class: whoever waits must hear of it
            logger.exception("a turn failed")
            for job in {*jobs, *self._long} - set(self._queue):
                if not job.result.done():
                    job.result.set_exception(error)
            self._long.clear()

    def _admit(self) -> list[_Job]:
        """Takes from the queue what may start now; an update waits behind earlier ones of its users."""
        admitted: list[_Job] = []
        busy = {user_id for job in self._long for user_id in job.user_ids}
        events, users = 0, sum(len(job.waiting) for job in self._long)
        with self._changed:
            waiting, self._queue = self._queue, deque()
            for job in waiting:
                long = job.events > SLICE_EVENTS
                room = users < MAX_LONG_USERS if long else events < SHORT_EVENTS_PER_TURN
                if room and busy.isdisjoint(job.user_ids):
                    admitted.append(job)
                    events += 0 if long else job.events
                    users += len(job.updates) + len(job.queries) if long else 0
                else:
                    self._queue.append(job)
                busy |= job.user_ids  # also of jobs that wait: nobody overtakes
        return admitted

    def _open(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Opens the users of jobs. A job that fails is answered, and harms no other."""
        opened = []
        for job in jobs:
            try:
                if job.updates:
                    job.opened = self._engine.open_updates(job.updates)
            except Exception as error:
                job.result.set_exception(error)
                continue
            job.waiting = deque(user for user in job.users if len(user.left))
            opened.append(job)
        return opened

    def _advance(self, jobs: list[_Job]) -> list[_Job]:
        """Advances short jobs wholly, in shared graph runs. Returns those that are still to be finished."""
        try:
            self._engine.advance([user for job in jobs for user in job.waiting])
        except Exception:
            self._each_alone(jobs)
            return []
        return jobs

    def _slice(self) -> list[_Job]:
        """One slice of the long jobs, a piece of each in rotation. Returns those that are done."""
        pieces: list[Piece] = []
        served: list[tuple[_Job, OpenUser]] = []
        turns, budget = deque(self._long), SLICE_EVENTS
        while turns and budget > 0:
            job = turns.popleft()
            user = job.waiting.popleft()
            pieces.append(user.take_piece())
            served.append((job, user))
            budget -= len(pieces[-1].items)
            if job.waiting:
                turns.append(job)
        jobs = list(dict.fromkeys(job for job, _ in served))
        self._long = [job for job in self._long if job not in jobs]  # served jobs go behind the others
        try:
            self._engine.generation.advance_pieces(pieces)
        except Exception:
            self._each_alone(jobs)
            return []
        for job, user in served:
            if len(user.left):
                job.waiting.append(user)
        self._long += [job for job in jobs if job.waiting]
        return [job for job in jobs if not job.waiting]

    def _finish(self, jobs: list[_Job]) -> None:
        """Answers jobs whose users are advanced: queries by one matrix product, updates after one commit."""
        queries = [job for job in jobs if job.queries]
        try:
            answers = iter(self._engine.answer([query for job in queries for query in job.queries]))
        except Exception:
            self._each_alone(queries)
        else:
            for job in queries:
                job.result.set_result([next(answers) for _ in job.queries])
        updates = [job for job in jobs if job.updates]
        try:
            while updates and (conflicts := set(self._engine.commit([user for job in updates for user in job.users]))):
                self._again([job for job in updates if not conflicts.isdisjoint(job.user_ids)])
                updates = [job for job in updates if conflicts.isdisjoint(job.user_ids)]
        except Exception:
            self._each_alone(updates)
            return
        for job in updates:
            job.result.set_result(job.opened.outcomes if job.opened else [])

    def _again(self, jobs: Sequence[_Job]) -> None:
        """Puts updates whose users somebody else has changed back to the head of the queue."""
        for job in jobs:
            job.attempts, job.opened = job.attempts + 1, None
            if job.attempts >= COMMIT_ATTEMPTS:
                job.result.set_exception(ConflictError("other workers kept changing the same users", "try again"))
        with self._changed:
            self._queue.extendleft(reversed([job for job in jobs if not job.result.done()]))

    def _each_alone(self, jobs: Sequence[_Job]) -> None:
        """After a failure of several jobs together: runs each by itself, so that only the one at fault fails."""
        for job in jobs:
            try:
                if job.updates:
                    result: Any = self._engine.update(job.updates)
                else:
                    result = self._engine.recommend([one.query for one in job.queries])
            except Exception as error:
                job.result.set_exception(error)
            else:
                job.result.set_result(result)
