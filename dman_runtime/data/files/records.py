"""Where the lines, records and values of some bytes of text begin and end, and whether their quotes make sense.

A record is a row as written. It is longer than a line if a quoted value in it holds line breaks.
A separator is one byte.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_NEWLINE, _RETURN, _QUOTE = 10, 13, 34


class Records:
    """The layout of bytes that begin with a record. Positions are int64 arrays, ends are exclusive.

    With `quoted`, separators and line breaks between two quotes belong to a value.
    """

    def __init__(self, data: bytes, separator: bytes, *, quoted: bool) -> None:
        self.data = data
        self.bytes = np.frombuffer(data, np.uint8)
        self.separator, self.quoted = separator[0], quoted
        self.quotes = np.flatnonzero(self.bytes == _QUOTE) if quoted else np.empty(0, np.int64)
        newlines = np.flatnonzero(self.bytes == _NEWLINE)
        if data and not data.endswith(b"\n"):
            newlines = np.append(newlines, len(data))
        self.line_ends = newlines  # positions of the line breaks, (lines)
        self.outside = self.is_outside(newlines)  # (lines) bool: the line break ends a record
        self.ends = newlines[self.outside]  # (records)

    def is_outside(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.quotes, positions) % 2 == 0 if len(self.quotes) else np.ones(len(positions), bool)

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def starts(self) -> np.ndarray:
        """(records) where they begin."""
        return np.concatenate([[0], self.ends[:-1] + 1]).astype(np.int64) if len(self.ends) else self.ends

    @cached_property
    def first_lines(self) -> np.ndarray:
        """(records) the line that each begins on, from 0."""
        return np.searchsorted(self.line_ends, self.starts)

    @cached_property
    def last_lines(self) -> np.ndarray:
        """(records) the line that each ends on, from 0."""
        return np.flatnonzero(self.outside)

    @cached_property
    def text_ends(self) -> np.ndarray:
        """(records) where they end, without the line break."""
        before = np.maximum(self.ends - 1, 0)
        return self.ends - ((self.ends > self.starts) & (self.bytes[before] == _RETURN))

    @cached_property
    def blank(self) -> np.ndarray:
        """(records) bool: nothing in them at all."""
        return self.text_ends == self.starts

    @cached_property
    def separators(self) -> np.ndarray:
        """Positions of the separators that are outside of quotes."""
        found = np.flatnonzero(self.bytes == self.separator)
        return found[self.is_outside(found)]

    @cached_property
    def columns(self) -> np.ndarray:
        """(records) how many values each has."""
        counts = np.searchsorted(self.separators, self.ends)
        return np.diff(counts, prepend=0) + 1

    def text_of(self, record: int) -> bytes:
        """The bytes of a record, without its line break."""
        return self.data[int(self.starts[record]) : int(self.text_ends[record])]

    def values_of(self, record: int) -> list[bytes]:
        """The values of a record, without their quotes."""
        start, end = int(self.starts[record]), int(self.text_ends[record])
        low, high = np.searchsorted(self.separators, [start, end])
        edges = [start - 1, *self.separators[low:high].tolist(), end]
        values = [self.data[left + 1 : right] for left, right in itertools.pairwise(edges)]
        if not self.quoted:
            return values
        return [value[1:-1].replace(b'""', b'"') if value.startswith(b'"') else value for value in values]

    def line_of(self, position: int) -> int:
        """The line of a position, from 0."""
        return int(np.searchsorted(self.line_ends, position))

    def column_of(self, position: int) -> int:
        """The column of a position, from 0, counted in its record."""
        record_starts = np.append(0, self.ends + 1)
        start = record_starts[np.searchsorted(record_starts, position, side="right") - 1]
        return int(np.searchsorted(self.separators, position) - np.searchsorted(self.separators, start))


@dataclass(frozen=True)
class BadQuote:
    """A quote in a place where none can be."""

    position: int  # where the value begins
    line: int  # from 0
    column: int  # from 0
    problem: str


def bad_quote(records: Records, *, complete: bool = True) -> BadQuote | None:
    """The first quote that neither begins nor ends a value, nor stands for a quote inside a value.

    With `complete`, a value that is still open at the end is one too.
    """
    quotes, data = records.quotes, records.bytes
    if not len(quotes):
        return None
    around = np.concatenate([[_NEWLINE], data, [_NEWLINE, _NEWLINE]])  # data[i] is around[i + 1]
    opening, closing = quotes[0::2], quotes[1::2]
    before = around[opening]
    ok = np.ones(len(quotes), bool)
    ok[0::2] = (before == _NEWLINE) | (before == records.separator)
    doubled = opening[1:] == closing[: len(opening) - 1] + 1
    ok[2::2] |= doubled
    after, then = around[closing + 2], around[closing + 3]
    ok[1::2] = (after == _NEWLINE) | (after == records.separator) | (after == _QUOTE)
    ok[1::2] |= (after == _RETURN) & (then == _NEWLINE)
    number = len(quotes) if ok.all() else int(np.argmin(ok))
    if number == len(quotes):
        if not complete or len(quotes) % 2 == 0:
            return None
        number, problem = number - 1, "a quote that is never closed"
    elif number % 2:
        problem = "a quoted value that goes on after its closing quote"
    else:
        problem = "a lone quote"
    pair = number // 2
    while pair and opening[pair] == closing[pair - 1] + 1:
        pair -= 1
    begin = int(opening[pair])
    return BadQuote(begin, records.line_of(begin), records.column_of(begin), problem)


def ambiguous_record(records: Records, line_columns: np.ndarray, columns: int) -> tuple[int, int] | None:
    """First and last line, from 0, of the first record of several lines that would all be rows without their quotes.

    `line_columns` (lines) are the numbers of values of the lines if quotes mean nothing.
    """
    longer = np.flatnonzero(records.last_lines > records.first_lines)
    starts = records.first_lines[longer]
    lengths = records.last_lines[longer] + 1 - starts
    total = np.concatenate([[0], np.cumsum(line_columns == columns)])
    found = np.flatnonzero(total[starts + lengths] - total[starts] == lengths)
    if not len(found):
        return None
    record = longer[found[0]]
    return int(records.first_lines[record]), int(records.last_lines[record])


def quoted_value(records: Records) -> int | None:
    """Where the first value begins that stands between quotes, in bytes whose quotes are taken to mean nothing."""
    data = records.bytes
    edges = np.flatnonzero((data == records.separator) | (data == _NEWLINE))
    begins = np.concatenate([[0], edges + 1])
    ends = np.append(edges, len(data))
    ends = ends - ((ends > begins) & (data[np.maximum(ends - 1, 0)] == _RETURN)) if len(data) else ends
    long = np.flatnonzero(ends - begins >= 2)
    whole = (data[begins[long]] == _QUOTE) & (data[ends[long] - 1] == _QUOTE)
    return int(begins[long[np.argmax(whole)]]) if whole.any() else None
