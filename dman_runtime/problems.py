"""What is wrong with a server now."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    name: str  # one word for programs
    detail: str  # for those who run the server: what is wrong; what to do. May name paths
    since: float  # of time.monotonic(), a clock that all processes of a machine share
    blocking: bool = False  # the worker does not serve while this lasts


@dataclass(frozen=True)
class ClusterStatus:
    """All workers of a server, as their supervisor sees them."""

    workers: int  # asked for
    ready: int
    restarts: int  # workers that were started again
    problems: tuple[Problem, ...]
    admin: int | None = None  # slot of the worker that has the admin service; None: none has


class Problems:
    """What is wrong now. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: dict[str, Problem] = {}

    def set(self, name: str, detail: str, *, blocking: bool = False) -> None:
        """Something is wrong; an empty detail: it is not. A change is logged once."""
        with self._lock:
            before = self._now.get(name)
            if not detail:
                self._now.pop(name, None)
            elif before is None or (before.detail, before.blocking) != (detail, blocking):
                since = before.since if before else time.monotonic()
                self._now[name] = Problem(name, detail, since, blocking)
        if detail and before is None:
            logger.error("%s: %s", name, detail, extra={"event": "problem", "problem": name})
        elif not detail and before is not None:
            logger.info("%s is over", name, extra={"event": "problem_over", "problem": name})

    def now(self) -> list[Problem]:
        """Blocking ones first, then the oldest."""
        with self._lock:
            return sorted(self._now.values(), key=lambda problem: (not problem.blocking, problem.since))

    @property
    def blocking(self) -> bool:
        return any(problem.blocking for problem in self.now())
