"""Work on batches of users, spread over processes of this machine or of a Ray cluster.

Results come in the order of the batches, and do not depend on who computed them. A process that is killed costs the
batches that it was given: they are computed again. A bounded number of batches is under way.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from dman_runtime.errors import DmanError, UsageError
from dman_runtime.jobs.processes import AHEAD, MAX_DEATHS, Pool, Task, killed

Batch = TypeVar("Batch")
Result = TypeVar("Result")
Batch_contra = TypeVar("Batch_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)
ENGINES = ("local", "ray")
FEW_EVENTS = 50_000  # are encoded while a process starts


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

    def results(self, work: Work[Batch, Result], batches: Iterable[Batch]) -> Generator[Result, None, None]:
        """In order. Close it where it is not read to its end.

        Raises what the work raises, and UsageError where a batch ends one process after the other.
        """
        ...


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(engine: str, processes: int, *, events: int | None, on_cuda: bool = False) -> Spread:
    """One of ENGINES, for a job of so many events; None: nobody knows.

    Args:
        processes: 0: one for each core, or this one alone where there are few events. Ray counts its own.
        on_cuda: The graphs run on a device, which this process has for itself.

    Raises UsageError.
    """
    if processes < 0:
        raise UsageError(f"{processes} processes are not possible", "choose 0 or more", parameter="processes")
    if on_cuda and (engine == "ray" or processes > 1):
        raise UsageError(
            "the graphs run on CUDA, and so in this process only",
            "have them run on the CPU, or ask for no other processes",
            parameter="provider",
        )
    if engine == "ray":
        return RayCluster()
    count = processes or (cores() if (events is None or events > FEW_EVENTS) and not on_cuda else 1)
    return Processes(count) if count > 1 else HERE


class Here:
    """This process."""

    name = "in this process"

    def results(self, work: Work[Batch, Result], batches: Iterable[Batch]) -> Generator[Result, None, None]:
        """As in `Spread`."""
        yield from map(work.open(), batches)


HERE = Here()


class Processes:
    """Several processes of this machine."""

    def __init__(self, count: int) -> None:
        self._count, self.name = count, f"by {count} processes"

    def results(self, work: Work[Batch, Result], batches: Iterable[Batch]) -> Generator[Result, None, None]:
        """As in `Spread`."""
        pool, tasks, left = Pool(self._count, work.open), deque[Task](), iter(batches)
        try:
            while True:
                while len(tasks) < AHEAD * self._count and (batch := next(left, _END)) is not _END:
                    tasks.append(Task(batch))
                    pool.put(tasks[-1])
                if not tasks:
                    return
                while not tasks[0].done:
                    pool.step()
                if (task := tasks.popleft()).error is not None:
                    raise task.error
                yield task.result
        finally:
            pool.end()


_END: Any = object()


@lru_cache(maxsize=1)
def _opened(work: Any) -> Callable[[Any], Any]:
    """Of this process of the cluster, which does one piece of work after the other."""
    opened: Callable[[Any], Any] = work.open()
    return opened


def _do(work: Work[Batch, Result], batch: Batch) -> Result:
    result: Result = _opened(work)(batch)
    return result


class RayCluster:
    """The cluster that RAY_ADDRESS names or that runs on this machine, or else a new one of this machine's cores."""

    name = "by Ray"

    def __init__(self) -> None:
        """Raises UsageError without Ray."""
        try:
            self._ray: Any = importlib.import_module("ray")  # it has few types
        except ImportError:
            raise UsageError("the library Ray is not installed", "install dman[ray]", parameter="engine") from None

    def results(self, work: Work[Batch, Result], batches: Iterable[Batch]) -> Generator[Result, None, None]:
        """As in `Spread`."""
        ray = self._ray
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
                yield self._result(under_way.popleft())
        finally:
            for waiting in under_way:
                ray.cancel(waiting, force=True)
            if started:
                ray.shutdown()

    def _result(self, waiting: Any) -> Any:
        ray = self._ray
        try:
            return ray.get(waiting)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, DmanError) else error) from None
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.ObjectLostError,
        ):
            raise killed() from None
