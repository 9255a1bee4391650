"""Serves with one worker, or with several that share a port and a state directory.

Workers are fresh processes (never forks: grpc and LMDB allow none) that share the port through SO_REUSEPORT and the
state directory through LMDB. The supervisor holds the port, restarts a worker that dies, and passes on SIGTERM.
"""

from __future__ import annotations

import logging
import multiprocessing
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from dman_runtime.errors import DmanError, UsageError
from dman_runtime.serving.config import ServeConfig, free_port, socket_for
from dman_runtime.serving.stop import StopRequest
from dman_runtime.serving.worker import announce, serve_one

logger = logging.getLogger(__name__)
MAX_RESTARTS_PER_MINUTE = 10


def serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status."""
    return _supervise(config) if config.workers > 1 else serve_one(config, ready=None)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


def _supervise(config: ServeConfig) -> int:
    with _reserve_port(config) as holder, StopRequest() as stop:
        port = holder.getsockname()[1]
        shared = config.at_port(port, shared=True)
        workers: list[_Worker] = []
        try:
            for _ in range(config.workers):
                workers.append(_start(shared))
            details = [_wait_until_ready(worker) for worker in workers]
            announce(*details[0], config, port)
            _watch(workers, shared, stop)
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join(config.grace + 10)
                if worker.process.is_alive():
                    worker.process.kill()
    logger.info("stopped")
    return 0


def _reserve_port(config: ServeConfig) -> socket.socket:
    """Binds the port without listening, so that it stays ours while workers come and go. Raises UsageError."""
    port = free_port(config)
    holder = socket_for(config.host)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        holder.setsockopt(socket.SOL_SOCKET, option, 1)
    holder.bind((config.host, port))
    return holder


def _start(config: ServeConfig) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker_main, args=(config, theirs), name="dman-worker", daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _worker_main(config: ServeConfig, pipe: Connection) -> None:
    from dman_runtime.options import configure_logging

    configure_logging()
    try:
        status = serve_one(config, ready=pipe)
    except DmanError as error:
        pipe.send(error)
        status = 2
    raise SystemExit(status)


def _wait_until_ready(worker: _Worker) -> tuple[str, str]:
    """Bundle id and provider of a started worker. Raises DmanError with its reason when it does not start."""
    try:
        message = worker.pipe.recv()
    except EOFError:
        raise UsageError("a worker died while starting", "see the messages above") from None
    if isinstance(message, DmanError):
        raise message
    bundle_id, provider = message
    return bundle_id, provider


def _watch(workers: list[_Worker], config: ServeConfig, stop: StopRequest) -> None:
    """Restarts workers that die, until asked to stop. Raises UsageError when they keep dying."""
    restarts: list[float] = []
    while not stop.wait(0.2):
        for index, worker in enumerate(workers):
            if worker.process.is_alive():
                continue
            now = time.monotonic()
            restarts = [*(t for t in restarts if now - t < 60), now]
            if len(restarts) > MAX_RESTARTS_PER_MINUTE:
                raise UsageError("workers keep dying", "see the messages above")
            logger.error("worker %d died with status %s; restarting it", worker.process.pid, worker.process.exitcode)
            worker.pipe.close()
            workers[index] = _start(config)
            try:
                _wait_until_ready(workers[index])
            except DmanError as error:  # the next round finds it dead
                logger.error("%s", error)
                workers[index].process.join(1)
