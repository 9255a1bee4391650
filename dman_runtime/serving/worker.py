"""One worker process: from its start to its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from contextlib import suppress

from dman_runtime.metrics import Metrics
from dman_runtime.serving.cluster import WorkerPipe
from dman_runtime.serving.config import ServeConfig, free_port
from dman_runtime.serving.metrics import worker_metrics

logger = logging.getLogger(__name__)
BEAT_SECONDS = 1.0
SWITCH_SECONDS = 0.0005  # a thread that computes in Python keeps the event loop waiting for no longer


def serve_one(config: ServeConfig, pipe: WorkerPipe | None) -> int:
    """Serves until it is asked to stop; says so to its supervisor, or else on stdout. Returns the exit status."""
    from dman_runtime.retrieval.exact import multiply_on_one_thread

    if not config.share_port:
        free_port(config)  # before the bundle is loaded, and in one line where gRPC writes several
    sys.setswitchinterval(SWITCH_SECONDS)
    multiply_on_one_thread()
    with worker_metrics(config, pipe) as metrics, asyncio.Runner(loop_factory=_fast_loop) as runner:
        runner.run(_serve(config, pipe, metrics))
    logger.info("stopped")
    return 0


def _fast_loop() -> asyncio.AbstractEventLoop:
    """uvloop takes a tenth off the CPU time of a call."""
    import uvloop

    return uvloop.new_event_loop()


async def _serve(config: ServeConfig, pipe: WorkerPipe | None, metrics: Metrics) -> None:
    from dman_runtime.serving.app import App  # so that a supervisor stays small and free of gRPC

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    expected = pipe.assignment.bundle_id if pipe is not None else None
    app = await asyncio.to_thread(App, config, expected_bundle_id=expected, metrics=metrics, loaded=_keep_loaded)
    async with app:
        provider = app.generation.graphs.provider
        if pipe is None:
            announce(app.bundle_id, provider, config, app.port, app.admin_address)
            await stop.wait()
        else:
            pipe.ready(app.generation.bundle_id, provider, app.bundle_id)
            while not stop.is_set():
                try:
                    app.cluster = pipe.receive() or app.cluster
                except EOFError:  # the supervisor was killed
                    break
                await app.administer(app.cluster.admin == pipe.assignment.slot)
                pipe.beat({"requests": app.requests, "problems": [one.name for one in app.problems.now()]})
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), BEAT_SECONDS)
        logger.info("stopping")


def _keep_loaded() -> None:
    """Has the garbage collector leave alone what there is.

    To look at all objects of libraries and bundles stops every thread for 30 to 70 ms. A bundle that is dropped later
    is freed all the same, as none refers to itself.
    """
    gc.freeze()


def announce(bundle_id: str, provider: str, config: ServeConfig, port: int, admin_address: str) -> None:
    address = config.at_port(port).address
    workers = f"{config.workers} worker{'s' if config.workers > 1 else ''}"
    admin = f", admin service on {admin_address}" if admin_address else ""
    print(f"serving bundle {bundle_id} on {address} ({provider}, {workers}){admin}", flush=True)
