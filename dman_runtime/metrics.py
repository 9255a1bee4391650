"""What a worker or an ingester counts and measures, without the library that keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


class Metrics:
    """Counts nothing: what a process without `--metrics-port` uses. `serving/prometheus.py` has the one that counts.

    All methods are safe for threads and take a few microseconds. Times are in seconds, sizes in bytes.
    """

    def call(self, method: str, status: str, seconds: float) -> None:
        """A call was answered: method without its service ("Update"), name of the gRPC status ("OK")."""

    def refused(self, cause: str) -> None:
        """A call was refused before any work, for example "in_flight_bytes", "caller_requests", "unauthenticated"."""

    def turn(self, jobs: int, events: int) -> None:
        """The batcher encoded so many events for so many requests together."""

    def commit(self, seconds: float) -> None:
        """A transaction was committed durably."""

    def applied(self, events: int, duplicates: int, unknown: int) -> None:
        """Stored: known events; updates that had been applied before; events of items that the bundle does not know."""

    def late(self, dropped: int, placed: int, deferred: int) -> None:
        """Late events: not stored; stored in their places; those of them that wait for their record to be made anew."""

    def fallback(self, answers: int = 1) -> None:
        """Recommendations by popularity, as nothing is known about the user."""

    def queue_depth(self, requests: int) -> None:
        """Requests that wait for their turn now."""

    def bytes_in_flight(self, size: int) -> None:
        """Messages and replies that this worker holds now."""

    def requests_in_flight(self, requests: int) -> None:
        """Calls that this worker has accepted and not answered now."""

    def store(self, bytes_used: int, file_bytes: int, map_bytes: int) -> None:
        """The size of the store now: what it uses, its file, and what the file may grow to."""

    def stale_readers(self, cleared: int) -> None:
        """Reader slots of dead processes that were cleared."""

    def unparsable(self, messages: int) -> None:
        """Messages that did not parse."""

    def restarts(self, workers: int) -> None:
        """Workers that were started again."""

    def workers(self, asked: int, ready: int) -> None:
        """Workers that were asked for, and those that serve now."""

    def problems(self, names: Iterable[str]) -> None:
        """All problems of now, by the names that GetStatus uses."""


NO_METRICS = Metrics()


@dataclass
class IngestCounts:
    """What has become of the messages so far. Read from other threads, for metrics."""

    events: int = 0  # stored
    repeats: int = 0  # recognised: stored before
    rejected: int = 0  # that can never be stored
    dropped_late: int = 0  # not stored, as they came late and such events are dropped
    unknown: int = 0  # of those stored: of items that the bundle does not know
    batches: int = 0  # of events, each stored at once
    retries: int = 0  # attempts that failed for now
    lags: dict[str, int] = field(default_factory=dict)  # by partition: what is not settled yet

    @property
    def lag(self) -> int:
        return sum(self.lags.values())

    def summary(self) -> str:
        """For people."""
        late = f", {self.dropped_late} dropped as late" if self.dropped_late else ""
        return (
            f"{self.events} events stored, {self.unknown} of them of items that the bundle does not know; "
            f"{self.repeats} recognised as repeats, {self.rejected} rejected{late}"
        )
