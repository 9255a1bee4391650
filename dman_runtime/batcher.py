"""The inference thread: gathers concurrent requests into batches, without ever waiting for company.

While one batch is encoded and committed, the requests that arrive queue up and form the next. All graph runs happen on
this one thread (CUDA wants that), and all updates of a batch share one durable commit.
"""

from __future__ import annotations

import logging
import queue
import threading
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
    """Runs the work of many threads on one. Every call blocks until its own work is done."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def update(self, updates: Sequence[Update]) -> list[UpdateOutcome]:
        """`Engine.update`, sharing its batch and commit with concurrent callers. Raises what it raises, and Stopped."""
        return self._submit(updates)

    def recommend(self, query: Query) -> Answer:
        """`Engine.recommend` on the inference thread, for queries with what-if events."""
        return self._submit(query)

    def _submit(self, work: Sequence[Update] | Query) -> Any:
        job = _Job(work, Future())
        with self._lock:  # nothing may be queued behind the end mark
            if self._closed:
                raise Stopped
            self._jobs.put(job)
        return job.result.result()

    def close(self) -> None:
        """Finishes the queued work and ends the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, events = [job], job.events
            ended = False
            while events < MAX_EVENTS_PER_BATCH:
                try:
                    following = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    ended = True
                    break
                batch.append(following)
                events += following.events
            self._process(batch)
            if ended:
                return

    def _process(self, batch: list[_Job]) -> None:
        updates = [job for job in batch if not isinstance(job.work, Query)]
        if updates:
            self._apply(updates)
        for job in batch:
            if isinstance(job.work, Query):
                _settle(job, self._engine.recommend, job.work)

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
