"""One worker process: from its start to its end."""

from __future__ import annotations

import logging
import threading
import time

from dman_runtime.serving.cluster import WorkerPipe
from dman_runtime.serving.config import ServeConfig, free_port
from dman_runtime.serving.metrics import worker_metrics
from dman_runtime.serving.stop import StopRequest

logger = logging.getLogger(__name__)
BEAT_SECONDS = 1.0


def serve_one(config: ServeConfig, pipe: WorkerPipe | None) -> int:
    """Serves until it is asked to stop; says so to its supervisor, or else on stdout. Returns the exit status."""
    if not config.share_port:
        free_port(config)  # before the bundle is loaded, and in one line where gRPC writes several
    from dman_runtime.model.bundle import read_manifest  # here, so that a supervisor stays small and free of gRPC
    from dman_runtime.serving.app import App

    if pipe is not None and pipe.assignment.bundle_id is not None:  # before the bundle is loaded, again
        pipe.assignment.check_bundle(config.bundle, read_manifest(config.bundle).bundle_id)

    with StopRequest() as stop, worker_metrics(config, pipe):
        app = App(config)
        generation = app.generation
        if pipe is not None:
            pipe.assignment.check_bundle(config.bundle, generation.bundle_id)
        with app:
            provider = generation.graphs.provider
            if pipe is None:
                announce(generation.bundle_id, provider, config, app.port)
            else:
                pipe.ready(generation.bundle_id, provider)
                threading.Thread(target=_beat, args=(pipe, stop), daemon=True).start()
            stop.wait()
            logger.info("stopping")
    logger.info("stopped")
    return 0


def announce(bundle_id: str, provider: str, config: ServeConfig, port: int) -> None:
    address = config.at_port(port).address
    workers = f"{config.workers} worker{'s' if config.workers > 1 else ''}"
    print(f"serving bundle {bundle_id} on {address} ({provider}, {workers})", flush=True)


def _beat(pipe: WorkerPipe, stop: StopRequest) -> None:
    """Tells the supervisor that this process lives. A worker whose supervisor was killed stops by itself."""
    while True:
        try:
            pipe.receive()
        except EOFError:
            stop.set()
            return
        pipe.beat({})
        time.sleep(BEAT_SECONDS)
