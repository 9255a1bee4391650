"""Rows of files that have lines: pieces of text become batches, several at a time, and every line is accounted for."""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dman_runtime.data.files.text_stream import Piece, TextStream
from dman_runtime.data.input_report import EXAMPLES, BadRow
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from dman_runtime.data.files.sources import Source

_PARSERS = max(2, min(4, os.cpu_count() or 2))


@dataclass(frozen=True)
class BadRecord:
    """Lines that are no row."""

    line: int  # of the file, from 1
    problem: str  # "has 3 values instead of 4: 'a,b,c'"
    remedy: str = "correct it, or leave such rows out (skip)"
    parameter: str = "bad_rows"


@dataclass(frozen=True)
class Parsed:
    """What a piece turned out to be."""

    batch: pa.RecordBatch | None  # None: no rows
    bad: Sequence[BadRecord] = ()
    blank: Sequence[int] = ()  # lines that hold blanks only, beyond those that the piece knows of
    error: InputError | None = None  # after the bad ones

    @property
    def rows(self) -> int:
        return 0 if self.batch is None else len(self.batch)


@dataclass
class Tally:
    """What was left out while files were read."""

    skip: bool  # leave bad rows out
    bad_row_count: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    blank_lines: int = 0


class LineFormat(Protocol):
    """How lines become rows: text in some dialect, or JSON."""

    names: list[str]
    words: list[str]
    typed: bool

    def stream(self) -> TextStream: ...

    def pieces(self, stream: TextStream) -> Iterator[Piece]:
        """The pieces of the file after its header."""
        ...

    def parser(self, names: list[str]) -> Callable[[Piece], Parsed]:
        """What makes batches of these columns; called from several threads."""
        ...

    def row_lines(self, piece: Piece) -> np.ndarray:
        """The line, from 0 in the piece, on which each record begins that is not blank."""
        ...


class LineReader:
    """Reads one file that has lines."""

    def __init__(self, source: Source, rows: LineFormat) -> None:
        self.source, self.format = source, rows
        self.names, self.words, self.typed = rows.names, rows.words, rows.typed
        self._left_out: array[int] = array("q")  # lines, in order, that no batch and no count of blanks holds
        self._left_out_up_to = 0

    def batches(self, names: list[str], tally: Tally) -> Iterator[pa.RecordBatch]:
        """All rows in order. Raises InputError unless each line is a row, part of one, blank, or in the tally."""
        stream = self.format.stream()
        rows, bad_rows, lines = 0, 0, 0
        for piece, parsed in _in_order(self.format.pieces(stream), self.format.parser(names)):
            if parsed.bad and not tally.skip:
                bad = parsed.bad[0]
                raise self.source.error(f"line {bad.line} {bad.problem}", bad.remedy, parameter=bad.parameter)
            if parsed.error:
                raise parsed.error
            if parsed.rows + len(parsed.bad) + len(parsed.blank) != piece.rows:
                raise self._lost(piece.rows, parsed, piece)
            self._account(parsed, piece, tally)
            rows, bad_rows, lines = rows + parsed.rows, bad_rows + len(parsed.bad), lines + piece.lines
            if parsed.batch is not None:
                yield parsed.batch
        tally.blank_lines += stream.header_blank
        if lines + stream.header_lines != stream.lines:
            raise self.source.error(
                f"has {stream.lines} lines, but {lines + stream.header_lines} were read", "report this as an error"
            )
        if bad_rows and not rows:
            raise self.source.error(
                f"none of its {bad_rows} rows can be read: {tally.bad_rows[0].problem}", "check how it is read"
            )

    def _account(self, parsed: Parsed, piece: Piece, tally: Tally) -> None:
        tally.blank_lines += piece.blank + len(parsed.blank)
        tally.bad_row_count += len(parsed.bad)
        for bad in parsed.bad[: max(0, EXAMPLES - len(tally.bad_rows))]:
            tally.bad_rows.append(BadRow(f"{self.source.path}: line {bad.line}", bad.problem))
        if piece.first_line > self._left_out_up_to:
            self._left_out.extend(sorted([*(bad.line for bad in parsed.bad), *parsed.blank]))
            self._left_out_up_to = piece.first_line

    def _lost(self, expected: int, parsed: Parsed, piece: Piece) -> InputError:
        return self.source.error(
            f"lines {piece.first_line} to {piece.first_line + piece.lines - 1} hold {expected} rows, but "
            f"{parsed.rows + len(parsed.bad)} were read",
            "report this as an error, with these lines",
        )

    def places(self, rows: Sequence[int]) -> list[str]:
        """The lines of rows that were given out, numbered from 0, in a second pass over the file."""
        wanted = np.asarray(rows, np.int64)
        lines = np.zeros(len(wanted), np.int64)
        left_out = np.frombuffer(self._left_out, np.int64)
        first_row = 0
        for piece in self.format.pieces(self.format.stream()):
            all_lines = piece.first_line + self.format.row_lines(piece)
            row_lines = all_lines[~np.isin(all_lines, left_out)] if len(left_out) else all_lines
            here = (wanted >= first_row) & (wanted < first_row + len(row_lines))
            lines[here] = row_lines[wanted[here] - first_row]
            first_row += len(row_lines)
            if first_row > wanted.max(initial=-1):
                break
        return [f"{self.source.path}: line {line}" for line in lines.tolist()]


def _in_order(pieces: Iterator[Piece], parse: Callable[[Piece], Parsed]) -> Iterator[tuple[Piece, Parsed]]:
    """Each piece with what it was parsed to, in order; a few are parsed at a time. The first error is raised first."""
    waiting: deque[tuple[Piece, Future[Parsed]]] = deque()
    failure: InputError | None = None
    with ThreadPoolExecutor(_PARSERS) as parsers:
        while True:
            try:
                piece = next(pieces, None)
            except InputError as error:
                piece, failure = None, error
            if piece is None:
                break
            waiting.append((piece, parsers.submit(parse, piece)))
            if len(waiting) > _PARSERS:
                first, parsed = waiting.popleft()
                yield first, parsed.result()
        while waiting:
            first, parsed = waiting.popleft()
            yield first, parsed.result()
        if failure:
            raise failure
