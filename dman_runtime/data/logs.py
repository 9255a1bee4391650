"""Reading of interaction logs: CSV, TSV, Parquet and MovieLens' `ratings.dat`. Training and serving share this reader.

Ids are text everywhere; `Interactions` also tells whether all of them are integers. A file that cannot be used raises
`InputError`. pyarrow is imported on use only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dman_runtime.data.interactions import Interactions
from dman_runtime.data.spill import split_by_user
from dman_runtime.data.tables import TableColumn, TableFile

if TYPE_CHECKING:
    import pyarrow as pa

_INTEGER = r"^(0|-?[1-9][0-9]*)$"
_WHOLE_FLOAT = r"^-?[0-9]+\.0+$"  # pandas writes an integer column like this if it has missing values


@dataclass(frozen=True)
class Columns:
    """The names of a log's columns. Time and position may be absent unless the caller named them."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    position: str = "position"


DEFAULT_COLUMNS = Columns()


def read_interactions(
    path: str | Path, *, columns: Columns = DEFAULT_COLUMNS, min_user_events: int = 0, min_item_events: int = 0
) -> Interactions:
    """Read a whole log, without the users and items that have too few events (`Interactions.filtered`).

    The events of a user are ordered by position if the file has that column, else by time; equal ones keep the order
    of the file. Raises InputError if the file cannot be used or no event is left.
    """
    log = _Log(path, columns)
    everything = log.group(list(log.batches()))
    if min_user_events <= 1 and min_item_events <= 1:
        return everything
    kept = everything.filtered(min_user_events=min_user_events, min_item_events=min_item_events)
    if not len(kept):
        raise log.file.error(
            f"no row of {len(everything)} is left with at least {min_user_events} events per user and "
            f"{min_item_events} per item",
            "lower these minimums",
            parameter="min_user_events" if min_user_events > 1 else "min_item_events",
        )
    return kept


def iter_interactions(
    path: str | Path, *, columns: Columns = DEFAULT_COLUMNS, max_events: int
) -> Iterator[Interactions]:
    """Read a log of any size in parts of complete users. Together they hold the histories of `read_interactions`.

    A part has at most max_events events, or one user who has more. It has its own item_ids, and the users are in
    another order. Whether ids are integers is decided over the whole log. About max_events rows are in memory at a
    time; a longer log goes through temporary files of about its own size (`TMPDIR` says where). Raises ValueError
    if max_events < 1; InputError at once for an absent file or column, and during iteration for bad rows.
    """
    if max_events < 1:
        raise ValueError(f"max_events must be at least 1, not {max_events}")
    return _parts(_Log(path, columns), max_events)


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

    def __init__(self, path: str | Path, columns: Columns) -> None:
        self.file = TableFile(path)
        self.columns = columns
        names = [getattr(columns, field.name) for field in fields(Columns)]
        for field, name in zip(fields(Columns), names, strict=True):
            parameter = f"{field.name}_column"
            if field.name in ("user", "item") or name != field.default or name in self.file.names:
                self.file.require(name, f"name the column that holds the {field.name}s", parameter=parameter)
            if name != field.default and names.count(name) > 1:
                cause = f"column {name!r} is named for two purposes"
                raise self.file.error(cause, f"name another column for the {field.name}s", parameter=parameter)
        self.time = columns.time if columns.time in self.file.names else None
        self.position = columns.position if columns.position in self.file.names else None
        # whether all ids read so far match
        self.matches = {
            (name, pattern): True for name in (columns.user, columns.item) for pattern in (_INTEGER, _WHOLE_FLOAT)
        }

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Columns user and item (dictionaries of text), time (seconds), order and suborder (sort keys of a user)."""
        names = [self.columns.user, self.columns.item, self.time, self.position]
        first_row = 0
        for raw in self.file.batches([name for name in names if name]):
            with self.file.errors():
                batch = self._checked(raw, first_row)
            first_row += len(raw)
            yield batch
        if not first_row:
            raise self.file.error("a header but no rows", "give a log with at least one event")
        for name in (self.columns.user, self.columns.item):
            if self.matches[name, _WHOLE_FLOAT]:
                raise self.file.error(f"column {name!r} holds numbers such as 1.0", "write the ids as integers or text")

    def _checked(self, raw: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
        import pyarrow as pa

        def column(name: str) -> TableColumn:
            return TableColumn(self.file, name, raw[name], first_row)

        user, item = self._ids(column(self.columns.user)), self._ids(column(self.columns.item))
        seconds = order = np.zeros(len(raw), dtype=np.int64)
        suborder = np.zeros(len(raw), dtype=np.int32)
        if self.time:
            seconds, suborder = column(self.time).seconds()
            order = seconds
        if self.position:
            order = column(self.position).integers()
            suborder = np.zeros_like(suborder)
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
        integers = {name: self.matches[name, _INTEGER] for name in (self.columns.user, self.columns.item)}

        item_ids: list[str] = items.dictionary.to_pylist()
        value: Callable[[str], Any] = int if integers[self.columns.item] else str
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
            integer_user_ids=integers[self.columns.user],
            integer_item_ids=integers[self.columns.item],
        )
