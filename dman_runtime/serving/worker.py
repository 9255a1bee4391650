"""One worker process: from its start to its end."""

from __future__ import annotations

import logging
import threading
from multiprocessing.connection import Connection

from dman_runtime.serving.config import ServeConfig, free_port
from dman_runtime.serving.stop import StopRequest

logger = logging.getLogger(__name__)


def serve_one(config: ServeConfig, ready: Connection | None) -> int:
    """Serves until it is asked to stop; says so through `ready`, or else on stdout. Returns the exit status."""
    if not config.share_port:
        free_port(config)  # before the bundle is loaded, and in one line where gRPC writes several
    from dman_runtime.serving.app import App  # so that a supervisor stays small and free of gRPC

    with StopRequest() as stop, App(config) as app:
        generation = app.generation
        provider = generation.graphs.provider
        if ready is None:
            announce(generation.bundle_id, provider, config, app.port)
        else:
            ready.send((generation.bundle_id, provider))
            threading.Thread(target=_stop_with_supervisor, args=(ready, stop), daemon=True).start()
        stop.wait()
        logger.info("stopping")
    logger.info("stopped")
    return 0


def announce(bundle_id: str, provider: str, config: ServeConfig, port: int) -> None:
    address = config.at_port(port).address
    workers = f"{config.workers} worker{'s' if config.workers > 1 else ''}"
    print(f"serving bundle {bundle_id} on {address} ({provider}, {workers})", flush=True)


def _stop_with_supervisor(pipe: Connection, stop: StopRequest) -> None:
    """A worker whose supervisor was killed stops by itself: the pipe ends."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        stop.set()
