"""Metrics kept by prometheus_client. Imported only where metrics are asked for.

One process keeps them in memory. With several, each writes its own files into a directory of the supervisor, which
adds them up when it is asked. The files are named after the worker's slot, not its process, so a worker that is started
again goes on with the counters of the one before, and the number of files does not grow with restarts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from dman_runtime.metrics import Metrics

CALL_SECONDS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
COMMIT_SECONDS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5, 1.0, 5.0)
JOBS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
EVENTS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
MAX_LABELS = 200  # per metric; what comes later is counted as OTHER, so that no caller can make metrics grow
OTHER = "other"
# The files of one process and their sizes, enough for MAX_LABELS. Their blocks are taken from the disk when they are
# made: on a full disk, a write into a hole of a mapped file would end the process.
FILE_BYTES = {"counter": 128 << 10, "histogram": 1 << 20, "gauge_livesum": 64 << 10, "gauge_livemax": 64 << 10}


class PrometheusMetrics(Metrics):
    """Keeps them in this process, or in the files of `record_in`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._define_requests()
        self._define_work()
        self._define_state()
        self._calls: dict[tuple[str, str], Histogram] = {}  # looking a child up by its labels takes longer than this
        self._refusals: dict[str, Counter] = {}
        self._problems: dict[str, Gauge] = {}

    def _define_requests(self) -> None:
        self._call = self._histogram("request_duration_seconds", "Time until a call was answered", CALL_SECONDS,
                                     "method", "status")  # fmt: skip
        self._refused = self._counter("refused_requests", "Calls refused before any work", "cause")
        self._fallback = self._counter("fallback_answers", "Recommendations by popularity")
        self._unparsable = self._counter("unparsable_messages", "Messages that did not parse")
        self._queue_depth = self._gauge("queue_depth", "Requests that wait for their turn")
        self._bytes_in_flight = self._gauge("in_flight_bytes", "Messages and replies held")
        self._requests_in_flight = self._gauge("in_flight_requests", "Calls accepted and not answered")

    def _define_work(self) -> None:
        self._turn_jobs = self._histogram("turn_requests", "Requests encoded together", JOBS)
        self._turn_events = self._histogram("turn_events", "Events encoded together", EVENTS)
        self._commit = self._histogram("commit_duration_seconds", "Time of a durable commit", COMMIT_SECONDS)
        self._events = self._counter("applied_events", "Events stored that the bundle knows")
        self._unknown = self._counter("unknown_events", "Events stored of items that the bundle does not know")
        self._late = self._counter("late_events", "Events of before the end of their history, by outcome", "outcome")
        self._duplicates = self._counter("duplicate_updates", "Updates that had been applied before")

    def _define_state(self) -> None:
        self._used = self._gauge("store_used_bytes", "Bytes of the store in use", mode="livemax")
        self._file = self._gauge("store_file_bytes", "Size of the store's file", mode="livemax")
        self._map = self._gauge("store_map_bytes", "Largest size of the store's file", mode="livemax")
        self._stale = self._counter("stale_readers_cleared", "Reader slots of dead processes that were cleared")
        self._restarts = self._counter("worker_restarts", "Workers that were started again")
        self._workers = self._gauge("workers", "Workers asked for", mode="livemax")
        self._ready = self._gauge("workers_ready", "Workers that serve", mode="livemax")
        self._problem = self._gauge("problem", "1 while the problem lasts", "problem", mode="livemax")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dman_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str, mode: Any = "livesum") -> Gauge:
        """`mode`: what several workers give together, their sum or their largest value."""
        return Gauge(f"dman_{name}", text, labels, registry=self.registry, multiprocess_mode=mode)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"dman_{name}", text, labels, registry=self.registry, buckets=buckets)

    def call(self, method: str, status: str, seconds: float) -> None:
        child = self._calls.get((method, status))
        if child is None:
            labels = (method, status) if len(self._calls) < MAX_LABELS else (OTHER, OTHER)
            child = self._calls[labels] = self._call.labels(*labels)
        child.observe(seconds)

    def refused(self, cause: str) -> None:
        child = self._refusals.get(cause)
        if child is None:
            label = cause if len(self._refusals) < MAX_LABELS else OTHER
            child = self._refusals[label] = self._refused.labels(label)
        child.inc()

    def turn(self, jobs: int, events: int) -> None:
        self._turn_jobs.observe(jobs)
        self._turn_events.observe(events)

    def commit(self, seconds: float) -> None:
        self._commit.observe(seconds)

    def applied(self, events: int, duplicates: int, unknown: int) -> None:
        if events:
            self._events.inc(events)
        if duplicates:
            self._duplicates.inc(duplicates)
        if unknown:
            self._unknown.inc(unknown)

    def late(self, dropped: int, placed: int, deferred: int) -> None:
        for outcome, events in (("dropped", dropped), ("placed", placed - deferred), ("deferred", deferred)):
            if events:
                self._late.labels(outcome).inc(events)

    def fallback(self, answers: int = 1) -> None:
        self._fallback.inc(answers)

    def queue_depth(self, requests: int) -> None:
        self._queue_depth.set(requests)

    def bytes_in_flight(self, size: int) -> None:
        self._bytes_in_flight.set(size)

    def requests_in_flight(self, requests: int) -> None:
        self._requests_in_flight.set(requests)

    def store(self, bytes_used: int, file_bytes: int, map_bytes: int) -> None:
        self._used.set(bytes_used)
        self._file.set(file_bytes)
        self._map.set(map_bytes)

    def stale_readers(self, cleared: int) -> None:
        self._stale.inc(cleared)

    def unparsable(self, messages: int) -> None:
        self._unparsable.inc(messages)

    def restarts(self, workers: int) -> None:
        self._restarts.inc(workers)

    def workers(self, asked: int, ready: int) -> None:
        self._workers.set(asked)
        self._ready.set(ready)

    def problems(self, names: Iterable[str]) -> None:
        present = set(names)
        for name in present - self._problems.keys():
            self._problems[name] = self._problem.labels(name)
        for name, gauge in self._problems.items():
            gauge.set(name in present)


def metrics_here() -> PrometheusMetrics:
    """The metrics of a server of one process. Makes them once only in a process."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    values.ValueClass = values.MutexValue  # whatever the environment says
    metrics = PrometheusMetrics()
    metrics.workers(1, 1)
    return metrics


def metrics_in(directory: Path, writer: str) -> PrometheusMetrics:
    """The metrics of one process of several. `writer` names its files: the slot of a worker, or "supervisor"."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    values.ValueClass = values.MultiProcessValue(lambda: writer)  # type: ignore[no-untyped-call]
    return PrometheusMetrics()


def renew_files(directory: Path, writer: str) -> None:
    """Makes the files of a process that has ended, or has not started: gauges end with it, counters stay.

    Raises OSError on a full disk.
    """
    mark_process_dead(writer, str(directory))  # type: ignore[no-untyped-call]
    for kind, size in FILE_BYTES.items():
        path, new = directory / f"{kind}_{writer}.db", directory / f"{kind}_{writer}.new"
        if not path.exists():
            try:
                new.write_bytes(bytes(size))
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)


def sum_of(directory: Path) -> CollectorRegistry:
    """The metrics of all processes that write into a directory."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]
    return registry
