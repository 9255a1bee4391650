"""Serves with one worker, or with several that share a port and a state directory.

Workers are fresh processes that share the port through SO_REUSEPORT and the state directory through LMDB. The
supervisor holds the port and looks after the workers: one that dies or hangs is started again, after a pause that
grows; the others never notice. It ends only when it is asked to, or when no worker could be started at all.
"""

from __future__ import annotations

import logging
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from dman_runtime.access.listening import check_listening, check_tls_options
from dman_runtime.errors import UsageError
from dman_runtime.metrics import Metrics
from dman_runtime.problems import ClusterStatus, Problem
from dman_runtime.serving.config import ServeConfig, free_port, socket_for
from dman_runtime.serving.metrics import supervisor_metrics
from dman_runtime.serving.slot import Run, Slot, State, Timing
from dman_runtime.serving.stop import StopRequest
from dman_runtime.serving.unix_socket import check_socket
from dman_runtime.serving.worker import announce, serve_one

logger = logging.getLogger(__name__)
EXTRA_GRACE = 10.0  # seconds beyond the grace period until a worker that does not stop is killed
LATE = 1.0  # seconds between two looks at the workers that say that the supervisor itself was stopped


def serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status. Raises DmanError where it cannot start."""
    check_tls_options(
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
        tls_client_ca=config.tls_client_ca,
        insecure=config.insecure,
    )
    check_listening(config.host, tls_cert=config.tls_cert, insecure=config.insecure)
    if config.admin_port is not None:
        check_listening(config.admin_host, tls_cert=config.tls_cert, insecure=config.insecure)
    elif config.admin_socket is not None:
        check_socket(config.admin_socket)
    return _serve_several(config) if config.workers > 1 else serve_one(config, None)


def _serve_several(config: ServeConfig) -> int:
    with (
        _reserve_port(config) as holder,
        _reserve_admin_port(config) as admin_holder,
        StopRequest() as stop,
        supervisor_metrics(config) as (metrics, directory),
    ):
        shared = config.at_port(holder.getsockname()[1], shared=True)
        if admin_holder is not None:
            shared = replace(shared, admin_port=admin_holder.getsockname()[1])
        Supervisor(shared, serve_one, metrics=metrics, metrics_directory=directory).run(stop)
    logger.info("stopped")
    return 0


def _reserve_admin_port(config: ServeConfig) -> AbstractContextManager[socket.socket | None]:
    if config.admin_port is None:
        return nullcontext()
    return _reserve_port(config.of_admin(), parameter="admin_port")


def _reserve_port(config: ServeConfig, *, parameter: str = "port") -> socket.socket:
    """Binds the port without listening, so that it stays ours while workers come and go. Raises UsageError."""
    port = free_port(config, parameter=parameter)
    holder = socket_for(config.host)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        holder.setsockopt(socket.SOL_SOCKET, option, 1)
    holder.bind((config.host, port))
    return holder


class Supervisor:
    """Looks after the workers of one server. Every worker does `run`."""

    def __init__(
        self,
        config: ServeConfig,
        run: Run,
        *,
        metrics: Metrics,
        metrics_directory: Path | None = None,
        timing: Timing | None = None,
    ) -> None:
        self.config, self._timing, self._metrics = config, timing or Timing(), metrics
        self.slots = [
            Slot(number, run, config, timing=self._timing, metrics=metrics_directory)
            for number in range(config.workers)
        ]
        self.bundle_id: str | None = None  # of the first worker that was ready; the others must serve the same
        self.status = ClusterStatus(config.workers, 0, 0, ())
        metrics.workers(config.workers, 0)
        self._announced = False
        self._looked = time.monotonic()

    def run(self, stop: StopRequest) -> None:
        """Starts the workers, and keeps them running until asked to stop.

        Raises the DmanError of the first worker when none could be started.
        """
        try:
            while not stop.wait(self._timing.tick):
                self.step(time.monotonic())
        finally:
            self.stop_workers()

    def step(self, now: float) -> None:
        """One look at all workers."""
        late = now - self._looked - self._timing.tick
        self._looked = now
        for slot in self.slots:
            if late > LATE:
                slot.forgive(late)
            slot.step(now, self.bundle_id)
            if self.bundle_id is None and slot.ready is not None:
                self.bundle_id = slot.ready.bundle_id
        self._report()
        if not self._announced:
            self._announce_or_give_up()

    def _report(self) -> None:
        """Tells metrics and workers what has changed."""
        before, self.status = self.status, self._look()
        if self.status != before:
            self._metrics.workers(self.status.workers, self.status.ready)
            self._metrics.restarts(self.status.restarts - before.restarts)
            self._metrics.problems(problem.name for problem in self.status.problems)
        for slot in self.slots:
            slot.tell(self.status)

    def _look(self) -> ClusterStatus:
        problems: dict[str, Problem] = {}  # one for all workers that say the same
        for slot in self.slots:
            if slot.problem is not None:
                problems.setdefault(slot.problem.detail, slot.problem)
        return ClusterStatus(
            workers=len(self.slots),
            ready=sum(slot.state is State.READY for slot in self.slots),
            restarts=sum(max(0, slot.starts - 1) for slot in self.slots),
            problems=tuple(problems.values()),
            admin=self._admin() if self.config.has_admin else None,
        )

    def _admin(self) -> int | None:
        """The slot of the worker that has the admin service: as long as that serves, the same one."""
        ready = [slot.number for slot in self.slots if slot.state is State.READY]
        return self.status.admin if self.status.admin in ready else next(iter(ready), None)

    def _announce_or_give_up(self) -> None:
        """Once every worker has been ready or has failed for the first time."""
        if not all(slot.ready or slot.failures for slot in self.slots):
            return
        first = next((slot.ready for slot in self.slots if slot.ready), None)
        if first is None:
            errors = [slot.error for slot in self.slots if slot.error is not None]
            reason = f"no worker could be started: {self.slots[0].reason}"
            raise errors[0] if errors else UsageError(reason, "see the messages above")
        announce(first.serves, first.provider, self.config, self.config.port, self.config.admin_address)
        self._announced = True
        for slot in self.slots:
            if slot.problem is not None:  # while none was ready, nothing was logged
                fields = {"event": slot.problem.name, "worker": slot.number}
                logger.error("worker %d did not start: %s", slot.number, slot.reason, extra=fields)

    def stop_workers(self) -> None:
        """Lets requests under way finish, and kills whoever takes longer than that."""
        for slot in self.slots:
            slot.ask_to_stop()
        deadline = time.monotonic() + self.config.grace + EXTRA_GRACE
        while not all(slot.stopped() for slot in self.slots) and time.monotonic() < deadline:
            time.sleep(0.02)
        for slot in self.slots:
            if not slot.stopped():
                logger.error("worker %d does not stop; it is killed", slot.number, extra={"event": "worker_killed"})
                slot.kill()
