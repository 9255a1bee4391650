"""A text file as pieces of whole records in UTF-8, checked, and counted before they are parsed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dman_runtime.data.files.dialect import INNER, Dialect, header_end, one_byte, unescaped
from dman_runtime.data.files.encodings import Encoding, check_no_nul, check_utf8, decoded
from dman_runtime.data.files.quoting import ambiguous_error, check_quotes
from dman_runtime.data.files.records import Records, ambiguous_record, quoted_value

if TYPE_CHECKING:
    from dman_runtime.data.files.sources import Source

BLOCK_BYTES = 1 << 20  # fits into the cache of a processor
MAX_RECORD_BYTES = 64 << 20
_NEWLINE, _QUOTE = 10, 34


@dataclass(frozen=True)
class Piece:
    """Some whole records, as they are parsed. A blank line is a record without a row."""

    data: bytes
    first_line: int  # of the file, from 1
    lines: int
    blank: int  # blank lines
    inner: int  # line breaks inside of values

    @property
    def rows(self) -> int:
        """How many rows a parser must find."""
        return self.lines - self.blank - self.inner


class TextStream:
    """One reading of a text file. Raises InputError for what no row can be made of."""

    def __init__(self, source: Source, encoding: Encoding, *, returns: bool = False) -> None:
        self.source, self.encoding, self.returns = source, encoding, returns
        self.lines = 0  # of the file, counted as they are read
        self.header_lines = 0  # of the header and of blank lines just before it: in no piece
        self.header_blank = 0  # of these, blank lines

    def whole_lines(self) -> Iterator[tuple[bytes, int]]:
        """The file in pieces of whole lines, and how many lines each has."""
        rest: list[bytes] = []
        with self.source.open() as (stream, _):
            for raw in decoded(self.source, stream, self.encoding, BLOCK_BYTES):
                block = raw.replace(b"\r", b"\n") if self.returns else raw
                cut = block.rfind(b"\n") + 1
                if cut:
                    yield self._counted(b"".join([*rest, block[:cut]]))
                    rest = []
                rest.append(block[cut:])
                if len(rest) * BLOCK_BYTES > MAX_RECORD_BYTES:
                    raise self.source.error(
                        f"line {self.lines + 1} is longer than {MAX_RECORD_BYTES >> 20} MiB", "is this a text file?"
                    )
            if last := b"".join(rest):
                yield self._counted(last)

    def _counted(self, lines: bytes) -> tuple[bytes, int]:
        first_line, count = self.lines + 1, _count_lines(lines)
        self.lines += count
        check_no_nul(self.source, lines, first_line)
        if self.encoding.codec == "utf-8":
            check_utf8(self.source, lines, first_line)
        return lines, count

    def json_pieces(self) -> Iterator[Piece]:
        """The file in pieces of whole lines, each a row unless it is blank."""
        for lines, count in self.whole_lines():
            data = lines.replace(b"\r\n", b"\n") if b"\r" in lines else lines
            blank = _count_blank(data) if _may_be_blank(data) else 0
            yield Piece(data, self.lines - count + 1, count, blank, 0)

    def pieces(self, dialect: Dialect) -> Iterator[Piece]:
        """The file in pieces of whole records, without the header."""
        checks = _Checks(self.source, dialect)
        header_pending = dialect.header
        open_record = b""  # its first lines
        for lines, count in self.whole_lines():
            before = open_record.count(b"\n")
            data = open_record + (unescaped(lines) if dialect.quote == "backslash" else lines)
            first_line = self.lines - count - before + 1
            cut = _end_of_records(data) if dialect.quoted and b'"' in data else len(data)
            data, open_record = data[:cut], data[cut:]
            kept = data.count(b"\n") if open_record else before + count
            if len(open_record) > MAX_RECORD_BYTES:
                checks.unclosed(open_record, first_line + kept)
            if data:
                piece = checks.piece(data, first_line, kept)
                if header_pending:
                    piece, header_pending = self._without_header(piece, dialect)
                if piece.data:
                    yield piece
        if open_record:
            checks.unclosed(open_record, self.lines - _count_lines(open_record) + 1)

    def _without_header(self, piece: Piece, dialect: Dialect) -> tuple[Piece, bool]:
        """The piece from after its first record that is not blank, and whether there is none."""
        records = Records(piece.data, dialect.byte, quoted=dialect.quoted)
        number = header_end(records)
        if number == len(records):
            return piece, True
        lines = int(records.last_lines[number]) + 1
        data = piece.data[int(records.ends[number]) + 1 :]
        inner = lines - number - 1
        self.header_lines, self.header_blank = lines, number
        return Piece(
            data, piece.first_line + lines, piece.lines - lines, piece.blank - number, piece.inner - inner
        ), False


class _Checks:
    """What is checked in the pieces of a file in some dialect."""

    def __init__(self, source: Source, dialect: Dialect) -> None:
        self.source, self.dialect = source, dialect

    def piece(self, raw: bytes, first_line: int, lines: int) -> Piece:
        """Checked records of so many lines."""
        dialect = self.dialect
        if dialect.byte == INNER and INNER in raw:
            line = first_line + raw.count(b"\n", 0, raw.index(INNER))
            raise self.source.error(f"line {line} holds the control character 0x1f", "remove it")
        data = one_byte(raw, dialect.separator, quoted=dialect.quoted)
        inner = 0
        has_quotes = b'"' in data
        if has_quotes and dialect.quoted:
            records = Records(data, dialect.byte, quoted=True)
            check_quotes(self.source, records, dialect.names, first_line, complete=True)
            inner = lines - len(records)
            if inner and not dialect.quote_given:
                self._unambiguous(raw, records, first_line)
        if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
            self._no_lone_returns(data, first_line)
        if has_quotes and not dialect.quoted and not dialect.quote_given:
            self._no_quoted_value(data, first_line)
        blank = 0
        if _may_be_blank(data):
            blank = int(Records(data, dialect.byte, quoted=dialect.quoted).blank.sum()) if inner else _count_blank(data)
        return Piece(data, first_line, lines, blank, inner)

    def unclosed(self, data: bytes, first_line: int) -> None:
        """Raises the error for a value that is not closed."""
        data = one_byte(data, self.dialect.separator, quoted=True)
        records = Records(data, self.dialect.byte, quoted=True)
        check_quotes(self.source, records, self.dialect.names, first_line, complete=True)
        raise AssertionError("the records are complete")

    def _unambiguous(self, raw: bytes, records: Records, first_line: int) -> None:
        dialect = self.dialect
        plain = Records(one_byte(raw, dialect.separator, quoted=False), dialect.byte, quoted=False)
        if lines := ambiguous_record(records, plain.columns, dialect.width):
            raise ambiguous_error(self.source, (first_line + lines[0], first_line + lines[1]))

    def _no_lone_returns(self, data: bytes, first_line: int) -> None:
        records = Records(data, self.dialect.byte, quoted=self.dialect.quoted)
        returns = np.flatnonzero(records.bytes == ord("\r"))
        following = np.append(records.bytes, 0)[returns + 1]
        lone = returns[(following != ord("\n")) & records.is_outside(returns)]
        if len(lone):
            line = first_line + records.line_of(int(lone[0]))
            raise self.source.error(
                f"line {line} has a carriage return in it that ends no line", "remove it, or end all lines alike"
            )

    def _no_quoted_value(self, data: bytes, first_line: int) -> None:
        records = Records(data, self.dialect.byte, quoted=False)
        position = quoted_value(records)
        if position is not None:
            raise self.source.error(
                f"line {first_line + records.line_of(position)} has a value in quotes, but quotes mean nothing in its "
                f"first lines ({self.dialect.quote_remark})",
                "say how values are quoted, none if quotes belong to them",
                parameter="quote",
            )


def _count_lines(data: bytes) -> int:
    """Much faster than bytes.count."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == _NEWLINE)) + (not data.endswith(b"\n"))


def _may_be_blank(data: bytes) -> bool:
    """Whether two line breaks follow each other, or one is at the beginning. Much faster than a search for them."""
    if data.startswith((b"\n", b"\r")) or (b"\r" in data and b"\n\r\n" in data):
        return True
    newlines = np.frombuffer(data, np.uint8) == _NEWLINE
    return bool((newlines[1:] & newlines[:-1]).any())


def _count_blank(data: bytes) -> int:
    return int(Records(data, b"\n", quoted=False).blank.sum())


def _end_of_records(data: bytes) -> int:
    """Where the last complete record ends."""
    if data.endswith(b"\n") and np.count_nonzero(np.frombuffer(data, np.uint8) == _QUOTE) % 2 == 0:
        return len(data)
    records = Records(data, b"\n", quoted=True)
    return min(int(records.ends[-1]) + 1, len(data)) if len(records) else 0
