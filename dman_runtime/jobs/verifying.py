"""Reads everything in a state store and lists what is damaged. Writes nothing; works while a server runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dman_runtime.model.record import lacks_events
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_verify import MAX_PROBLEMS, Problems, verify_contents, verify_structure

DAMAGED_STATUS = 1  # of the command that finds damage


@dataclass(frozen=True)
class VerifyReport:
    """`counts` says how many of each kind were read, `problem_count` how many problems there are, `problems` the first
    ones."""

    path: str
    counts: Mapping[str, int] = field(default_factory=dict)
    problem_count: int = 0
    problems: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        return not self.problem_count

    @property
    def exit_status(self) -> int:
        return 0 if self.sound else DAMAGED_STATUS

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"counts": dict(self.counts), "problems": list(self.problems), "sound": self.sound}


def verify_store(
    path: Path, check_more: Callable[[LmdbStore, Problems], Mapping[str, int]] | None = None
) -> VerifyReport:
    """Checks the pages of the file, then every value and how they belong together; then what `check_more` does.

    What is damaged ends it there: LMDB trusts its pages, and could crash. Raises StoreError for what cannot be opened
    at all.
    """
    problems = Problems()
    verify_structure(path, problems)
    counts: dict[str, int] = {}
    if not problems.count:
        with LmdbStore.open(path, readonly=True) as store:
            counts = verify_contents(store, problems)
            if not problems.count:
                counts["records_lacking_late_events"] = sum(lacks_events(one.start) for one in store.records(1))
            if check_more is not None and not problems.count:
                counts |= check_more(store, problems)
    return VerifyReport(str(path), counts, problems.count, tuple(problems.first))


def format_report(report: VerifyReport) -> str:
    """The report for people, several lines."""
    lines = [f"{name.replace('_', ' ')}: {count}" for name, count in report.counts.items()]
    if report.sound:
        lines.append(f"the state store {report.path} is sound")
    else:
        lines += report.problems
        if report.problem_count > MAX_PROBLEMS:
            lines.append(f"and {report.problem_count - MAX_PROBLEMS} more")
        if not report.counts:
            lines.append("the values were not read, because the pages that hold them are damaged")
        lines.append(f"the state store {report.path} is damaged ({report.problem_count} problems); restore a backup")
    return "\n".join(lines)
