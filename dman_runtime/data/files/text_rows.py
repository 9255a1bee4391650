"""Text files in some dialect as batches of text columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from dman_runtime.data.files.dialect import Dialect
from dman_runtime.data.files.encodings import Encoding
from dman_runtime.data.files.line_rows import BadRecord, Parsed
from dman_runtime.data.files.records import Records
from dman_runtime.data.files.text_stream import Piece, TextStream

if TYPE_CHECKING:
    import pyarrow as pa

    from dman_runtime.data.files.sources import Source

_SHOWN = 80  # characters of a bad line


class TextRows:
    """A `LineFormat`: values separated as the dialect says, all of them text."""

    def __init__(self, source: Source, encoding: Encoding, dialect: Dialect) -> None:
        self.source, self.encoding, self.dialect = source, encoding, dialect
        self.names, self.words = list(dialect.names), ["text", *dialect.words]
        self.typed = False

    def stream(self) -> TextStream:
        return TextStream(self.source, self.encoding, returns=self.dialect.returns)

    def pieces(self, stream: TextStream) -> Iterator[Piece]:
        return stream.pieces(self.dialect)

    def parser(self, names: list[str]) -> Callable[[Piece], Parsed]:
        columns = [self.names.index(name) for name in names]

        def parse(piece: Piece) -> Parsed:
            if not piece.rows:
                return Parsed(None)
            batch = self._batch(piece, columns)
            if batch is None or len(batch) != piece.rows:
                return self._examined(piece, columns, names)
            return Parsed(batch.rename_columns(names))

        return parse

    def _batch(self, piece: Piece, columns: list[int]) -> pa.RecordBatch | None:
        """The columns as text; None if some record has another number of values."""
        import pyarrow as pa
        import pyarrow.compute as pc
        from pyarrow import csv

        dialect = self.dialect
        kept = [str(column) for column in columns]
        read = [*kept, *([str(dialect.width - 1)] if dialect.trailing else [])] or ["0"]
        quoted = dialect.quoted and b'"' in piece.data
        try:
            table = csv.read_csv(
                pa.BufferReader(piece.data),
                read_options=csv.ReadOptions(
                    use_threads=False,  # pieces are parsed side by side already
                    block_size=len(piece.data) + 1,
                    column_names=[str(column) for column in range(dialect.width)],
                ),
                parse_options=csv.ParseOptions(
                    delimiter=dialect.byte.decode(), quote_char='"' if quoted else False, newlines_in_values=quoted
                ),
                convert_options=csv.ConvertOptions(
                    include_columns=read, column_types=dict.fromkeys(read, pa.string()), check_utf8=False
                ),
            )
        except pa.ArrowInvalid:
            return None
        batch = table.combine_chunks().to_batches()[0]
        if dialect.trailing and pc.max(pc.binary_length(batch.column(len(kept)))).as_py():
            return None
        return batch.select(list(range(len(kept))))

    def _examined(self, piece: Piece, columns: list[int], names: list[str]) -> Parsed:
        """What can be read of a piece in which some records have a wrong number of values."""
        records = Records(piece.data, self.dialect.byte, quoted=self.dialect.quoted)
        wrong = ~records.blank & (records.columns != self.dialect.width)
        if self.dialect.trailing:
            last = records.bytes[np.maximum(records.text_ends - 1, 0)]
            wrong |= ~records.blank & (last != records.separator)
        bad, blank = [], []
        for number in np.flatnonzero(wrong).tolist():
            line = piece.first_line + int(records.first_lines[number])
            text = records.text_of(number)
            if text.strip(b" \t"):
                problem = self._problem(int(records.columns[number]), text)
                bad.append(BadRecord(line, problem, **self._remedy(text, share=float(wrong.mean()))))
            else:
                blank.append(line)
        sizes = np.diff(np.append(records.ends + 1, len(piece.data)), prepend=0)[: len(records)]
        kept = records.bytes[np.repeat(~wrong, sizes)[: len(piece.data)]].tobytes()
        rows = int((~wrong & ~records.blank).sum())
        batch = self._batch(Piece(kept, 0, 0, 0, 0), columns) if rows else None
        if rows and (batch is None or not len(bad) + len(blank)):
            raise self.source.error(
                f"lines {piece.first_line} to {piece.first_line + piece.lines - 1} cannot be parsed",
                "report this as an error, with these lines",
            )
        return Parsed(batch.rename_columns(names) if batch is not None else None, bad, blank)

    def _problem(self, values: int, text: bytes) -> str:
        shown = text.replace(self.dialect.byte, self.dialect.separator).decode("utf-8", "replace")
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        if self.dialect.trailing and values < self.dialect.width:
            return f"has no separator at its end, or too few values: {shown!r}"
        count = f"{values} value{'s' if values > 1 else ''} instead of {len(self.names)}"
        return f"has {count}: {shown!r}"

    def _remedy(self, text: bytes, *, share: float) -> dict[str, str]:
        """What may cure a wrong number of values, where it is more than one bad line."""
        if share > 0.5:
            return {"remedy": "give the separator, if this is not one row as it should be", "parameter": "separator"}
        if b'"' in text and not self.dialect.quoted:
            return {"remedy": "read it with quotes (double), or correct it", "parameter": "quote"}
        return {}

    def row_lines(self, piece: Piece) -> np.ndarray:
        records = Records(piece.data, self.dialect.byte, quoted=self.dialect.quoted)
        return records.first_lines[~records.blank]
