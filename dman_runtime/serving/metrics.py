"""Which metrics a process keeps: none, its own, or those of several workers in a directory of their supervisor."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dman_runtime.metrics import NO_METRICS, Metrics
from dman_runtime.serving.cluster import WorkerPipe
from dman_runtime.serving.config import ServeConfig

SUPERVISOR = "supervisor"  # as a writer beside the workers' slots


@contextmanager
def worker_metrics(config: ServeConfig, pipe: WorkerPipe | None) -> Iterator[Metrics]:
    """What a worker records into. One without a supervisor serves them too. Raises UsageError."""
    if config.metrics_port is None:
        yield NO_METRICS
        return
    from dman_runtime.serving.metrics_server import serve_metrics
    from dman_runtime.serving.prometheus import metrics_here, metrics_in

    if pipe is not None and pipe.assignment.metrics is not None:
        yield metrics_in(pipe.assignment.metrics, str(pipe.assignment.slot))
        return
    metrics = metrics_here()
    server = serve_metrics(metrics.registry, host=config.metrics_host, port=config.metrics_port)
    try:
        yield metrics
    finally:
        server.stop()


@contextmanager
def supervisor_metrics(config: ServeConfig) -> Iterator[tuple[Metrics, Path | None]]:
    """What the supervisor records into, and the directory for all; the sum is served. Raises UsageError."""
    if config.metrics_port is None:
        yield NO_METRICS, None
        return
    from dman_runtime.serving.metrics_server import serve_metrics
    from dman_runtime.serving.prometheus import metrics_in, sum_of

    with tempfile.TemporaryDirectory(prefix="dman-metrics-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        server = serve_metrics(sum_of(directory), host=config.metrics_host, port=config.metrics_port)
        try:
            renew_metrics(directory, SUPERVISOR)
            yield metrics_in(directory, SUPERVISOR), directory
        finally:
            server.stop()


def renew_metrics(directory: Path, writer: str) -> None:
    """Ends the gauges of a process that has ended, and makes room for those of the next. Raises OSError."""
    from dman_runtime.serving.prometheus import renew_files

    renew_files(directory, writer)
