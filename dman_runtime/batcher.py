"""The engine's only door in a server: gathers concurrent requests into batches and cuts long work into slices.

All work of a batcher runs on its own thread, in *turns*:

1. what is short (at most SLICE_EVENTS events to encode) and waiting is encoded together, committed together and
   answered. It never waits to fill a batch.
2. what is long gets one slice of about SLICE_EVENTS events, in which the long requests take turns.

So nobody waits for more than one slice of somebody else's long request. Updates of one user are applied in the order
of their arrival: an update waits while an earlier one of the same user is under way. A request that was cancelled, or
whose deadline has passed, stops at the next slice; it is never started late.

A server has two of them, one for updates and one for queries: a commit that waits for the disk delays no answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from dman_runtime.engine import COMMIT_ATTEMPTS, Engine, conflict_pause
from dman_runtime.errors import ConflictError, StoppedError
from dman_runtime.metrics import NO_METRICS, Metrics
from dman_runtime.opened import OpenUser, catch_up_updates
from dman_runtime.requests import NOT_LATE, Answer, Query, Update, UpdateOutcome, check_query, check_updates
from dman_runtime.waiting import NO_DEADLINE, Job

logger = logging.getLogger(__name__)
SLICE_EVENTS = 128  # a long request holds up others for the time of this many events
SHORT_EVENTS_PER_TURN = 2048  # short requests beyond it wait for the next turn
MAX_LONG_USERS = 1024  # open at a time: each holds a state in memory
CATCH_UP_EVENTS = 32  # a query that lacks no more is answered before they are stored
_MAX_CATCH_UPS = 64  # in the queue of a writer, of queries that do not wait for them
_SHORTEST_WAIT = 0.001  # seconds until the queue is looked at again
_MIN_PRUNED = 1000  # requests in the queue, before those that nobody waits for are looked for


class Batcher:
    """Runs requests in turns. Everything may be called from any thread."""

    def __init__(self, engine: Engine, *, writer: Batcher | None = None, metrics: Metrics = NO_METRICS) -> None:
        """`writer` stores the records that queries find out of date; this one does if there is none."""
        self._engine, self._writer, self._metrics = engine, writer or self, metrics
        self._queue: deque[Job] = deque()
        self._prune_at = _MIN_PRUNED
        self._catching_up = 0  # queries that wait for the writer
        self._closed = False
        self._changed = threading.Condition()  # guards the four above
        self._long: list[Job] = []  # opened, with events left; of this class's own thread
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    # -- what callers ask ------------------------------------------------------------------------------------------

    def submit_updates(
        self, updates: Sequence[Update], *, batch_id: str = "", deadline: float = NO_DEADLINE
    ) -> Future[list[UpdateOutcome]]:
        """`Engine.update` for checked updates, sharing graph runs and commit with others. Cancel the future to stop.

        `deadline` is a time of time.monotonic(). Raises StoppedError; the future raises what `Engine.update` raises,
        and ExpiredError.
        """
        return self._submit(Job(updates=updates, batch_id=batch_id, deadline=deadline))

    def submit_queries(self, queries: Sequence[Query], *, deadline: float = NO_DEADLINE) -> Future[list[Answer]]:
        """`Engine.recommend` for checked queries, sharing graph runs and one matrix product; as `submit_updates`."""
        return self._submit(Job(queries=queries, deadline=deadline))

    def update(self, updates: Sequence[Update], *, batch_id: str = "") -> list[UpdateOutcome]:
        """Checks the updates, submits them and waits for the result."""
        check_updates(updates, batch_id)
        return self.submit_updates(updates, batch_id=batch_id).result()

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """Checks the queries, submits them and waits for the result."""
        for query in queries:
            check_query(query)
        return self.submit_queries(queries).result()

    @property
    def queue_depth(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    def busy_since(self) -> float | None:
        """When the turn of now began (time.monotonic()); None between turns."""
        return self._busy_since

    def close(self) -> None:
        """Finishes what waits and ends the thread. Close a writer after those that use it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _submit(self, job: Job) -> Future[Any]:
        if not job.updates and not job.queries:
            job.finish([])
            return job.result
        with self._changed:
            if self._closed:
                raise StoppedError("the server is stopping", "try another one or again later")
            self._queue.append(job)
            if len(self._queue) > self._prune_at:  # a commit may take minutes, and callers leave and come back
                waiting, self._queue = self._queue, deque()
                self._queue.extend(job for job in waiting if not job.is_dead())
                self._prune_at = max(_MIN_PRUNED, 2 * len(self._queue))
            self._changed.notify()
        return job.result

    # -- whose turn it is ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (jobs := self._next_jobs()) is not None:
            self._busy_since = time.monotonic()
            self._turn(jobs)
            self._busy_since = None

    def _next_jobs(self) -> list[Job] | None:
        """Waits for work: the jobs that may start now; None when closed and all work is done."""
        with self._changed:
            while True:
                jobs = self._admit()
                if jobs or self._long:
                    return jobs
                if self._closed and not self._queue and not self._catching_up:
                    return None
                delayed = [job.not_before for job in self._queue]  # or 0, for those that wait behind a delayed one
                self._changed.wait(max(_SHORTEST_WAIT, min(delayed) - time.monotonic()) if delayed else None)

    def _admit(self) -> list[Job]:
        """Takes from the queue what may start now; an update waits behind earlier ones of its users."""
        admitted: list[Job] = []
        now = time.monotonic()
        busy = {user_id for job in self._long for user_id in job.user_ids}
        events, users = 0, sum(len(job.waiting) for job in self._long)
        waiting, self._queue = self._queue, deque()
        for job in waiting:
            if job.is_dead():
                continue
            long = job.events > SLICE_EVENTS
            room = users < MAX_LONG_USERS if long else events < SHORT_EVENTS_PER_TURN
            user_ids = job.user_ids
            if room and job.not_before <= now and busy.isdisjoint(user_ids):
                admitted.append(job)
                events += 0 if long else job.events
                users += len(job.updates) + len(job.queries) if long else 0
            else:
                self._queue.append(job)
            busy |= user_ids  # also of jobs that wait: nobody overtakes
        return admitted

    # -- one turn --------------------------------------------------------------------------------------------------

    def _turn(self, jobs: list[Job]) -> None:
        """Finishes the short ones of some jobs, and gives the long ones, old and new, a slice."""
        try:
            short: list[Job] = []
            for job in self._open(jobs):
                left = sum(len(user.left) for user in job.waiting)
                (short if left <= SLICE_EVENTS else self._long).append(job)
            self._metrics.turn(len(short), sum(job.events for job in short))
            together = [job for job in short if not job.alone]
            for group in [together, *([job] for job in short if job.alone)]:
                self._finish(self._advance(group))
            self._long = [job for job in self._long if not job.is_dead()]
            if self._long:
                self._finish(self._slice())
        except Exception as error:  # a fault of this class: whoever waits must hear of it
            logger.exception("a turn failed")
            with self._changed:
                queued = set(self._queue)
            for job in {*jobs, *self._long} - queued:
                job.fail(error)
            self._long.clear()

    def _open(self, jobs: Sequence[Job]) -> list[Job]:
        """Opens the users of jobs. A job that fails is answered, and harms no other."""
        opened = []
        for job in jobs:
            try:
                if job.opened is not None:
                    job.opened = self._engine.reopen(job.opened, job.conflicts, job.batch_id)
                elif job.updates:
                    job.opened = self._engine.open_updates(job.updates, job.batch_id)
                elif not self._open_queries(job):
                    continue
            except Exception as error:
                job.fail(error)
                continue
            job.conflicts = set()
            job.waiting = deque(user for user in job.users if len(user.left))
            opened.append(job)
        return opened

    def _open_queries(self, job: Job) -> bool:
        """Opens queries. False where they wait: the writer first brings records up to date that lack many events."""
        job.opened_queries = self._engine.open_queries(job.queries, catch_up=not job.caught_up)
        updates = catch_up_updates(job.opened_queries)
        if not updates:
            return True
        job.caught_up, job.opened_queries = True, self._engine.open_queries(job.queries, catch_up=False)
        if sum(len(one.user.left) for one in job.opened_queries if one.user) <= CATCH_UP_EVENTS:
            job.afterwards = updates
            return True
        try:
            stored = self._writer.submit_updates(updates, deadline=job.deadline)
        except StoppedError:  # the answer does not depend on it
            return True
        job.opened_queries = []
        with self._changed:
            self._catching_up += 1
        stored.add_done_callback(lambda _: self._requeue(job))
        return False

    def _requeue(self, job: Job) -> None:
        with self._changed:
            self._catching_up -= 1
            self._queue.append(job)
            self._changed.notify()

    def _advance(self, jobs: list[Job]) -> list[Job]:
        """Advances short jobs wholly, in shared graph runs. Returns those that are still to be finished."""
        try:
            self._engine.advance([user for job in jobs for user in job.waiting])
        except Exception as error:
            self._each_alone(jobs, error)
            return []
        return jobs

    def _slice(self) -> list[Job]:
        """One slice of the long jobs, a piece of each in rotation. Returns those that are done."""
        served: list[tuple[Job, OpenUser]] = []
        first = self._long[0]
        turns = deque([first] if first.alone else [job for job in self._long if not job.alone])
        budget = SLICE_EVENTS
        while turns and budget > 0:
            job = turns.popleft()
            user = job.waiting.popleft()
            served.append((job, user))
            budget -= user.piece_events
            if job.waiting:
                turns.append(job)
        jobs = list(dict.fromkeys(job for job, _ in served))
        self._long = [job for job in self._long if job not in jobs]  # served jobs go behind the others
        try:
            self._engine.advance_pieces([user for _, user in served])
        except Exception as error:
            self._each_alone(jobs, error)
            return []
        for job, user in served:
            if len(user.left):
                job.waiting.append(user)
        self._long += [job for job in jobs if job.waiting]
        return [job for job in jobs if not job.waiting]

    def _finish(self, jobs: list[Job]) -> None:
        """Answers jobs whose users are advanced: queries by one matrix product, updates after one commit."""
        jobs = [job for job in jobs if not job.is_dead()]
        if queries := [job for job in jobs if job.queries]:
            try:
                answers = iter(self._engine.answer([query for job in queries for query in job.opened_queries]))
            except Exception as error:
                self._each_alone(queries, error)
            else:
                for job in queries:
                    job.finish([next(answers) for _ in job.queries])
                for job in queries:
                    self._store_afterwards(job)
        if updates := [job for job in jobs if job.updates]:
            self._commit(updates)

    def _store_afterwards(self, job: Job) -> None:
        """Has the writer store what a query lacked. Where it is busy, the next query of the user asks for it again."""
        if job.afterwards and self._writer.queue_depth < _MAX_CATCH_UPS:
            with suppress(StoppedError):
                self._writer.submit_updates(job.afterwards)

    def _commit(self, updates: list[Job]) -> None:
        """Commits jobs together; those whose users somebody else has changed are tried again after a pause."""
        began = time.perf_counter()
        try:
            while updates and (conflicts := set(self._engine.commit([user for job in updates for user in job.users]))):
                for job in updates:
                    if not conflicts.isdisjoint(job.user_ids):
                        self._again(job, conflicts)
                updates = [job for job in updates if conflicts.isdisjoint(job.user_ids)]
        except Exception as error:
            self._each_alone(updates, error, opened=True)
            return
        self._metrics.commit(time.perf_counter() - began)
        for job in updates:
            assert job.opened is not None
            for outcome in job.opened.outcomes:
                self._metrics.applied(outcome.applied, int(outcome.duplicate), outcome.unknown_count)
                if outcome.late is not NOT_LATE:
                    self._metrics.late(*outcome.late)
            job.finish(job.opened.outcomes)

    def _again(self, job: Job, conflicts: set[str]) -> None:
        """Puts a job back to the head of the queue. Only its users in conflict will be computed again."""
        job.attempts, job.conflicts = job.attempts + 1, conflicts & job.user_ids
        if job.attempts >= COMMIT_ATTEMPTS:
            job.fail(ConflictError("other workers kept changing the same users", "try again"))
            return
        job.not_before = time.monotonic() + conflict_pause(job.attempts)
        with self._changed:
            self._queue.appendleft(job)

    def _each_alone(self, jobs: Sequence[Job], error: Exception, *, opened: bool = False) -> None:
        """After a failure of several jobs together: each is run by itself, so that only the one at fault fails.

        With `opened`, as it is: a store that commits each user by itself may have stored some of them.
        """
        for job in reversed(jobs):
            if job.alone or len(jobs) == 1:
                job.fail(error)
                continue
            job.alone, job.opened, job.opened_queries = True, job.opened if opened else None, []
            with self._changed:
                self._queue.appendleft(job)
