"""The metrics of an ingester, as `metrics_server` serves them: read from its counts when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dman_runtime.metrics import IngestCounts

_COUNTERS = {
    "events": "Events stored",
    "repeats": "Events that were stored before",
    "rejected": "Messages that can never be stored",
    "dropped_late": "Events not stored, as they came late",
    "unknown": "Events stored of items that the bundle does not know",
    "batches": "Batches of events, each stored at once",
    "retries": "Attempts that failed for now",
}


class _Collector(Collector):
    def __init__(self, counts: IngestCounts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"dman_ingest_{name}", text, value=getattr(self._counts, name))
        lag = GaugeMetricFamily("dman_ingest_lag", "What is not settled yet, in events or bytes", labels=["partition"])
        for partition, left in self._counts.lags.items():
            lag.add_metric([partition], left)
        yield lag


def ingest_registry(counts: IngestCounts) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Collector(counts))
    return registry
