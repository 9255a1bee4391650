"""Reading of interaction logs. Training and serving share this reader.

Ids are text everywhere; `Interactions` also tells whether all of them are integers. A file that cannot be used raises
`InputError`. pyarrow is imported on use only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dman_runtime.data.input_report import InputReport, length_groups
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import ANY_LOG, AUTO, NONE, LogOptions
from dman_runtime.data.spill import split_by_user
from dman_runtime.data.tables import TableColumn, TableFile
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_INTEGER = r"^(0|-?[1-9][0-9]*)$"
_WHOLE_FLOAT = r"^-?[0-9]+\.0+$"  # pandas writes an integer column like this if it has missing values


class Log:
    """A log that was read completely, once: what it is, and its histories."""

    def __init__(self, report: InputReport, options: LogOptions, parts: list[Interactions]) -> None:
        self.report = report
        self.options = options  # with what was found in place of "auto"
        self._parts = parts

    def parts(self) -> Iterator[Interactions]:
        """The histories in parts of complete users, each of at most `max_rows` events or of one user with more.

        Each part has its own item_ids. Can be called once.
        """
        yield from self._parts

    def whole(self) -> Interactions:
        """All histories, of a log that was opened without `max_rows`; users in order of first appearance."""
        (everything,) = self._parts
        return everything


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
    Raises InputError.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, not {max_rows}")
    log = _Log(path, options)
    parts = list(_parts(log, max_rows or 1 << 62))
    report = InputReport(
        str(path), files=[{"path": str(path), "bytes": Path(path).stat().st_size, "rows": 0, "dialect": log.file.kind}]
    )
    report.rows = report.events = sum(map(len, parts))
    report.users = sum(part.num_users for part in parts)
    report.items = len(set().union(*(part.item_ids for part in parts)))
    report.columns = {"user": log.user, "item": log.item, "time": log.time or NONE, "position": log.position or NONE}
    report.user_ids, report.item_ids = (
        ("text", "integer")[flag] for flag in (parts[0].integer_user_ids, parts[0].integer_item_ids)
    )
    report.lengths = length_groups(np.concatenate([np.diff(part.offsets) for part in parts]))
    if known_items is not None:
        counts: dict[str, int] = {}
        for part in parts:
            for item_id, count in zip(
                part.item_ids, np.bincount(part.items, minlength=len(part.item_ids)).tolist(), strict=True
            ):
                if item_id not in known_items:
                    counts[item_id] = counts.get(item_id, 0) + count
        report.unknown_items, report.unknown_events = len(counts), sum(counts.values())
        report.unknown_examples = sorted(counts, key=lambda item_id: -counts[item_id])[:3]
    found: dict[str, Any] = {f"{role}_column": name for role, name in report.columns.items()}
    found["order_by"] = "time" if log.time else "position" if log.position else "file"
    found |= {"user_ids": report.user_ids, "item_ids": report.item_ids}
    resolved = replace(options, **found)
    yield Log(report, resolved, parts)


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


def _parts(log: _Log, max_events: int) -> Iterator[Interactions]:
    try:
        with closing(split_by_user(log.batches(), max_rows=max_events)) as parts:
            for batches in parts:
                yield log.group(batches)
    except OSError as error:
        raise log.file.error(
            f"cannot be split into parts in {tempfile.tempdir or 'a temporary folder'}: {error}",
            "make room there, or set TMPDIR to another folder",
        ) from None


class _Log:
    """One pass over a log's rows as checked columns, and their grouping into Interactions."""

    def __init__(self, path: str | Path, options: LogOptions) -> None:
        self.file = TableFile(path)
        self.user, self.item = (
            self._column(name, getattr(options, f"{name}_column"), f"{name}_id") or "" for name in ("user", "item")
        )
        self.time, self.position = (
            self._column(name, getattr(options, f"{name}_column"), default)
            for name, default in (("time", "timestamp"), ("position", "position"))
        )
        # whether all ids read so far match
        self.matches = {
            (name, pattern): True for name in (self.user, self.item) for pattern in (_INTEGER, _WHOLE_FLOAT)
        }

    def _column(self, role: str, name: str, default: str) -> str | None:
        if name == NONE or (name == AUTO and role in ("time", "position") and default not in self.file.names):
            return None
        found = default if name == AUTO else name
        self.file.require(found, f"name the column that holds the {role}s", parameter=f"{role}_column")
        return found

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Columns user and item (dictionaries of text), time (seconds), order and suborder (sort keys of a user)."""
        names = [self.user, self.item, self.time, self.position]
        first_row = 0
        for raw in self.file.batches([name for name in names if name]):
            with self.file.errors():
                batch = self._checked(raw, first_row)
            first_row += len(raw)
            yield batch
        if not first_row:
            raise self.file.error("a header but no rows", "give a log with at least one event")
        for name in (self.user, self.item):
            if self.matches[name, _WHOLE_FLOAT]:
                raise self.file.error(f"column {name!r} holds numbers such as 1.0", "write the ids as integers or text")

    def _checked(self, raw: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
        import pyarrow as pa

        def column(name: str) -> TableColumn:
            return TableColumn(self.file, name, raw[name], first_row)

        user, item = self._ids(column(self.user)), self._ids(column(self.item))
        seconds = order = np.zeros(len(raw), dtype=np.int64)
        suborder = np.zeros(len(raw), dtype=np.int32)
        if self.time:
            seconds, suborder = column(self.time).seconds()
            order = seconds
        elif self.position:
            order = column(self.position).integers()
        return pa.RecordBatch.from_arrays(
            [user, item, pa.array(seconds), pa.array(order), pa.array(suborder)],
            names=["user", "item", "time", "order", "suborder"],
        )

    def _ids(self, column: TableColumn) -> pa.DictionaryArray:
        import pyarrow.compute as pc

        ids = column.ids()
        for pattern in (_INTEGER, _WHOLE_FLOAT):
            if self.matches[column.name, pattern]:
                all_match = pc.all(pc.match_substring_regex(ids.dictionary, pattern)).as_py()
                self.matches[column.name, pattern] = all_match
        return ids

    def group(self, batches: list[pa.RecordBatch]) -> Interactions:
        """The Interactions of some of the rows. Call it after the last of `batches()`: the id types are known then."""
        import pyarrow as pa

        table = pa.Table.from_batches(batches).unify_dictionaries().combine_chunks()
        users, items = (table[name].chunk(0) for name in ("user", "item"))
        user_codes, item_codes = (ids.indices.to_numpy() for ids in (users, items))
        integers = {name: self.matches[name, _INTEGER] for name in (self.user, self.item)}

        item_ids: list[str] = items.dictionary.to_pylist()
        value: Callable[[str], Any] = int if integers[self.item] else str
        code_by_index = sorted(range(len(item_ids)), key=[value(item_id) for item_id in item_ids].__getitem__)
        index_by_code = np.empty(len(item_ids), dtype=np.int32)
        index_by_code[code_by_index] = np.arange(len(item_ids), dtype=np.int32)

        rows = np.lexsort((table["suborder"].to_numpy(), table["order"].to_numpy(), user_codes))  # stable
        lengths = np.bincount(user_codes, minlength=len(users.dictionary))
        return Interactions(
            user_ids=users.dictionary.to_pylist(),
            item_ids=[item_ids[code] for code in code_by_index],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=index_by_code[item_codes[rows]],
            timestamps=table["time"].to_numpy()[rows],
            integer_user_ids=integers[self.user],
            integer_item_ids=integers[self.item],
        )
