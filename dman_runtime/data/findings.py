"""What a scan found, in the words of the input report: facts, and warnings about what was guessed or looks wrong."""

from __future__ import annotations

import numpy as np

from dman_runtime.data.columns import IdColumn
from dman_runtime.data.input_report import EXAMPLES, InputReport, length_groups
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.roles import ROLES
from dman_runtime.data.scan import Scan
from dman_runtime.data.times import NAMES

EXACT_REPEATS = "exact repeats"
_SAMPLE_EVENTS = 2_000_000  # of complete users, from which the share of repeated items is taken


def describe(scan: Scan, first: Interactions) -> None:
    """Fills the report of a scan that has ended. `first` is the whole log, or the first part of one that was split.

    Raises InputError for ids that are written in two ways.
    """
    report = scan.report
    _count_rows(scan)
    _describe_ids(scan, first)
    _describe_order(scan)
    _describe_times(scan)
    lengths = scan.note_tallies() if scan.was_split else np.diff(first.offsets)
    report.lengths = length_groups(lengths)
    if not scan.was_split:
        report.users, report.items = first.num_users, len(first.item_ids)
        scan.note_known(first.item_ids, np.bincount(first.items, minlength=len(first.item_ids)))
    sample = int(np.searchsorted(first.offsets, _SAMPLE_EVENTS, side="right"))
    report.repeats = first.first_users(max(1, sample - 1)).repeated_share()


def _count_rows(scan: Scan) -> None:
    report, tables = scan.report, scan.tables
    report.files = [
        {"path": one.path, "bytes": one.bytes, "rows": one.rows, "dialect": one.dialect} for one in tables.files
    ]
    report.ignored_files = list(tables.ignored)
    report.users_in_several_files, report.split = scan.users_in_several_files(), scan.was_split
    report.rows = sum(one.rows for one in tables.files) + tables.bad_row_count
    report.blank_lines = tables.blank_lines
    if tables.bad_row_count:
        report.left_out = {"that cannot be read": tables.bad_row_count} | report.left_out
        report.bad_rows = (tables.bad_rows + report.bad_rows)[:EXAMPLES]
    unusable = report.left_out_rows - report.left_out.get(EXACT_REPEATS, 0)
    if unusable:
        share = unusable / max(1, report.rows)
        report.notice(
            f"left out because they cannot be used: {unusable:,} of {report.rows:,} rows ({share:.1%})",
            parameter="bad_rows",
            weight=50,
        )
    if count := report.left_out.get(EXACT_REPEATS):
        report.notice(
            f"left out as exact repeats (same user, item, time and position): {count:,} of {report.rows:,} rows",
            parameter="exact_repeats",
            weight=30,
        )


def _describe_ids(scan: Scan, first: Interactions) -> None:
    import pyarrow as pa

    report = scan.report
    for column, ids in ((scan.users, first.user_ids), (scan.items, first.item_ids)):
        if not column.integers:
            distinct = pa.array(ids, pa.string())
            column.note_distinct(distinct, report.path)
            column.check_whole(report.path)
        _warn_of_ids(column, report)
    report.user_ids, report.item_ids = scan.users.kind, scan.items.kind
    report.trimmed_ids = scan.users.trimmed + scan.items.trimmed


def _warn_of_ids(column: IdColumn, report: InputReport) -> None:
    if column.trimmed:
        report.notice(f"blanks around {column.role} ids were removed: {column.trimmed:,}", weight=25)
    if column.why_text and column.mostly_integers:
        report.notice(
            f"all {column.role} ids are text, although most are integers: {column.why_text}",
            parameter=f"{column.role}_ids",
            weight=25,
        )


def _describe_order(scan: Scan) -> None:
    report, position = scan.report, scan.positions
    report.columns = scan.roles.by_role()
    used = {role: name for role, name in report.columns.items() if role in ROLES[2:]}
    if position and position.why_not:
        report.notice(
            f"column {position.name!r} orders nothing, as not all of it are integers ({position.why_not})",
            parameter="position_column",
            weight=35,
        )
        used["position"] = "none"
    keys = {"time": ("time", "position"), "position": ("position",), "file": ()}[scan.order_by]
    names = [used[key] for key in keys if used[key] != "none"]
    report.order = f"by {', then '.join([*names, 'row of the file'])}"
    if scan.order_by == "file" and scan.options.order_by != "file":
        others = f"; other columns: {', '.join(report.other_columns)[:200]}" if report.other_columns else ""
        report.notice(
            f"no column of times or positions was found, so the rows of a user are in the order of the file, oldest "
            f"first{others}",
            parameter="time_column",
            weight=100,
        )


def _describe_times(scan: Scan) -> None:
    times, report = scan.times, scan.report
    if times is None:
        return
    report.time_unit = times.described
    if (found := times.range()) is not None:
        report.first_time, report.last_time = found
    if example := times.early_example():
        report.notice(f"times before 1990: {times.early:,}, such as {example}", parameter="time_unit", weight=40)
    if unit := times.other_unit():
        report.notice(
            f"in {NAMES[times.unit]} all times are before 1990, and in {NAMES[unit]} they would be recent",
            parameter="time_unit",
            weight=90,
        )
