"""Interaction logs and item files: CSV, TSV, Parquet and the original MovieLens `.dat` files.

Ids are text everywhere; whether a column holds integers is remembered beside them. Problems in a file raise
`InputError`: one line that says what is wrong, where, and what to do. pyarrow is imported on use only.
"""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dman_runtime.data.tables import TableColumn, TableFile, quoted
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Columns", "InputError", "Interactions", "ItemInfo", "iter_interactions", "read_interactions", "read_items"]

_INTEGER = r"^(0|-?[1-9][0-9]*)$"
_WHOLE_FLOAT = r"^-?[0-9]+\.0+$"  # what an integer column with gaps turns into in pandas
_MISSING: tuple[Any, ...] = (None, "", [])
_PARTITION_BITS = 5  # 32 partition files open at a time while spilling
_HASH_BITS = 30  # beyond them two users are not told apart by their hash: such a partition is yielded as it is


@dataclass(frozen=True)
class Columns:
    """The names of a log's columns. Time and position may be absent unless their names were changed."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    position: str = "position"


DEFAULT_COLUMNS = Columns()


@dataclass(frozen=True, eq=False)
class Interactions:
    """A log grouped by user: users in order of first appearance, the events of each in order."""

    user_ids: list[str]  # (U,) external ids
    item_ids: list[str]  # (V,) distinct external ids, in numeric order when all are integers, else sorted as text
    offsets: np.ndarray  # (U+1,) int64: the events of user u are [offsets[u], offsets[u+1])
    items: np.ndarray  # (N,) int32 indices into item_ids
    timestamps: np.ndarray  # (N,) int64 seconds since the epoch; 0 where the log has none
    integer_user_ids: bool
    integer_item_ids: bool

    def __len__(self) -> int:
        """The number of events."""
        return len(self.items)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    def history(self, user_index: int) -> np.ndarray:
        """The item indices of one user, oldest first: (n,) int32, a view."""
        return self.items[self.offsets[user_index] : self.offsets[user_index + 1]]

    def user_timestamps(self, user_index: int) -> np.ndarray:
        """The times of one user's events: (n,) int64 seconds, a view."""
        return self.timestamps[self.offsets[user_index] : self.offsets[user_index + 1]]

    def repeated_share(self) -> float:
        """The share of events with an item that their user had had before."""
        users = np.repeat(np.arange(self.num_users), np.diff(self.offsets))
        distinct = len(np.unique(users * len(self.item_ids) + self.items))
        return 1 - distinct / max(1, len(self))

    def fingerprint(self) -> str:
        """SHA-256 in hex over the ids, their order and every history; the same on every platform."""
        digest = hashlib.sha256()
        for ids in (self.user_ids, self.item_ids):
            digest.update(f"{len(ids)}\n".encode())
            digest.update("\n".join(ids).encode())  # ids hold no control characters
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.items.astype("<i4").tobytes())
        return digest.hexdigest()

    def filtered(self, *, min_user_events: int, min_item_events: int) -> Interactions:
        """Drop rare items, then short users, again until nothing changes; items are indexed anew. May end up empty."""
        users = np.repeat(np.arange(self.num_users), np.diff(self.offsets))  # (N,)
        keep = np.ones(len(self), dtype=bool)
        while True:
            before = np.count_nonzero(keep)
            item_counts = np.bincount(self.items[keep], minlength=len(self.item_ids))
            keep &= (item_counts >= min_item_events)[self.items]
            user_counts = np.bincount(users[keep], minlength=self.num_users)
            keep &= (user_counts >= min_user_events)[users]
            if np.count_nonzero(keep) == before:
                break
        item_kept = np.bincount(self.items[keep], minlength=len(self.item_ids)) > 0
        lengths = np.bincount(users[keep], minlength=self.num_users)
        new_index = np.cumsum(item_kept, dtype=np.int32) - np.int32(1)
        return Interactions(
            user_ids=[self.user_ids[u] for u in np.flatnonzero(lengths)],
            item_ids=[self.item_ids[i] for i in np.flatnonzero(item_kept)],
            offsets=np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64),
            items=new_index[self.items[keep]].astype(np.int32),
            timestamps=self.timestamps[keep],
            integer_user_ids=self.integer_user_ids,
            integer_item_ids=self.integer_item_ids,
        )


@dataclass(frozen=True)
class ItemInfo:
    """What an item file says about one item; empty attributes are left out."""

    title: str
    attributes: dict[str, str]


def read_interactions(
    path: str | Path, *, columns: Columns = DEFAULT_COLUMNS, min_user_events: int = 0, min_item_events: int = 0
) -> Interactions:
    """Read a whole log. A user's events are ordered by position if the file has it, else time; ties by file.

    Raises InputError when the file cannot be used or the filters leave nothing.
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
    """Read a log of any size in parts of complete users: `read_interactions` but for the order of users and item_ids.

    A part holds at most max_events events, or one user with more. Memory stays near max_events rows: a longer log goes
    through files in the temporary folder (about its own size; `TMPDIR` moves it). Whether ids are integers is
    decided over the whole log. Raises ValueError for max_events < 1; InputError at once for an absent file or column,
    while iterating for bad rows.
    """
    if max_events < 1:
        raise ValueError(f"max_events must be at least 1, not {max_events}")
    return _iterate(_Log(path, columns), max_events)


def read_items(path: str | Path, *, item_column: str = "item_id", title_column: str = "title") -> dict[str, ItemInfo]:
    """Titles and attributes by item id, in file order, from CSV, TSV, Parquet or MovieLens' movies.dat."""
    file = TableFile(path)
    rows = _movie_rows(file) if file.kind == ".dat" else _item_rows(file, item_column, title_column)
    infos: dict[str, ItemInfo] = {}
    for number, (item_id, info) in enumerate(rows):
        if item_id in infos:
            cause = f"{file.where(number)}: item {quoted(item_id)} appears a second time"
            raise file.error(cause, "keep one row per item")
        infos[item_id] = info
    if not infos:
        raise file.error("no rows", "give a file with one row per item")
    return infos


def _item_rows(file: TableFile, item_column: str, title_column: str) -> Iterator[tuple[str, ItemInfo]]:
    file.require(item_column, "name the column that holds the items", parameter="item_column")
    file.require(title_column, f"rename the column that holds the titles to {title_column!r}")
    first_row = 0
    for batch in file.batches(list(dict.fromkeys(file.names))):
        with file.errors():
            ids = TableColumn(file, item_column, batch[item_column], first_row).ids().to_pylist()
            rows = batch.drop_columns([item_column]).to_pylist()
        first_row += len(ids)
        for item_id, row in zip(ids, rows, strict=True):
            texts = {
                name: "|".join(map(str, v)) if isinstance(v, list) else str(v)
                for name, v in row.items()
                if v not in _MISSING
            }
            yield item_id, ItemInfo(texts.pop(title_column, ""), texts)


def _movie_rows(file: TableFile) -> Iterator[tuple[str, ItemInfo]]:
    with file.errors():
        import pyarrow as pa

        with pa.input_stream(str(file.path)) as stream:  # undoes .gz
            text = stream.read().decode("latin-1")
    for number, line in enumerate(text.rstrip("\n").split("\n") if text.strip() else []):
        parts = line.removesuffix("\r").split("::")
        if len(parts) != 3 or not parts[0]:
            raise file.error(f"{file.where(number)} is {quoted(line)}", "every line needs item::title::genres")
        yield parts[0], ItemInfo(parts[1], {"genres": parts[2]} if parts[2] else {})


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
        self.matches = {
            (name, pattern): True for name in (columns.user, columns.item) for pattern in (_INTEGER, _WHOLE_FLOAT)
        }

    def batches(self) -> Iterator[pa.RecordBatch]:
        """user and item (dictionaries of text), time (seconds), order and suborder (the sort keys within a user)."""
        import pyarrow as pa

        names = [self.columns.user, self.columns.item, self.time, self.position]
        first_row = 0
        for raw in self.file.batches([name for name in names if name]):
            with self.file.errors():
                user, item = (
                    self._ids(TableColumn(self.file, name, raw[name], first_row))
                    for name in (self.columns.user, self.columns.item)
                )
                seconds = order = np.zeros(len(raw), dtype=np.int64)
                nanos = np.zeros(len(raw), dtype=np.int32)
                if self.time:
                    seconds, nanos = TableColumn(self.file, self.time, raw[self.time], first_row).seconds()
                    order = seconds
                if self.position:
                    order = TableColumn(self.file, self.position, raw[self.position], first_row).integers()
                    nanos = np.zeros_like(nanos)
                batch = pa.RecordBatch.from_arrays(
                    [user, item, pa.array(seconds), pa.array(order), pa.array(nanos)],
                    names=["user", "item", "time", "order", "suborder"],
                )
            first_row += len(raw)
            yield batch
        if not first_row:
            raise self.file.error("a header but no rows", "give a log with at least one event")
        for name in (self.columns.user, self.columns.item):
            if self.matches[name, _WHOLE_FLOAT]:
                raise self.file.error(f"column {name!r} holds numbers such as 1.0", "write the ids as integers or text")

    def _ids(self, column: TableColumn) -> pa.DictionaryArray:
        import pyarrow.compute as pc

        ids = column.ids()
        for pattern in (_INTEGER, _WHOLE_FLOAT):
            if self.matches[column.name, pattern]:
                all_match = pc.all(pc.match_substring_regex(ids.dictionary, pattern)).as_py()
                self.matches[column.name, pattern] = all_match
        return ids

    def group(self, batches: list[pa.RecordBatch]) -> Interactions:
        """The Interactions of some of the rows; call it once `batches` is exhausted, which settles the id types."""
        import pyarrow as pa

        table = pa.Table.from_batches(batches).unify_dictionaries().combine_chunks()
        users, items = (table[name].chunk(0) for name in ("user", "item"))
        user_codes, item_codes = (ids.indices.to_numpy() for ids in (users, items))
        integers = {name: self.matches[name, _INTEGER] for name in (self.columns.user, self.columns.item)}

        item_ids: list[str] = items.dictionary.to_pylist()
        value: Callable[[str], Any] = int if integers[self.columns.item] else str
        ranked = sorted(range(len(item_ids)), key=[value(item_id) for item_id in item_ids].__getitem__)
        rank = np.empty(len(item_ids), dtype=np.int32)
        rank[ranked] = np.arange(len(item_ids), dtype=np.int32)

        rows = np.lexsort((table["suborder"].to_numpy(), table["order"].to_numpy(), user_codes))  # stable
        lengths = np.bincount(user_codes, minlength=len(users.dictionary))
        return Interactions(
            user_ids=users.dictionary.to_pylist(),
            item_ids=[item_ids[code] for code in ranked],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=rank[item_codes[rows]],
            timestamps=table["time"].to_numpy()[rows],
            integer_user_ids=integers[self.columns.user],
            integer_item_ids=integers[self.columns.item],
        )


def _iterate(log: _Log, max_events: int) -> Iterator[Interactions]:
    batches = log.batches()
    head: list[pa.RecordBatch] = []
    for batch in batches:
        head.append(batch)
        if sum(map(len, head)) > max_events:
            break
    else:
        yield log.group(head)
        return
    try:
        with tempfile.TemporaryDirectory(prefix="dman-") as folder:
            rest = chain(_drained(head), batches)
            yield from _spilled(log, rest, Path(folder), bits_used=0, max_events=max_events)
    except OSError as error:
        raise log.file.error(
            f"cannot be split into parts in {tempfile.tempdir or 'a temporary folder'}: {error}",
            "make room there, or set TMPDIR to another folder",
        ) from None


def _drained(batches: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches in order, each released once it has been used."""
    while batches:
        yield batches.pop(0)


def _spilled(
    log: _Log, batches: Iterable[pa.RecordBatch], folder: Path, *, bits_used: int, max_events: int
) -> Iterator[Interactions]:
    """Divide rows by a hash of their user into files, divide too large files further, and join small ones."""
    pending: list[pa.RecordBatch] = []
    for path, rows, divisible in _write_partitions(batches, folder, bits_used):
        if rows > max_events and divisible:
            deeper = path.with_suffix("")
            deeper.mkdir()
            yield from _spilled(
                log, _partition(path), deeper, bits_used=bits_used + _PARTITION_BITS, max_events=max_events
            )
        else:
            if pending and sum(map(len, pending)) + rows > max_events:
                yield log.group(pending)
                pending = []
            pending += _partition(path)
        path.unlink()
    if pending:
        yield log.group(pending)


def _write_partitions(batches: Iterable[pa.RecordBatch], folder: Path, bits_used: int) -> list[tuple[Path, int, bool]]:
    """Write each row to the file of its user; returns path, rows and whether it may be divided, for each file."""
    import pyarrow as pa

    shift = np.uint64(64 - bits_used - _PARTITION_BITS)
    paths = [folder / f"{part}.arrow" for part in range(1 << _PARTITION_BITS)]
    rows = np.zeros(len(paths), dtype=np.int64)
    lowest = np.full(len(paths), np.iinfo(np.uint64).max, dtype=np.uint64)  # the hashes met in each file
    highest = np.zeros(len(paths), dtype=np.uint64)
    writers: dict[int, Any] = {}
    with ExitStack() as stack:
        for batch in batches:
            hashes = _hashes(batch["user"])
            parts = ((hashes >> shift) % np.uint64(len(paths))).astype(np.int64)
            np.minimum.at(lowest, parts, hashes)
            np.maximum.at(highest, parts, hashes)
            by_part = np.argsort(parts, kind="stable")
            plain = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
            sorted_batch = pa.RecordBatch.from_arrays(plain, names=batch.schema.names).take(pa.array(by_part))
            counts = np.bincount(parts, minlength=len(paths))
            ends = np.cumsum(counts)
            for part in np.flatnonzero(counts).tolist():
                if part not in writers:
                    writers[part] = stack.enter_context(pa.ipc.new_stream(str(paths[part]), sorted_batch.schema))
                writers[part].write_batch(sorted_batch.slice(ends[part] - counts[part], counts[part]))
            rows += counts
    may_divide = (lowest != highest) & (bits_used + _PARTITION_BITS < _HASH_BITS)
    return [(paths[part], int(rows[part]), bool(may_divide[part])) for part in sorted(writers)]


def _hashes(users: pa.DictionaryArray) -> np.ndarray:
    """A hash of each row's user, (N,) uint64, well mixed in its upper bits; the same in every process."""
    checksums = [zlib.crc32(user_id.encode()) for user_id in users.dictionary.to_pylist()]
    mixed = np.array(checksums, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    by_row: np.ndarray = mixed[users.indices.to_numpy()]
    return by_row


def _partition(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            columns = [c.dictionary_encode() if pa.types.is_string(c.type) else c for c in batch.columns]
            yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
