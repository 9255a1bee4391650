"""Micro-batching: gathers concurrent requests into batches, without ever waiting for company.

While one batch is encoded and committed, the requests that arrive queue up and form the next. Only one batch runs at
a time, and all updates of a batch share one durable commit.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dman_runtime.engine import Answer, Engine, Query, Update, UpdateOutcome

logger = logging.getLogger(__name__)
MAX_EVENTS_PER_BATCH = 4096  # bounds how long one batch can hold up the next


class Stopped(Exception):
    """The server is stopping and takes no new work."""


@dataclass(slots=True)
class _Job:
    work: Sequence[Update] | Query
    result: Future[Any]

    @property
    def updates(self) -> Sequence[Update]:
        return () if isinstance(self.work, Query) else self.work

    @property
    def events(self) -> int:
        if isinstance(self.work, Query):
            return len(self.work.what_if)
        return sum(len(update.item_ids) for update in self.work)


class Batcher:
    """Runs the work of many threads one batch at a time. Every call blocks until its own work is done."""

    def __init__(self, engine: Engine, *, one_thread: bool = True) -> None:
        """With `one_thread` all batches run on the inference thread, as CUDA wants it.

        Without, a call that finds nothing running or queued is run by its own thread, which saves two thread switches.
        """
        self._engine, self._one_thread = engine, one_thread
        self._queue: deque[_Job] = deque()
        self._running = self._closed = False
        self._changed = threading.Condition()  # guards the three above
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def update(self, updates: Sequence[Update]) -> list[UpdateOutcome]:
        """`Engine.update`, sharing its batch and commit with concurrent callers. Raises what it raises, and Stopped."""
        return self._submit(updates)

    def recommend(self, query: Query) -> Answer:
        """`Engine.recommend`, batched as well: for queries with what-if events."""
        return self._submit(query)

    def _submit(self, work: Sequence[Update] | Query) -> Any:
        with self._changed:
            if self._closed:
                raise Stopped
            alone = not (self._one_thread or self._running or self._queue)
            if alone:
                self._running = True
            else:
                job = _Job(work, Future())
                self._queue.append(job)
                self._changed.notify_all()
        if not alone:
            return job.result.result()
        try:
            return self._engine.recommend(work) if isinstance(work, Query) else self._engine.update(work)
        finally:
            self._end()

    def close(self) -> None:
        """Finishes the queued work and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._process(batch)

    def _next_batch(self) -> list[_Job]:
        """Waits for its turn and takes what has queued up; empty when closed and all work is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running and (self._queue or self._closed))
            batch: list[_Job] = []
            events = 0
            while self._queue and events < MAX_EVENTS_PER_BATCH:
                batch.append(self._queue.popleft())
                events += batch[-1].events
            self._running = bool(batch)
            return batch

    def _process(self, batch: list[_Job]) -> None:
        try:
            updates = [job for job in batch if not isinstance(job.work, Query)]
            if updates:
                self._apply(updates)
            for job in batch:
                if isinstance(job.work, Query):
                    _settle(job, self._engine.recommend, job.work)
        finally:
            self._end()

    def _end(self) -> None:
        """Lets the next batch run."""
        with self._changed:
            self._running = False
            if self._queue or self._closed:
                self._changed.notify_all()

    def _apply(self, jobs: list[_Job]) -> None:
        """One commit for all; when that fails, each alone, so that one bad request fails nobody else's."""
        if len(jobs) > 1:
            try:
                outcomes = iter(self._engine.update([update for job in jobs for update in job.updates]))
            except Exception:
                logger.warning("a batch of %d updates failed; trying each alone", len(jobs), exc_info=True)
            else:
                for job in jobs:
                    job.result.set_result([next(outcomes) for _ in job.updates])
                return
        for job in jobs:
            _settle(job, self._engine.update, job.updates)


def _settle(job: _Job, work: Callable[[Any], Any], argument: Any) -> None:
    try:
        result = work(argument)
    except Exception as error:
        job.result.set_exception(error)
    else:
        job.result.set_result(result)
