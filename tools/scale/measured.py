"""What was measured, read from the pages that say so: a number that changes there changes here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dman_runtime.errors import UsageError


@dataclass(frozen=True)
class Measured:
    """A number, and the page that has it, or several from which it follows."""

    what: str
    unit: str
    page: str
    patterns: tuple[str, ...]  # each finds one or several numbers, in brackets
    of: Callable[..., float] = lambda number: number
    how: str = ""  # the arithmetic, with {0}, {1} for the numbers found

    def value(self, root: Path) -> float:
        """Raises UsageError where the page no longer says it."""
        return self.of(*(float(number.replace(",", "")) for number in self._found(root)))

    def arithmetic(self, root: Path) -> str:
        return self.how.format(*self._found(root))

    def _found(self, root: Path) -> list[str]:
        text = (root / self.page).read_text(encoding="utf-8")
        numbers: list[str] = []
        for pattern in self.patterns:
            found = re.search(pattern, text, re.MULTILINE)
            if not found:
                raise UsageError(
                    f"{self.page} no longer says: {self.what}", "mend the pattern in tools/scale/measured.py"
                )
            numbers += found.groups()
        return numbers


PERFORMANCE, LIFE = "reports/performance.md", "reports/life.md"
EXPERIMENTS, FORMATS, OPERATIONS = "docs/experiments.md", "docs/formats.md", "docs/operations.md"
SIMULATED = "reports/scale.md"
_MIX = tuple(rf"^\| {one} of the mix, 2 workers \| 64 \| \d+ \| ([\d,]+) \|" for one in ("recommend", "update"))
_STORE = (r"The store had ([\d.]+) MB before the rebuild, and ([\d.]+) MB after", r"of ([\d,]+) users \| none")
_ENCODED = r"Both encode ([\d,]+) events"
_WITH_REPLICA = r"^\| the same with a replica and `WAIT 1`, 1 connection \| ([\d.]+) \| ([\d.]+) \| ([\d.]+),"

MEASURED = {
    "record": Measured(
        "a record, mean of MovieLens-1M", "B", LIFE, (r"records of a bundle \| ([\d.]+) MB of ([\d,]+) users",),
        lambda megabytes, users: megabytes * 1e6 / users, "{0} MB / {1} users",
    ),
    "most": Measured("a record, largest", "B", FORMATS, (r"Together ([\d,]+) bytes without sketch",)),
    "record_on_disk": Measured(
        "what a record adds to the file of LMDB", "B", LIFE, _STORE,
        lambda before, after, users: (after - before) * 1e6 / users, "({1} - {0}) MB / {2} users",
    ),
    "event_on_disk": Measured(
        "what an event adds to it: history, seen items, free space", "B", LIFE, (*_STORE, _ENCODED),
        lambda before, after, users, events: (2 * before - after) * 1e6 / events,
        "(2 x {0} - {1}) MB / {3} events",
    ),
    "calls": Measured(
        "calls/s of a core, one update to four recommendations, clients on the same machine", "/s", PERFORMANCE, _MIX,
        lambda recommend, update: (recommend + update) / 2, "({0} + {1}) / 2 cores",
    ),
    "commit": Measured(
        "a durable commit of one user to LMDB, p50", "ms", PERFORMANCE,
        (r"^\| the store's own commit \| \d+ \| ([\d.]+) ",),
    ),
    "rebuild": Measured(
        "events/s of a rebuild on one core", "/s", LIFE, (r"speed of rebuild by that of import \| [\d.]+x \(([\d,]+) ",)
    ),
    "command": Measured(
        "the part of it that the command does itself, at 150 events a user", "of the time", OPERATIONS,
        (r"with 150 events 1/([0-9]+) \(",), lambda part: 1 / part, "1 / {0}",
    ),
    "cores": Measured(
        "what a second process adds to a job, the worse of two", "times", EXPERIMENTS,
        (r"Yes: ([\d.]+) and [\d.]+ times as fast",),
    ),
    "redis_recommend": Measured(
        "a primary, for a recommendation", "us", EXPERIMENTS, (_WITH_REPLICA,), lambda one, _, __: one
    ),
    "redis_update": Measured(
        "a primary, for an update, with one replica and WAIT", "us", EXPERIMENTS, (_WITH_REPLICA,),
        lambda _, read, write: read + write, "{1} + {2}",
    ),
    "redis_memory": Measured(
        "memory by bytes stored, of Valkey", "times", EXPERIMENTS,
        (r"A user of ([\d,]+) bytes takes ([\d,]+) bytes of memory",), lambda stored, used: used / stored,
        "{1} / {0}",
    ),
    "failover": Measured(
        "until a replica has taken over, node timeout 5 s", "s", EXPERIMENTS,
        (r"Of 5 s: [\d.]+, [\d.]+ and ([\d.]+) s",),
    ),
    "trained_rows": Measured(
        "training at a million items, by rows", "events/s", EXPERIMENTS, (r"^\| by rows \| ([\d,]+) \|",)
    ),
    "trained_memory": Measured(
        "its peak memory", "GB", EXPERIMENTS, (r"^\| by rows \| [\d,]+ \| ([\d.]+) GB",)
    ),
    "checkpoint": Measured(
        "its checkpoint", "GB", EXPERIMENTS, (r"The checkpoint has ([\d.]+) GB",)
    ),
}  # fmt: skip


# What the simulation of so many users came to.
PRIMARIES = {
    users: Measured("primaries, simulated", "", SIMULATED, (rf"^\| {users:,} \| [^|]+ \| ([\d,]+) \|",))
    for users in (10**6, 10**7, 10**8, 10**9)
}


def measured(root: Path) -> dict[str, float]:
    """All numbers by name. Raises UsageError."""
    return {name: one.value(root) for name, one in MEASURED.items()}
