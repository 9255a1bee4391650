"""Work on batches of users, spread over processes of this machine or of a Ray cluster.

Results come in the order of the batches, and do not depend on who computed them. A process that is killed costs the
batches that it had: they are computed again. A bounded number of batches is under way.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from dman_runtime.errors import DmanError, UsageError

Batch = TypeVar("Batch")
Result = TypeVar("Result")
Batch_contra = TypeVar("Batch_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)
ENGINES = ("local", "ray")
AHEAD = 2  # batches of each process that wait or run
FEW_EVENTS = 50_000  # are encoded while a process starts
MAX_DEATHS = 3  # of processes, one after the other, without a result in between


class Work(Protocol[Batch_contra, Result_co]):
    """What is to be done with each batch: hashable, and pickled to be sent to the processes."""

    def open(self) -> Callable[[Batch_contra], Result_co]:
        """Loads what is needed, once in each process."""
        ...

    def __hash__(self) -> int: ...


class Spread(Protocol):
    """Where work is done."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def results(self, work: Work[Batch, Result], batches: Iterable[Batch]) -> Iterator[Result]:
        """In order. Raises what the work raises, and UsageError where processes die again and again."""
        ...


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(engine: str, processes: int, *, events: int) -> Spread:
    """One of ENGINES, for a job of so many events.

    `processes`: 0: one for each core, or this one alone where there are few events. Ray counts its own.

    Raises UsageError.
    """
    if processes < 0:
        raise UsageError(f"{processes} processes are not possible", "choose 0 or more", parameter="processes")
    if engine == "ray":
        return RayCluster()
    count = processes or (cores() if events > FEW_EVENTS else 1)
    return Processes(count) if count > 1 else HERE


class Here:
    """This process."""

    name = "in this process"

    def results(self, work: Work[Batch, Result], batches: Iterable[Batch]) -> Iterator[Result]:
        """As in `Spread`."""
        return map(work.open(), batches)


HERE = Here()


@lru_cache(maxsize=1)
def _opened(work: Any) -> Callable[[Any], Any]:
    """Of this process."""
    opened: Callable[[Any], Any] = work.open()
    return opened


def _do(work: Work[Batch, Result], batch: Batch) -> Result:
    result: Result = _opened(work)(batch)
    return result


class Processes:
    """Several processes of this machine."""

    def __init__(self, count: int) -> None:
        self._count, self.name = count, f"by {count} processes"

    def results(self, work: Work[Batch, Result], batches: Iterable[Batch]) -> Iterator[Result]:
        """As in `Spread`."""
        pool, deaths = self._new_pool(), 0
        under_way = deque[tuple[Batch, Future[Result]]]()
        left = iter(batches)
        try:
            while True:
                while len(under_way) < AHEAD * self._count and (batch := next(left, _END)) is not _END:
                    under_way.append((batch, _submitted(pool, work, batch)))
                if not under_way:
                    return
                try:
                    result = under_way[0][1].result()
                except BrokenProcessPool:
                    if (deaths := deaths + 1) == MAX_DEATHS:
                        raise _dying() from None
                    pool.shutdown(wait=True)
                    pool = self._new_pool()
                    under_way = deque((batch, _again(pool, work, batch, future)) for batch, future in under_way)
                    continue
                deaths = 0
                under_way.popleft()
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._count, mp_context=multiprocessing.get_context("spawn"))


_END: Any = object()


def _submitted(pool: ProcessPoolExecutor, work: Work[Batch, Result], batch: Batch) -> Future[Result]:
    """A future, also of a pool that has just broken."""
    try:
        return pool.submit(_do, work, batch)
    except BrokenProcessPool as error:
        future: Future[Result] = Future()
        future.set_exception(error)
        return future


def _again(
    pool: ProcessPoolExecutor, work: Work[Batch, Result], batch: Batch, future: Future[Result]
) -> Future[Result]:
    """The future of a batch after its pool has broken: the same if it has its result."""
    return _submitted(pool, work, batch) if isinstance(future.exception(), BrokenProcessPool) else future


def _dying() -> DmanError:
    return UsageError(
        f"the processes that work on the users were killed {MAX_DEATHS} times in a row",
        "look for the kernel's reason (memory?), and use fewer of them",
        parameter="processes",
    )


class RayCluster:
    """The cluster that RAY_ADDRESS names or that runs on this machine, or else a new one of this machine's cores."""

    name = "by Ray"

    def results(self, work: Work[Batch, Result], batches: Iterable[Batch]) -> Iterator[Result]:
        """As in `Spread`. Raises UsageError without Ray."""
        try:
            ray: Any = importlib.import_module("ray")  # it has few types
        except ImportError:
            raise UsageError("the library Ray is not installed", "install dman[ray]", parameter="engine") from None
        started = not ray.is_initialized()
        if started:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        # Idempotent, so that Ray may repeat a batch whose process or node has gone.
        run = ray.remote(num_cpus=1, max_retries=MAX_DEATHS - 1, retry_exceptions=False)(_do)
        under_way, left, sent = deque[Any](), iter(batches), ray.put(work)
        try:
            most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while True:
                while len(under_way) < most and (batch := next(left, _END)) is not _END:
                    under_way.append(run.remote(sent, batch))
                if not under_way:
                    return
                yield self._result(ray, under_way.popleft())
        finally:
            for waiting in under_way:
                ray.cancel(waiting, force=True)
            if started:
                ray.shutdown()

    @staticmethod
    def _result(ray: Any, waiting: Any) -> Any:
        try:
            return ray.get(waiting)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, DmanError) else error) from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            raise _dying() from None
