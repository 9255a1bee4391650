"""How the values of a text file are quoted: what its first lines agree with, for one separator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dman_runtime.data.files.dialect import header_end, inner_byte, one_byte, unescaped
from dman_runtime.data.files.records import BadQuote, Records, ambiguous_record, bad_quote, quoted_value
from dman_runtime.data.log_options import AUTO, LogOptions
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    from dman_runtime.data.files.sources import Source


@dataclass(frozen=True)
class Sample:
    """The first lines of a file, in UTF-8."""

    source: Source
    options: LogOptions
    data: bytes  # whole lines
    complete: bool  # it is the whole file


@dataclass(frozen=True)
class Fit:
    """How well a sample fits a separator and a way of quoting."""

    separator: bytes
    quote: str
    records: Records  # of the sample
    width: int  # names of columns
    trailing: bool  # each line after the header has one more value, which is empty
    share: float  # of the records that have as many values as the first
    bad: BadQuote | None = None
    ambiguous: tuple[int, int] | None = None  # lines that are one row, or one row each without quotes; from 0
    remark: str = ""

    @property
    def perfect(self) -> bool:
        return self.share == 1 and self.bad is None

    def values(self, record: int) -> list[str]:
        return [value.decode("utf-8", "replace") for value in self.records.values_of(record)]

    def column_name(self, column: int, *, header: bool) -> str:
        first = header_end(self.records)
        names = self.values(first) if header and first < len(self.records) else []
        return names[column].strip()[:60] if column < len(names) else str(column + 1)


def best_quoting(sample: Sample, separator: bytes) -> Fit:
    """The way of quoting that fits the sample best. Raises InputError if two give different values."""
    if sample.options.quote != AUTO:
        return _measured(sample, separator, sample.options.quote)
    double = _measured(sample, separator, "double")
    if b'"' not in sample.data:
        return double
    quoted = [double] + ([_measured(sample, separator, "backslash")] if b'\\"' in sample.data else [])
    perfect = [fit for fit in quoted if fit.perfect]
    if len(perfect) > 1:
        raise sample.source.error(
            "its quotes inside values can be doubled or have a backslash, which gives different values",
            "choose double or backslash",
            parameter="quote",
        )
    if perfect:
        return perfect[0]
    plain = _measured(sample, separator, "none")
    if plain.perfect:
        return _without_quotes(sample, plain, double)
    return max(quoted, key=lambda fit: (fit.bad is None, fit.share))


def _without_quotes(sample: Sample, plain: Fit, double: Fit) -> Fit:
    bad = double.bad or _uneven(double)
    column = double.column_name(bad.column, header=sample.options.header)
    position = quoted_value(plain.records)
    if position is not None:
        raise sample.source.error(
            f"its quotes have no single meaning: line {plain.records.line_of(position) + 1} has a value in quotes, and "
            f"line {bad.line + 1}, column {column}, has {bad.problem}",
            "say how values are quoted, none if quotes belong to them",
            parameter="quote",
        )
    return replace(plain, remark=f"a lone quote in line {bad.line + 1}, column {column}")


def _uneven(fit: Fit) -> BadQuote:
    """The first quote of the first record with another number of values than the others."""
    records = fit.records
    record = int(np.argmax(~records.blank & (records.columns != fit.width + fit.trailing)))
    after = records.quotes[np.searchsorted(records.quotes, records.starts[record]) :]
    position = int(after[0]) if len(after) else int(records.starts[record])
    return BadQuote(position, records.line_of(position), records.column_of(position), "a lone quote")


def _measured(sample: Sample, separator: bytes, quote: str) -> Fit:
    quoted, byte = quote != "none", inner_byte(separator)
    data = unescaped(sample.data) if quote == "backslash" else sample.data
    records = Records(one_byte(data, separator, quoted=quoted), byte, quoted=quoted)
    bad = bad_quote(records, complete=sample.complete or bool(records.blank.all()))
    width, trailing, share = _columns(records, header=sample.options.header)
    ambiguous = None
    if quoted and sample.options.quote == AUTO and not records.outside.all():
        plain = Records(one_byte(data, separator, quoted=False), byte, quoted=False)
        ambiguous = ambiguous_record(records, plain.columns, width + trailing)
        bad = bad or _swallowing(records, plain, width + trailing)
    return Fit(separator, quote, records, width, trailing, share, bad, ambiguous)


def _columns(records: Records, *, header: bool) -> tuple[int, bool, float]:
    """How many columns the first line has; whether a separator ends each other line; how many lines agree."""
    filled = np.flatnonzero(~records.blank)
    if not len(filled):
        return 0, False, 0.0
    counts, ends = records.columns[filled], records.text_ends[filled]
    width = int(counts[0])
    one_more = (counts[1:] == width + 1) & (records.bytes[ends[1:] - 1] == records.separator)
    if header and len(one_more) and one_more.mean() > 0.5:
        return width, True, float((one_more.sum() + 1) / len(counts))
    return width, False, float((counts == width).mean())


def _swallowing(records: Records, plain: Records, width: int) -> BadQuote | None:
    """A quote that is still open at the end of the sample, if the lines after it look like rows."""
    if len(records.quotes) % 2 == 0:
        return None
    position = int(records.quotes[-1])
    line = records.line_of(position)
    after = plain.columns[line:]
    if len(after) < 3 or (after != width).any():
        return None
    return BadQuote(position, line, records.column_of(position), "a lone quote")


def check_quotes(source: Source, records: Records, names: tuple[str, ...], first_line: int, *, complete: bool) -> None:
    """Raise InputError, with the line and the column where the value begins, if a quote is where none can be."""
    if bad := bad_quote(records, complete=complete):
        raise bad_quote_error(source, bad, names[bad.column] if bad.column < len(names) else "", first_line)


def bad_quote_error(source: Source, bad: BadQuote, column: str, first_line: int) -> InputError:
    place = f"line {first_line + bad.line}{f', column {column}' if column else ''}"
    return source.error(f"{place}: {bad.problem}", "read it without quotes (none), or correct it", parameter="quote")


def ambiguous_error(source: Source, lines: tuple[int, int]) -> InputError:
    return source.error(
        f"lines {lines[0]} to {lines[1]} are one row with line breaks in quotes, or a row each if quotes mean nothing",
        "say how values are quoted: double, or none",
        parameter="quote",
    )
