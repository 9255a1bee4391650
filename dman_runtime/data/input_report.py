"""What a command understood of a log: counted while it was read, printed before anything else is done with it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

MAX_WARNINGS = 3
EXAMPLES = 5  # of bad rows and of unknown items
LENGTH_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 10_000)  # lower ends of the groups of histories


@dataclass(frozen=True)
class Notice:
    """One warning: what was seen or decided, and the option that decides otherwise."""

    text: str
    parameter: str  # name of the option, such as time_column; empty if there is none
    weight: int = 0  # the heavier ones are shown first


@dataclass(frozen=True)
class BadRow:
    """A row that was left out."""

    place: str  # file and line or row
    problem: str


@dataclass
class InputReport:
    """What was read, what it was taken for, and what was left out."""

    path: str
    files: list[dict[str, Any]] = field(default_factory=list)  # path, bytes, rows, dialect
    ignored_files: list[str] = field(default_factory=list)  # in a folder, a glob or an archive, with the reason
    rows: int = 0  # in the files, without headers and blank lines
    blank_lines: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # rows by cause
    bad_rows: list[BadRow] = field(default_factory=list)  # the first of those that cannot be read
    users: int = 0
    users_in_several_files: int | None = None  # None for a single file
    split: bool = False  # whether users were taken in parts, through temporary files
    items: int = 0
    columns: dict[str, str] = field(default_factory=dict)  # user, item, time, position: name
    other_columns: list[str] = field(default_factory=list)
    order: str = ""  # what orders the events of a user, in words
    time_unit: str = ""
    first_time: int | None = None  # seconds since 1970
    last_time: int | None = None
    user_ids: str = ""  # text or integer
    item_ids: str = ""
    trimmed_ids: int = 0  # ids that had blanks around them
    repeats: float = 0.0  # share of events whose item the user already had
    lengths: dict[str, int] = field(default_factory=dict)  # users by number of events
    unknown_items: int | None = None  # distinct items that the bundle does not know; None without a bundle
    unknown_events: int | None = None
    unknown_examples: list[str] = field(default_factory=list)  # some of the ids of these items
    unknown_users: int | None = None  # not in the store
    filters: dict[str, int] = field(default_factory=dict)  # the limits, and the users, items and events they removed
    notices: list[Notice] = field(default_factory=list)

    @property
    def events(self) -> int:
        """Rows that are used."""
        return self.rows - self.left_out_rows

    @property
    def left_out_rows(self) -> int:
        return sum(self.left_out.values())

    @property
    def unknown_share(self) -> float:
        """Share, from 0 to 1, of the events that are of items that the bundle does not know; 0 without a bundle."""
        return (self.unknown_events or 0) / max(1, self.events)

    def notice(self, text: str, *, parameter: str = "", weight: int = 0) -> None:
        self.notices.append(Notice(text, parameter, weight))

    def warnings(self) -> list[str]:
        """The heaviest notices as lines, at most MAX_WARNINGS, each with its option."""
        heaviest = sorted(self.notices, key=lambda notice: -notice.weight)[:MAX_WARNINGS]
        return [f"{one.text} (--{one.parameter.replace('_', '-')})" if one.parameter else one.text for one in heaviest]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return (
            asdict(self)
            | {name: getattr(self, name) for name in ("events", "unknown_share")}
            | {"warnings": self.warnings()}
        )

    def table(self) -> str:
        """For people: one fact a line, then the warnings."""
        rows = [(name, value) for name, value in self._facts() if value]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings()])

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "input", self._input()
        yield from (("dialect", dialect) for dialect in dict.fromkeys(one["dialect"] for one in self.files))
        yield "ignored", "; ".join(self.ignored_files[:5])
        yield "by user", self._by_user()
        yield "rows", f"{self.rows:,}{self._left_out()}"
        yield from ((f"  {row.place}", row.problem) for row in self.bad_rows)
        yield "columns", ", ".join(f"{role}: {name}" for role, name in self.columns.items())
        yield "not read", ", ".join(self.other_columns)[:200]
        yield "ids", f"users {self.user_ids}, items {self.item_ids}" if self.user_ids else ""
        yield "order", self.order
        yield "times", self._times()
        yield "events", f"{self.events:,} of {self.users:,} users and {self.items:,} items"
        yield "repeats", f"{self.repeats:.1%} of the events are of items that the user already had"
        yield "histories", self._lengths()
        yield "filters", self._filters()
        yield "unknown", self._unknown()

    def _input(self) -> str:
        size = sum(one["bytes"] for one in self.files)
        count = "" if len(self.files) == 1 else f"{len(self.files)} files, "
        return f"{self.path} ({count}{size:,} bytes)"

    def _by_user(self) -> str:
        """How the files have the users, and what was done about it."""
        facts = []
        if (several := self.users_in_several_files) is not None:
            together = f"{several:,} of {self.users:,} users are in several files: their events are brought together"
            facts.append(together if several else "each user is in one of the files")
        if self.split:
            facts.append("the log is worked on in parts, through temporary files")
        return "; ".join(facts)

    def _left_out(self) -> str:
        causes = [f"{count:,} {cause}" for cause, count in self.left_out.items() if count]
        return f", {self.events:,} used; left out: {', '.join(causes)}" if causes else ", all used"

    def _times(self) -> str:
        if self.first_time is None or self.last_time is None:
            return ""
        return f"{self.time_unit}, {_utc(self.first_time)} to {_utc(self.last_time)}"

    def _lengths(self) -> str:
        groups = ", ".join(f"{group}: {count:,}" for group, count in self.lengths.items())
        return f"users by number of events: {groups}" if groups else ""

    def _filters(self) -> str:
        if not self.filters:
            return ""
        f = self.filters
        return (
            f"at least {f['min_user_events']} events a user and {f['min_item_events']} an item: "
            f"removed {f['users']:,} users, {f['items']:,} items and {f['events']:,} events"
        )

    def _unknown(self) -> str:
        parts = []
        if self.unknown_events is not None:
            parts.append(
                f"{self.unknown_share:.1%} of the events: {self.unknown_items or 0:,} of {self.items:,} items are not "
                "in the bundle"
            )
        if self.unknown_users is not None:
            parts.append(f"{self.unknown_users:,} of {self.users:,} users are not in the store")
        return "; ".join(parts)


def length_groups(lengths: np.ndarray) -> dict[str, int]:
    """How many of the lengths (N) of histories fall into each group; empty groups are left out."""
    groups = {}
    for low, high in zip(LENGTH_BOUNDS, (*LENGTH_BOUNDS[1:], 0), strict=True):
        count = int(np.count_nonzero((lengths >= low) & ((lengths < high) if high else True)))
        if count:
            groups[str(low) if high == low + 1 else f"{low:,}-{high - 1:,}" if high else f"{low:,}+"] = count
    return groups


def _utc(seconds: int) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(seconds)
