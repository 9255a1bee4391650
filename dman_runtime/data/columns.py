"""Columns of a log, batch by batch: ids and positions that are checked, and rows that cannot be used.

A column remembers what it has met in all batches, because a log has one type of ids. Whole batches are checked with
few operations on their bytes: a log of integers never becomes text. pyarrow is imported on use only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dman_runtime.data.ids import (
    BLANKS,
    CONTROL_CHARACTERS,
    INTEGER,
    INTEGER_FORM,
    MAX_ID_BYTES,
    RULE,
    TEXT,
    id_problem,
    is_integer_id,
)
from dman_runtime.data.input_report import EXAMPLES, BadRow
from dman_runtime.data.tables import Rows, is_text_type, quoted
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_WHOLE_FLOAT = r"^-?[0-9]+\.0+$"  # pandas writes an integer column like this if it has missing values
_POWERS_OF_TEN = 10 ** np.arange(1, 19, dtype=np.int64)


class BadRows:
    """The rows of one batch that cannot be used, with the first problem of each."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.mask: np.ndarray | None = None  # (rows,) bool; None while there are none
        self.causes: dict[str, int] = {}
        self.examples: list[tuple[int, str, str]] = []  # row of the file, problem, remedy

    def add(self, bad: np.ndarray, cause: str, problem: Callable[[int], str], remedy: str) -> None:
        """Rows (N,) bool; `cause` counts them, `problem` describes a row of the batch."""
        new = bad if self.mask is None else bad & ~self.mask
        count = int(np.count_nonzero(new))
        if not count:
            return
        self.mask = new if self.mask is None else self.mask | new
        self.causes[cause] = self.causes.get(cause, 0) + count
        for row in np.flatnonzero(new)[:EXAMPLES].tolist():
            self.examples.append((self._rows.first_row + row, problem(row), remedy))
        self.examples.sort()

    def described(self, count: int) -> list[BadRow]:
        """The first `count` of them, for the report."""
        chosen = self.examples[: max(0, count)]
        places = self._rows.file.places([row for row, _, _ in chosen]) if chosen else []
        return [BadRow(place, problem) for place, (_, problem, _) in zip(places, chosen, strict=True)]

    def error(self) -> InputError:
        row, problem, remedy = self.examples[0]
        return InputError(
            f"{self._rows.file.where(row)}: {problem}", f"{remedy}, or skip such rows", parameter="bad_rows"
        )


class IdColumn:
    """The ids of users or of items. Raises InputError for what no row can be blamed for."""

    def __init__(self, role: str, name: str, wanted: str) -> None:
        self.role, self.name, self.wanted = role, name, wanted
        self.integers = wanted != TEXT  # all ids so far are integers that fit 64 bits
        self.trimmed = 0
        self.why_text = ""
        self.mostly_integers = False  # before the first id that is none
        self._whole_float = self._whole_number = ""  # examples
        self._only_floats = True

    @property
    def kind(self) -> str:
        return INTEGER if self.integers else TEXT

    def read(self, rows: Rows, bad: BadRows) -> pa.Array:
        """The ids of a batch, int64 or string; what stands in bad rows means nothing."""
        import pyarrow as pa

        values = rows.batch[self.name]
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_integer(values.type):
            return self._numbers(values, bad)
        if not is_text_type(values.type):
            cause = f"{rows.file.path}: column {self.name!r} has type {values.type}"
            raise InputError(cause, "write the ids as integers or text", parameter=f"{self.role}_column")
        values = _as_utf8(values, self.name, rows)
        if rows.file.typed:
            if self.wanted != INTEGER:
                self._turn_to_text(f"{rows.file.path} has them as text")
        elif self.integers and (numbers := _canonical_integers(values)) is not None:
            self.mostly_integers = True
            return numbers
        return self._texts(values, rows, bad)

    def _numbers(self, values: pa.Array, bad: BadRows) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        self._add_missing(values, bad)
        if values.type == pa.uint64() and pc.max(values).as_py() > np.iinfo(np.int64).max:
            self._turn_to_text("one does not fit 64 bits")
            return values.cast(pa.string())
        return values.cast(pa.int64()).fill_null(0)

    def _add_missing(self, values: pa.Array, bad: BadRows) -> None:
        if values.null_count:
            missing = values.is_null().to_numpy(zero_copy_only=False)
            bad.add(missing, f"without {self.role} id", lambda _: f"{self.name} has no value", "fill it in")

    def _turn_to_text(self, why: str) -> None:
        if self.integers:
            self.integers, self.why_text = False, why

    def _texts(self, values: pa.Array, rows: Rows, bad: BadRows) -> pa.Array:
        """Ids as text, trimmed and checked."""
        import pyarrow.compute as pc

        self._add_missing(values, bad)
        values = values.fill_null("")
        data, offsets = text_buffers(values)
        if _blank_edges(data, offsets):
            trimmed = pc.utf8_trim(values, characters=BLANKS)
            self.trimmed += pc.sum(pc.not_equal(trimmed, values)).as_py()
            values = trimmed
            data, offsets = text_buffers(values)
        self._add_invalid(values, data, offsets, bad)
        if self.wanted == INTEGER or self.integers:
            values = self._maybe_integers(values, rows, bad)
        return values

    def _maybe_integers(self, values: pa.Array, rows: Rows, bad: BadRows) -> pa.Array:
        """Text that is not all integers as it stood: blanks or bad rows may be the reason."""
        import pyarrow as pa
        import pyarrow.compute as pc

        integer = pc.match_substring_regex(values, INTEGER_FORM)
        other = pc.invert(integer).to_numpy(zero_copy_only=False)
        if bad.mask is not None:
            other &= ~bad.mask
        if not other.any():
            usable = pc.if_else(integer, values, "0")
            if (numbers := _canonical_integers(usable)) is not None:
                self.mostly_integers = True
                return numbers
            other = np.array([not is_integer_id(text) for text in usable.to_pylist()])
        row = int(np.argmax(other))
        text = values[row].as_py()
        if self.wanted == INTEGER:
            raise InputError(
                f"{rows.file.where(rows.first_row + row)}: {self.name} {quoted(text)} is no integer of 64 bits, and "
                f"{self.role} ids are integers",
                "give a log with such ids, or say that they are text",
                parameter=f"{self.role}_ids",
            )
        if np.count_nonzero(other) < 0.5 * len(other):
            self.mostly_integers = True
        self._turn_to_text(f"{quoted(text)} is no integer of 64 bits")
        return values.cast(pa.string())

    def _add_invalid(self, values: pa.Array, data: np.ndarray, offsets: np.ndarray, bad: BadRows) -> None:
        import pyarrow.compute as pc

        sizes = np.diff(offsets)
        wrong = (sizes == 0) | (sizes > MAX_ID_BYTES)
        # C0 and DEL are single bytes, C1 is 0xC2 with 0x80 to 0x9f: rarely there, so look closer only then
        if ((data < 0x20) | (data == 0x7F)).any() or ((data[:-1] == 0xC2) & (data[1:] < 0xA0)).any():
            wrong |= pc.match_substring_regex(values, CONTROL_CHARACTERS).to_numpy(zero_copy_only=False)
        if wrong.any():

            def problem(row: int) -> str:
                text = values[row].as_py()
                return f"{self.name} {quoted(text)} {id_problem(text)}" if text else f"{self.name} has no value"

            empty = sizes == 0
            bad.add(wrong & empty, f"without {self.role} id", problem, "fill it in")
            bad.add(wrong & ~empty, f"with an unusable {self.role} id", problem, RULE)

    def note_distinct(self, ids: pa.Array, where: str) -> None:
        """Looks for one id written in two ways among distinct ids (N,) as text. Raises InputError."""
        import pyarrow.compute as pc

        def first(pattern: str) -> str:
            index = pc.match_substring_regex(ids, pattern).index(True).as_py()
            return "" if index < 0 else str(ids[index].as_py())

        data, _ = text_buffers(ids)
        if not self._whole_float and (data == ord(".")).any():
            self._whole_float = first(_WHOLE_FLOAT)
        if not self._whole_number:
            self._whole_number = first(INTEGER_FORM)
        if self._whole_float and self._whole_number:
            raise InputError(
                f"{where}: {self.name} holds {self._whole_number} and {self._whole_float}: whole numbers in two forms",
                "write all ids in one form",
            )
        if self._only_floats:
            self._only_floats = bool(pc.all(pc.match_substring_regex(ids, _WHOLE_FLOAT)).as_py())

    def check_whole(self, where: str) -> None:
        """Raises InputError if all ids that were noted look like 1.0."""
        if self._whole_float and self._only_floats:
            cause = f"{where}: {self.name} holds numbers such as {self._whole_float}"
            raise InputError(cause, "write the ids as integers or text")


class PositionColumn:
    """Places of events in the histories of their users."""

    def __init__(self, name: str, *, named: bool) -> None:
        self.name, self._named = name, named
        self.why_not = ""  # why it is not used; only where nobody named it

    def read(self, rows: Rows, bad: BadRows) -> np.ndarray:
        """Positions of a batch, (N,) int64."""
        import pyarrow as pa

        values = rows.batch[self.name]
        numbers, wrong = parsed(values, pa.int64())
        if wrong is not None and not self._named:
            row = int(np.argmax(wrong))
            self.why_not = f"{rows.file.where(rows.first_row + row)}: {_shown(values[row].as_py())}"
        elif wrong is not None:
            bad.add(
                wrong,
                "without a position",
                lambda row: f"{self.name} {_shown(values[row].as_py())}, not an integer",
                "write whole numbers (also for 1.0)",
            )
        return numbers


def parsed(values: pa.Array, kind: pa.DataType) -> tuple[np.ndarray, np.ndarray | None]:
    """Values as numbers of a type, and where they are none (N,) bool; None if all are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if is_text_type(values.type):
        values = values.cast(pa.string())
        values = pc.utf8_trim_whitespace(values) if _blank_edges(*text_buffers(values.fill_null(""))) else values
    try:
        numbers = values.cast(kind)
        wrong = numbers.is_null().to_numpy(zero_copy_only=False) if numbers.null_count else None
        return numbers.fill_null(0).to_numpy(zero_copy_only=False), wrong
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    converted = np.zeros(len(values), dtype=kind.to_pandas_dtype())
    wrong = np.zeros(len(values), dtype=bool)
    for row, value in enumerate(values.to_pylist()):  # slow, and only for a batch with a bad value
        try:
            converted[row] = pa.scalar(value).cast(kind).as_py()
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            wrong[row] = True
    return converted, wrong


def _as_utf8(values: pa.Array, name: str, rows: Rows) -> pa.Array:
    import pyarrow as pa

    try:
        values = values.cast(pa.string())
        if rows.file.typed:  # other files were decoded
            values.validate(full=True)
    except pa.ArrowInvalid:
        cause = f"{rows.file.path}: column {name!r} holds text that is not UTF-8"
        raise InputError(cause, "write it as UTF-8") from None
    return values


def text_buffers(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a string array without nulls, and the offsets (N+1,) int64 of its values in them."""
    _, offset_buffer, data_buffer = values.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    start, end = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (0, 0)
    return data[start:end], offsets - start


def _blank_edges(data: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether a value may begin or end with blanks; those beyond ASCII are looked at closer by the caller."""
    filled = np.diff(offsets) > 0
    edges = np.concatenate([data[offsets[:-1][filled]], data[offsets[1:][filled] - 1]])
    return bool(((edges <= 0x20) | (edges >= 0x80)).any())


def _canonical_integers(values: pa.Array) -> pa.Array | None:
    """The text as int64, if each value is an integer in plain decimal (0, 42, -7; not 007); else None."""
    import pyarrow as pa

    if values.null_count or not len(values):
        return None
    try:
        numbers = values.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    # Arrow reads other forms too (007), which are all longer: the sum of the lengths tells
    integers = numbers.to_numpy()
    sizes = np.abs(integers)
    digits = len(integers) + sum(
        int(np.count_nonzero(sizes >= power)) for power in _POWERS_OF_TEN if power <= sizes.max()
    )
    offsets = np.frombuffer(values.buffers()[1], np.int32)
    length = int(offsets[values.offset + len(values)]) - int(offsets[values.offset])
    return numbers if length == digits + int(np.count_nonzero(integers < 0)) else None


def _shown(value: object) -> str:
    return "has no value" if value is None or value == "" else f"{quoted(value)} is"
