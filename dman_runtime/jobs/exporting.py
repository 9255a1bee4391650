"""Writes all histories of a store as a log, which trains the next model or fills another store.

Works while a server runs: users are read in short snapshots, each user in one. Users that come or go meanwhile may be
in the log or not. pyarrow is imported on use only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dman_runtime.data.ids import INTEGER, TEXT, is_integer_id
from dman_runtime.errors import InputError
from dman_runtime.jobs.parquet_output import ParquetOutput
from dman_runtime.merging import first_known
from dman_runtime.model.times import filled_times
from dman_runtime.store.base import UNKNOWN, Events, StateStore

if TYPE_CHECKING:
    import pyarrow as pa

EVENTS_PER_TABLE = 500_000  # read from one moment and written at once; a user may have more
_USERS_PER_SCAN = 5000
_IDS_PER_LOOK = 100_000


@dataclass
class ExportResult:
    events: int = 0
    users: int = 0  # with at least one event
    items: int = 0
    filled_times: int = 0  # unknown times that were written as the time of the event before
    user_ids: str = TEXT  # or INTEGER
    item_ids: str = TEXT
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """For people, one line."""
        return f"{self.events} events of {self.users} users, {self.items} items"


@dataclass(frozen=True)
class _Columns:
    """What the columns are; decided before the first row is written."""

    users: str  # INTEGER or TEXT
    items: str
    times: bool  # at least one time is known
    warnings: tuple[str, ...] = ()

    def fitted(self, which: Literal["users", "items"], kind: str, misfit: str | None) -> _Columns:
        """The same with ids of a kind, or as text if one does not fit."""
        if kind == TEXT or (kind == UNKNOWN and misfit is not None):
            return replace(self, **{which: TEXT})  # type: ignore[arg-type]
        return self if misfit is None else self.as_text(which, misfit)

    def as_text(self, which: Literal["users", "items"], misfit: str) -> _Columns:
        """The same with ids as text, because of one of them."""
        warning = f"the {which[:-1]} ids are written as text: {misfit!r:.80} is no integer of 64 bits"
        return replace(self, warnings=(*self.warnings, warning), **{which: TEXT})  # type: ignore[arg-type]

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        kinds = {INTEGER: pa.int64(), TEXT: pa.string()}
        columns = [("user_id", kinds[self.users]), ("item_id", kinds[self.items])]
        columns += [("timestamp", pa.int64())] if self.times else []
        return pa.schema([*columns, ("position", pa.int64())])


class _ChangedError(Exception):
    """What came while the file was written does not fit its columns."""

    def __init__(self, columns: _Columns) -> None:
        super().__init__()
        self.columns = columns


def export_log(store: StateStore, output: Path) -> ExportResult:
    """Writes a Parquet file with the columns user_id, item_id, timestamp and position.

    The rows of a user are consecutive, in the order of the history; positions count from 0. Ids have the types that
    the store remembers, or text where one does not fit; timestamps are seconds. An unknown time becomes that of the
    event before it, or of the first known one; it stays 0 where none of the user is known. Without any known time
    there is no column timestamp. Raises InputError, StoreError.
    """
    if output.suffix.lower() != ".parquet":
        raise InputError(f"{output} is not named as a Parquet file", "let its name end in .parquet", parameter="output")
    columns: _Columns | None = None
    while True:  # four times at most: each time one column gets wider
        try:
            with ParquetOutput(output) as out:  # first of all: what cannot be written is refused at once
                columns = columns or _decided(store)
                return _write(store, out, columns)
        except _ChangedError as changed:
            columns = changed.columns


def _decided(store: StateStore) -> _Columns:
    """Looks at all ids and times once."""
    types, times, items = store.id_types(), False, _ItemSet()
    unfit_user: str | None = None
    for user_ids, histories in _batches(store, "look"):
        unfit_user = unfit_user or _misfit(user_ids)
        for numbers, timestamps in histories:
            items.add(numbers)
            times = times or bool(timestamps.any())
    unfit_item = next(filter(None, (_misfit(store.item_ids(part)) for part in items.parts())), None)
    columns = _Columns(INTEGER, INTEGER, times)
    return columns.fitted("users", types.users, unfit_user).fitted("items", types.items, unfit_item)


def _write(store: StateStore, out: ParquetOutput, columns: _Columns) -> ExportResult:
    result, items = ExportResult(user_ids=columns.users, item_ids=columns.items), _ItemSet()
    for user_ids, histories in _batches(store, "export"):
        out.write(_table(store, user_ids, histories, columns, result))
        result.users += len(user_ids)
        for numbers, _ in histories:
            result.events += len(numbers)
            items.add(numbers)
    if not result.users:
        out.write(columns.schema().empty_table())
    result.items = items.count()
    result.warnings = [*columns.warnings, *_time_warnings(result)]
    return result


def _time_warnings(result: ExportResult) -> Iterator[str]:
    if result.filled_times:
        yield f"{result.filled_times} events without a time were written with that of the event before"


def _batches(store: StateStore, what: str) -> Iterator[tuple[list[str], list[Events]]]:
    """User ids and their histories, none empty, in batches of about EVENTS_PER_TABLE events."""
    users = store.scan()
    with tqdm(unit="ev", unit_scale=True, desc=what, disable=None) as bar:
        while left := list(islice(users, _USERS_PER_SCAN))[::-1]:
            while left:
                user_ids, histories, events = list[str](), list[Events](), 0
                with store.snapshot() as snapshot:
                    while left and events < EVENTS_PER_TABLE:
                        history = snapshot.history(user_id := left.pop())
                        if len(history[0]):
                            user_ids.append(user_id)
                            histories.append(history)
                            events += len(history[0])
                if user_ids:
                    yield user_ids, histories
                bar.update(events)


def _table(
    store: StateStore, user_ids: list[str], histories: list[Events], columns: _Columns, result: ExportResult
) -> pa.Table:
    """The rows of some users. Counts what was filled in. Raises _ChangedError."""
    import pyarrow as pa

    lengths = np.array([len(numbers) for numbers, _ in histories])
    users = np.repeat(np.arange(len(user_ids)), lengths)
    distinct, items = np.unique(np.concatenate([numbers for numbers, _ in histories]), return_inverse=True)
    arrays: dict[str, Any] = {
        "user_id": _ids("users", user_ids, columns).take(pa.array(users)),
        "item_id": _ids("items", store.item_ids(distinct), columns).take(pa.array(items)),
    }
    if columns.times:
        times = np.concatenate([filled_times(found, first_known(found, 0)) for _, found in histories])
        result.filled_times += int(np.count_nonzero(times)) - sum(int(np.count_nonzero(t)) for _, t in histories)
        arrays["timestamp"] = times
    elif any(found.any() for _, found in histories):
        raise _ChangedError(replace(columns, times=True))
    arrays["position"] = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return pa.table(arrays, schema=columns.schema())


def _ids(which: Literal["users", "items"], ids: list[str], columns: _Columns) -> pa.Array:
    import pyarrow as pa

    if getattr(columns, which) == TEXT:
        return pa.array(ids, pa.string())
    if (misfit := _misfit(ids)) is not None:
        raise _ChangedError(columns.as_text(which, misfit))
    return pa.array([int(text) for text in ids], pa.int64())


def _misfit(ids: Sequence[str]) -> str | None:
    """The first id that is not written as an integer of 64 bits is."""
    return next((text for text in ids if not is_integer_id(text)), None)


class _ItemSet:
    """Item numbers, as a bit for each number that there is."""

    def __init__(self) -> None:
        self._found = np.zeros(0, bool)

    def add(self, numbers: NDArray[np.uint32]) -> None:
        if (highest := int(numbers.max(initial=0))) >= len(self._found):
            self._found = np.concatenate([self._found, np.zeros(highest + 1, bool)])
        self._found[numbers] = True

    def count(self) -> int:
        return int(self._found.sum())

    def parts(self) -> Iterator[NDArray[np.int64]]:
        numbers = np.flatnonzero(self._found)
        for start in range(0, len(numbers), _IDS_PER_LOOK):
            yield numbers[start : start + _IDS_PER_LOOK]
