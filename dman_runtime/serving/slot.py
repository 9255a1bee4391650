"""One place for a worker process: its state, and what becomes of the process in it. Nothing here waits."""

from __future__ import annotations

import logging
import multiprocessing
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from dman_runtime.errors import BundleError, DmanError, UsageError
from dman_runtime.options import configure_logging
from dman_runtime.problems import ClusterStatus, Problem
from dman_runtime.serving.cluster import Assignment, Beat, Ready, WorkerPipe, drain, offer
from dman_runtime.serving.config import ServeConfig
from dman_runtime.serving.metrics import renew_metrics

logger = logging.getLogger(__name__)
Run = Callable[[ServeConfig, WorkerPipe], int]  # what a worker does, until it is asked to stop; its exit status


class State(Enum):
    WAITING = "waiting for its next start"
    STARTING = "starting"
    READY = "ready"
    HUNG = "hung"  # killed, and not yet gone


@dataclass(frozen=True)
class Timing:
    """In seconds."""

    heartbeat: float = 5.0  # without a message from a ready worker: it hangs
    start: float = 120.0  # without being ready: it hangs
    first_pause: float = 0.5  # before a worker is started again; doubles
    longest_pause: float = 30.0
    settled: float = 60.0  # of serving, after which the first pause applies again
    tick: float = 0.1  # between two looks at the workers

    def pause(self, failures: int) -> float:
        """The pause after so many failures in a row. Drawn anew each time, so that workers do not start in step."""
        return min(self.first_pause * 2.0 ** min(failures - 1, 30), self.longest_pause) * random.uniform(0.75, 1.25)


class Slot:
    """A place for one worker. `step` looks at it and does what is due."""

    def __init__(self, number: int, run: Run, config: ServeConfig, *, timing: Timing, metrics: Path | None) -> None:
        self.number, self.state = number, State.WAITING
        self.ready: Ready | None = None  # what the worker said when it was ready last
        self.error: DmanError | None = None  # what the last worker ended with
        self.reason = ""  # why the last worker ended
        self.problem: Problem | None = None  # until a worker is ready again
        self.starts = 0
        self.failures = 0  # in a row
        self._run, self._config, self._timing, self._metrics = run, config, timing, metrics
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._told: ClusterStatus | None = None
        self._hangs = ""  # why, if it does
        self._status: dict[str, object] = {}  # of the last heartbeat
        self._since = self._heard = self._next_start = 0.0
        self._ready_at: float | None = None  # since its last start

    def step(self, now: float, bundle_id: str | None) -> None:
        """`bundle_id`: what the others serve."""
        if self._process is None:
            if now >= self._next_start:
                self._start(now, bundle_id)
            return
        self._read(now, bundle_id)
        if not self._process.is_alive():
            self._read(now, bundle_id)  # its last words
            self._ended(now, bundle_id)
        elif self.state is State.STARTING and now - self._since > self._timing.start:
            self._kill(now, f"is not ready after {self._timing.start:g} s")
        elif self.state is State.READY and now - self._heard > self._timing.heartbeat:
            self._kill(now, f"gave no sign of life for {self._timing.heartbeat:g} s; its last one was {self._status}")

    def tell(self, status: ClusterStatus) -> None:
        """Sends a status to a worker that serves, once; again at the next call if its pipe is full."""
        if self.state is State.READY and self._pipe is not None and status != self._told and offer(self._pipe, status):
            self._told = status

    def forgive(self, seconds: float) -> None:
        """The supervisor itself was stopped so long, and its workers perhaps with it."""
        self._heard += seconds
        self._since += seconds

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def stopped(self) -> bool:
        return self._process is None or not self._process.is_alive()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _start(self, now: float, bundle_id: str | None) -> None:
        self.state, self.error, self._hangs, self._status, self._told = State.STARTING, None, "", {}, None
        self._since, self._ready_at = now, None
        self.starts += 1
        self._renew_metrics()
        context = multiprocessing.get_context("spawn")  # never a fork: grpc and LMDB allow none
        assignment = Assignment(self.number, bundle_id, self._metrics)
        verbose = logging.getLogger().isEnabledFor(logging.DEBUG)
        try:
            self._pipe, theirs = context.Pipe()
            with theirs:
                arguments = (self._run, self._config, theirs, assignment, verbose)
                process = context.Process(target=worker_main, args=arguments, name="dman-worker", daemon=True)
                process.start()
            self._process = process
        except OSError as error:  # no process or descriptor is left
            self.error = UsageError(f"cannot start a process: {error.strerror}", "raise the limits of this system")
            self._ended(now, bundle_id)

    def _read(self, now: float, bundle_id: str | None) -> None:
        assert self._pipe is not None
        messages, _ = drain(self._pipe)
        for message in messages:
            self._heard = now
            if isinstance(message, Beat):
                self._status = message.status
            elif isinstance(message, Ready):
                self._is_ready(now, message, bundle_id)
            elif isinstance(message, DmanError):
                self.error = message

    def _is_ready(self, now: float, ready: Ready, bundle_id: str | None) -> None:
        try:
            Assignment(self.number, bundle_id).check_bundle(self._config.bundle, ready.bundle_id)
        except BundleError as error:  # replaced while the first workers started
            self.error = error
            self.kill()
            return
        if self.starts > 1:
            logger.info("worker %d serves again", self.number, extra={"event": "worker_ready", "worker": self.number})
        self.ready, self.state, self.problem, self._ready_at = ready, State.READY, None, now

    def _kill(self, now: float, reason: str) -> None:
        self.state, self._hangs = State.HUNG, reason
        self.kill()
        self._name_problem(now, reason)
        fields = {"event": "worker_hung", "worker": self.number}
        logger.error("worker %d hangs: it %s; it is killed", self.number, reason, extra=fields)

    def _ended(self, now: float, bundle_id: str | None) -> None:
        self.reason = self._hangs or (str(self.error) if self.error else self._exit())
        settled = self._ready_at is not None and now - self._ready_at >= self._timing.settled
        self.failures = 1 if settled else self.failures + 1
        pause = self._timing.pause(self.failures)
        self._name_problem(now, self.reason)
        self._next_start, self.state = now + pause, State.WAITING
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.close()
        self._pipe = self._process = None
        self._renew_metrics()
        if bundle_id is not None:  # else it is not yet sure whether any worker can be started
            fields = {"event": "worker_down", "worker": self.number, "failures": self.failures}
            what = "did not start" if self._ready_at is None and not self._hangs else "is gone"
            logger.error("worker %d %s: %s; next start in %.1f s", self.number, what, self.reason, pause, extra=fields)

    def _exit(self) -> str:
        """How the process ended, in words."""
        status = self._process.exitcode if self._process is not None else None
        if status is None or status >= 0:
            return f"exit status {status}"
        names = {number.value: number.name for number in signal.Signals}  # not every number has one
        return f"killed by {names.get(-status, f'signal {-status}')}"

    def _name_problem(self, now: float, reason: str) -> None:
        """A restart that finds an unusable bundle means that it is no longer what the others serve."""
        changed = isinstance(self.error, BundleError) and not self._hangs
        name = "bundle_changed" if changed else "worker_hung" if self._hangs else "worker_down"
        detail = reason if changed else f"worker {self.number}: {reason}; it is started again"
        since = self.problem.since if self.problem is not None and self.problem.name == name else now
        self.problem = Problem(name, detail[:1000], since)

    def _renew_metrics(self) -> None:
        if self._metrics is not None:
            try:
                renew_metrics(self._metrics, str(self.number))
            except OSError as error:
                logger.warning("no room for the metrics of worker %d: %s", self.number, error)


def worker_main(run: Run, config: ServeConfig, connection: Connection, assignment: Assignment, verbose: bool) -> None:
    """The worker process: ends with the status of `run`. Errors go to the supervisor, or else to the log."""
    configure_logging(verbose=verbose, json=config.log_format == "json")
    pipe = WorkerPipe(connection, assignment)
    try:
        status = run(config, pipe)
    except DmanError as error:
        pipe.failed(error)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except Exception:
        logger.critical("worker %d ends", assignment.slot, exc_info=True)
        status = 1
    raise SystemExit(status)
