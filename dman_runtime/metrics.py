"""What a worker counts and measures, without the library that keeps it."""

from __future__ import annotations

from collections.abc import Iterable


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
