"""The server process: gRPC with health and reflection, graceful stop, and a supervisor for several workers.

Workers are fresh processes (never forks: grpc and LMDB allow none) that share the port through SO_REUSEPORT and the
state directory through LMDB. The supervisor holds the port, restarts a worker that dies, and passes on SIGTERM.
"""

from __future__ import annotations

import logging
import multiprocessing
import select
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

from dman_runtime.errors import DmanError, UsageError

logger = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 16 << 20
SERVICE_NAME = "dman.v1.Recommender"
MAX_RESTARTS_PER_MINUTE = 10


@dataclass(frozen=True)
class ServeConfig:
    bundle: Path
    state: Path
    host: str
    port: int  # 0: any free one
    provider: str
    workers: int
    threads: int  # concurrent requests per worker; more wait
    encoder_threads: int  # CPU threads per graph run
    max_concurrent: int  # requests per worker, running and waiting; beyond it RESOURCE_EXHAUSTED
    map_size_mib: int
    grace: float  # seconds that in-flight requests get when stopping
    share_port: bool = False  # set by the supervisor

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port is {self.port}; choose 0 to 65535")
        for name in ("workers", "threads", "encoder_threads", "max_concurrent", "map_size_mib"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; choose 1 or more")
        if not 0 <= self.grace <= 3600:  # nor NaN
            raise UsageError(f"--grace is {self.grace}; choose 0 to 3600 seconds")


def serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status."""
    return _supervise(config) if config.workers > 1 else _serve_one(config, ready=None)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _check_port(config: ServeConfig) -> int:
    """The port to listen on, a free one for 0. Raises UsageError where any server listens, shared or not."""
    try:
        with socket.socket(_family(config.host), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a crash left in TIME_WAIT is no server
            probe.bind((config.host, config.port))
            return probe.getsockname()[1]
    except OSError as error:
        raise UsageError(
            f"cannot listen on {_address(config.host, config.port)}: {error.strerror}; "
            "stop the other server or choose another --port"
        ) from None


class _Stop:
    """Asked for by SIGTERM, SIGINT or `set`. Use as a context manager, in the main thread.

    A threading.Event misses a signal that arrives just as the main thread begins to wait: handlers run after the wait.
    The wakeup descriptor gets its byte at once, in whichever thread and state Python is.
    """

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        """Signals that come later find a process that is ending anyway, and no descriptor to write to."""
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()

    def set(self) -> None:
        with suppress(OSError):  # stopped already
            self._writer.send(b"\0")

    def wait(self, timeout: float | None = None) -> bool:
        """Whether stopping was asked for, after at most `timeout` seconds. Nothing is read, so it stays so."""
        return bool(select.select([self._reader], [], [], timeout)[0])


# -- one worker ------------------------------------------------------------------------------------------------------


class Server:
    """One worker: opens everything, serves, and closes in order. Use as a context manager."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises BundleError, EncoderError, StoreError, and UsageError when the port cannot be had."""
        # Imported here so that the supervisor stays small and free of grpc.
        import grpc
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        from dman_runtime.api.recommender import RecommenderService
        from dman_runtime.batcher import Batcher
        from dman_runtime.engine import Engine
        from dman_runtime.model.bundle import open_bundle
        from dman_runtime.model.encoder import Encoder
        from dman_runtime.model.recurrence import check_golden
        from dman_runtime.store.lmdb import StateStore
        from protos.dman.v1.dman_pb2_grpc import add_RecommenderServicer_to_server

        bundle = open_bundle(config.bundle)
        encoder = Encoder(bundle.path, provider=config.provider, threads=config.encoder_threads)  # type: ignore[arg-type]
        check_golden(bundle, encoder)
        self.provider = encoder.provider
        self.bundle_id = bundle.bundle_id
        self._grace = config.grace
        self._serving = health_pb2.HealthCheckResponse.SERVING
        self._health = health.HealthServicer()
        self._server = grpc.server(
            ThreadPoolExecutor(config.threads, thread_name_prefix="request"),
            maximum_concurrent_rpcs=config.max_concurrent,
            options=[
                ("grpc.so_reuseport", int(config.share_port)),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        try:
            self.port = self._server.add_insecure_port(_address(config.host, config.port))
        except RuntimeError:
            raise UsageError(
                f"cannot listen on {_address(config.host, config.port)}: the port is in use or not allowed; "
                "stop the other server or choose another --port"
            ) from None
        self._store = StateStore.open(
            config.state,
            bundle_id=bundle.bundle_id,
            item_ids=bundle.items.item_ids,
            map_size=config.map_size_mib << 20,
        )
        engine = Engine(bundle, encoder, self._store)
        self._batcher = Batcher(engine, one_thread=encoder.on_cuda)
        add_RecommenderServicer_to_server(RecommenderService(engine, self._batcher), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    def __enter__(self) -> Server:
        self._server.start()
        for service in ("", SERVICE_NAME):
            self._health.set(service, self._serving)
        return self

    def __exit__(self, *_: object) -> None:
        """In-flight requests finish (up to the grace period), queued updates are committed, the store is flushed."""
        self._health.enter_graceful_shutdown()
        self._server.stop(self._grace).wait()
        self._batcher.close()
        self._store.flush()
        self._store.close()


def _serve_one(config: ServeConfig, ready: Connection | None) -> int:
    if not config.share_port:
        _check_port(config)  # before the bundle is loaded, and in one line where gRPC writes several
    with _Stop() as stop, Server(config) as server:
        if ready is None:
            _announce(server.bundle_id, server.provider, config, server.port)
        else:
            ready.send((server.bundle_id, server.provider))
            threading.Thread(target=_stop_with_parent, args=(ready, stop), daemon=True).start()
        stop.wait()
        logger.info("stopping")
    logger.info("stopped")
    return 0


def _announce(bundle_id: str, provider: str, config: ServeConfig, port: int) -> None:
    workers = f"{config.workers} worker{'s' if config.workers > 1 else ''}"
    print(f"serving bundle {bundle_id} on {_address(config.host, port)} ({provider}, {workers})", flush=True)


def _stop_with_parent(pipe: Connection, stop: _Stop) -> None:
    """A worker whose supervisor was killed stops by itself: the pipe ends."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        stop.set()


# -- several workers -------------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


def _supervise(config: ServeConfig) -> int:
    with _reserve_port(config) as holder, _Stop() as stop:
        port = holder.getsockname()[1]
        shared = replace(config, port=port, share_port=True)
        workers: list[_Worker] = []
        try:
            for _ in range(config.workers):
                workers.append(_start(shared))
            details = [_wait_until_ready(worker) for worker in workers]
            _announce(*details[0], config, port)
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
    port = _check_port(config)
    holder = socket.socket(_family(config.host), socket.SOCK_STREAM)
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
        status = _serve_one(config, ready=pipe)
    except DmanError as error:
        pipe.send(str(error))
        status = 2
    raise SystemExit(status)


def _wait_until_ready(worker: _Worker) -> tuple[str, str]:
    """Bundle id and provider of a started worker. Raises UsageError with its reason when it does not start."""
    try:
        message = worker.pipe.recv()
    except EOFError:
        raise UsageError("a worker died while starting; see the messages above") from None
    if isinstance(message, str):
        raise UsageError(message)
    return message


def _watch(workers: list[_Worker], config: ServeConfig, stop: _Stop) -> None:
    """Restarts workers that die, until asked to stop. Raises UsageError when they keep dying."""
    restarts: list[float] = []
    while not stop.wait(0.2):
        for place, worker in enumerate(workers):
            if worker.process.is_alive():
                continue
            now = time.monotonic()
            restarts = [*(t for t in restarts if now - t < 60), now]
            if len(restarts) > MAX_RESTARTS_PER_MINUTE:
                raise UsageError("workers keep dying; see the messages above")
            logger.error("worker %d died with status %s; restarting it", worker.process.pid, worker.process.exitcode)
            worker.pipe.close()
            workers[place] = _start(config)
            try:
                _wait_until_ready(workers[place])
            except UsageError as error:  # the next round finds it dead
                logger.error("%s", error)
                workers[place].process.join(1)
