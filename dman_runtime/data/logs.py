"""Reading of interaction logs: one pass over all rows, a report of what was understood, and the histories.

Training and serving share this reader. Ids are text in `Interactions`, which also tells whether all of them are
integers. A log that cannot be used raises `InputError`. pyarrow is imported on use only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Container, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from dman_runtime.data.findings import EXACT_REPEATS, describe
from dman_runtime.data.grouping import grouped
from dman_runtime.data.input_report import InputReport
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import ANY_LOG, LogOptions
from dman_runtime.data.scan import Scan
from dman_runtime.data.spill import split_by_user
from dman_runtime.errors import InputError


class Log:
    """A log that was read completely, once: what it is, and its histories."""

    def __init__(self, scan: Scan, parts: Iterator[Interactions]) -> None:
        self.report: InputReport = scan.report
        self.options: LogOptions = scan.found()  # with what was found in place of "auto"
        self._parts = parts
        self._whole: Interactions | None = None

    def parts(self) -> Iterator[Interactions]:
        """The histories in parts of complete users, each of at most `max_rows` events or of one user with more.

        Each part has its own item_ids. Can be called once. Exact repeats of a log that went through temporary files
        are counted in the report as the parts come.
        """
        return self._parts

    def whole(self) -> Interactions:
        """All histories, of a log that was opened without `max_rows`; users in order of first appearance."""
        if self._whole is None:
            (self._whole,) = self._parts
        return self._whole


@contextmanager
def open_log(
    path: str | Path,
    options: LogOptions = ANY_LOG,
    *,
    known_items: Container[str] | None = None,
    max_rows: int | None = None,
) -> Iterator[Log]:
    """Reads a log: a file, a glob pattern or a folder.

    With `known_items`, the report counts the events of other items. About max_rows rows are in memory at a time; a
    longer log goes through temporary files of about its own size (`TMPDIR` says where), which are removed at the end.
    Raises InputError, and ValueError for max_rows below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, not {max_rows}")
    scan = Scan(path, options, known_items)
    with closing(_parts(scan, max_rows or 1 << 62)) as parts:
        first = next(parts)
        describe(scan, first)
        yield Log(scan, _chained(first, parts))


def _chained(first: Interactions, rest: Iterator[Interactions]) -> Iterator[Interactions]:
    yield first
    del first
    yield from rest


def _parts(scan: Scan, max_rows: int) -> Generator[Interactions, None, None]:
    try:
        with closing(split_by_user(scan.batches(), scan.prepared, max_rows=max_rows)) as parts:
            for batches in parts:
                yield _histories(scan, batches)
    except OSError as error:
        raise scan.tables.error(
            f"cannot be split into parts in {tempfile.tempdir or 'a temporary folder'}: {error}",
            "make room there, or set TMPDIR to another folder",
        ) from None


def _histories(scan: Scan, batches: list[Any]) -> Interactions:
    """The Interactions of some of the rows, after the last row was read: types, unit and order are known then."""
    rows = scan.columns_of(batches)
    batches.clear()
    interactions, dropped = grouped(
        rows.users,
        rows.items,
        rows.times,
        rows.keys,
        integer_user_ids=scan.users.integers,
        integer_item_ids=scan.items.integers,
        positions=rows.positions,
        drop_repeats=rows.drop_repeats,
    )
    if dropped:
        scan.report.left_out[EXACT_REPEATS] = scan.report.left_out.get(EXACT_REPEATS, 0) + dropped
    return interactions


def read_interactions(
    path: str | Path, options: LogOptions = ANY_LOG, *, min_user_events: int = 0, min_item_events: int = 0
) -> Interactions:
    """A whole log, without the users and items that have too few events (`Interactions.filtered`).

    Raises InputError if the log cannot be used or no event is left.
    """
    with open_log(path, options) as log:
        return filtered(log, min_user_events=min_user_events, min_item_events=min_item_events)


def filtered(log: Log, *, min_user_events: int, min_item_events: int) -> Interactions:
    """The whole log without rare items and short histories; its report says what that removed. Raises InputError."""
    everything = log.whole()
    if min_user_events <= 1 and min_item_events <= 1:
        return everything
    kept = everything.filtered(min_user_events=min_user_events, min_item_events=min_item_events)
    log.report.filters = {
        "min_user_events": min_user_events,
        "min_item_events": min_item_events,
        "users": everything.num_users - kept.num_users,
        "items": len(everything.item_ids) - len(kept.item_ids),
        "events": len(everything) - len(kept),
    }
    if not len(kept):
        raise InputError(
            f"{log.report.path}: no row of {len(everything)} is left with at least {min_user_events} events per user "
            f"and {min_item_events} per item",
            "lower these minimums",
            parameter="min_user_events" if min_user_events > 1 else "min_item_events",
        )
    return kept
