"""One pass over the rows of a log: checked columns, counts, and what the log as a whole turned out to be."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dman_runtime.data.columns import BadRows, IdColumn, PositionColumn
from dman_runtime.data.hash_counts import HashCounts, id_hashes
from dman_runtime.data.input_report import EXAMPLES, InputReport
from dman_runtime.data.log_options import AUTO, NONE, LogOptions
from dman_runtime.data.roles import find_roles
from dman_runtime.data.spill import HASH
from dman_runtime.data.tables import Rows, Tables, open_tables
from dman_runtime.data.times import TimeColumn, Times

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RowColumns:
    """The rows (N) of a log or of a part of it, in their final types."""

    users: pa.ChunkedArray  # int64 or string
    items: pa.ChunkedArray
    times: Times | None
    positions: np.ndarray | None  # (N,) int64
    keys: list[np.ndarray]  # (N,) int64 each: what orders the events of a user, the first counts most
    drop_repeats: bool


class Scan:
    """Reads the rows once. What it knows of the whole log is complete when `batches` has ended."""

    def __init__(self, path: str | Path, options: LogOptions, known_items: Container[str] | None) -> None:
        self.options = options
        self.report = InputReport(str(path))
        self.tables: Tables = open_tables(path, options)
        roles = find_roles(self.tables, options, self.report)
        self.roles = roles
        self.users = IdColumn("user", roles.user, options.user_ids)
        self.items = IdColumn("item", roles.item, options.item_ids)
        self.times = TimeColumn(roles.time, options.time_unit) if roles.time else None
        self.positions = PositionColumn(roles.position, named=roles.position_is_named) if roles.position else None
        self._known_items = known_items
        self._user_tally, self._item_tally, self._unknown_tally = HashCounts(), HashCounts(), HashCounts()
        self._of_file = (0, HashCounts())  # the file that is read, and its users
        self._files_of_users = HashCounts()  # in how many of the files before it each user is
        self.was_split = False
        self.order_by = self._order()

    def _order(self) -> str:
        has = {"time": self.times is not None, "position": self.positions is not None, "file": True}
        if self.options.order_by == AUTO:
            return next(name for name, there in has.items() if there)
        if not has[self.options.order_by]:
            raise self.tables.error(
                f"no column of {self.options.order_by}s is known to order the events by",
                "name it, or order the events by something else",
                parameter=f"{self.options.order_by}_column",
            )
        return self.options.order_by

    # -- reading ---------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Checked rows: user and item (int64 or string), time and fraction, position; as far as the log has them."""
        rows = 0
        for one in self.tables.batches(self.roles.columns()):
            rows += len(one.batch)
            checked = self._checked(one)
            if len(self.tables.files) > 1:
                self._note_users(one.number, checked["user"])
            yield checked
        if not rows and not self.tables.bad_row_count:
            raise self.tables.error("a header but no rows", "give a log with at least one event")
        if rows == self.report.left_out_rows:
            raise self.tables.error(
                "no row can be used", "correct the file; the report lists the first of its bad rows"
            )

    def _checked(self, rows: Rows) -> pa.RecordBatch:
        import pyarrow as pa

        bad = BadRows(rows)
        columns: dict[str, Any] = {"user": self.users.read(rows, bad), "item": self.items.read(rows, bad)}
        if self.times:
            whole, fraction = self.times.read(rows, bad)
            columns |= {"time": pa.array(whole)} | ({} if fraction is None else {"fraction": pa.array(fraction)})
        if self.positions and not self.positions.why_not:
            columns["position"] = pa.array(self.positions.read(rows, bad))
        batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
        if bad.mask is None:
            return batch
        self._note_bad(bad)
        return batch.filter(pa.array(~bad.mask))

    def _note_users(self, file: int, users: pa.Array) -> None:
        """Counts the files that each user is in; they come one after the other."""
        import pyarrow as pa

        number, in_file = self._of_file
        if number != file:
            self._files_of_users.add(in_file.distinct())
            in_file = HashCounts()
        self._of_file = file, in_file
        in_file.add(id_hashes(users.dictionary_encode().dictionary.cast(pa.string())))

    def users_in_several_files(self) -> int | None:
        """How many of the users are in more than one file; None where there is one."""
        if len(self.tables.files) < 2:
            return None
        self._files_of_users.add(self._of_file[1].distinct())
        self._of_file = self._of_file[0], HashCounts()
        return int(np.count_nonzero(self._files_of_users.counts() > 1))

    def _note_bad(self, bad: BadRows) -> None:
        if self.options.bad_rows == "fail":
            raise bad.error()
        for cause, count in bad.causes.items():
            self.report.left_out[cause] = self.report.left_out.get(cause, 0) + count
        missing = EXAMPLES - len(self.report.bad_rows)
        self.report.bad_rows += bad.described(missing)

    def prepared(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A batch for temporary files: ids as text, all columns always there, the hash of the user. Counts ids."""
        import pyarrow as pa

        self.was_split = True
        names = batch.schema.names
        users, items = (batch[name].cast(pa.string()).dictionary_encode() for name in ("user", "item"))
        hashes = self._tallied(self.users, self._user_tally, users)
        item_hashes = self._tallied(self.items, self._item_tally, items)
        if self._known_items is not None:
            texts = items.dictionary.to_pylist()
            unknown = np.array([text not in self._known_items for text in texts], bool)
            self._add_examples([texts[code] for code in np.flatnonzero(unknown)[:EXAMPLES]])
            self._unknown_tally.add(item_hashes[unknown[items.indices.to_numpy()]])
        zeros = np.zeros(len(batch), np.int64)
        columns = {
            HASH: pa.array(hashes),
            "user": users.dictionary_decode(),
            "item": items.dictionary_decode(),
            "time": batch["time"] if "time" in names else pa.array(zeros),
            "fraction": batch["fraction"] if "fraction" in names else pa.array(zeros.astype(np.float64)),
            "position": batch["position"] if "position" in names else pa.array(zeros),
        }
        return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))

    def _tallied(self, column: IdColumn, tally: HashCounts, ids: pa.DictionaryArray) -> np.ndarray:
        """The hash of each row's id, (N,) uint64."""
        column.note_distinct(ids.dictionary, self.tables.path)
        by_row: np.ndarray = id_hashes(ids.dictionary)[ids.indices.to_numpy()]
        tally.add(by_row)
        return by_row

    def _add_examples(self, unknown: list[str]) -> None:
        examples = self.report.unknown_examples
        examples += [text for text in unknown if text not in examples][: EXAMPLES - len(examples)]

    # -- at the end ------------------------------------------------------------------------------------------------

    def columns_of(self, batches: list[pa.RecordBatch]) -> RowColumns:
        """All rows of some batches as arrays, in the types and units that the whole log turned out to have."""
        import pyarrow as pa

        def ids(name: str, column: IdColumn) -> pa.ChunkedArray:
            chunks = [batch[name] for batch in batches]
            if len({chunk.type for chunk in chunks}) > 1:
                chunks = [chunk.cast(pa.string()) for chunk in chunks]
            joined = pa.chunked_array(chunks)
            return joined.cast(pa.int64()) if column.integers and pa.types.is_string(joined.type) else joined

        def numbers(name: str, kind: type[np.generic]) -> np.ndarray | None:
            if not any(name in batch.schema.names for batch in batches):
                return None
            zeros: np.ndarray = np.zeros(max(map(len, batches), default=0), kind)
            parts = [b[name].to_numpy() if name in b.schema.names else zeros[: len(b)] for b in batches]
            return np.concatenate(parts)

        users, items = ids("user", self.users), ids("item", self.items)
        times, by_time = None, []
        if self.times:
            fraction = numbers("fraction", np.float64)
            whole = numbers("time", np.int64)
            assert whole is not None
            times = self.times.times(whole, fraction if fraction is not None and fraction.any() else None)
            by_time = times.keys
        position = numbers("position", np.int64) if self.positions and not self.positions.why_not else None
        by_position = [] if position is None else [position]
        keys = {"time": by_time + by_position, "position": by_position, "file": []}[self.order_by]
        drop = self.found().exact_repeats == "drop"
        return RowColumns(users, items, times, position, keys, drop_repeats=drop)

    def note_known(self, item_ids: list[str], counts: np.ndarray) -> None:
        """Counts the unknown among all distinct items and their events, of a log that was not split."""
        if self._known_items is not None:
            unknown = [row for row, item_id in enumerate(item_ids) if item_id not in self._known_items]
            self.report.unknown_items, self.report.unknown_events = len(unknown), int(counts[unknown].sum())
            frequent = sorted(unknown, key=lambda row: -int(counts[row]))
            self._add_examples([item_ids[row] for row in frequent[:EXAMPLES]])

    def note_tallies(self) -> np.ndarray:
        """Puts the counts of a log that was split into the report; returns the lengths of all histories (U,)."""
        lengths = self._user_tally.counts()
        self.report.users, self.report.items = len(lengths), len(self._item_tally.counts())
        if self._known_items is not None:
            unknown = self._unknown_tally.counts()
            self.report.unknown_items, self.report.unknown_events = len(unknown), int(unknown.sum())
        return lengths

    def found(self) -> LogOptions:
        """The options with what was found in place of "auto"."""
        found: dict[str, Any] = {f"{role}_column": name for role, name in self.roles.by_role().items()}
        found |= {"order_by": self.order_by, "user_ids": self.users.kind, "item_ids": self.items.kind}
        if self.positions and self.positions.why_not:
            found["position_column"] = NONE
        if self.options.exact_repeats == AUTO:
            found["exact_repeats"] = "keep" if self.times is None or self.times.only_dates else "drop"
        if self.times and self.times.is_numbers:
            found["time_unit"] = self.times.unit
        return replace(self.options, **found)
