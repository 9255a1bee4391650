"""The time column of a log: numbers in a unit that is found for the whole log, or dates and times in words.

A number is plausible in a unit if it then lies between 1990 and the end of the next year. These ranges do not overlap
(a second of 2024 is a millisecond of 1970), so the unit follows from the values, and a mixture shows. Numbers that are
too small for any unit (0, 1, 2...) are seconds: they order events, and the report shows the year.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dman_runtime.data.columns import BadRows, parsed
from dman_runtime.data.log_options import AUTO
from dman_runtime.data.tables import Rows, TableFile, is_text_type, quoted
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # per second
NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
DAY = 86_400
FIRST = int(datetime.datetime(1990, 1, 1, tzinfo=datetime.UTC).timestamp())
_NUMBERS, _WORDS = "numbers", "dates in words"
_REMEDY = "write seconds since 1970, or times as 2024-01-31 12:00:00"
ISO_FIXES = (  # other ways to write the same, made to fit what Arrow reads
    (r"\s*(UTC|GMT|Z|z)$", ""),
    (r"\s+([+-]\d{2}:?\d{2})$", r"\1"),
    (r"^(\d{4})[/.](\d{1,2})[/.](\d{1,2})", r"\1-\2-\3"),
)


def end_of_next_year() -> int:
    year = datetime.datetime.now(datetime.UTC).year + 2
    return int(datetime.datetime(year, 1, 1, tzinfo=datetime.UTC).timestamp())


@dataclass(frozen=True)
class Times:
    """The times of events in the unit of their log."""

    whole: np.ndarray  # (N,) int64
    fraction: np.ndarray | None  # (N,) float64 from 0 to below 1; None if all are 0
    per_second: int

    @property
    def keys(self) -> list[np.ndarray]:
        """What orders events: arrays (N,) int64, the first of which counts most."""
        return [self.whole] if self.fraction is None else [self.whole, (self.fraction * 1e9).astype(np.int64)]

    @property
    def seconds(self) -> np.ndarray:
        """(N,) int64 since 1970, rounded down."""
        return self.whole if self.per_second == 1 else self.whole // self.per_second

    def taken(self, rows: np.ndarray | None) -> Times:
        """The times of some rows in their order; None: of all."""
        if rows is None:
            return self
        return Times(self.whole[rows], None if self.fraction is None else self.fraction[rows], self.per_second)


class TimeColumn:
    """What a log's times are, found over all batches. Raises InputError for what no row can be blamed for."""

    def __init__(self, name: str, unit: str) -> None:
        self.name = name
        self._unit = unit
        self._form = ""  # numbers or words, the same in the whole log
        self._form_at: tuple[TableFile, int] | None = None  # a row that has it
        self._found: dict[int, tuple[TableFile, int, object]] = {}  # class of a time -> the first row that has it
        self.early = 0  # times before 1990
        self.only_dates = True
        self._late = end_of_next_year()
        self._lowest: int | float | None = None
        self._highest: int | float | None = None

    def read(self, rows: Rows, bad: BadRows) -> tuple[np.ndarray, np.ndarray | None]:
        """The times of a batch, in a unit that is known at the end: whole (N,) int64 and, if any, their fractions."""
        values = rows.batch[self.name]
        numbers, wrong = self._numbers(values, rows)
        if numbers.dtype.kind == "f":
            unusable = ~(np.abs(numbers) < 2.0**63)  # NaN too
            if unusable.any():
                numbers = np.where(unusable, 0, numbers)
                wrong = unusable if wrong is None else wrong | unusable
        if wrong is not None:

            def problem(row: int) -> str:
                value = values[row].as_py()
                missing = value is None or value == ""
                return f"{self.name} has no value" if missing else f"{self.name} {quoted(value)} is not a time"

            bad.add(wrong, "without a time", problem, _REMEDY)
        self._classify(numbers, rows, bad)
        if numbers.dtype.kind == "i":
            return numbers, None
        whole = np.floor(numbers)
        return whole.astype(np.int64), numbers - whole

    # -- numbers or words ------------------------------------------------------------------------------------------

    def _numbers(self, values: pa.Array, rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
        import pyarrow as pa

        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            self._require_form(_WORDS, rows)
            return _nanoseconds(values)
        if is_text_type(kind):
            return self._from_text(values, rows)
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            cause = f"{rows.file.path}: column {self.name!r} has type {kind}"
            raise InputError(cause, _REMEDY, parameter="time_column")
        self._require_form(_NUMBERS, rows)
        return parsed(values, pa.int64() if pa.types.is_integer(kind) else pa.float64())

    def _from_text(self, values: pa.Array, rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
        """Text is numbers or words in the whole log; the first value that is one of them decides."""
        import pyarrow as pa

        if self._form != _WORDS:
            as_integers = _whole_numbers(values)
            as_numbers = parsed(values, pa.float64()) if as_integers is None else (as_integers, None)
            if _misses(as_numbers) == 0 or (self._form == _NUMBERS and _misses(as_numbers) < len(values)):
                self._require_form(_NUMBERS, rows)
                return as_numbers
        as_words = _iso_nanoseconds(values)
        # where as many are either, words: what is left of a date that was cut off is a number
        if self._form == _WORDS or len(values) > _misses(as_words) <= _misses(as_numbers):
            self._require_form(_WORDS, rows)
            return as_words
        if _misses(as_numbers) < len(values):
            self._require_form(_NUMBERS, rows)
        return as_numbers

    def _require_form(self, form: str, rows: Rows) -> None:
        if self._form_at is None:
            self._form, self._form_at = form, (rows.file, rows.first_row)
        elif self._form != form:
            file, row = self._form_at
            raise InputError(
                f"{self.name} holds {self._form} from {file.where(row)} on and {form} from "
                f"{rows.file.where(rows.first_row)} on",
                "write all times in one way",
            )

    # -- units -----------------------------------------------------------------------------------------------------

    def _edges(self) -> list[int]:
        """Ends of the ranges that are plausible: even classes lie between them, odd ones in them."""
        known = self._form == _WORDS or self._unit != AUTO
        factors = [UNITS[self.unit]] if known else UNITS.values()
        return [edge * factor for factor in factors for edge in (FIRST, self._late)]

    def _classify(self, numbers: np.ndarray, rows: Rows, bad: BadRows) -> None:
        """Notes in which units the times are plausible. Those that lie after the next year in all are bad rows."""
        usable = numbers if bad.mask is None else numbers[~bad.mask]
        if not len(usable):
            return
        edges, low, high = self._edges(), usable.min(), usable.max()
        first, last = np.searchsorted(edges, (low, high), side="right").tolist()
        if first == last and first % 2 == 1:
            self._found.setdefault(first, (rows.file, rows.first_row, numbers[0].item()))
        else:
            classes = np.searchsorted(edges, numbers, side="right")
            unit = "" if len(edges) == 2 else " in every unit"
            bad.add(
                (classes % 2 == 0) & (classes > 0),
                "with a time beyond the next year",
                lambda row: f"{self.name} {self._shown(numbers[row])} is a time beyond the next year{unit}",
                "correct it; if the column is no time but an order, name it as the position column",
            )
            kept = np.ones(len(numbers), bool) if bad.mask is None else ~bad.mask
            for one in np.unique(classes[kept]).tolist():
                row = int(np.argmax((classes == one) & kept))
                self._found.setdefault(one, (rows.file, rows.first_row + row, numbers[row].item()))
            self.early += int(np.count_nonzero((classes == 0) & kept))
            if not kept.any():
                return
            low, high = numbers[kept].min(), numbers[kept].max()
        self._lowest = low.item() if self._lowest is None else min(self._lowest, low.item())
        self._highest = high.item() if self._highest is None else max(self._highest, high.item())
        if self.only_dates:
            self._note_dates(usable)

    def _note_dates(self, usable: np.ndarray) -> None:
        """Midnights only, in the largest unit that they can be in: then they are dates."""
        day = DAY * (UNITS["ns"] if self._form == _WORDS else UNITS.get(self._unit, 1))
        self.only_dates = not (usable[:1000] % day).any() and not (usable % day).any()

    def _shown(self, value: object) -> str:
        if self._form == _WORDS and isinstance(value, int | np.integer):
            return str(np.datetime64(int(value), "ns")).removesuffix("000000000").rstrip(".")
        return str(value)

    # -- at the end ------------------------------------------------------------------------------------------------

    @property
    def unit(self) -> str:
        """s, ms, us or ns: of all times read so far. Raises InputError, naming two rows, if they have several."""
        if self._form == _WORDS:
            return "ns"
        if self._unit != AUTO:
            return self._unit
        found = sorted(one for one in self._found if one % 2 == 1)
        if len(found) > 1:
            rows = []
            for one in found[:2]:
                file, row, value = self._found[one]
                rows.append(f"{value} in {NAMES[_unit_of(one)]} ({file.where(row)})")
            raise InputError(
                f"{self.name} holds times in several units: {' and '.join(rows)}",
                "write all times in one unit, or say which one is meant",
                parameter="time_unit",
            )
        return _unit_of(found[0]) if found else "s"

    @property
    def is_numbers(self) -> bool:
        return self._form == _NUMBERS

    @property
    def described(self) -> str:
        """The unit in words, for people."""
        return "dates and times" if self._form == _WORDS else NAMES[self.unit]

    def times(self, whole: np.ndarray, fraction: np.ndarray | None) -> Times:
        """Values that were read, in the unit of the log."""
        return Times(whole, fraction, UNITS[self.unit])

    def range(self) -> tuple[int, int] | None:
        """First and last time in seconds since 1970, or None."""
        if self._lowest is None or self._highest is None:
            return None
        factor = UNITS[self.unit]
        return int(self._lowest // factor), int(self._highest // factor)

    def early_example(self) -> str:
        """Where the first time before 1990 stands; empty if all times are, as then they only order."""
        if 0 not in self._found or len(self._found) == 1:
            return ""
        file, row, value = self._found[0]
        return f"{self._shown(value)} in {file.where(row)}"

    def other_unit(self) -> str:
        """A unit in which all times would be plausible, where in the unit that was named none is; else empty."""
        if self._form != _NUMBERS or self._unit == AUTO or set(self._found) != {0} or self._lowest is None:
            return ""
        for name, factor in UNITS.items():
            if FIRST * factor <= self._lowest and (self._highest or 0) < self._late * factor:
                return name
        return ""


def _unit_of(plausible: int) -> str:
    return list(UNITS)[plausible // 2]


def _whole_numbers(values: pa.Array) -> np.ndarray | None:
    import pyarrow as pa

    try:
        numbers: np.ndarray = values.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        return None
    return numbers


def _misses(result: tuple[np.ndarray, np.ndarray | None]) -> int:
    return 0 if result[1] is None else int(np.count_nonzero(result[1]))


def _nanoseconds(values: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Dates and timestamps as nanoseconds since 1970 in UTC, which is meant where no zone is named."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    zone = getattr(values.type, "tz", None)
    converted = values.cast(pa.timestamp("ns", zone), safe=False)
    back = converted.cast(values.type, safe=False)
    wrong = pc.fill_null(pc.not_equal(back, values), True).to_numpy(zero_copy_only=False)  # beyond what 64 bits hold
    numbers = converted.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return numbers, wrong if wrong.any() else None


def _iso_nanoseconds(values: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """ISO dates and times in text, with or without a zone, as nanoseconds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = pc.utf8_trim_whitespace(values.cast(pa.string()))
    for attempt in range(2):
        for kind in (pa.timestamp("ns"), pa.timestamp("ns", "UTC")):
            try:
                converted = texts.cast(kind)
            except pa.ArrowInvalid:
                continue
            missing = converted.is_null().to_numpy(zero_copy_only=False) if converted.null_count else None
            return converted.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False), missing
        if attempt == 0:
            for pattern, replacement in ISO_FIXES:
                texts = pc.replace_substring_regex(texts, pattern, replacement)
    return _one_by_one(texts)


def _one_by_one(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Slow, and only for a batch in which zones are mixed or a value is bad."""
    import pyarrow as pa

    numbers, wrong = np.zeros(len(texts), np.int64), np.zeros(len(texts), bool)
    for row, text in enumerate(texts):
        for kind in (pa.timestamp("ns"), pa.timestamp("ns", "UTC")):
            try:
                value = text.cast(kind)
            except pa.ArrowInvalid:
                continue
            if value.is_valid:
                numbers[row] = value.value
                break
        else:
            wrong[row] = True
    return numbers, wrong
