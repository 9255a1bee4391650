"""JSON lines as batches of typed columns: one object a line, a missing key and null are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dman_runtime.data.files.encodings import Encoding
from dman_runtime.data.files.line_rows import BadRecord, Parsed
from dman_runtime.data.files.records import Records
from dman_runtime.data.files.text_stream import Piece, TextStream
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from dman_runtime.data.files.sources import Source

_TEXT, _INTEGER, _FLOAT, _BOOLEAN, _NESTED = "text", "an integer", "a number with a point", "true or false", "nested"
_KINDS = {str: _TEXT, int: _INTEGER, float: _FLOAT, bool: _BOOLEAN, list: _NESTED, dict: _NESTED}
_SHOWN = 80  # characters of a bad line
_MAX_INTEGER = 2**63 - 1


class JsonRows:
    """A `LineFormat`: the columns are the keys of the objects in the first lines, in order of first appearance."""

    def __init__(self, source: Source, encoding: Encoding, sample: bytes) -> None:
        self.source, self.encoding = source, encoding
        self.words, self.typed = ["JSON lines"], True
        self._kinds: dict[str, dict[str, int]] = {}  # of the values of a column: the first line that has it
        for number, line in enumerate(sample.split(b"\n")):
            values = json_object(line)
            if isinstance(values, dict):
                self._note(values, number + 1)
        self.names = list(self._kinds)
        if not self.names:
            raise source.error("no line of the first ones is a JSON object with keys", "write one object a line")

    def _note(self, values: dict[str, Any], line: int) -> None:
        for name, value in values.items():
            kinds = self._kinds.setdefault(name, {})
            if value is not None:
                kinds.setdefault(_KINDS[type(value)], line)

    def stream(self) -> TextStream:
        return TextStream(self.source, self.encoding)

    def pieces(self, stream: TextStream) -> Iterator[Piece]:
        return stream.json_pieces()

    def parser(self, names: list[str]) -> Callable[[Piece], Parsed]:
        import pyarrow as pa

        known = [name for name in names if name in self.names]  # another file may have more
        kinds = {name: self._kind(name) for name in known}
        types = {_TEXT: pa.string(), _INTEGER: pa.int64(), _FLOAT: pa.float64(), _BOOLEAN: pa.bool_()}
        schema = pa.schema([(name, types[kinds.get(name, _TEXT)]) for name in names])

        def parse(piece: Piece) -> Parsed:
            if not piece.rows:
                return Parsed(None)
            batch = self._batch(piece, schema)
            if batch is None or len(batch) != piece.rows:
                return self._examined(piece, schema, kinds)
            return Parsed(batch)

        return parse

    def _kind(self, name: str) -> str:
        """What all values of a column are. Raises InputError for nested and mixed ones."""
        kinds = self._kinds[name] or self._later_kinds(name)
        if _NESTED in kinds:
            raise self._wrong_kind(name, kinds[_NESTED], _NESTED, "")
        if set(kinds) == {_INTEGER, _FLOAT}:
            return _FLOAT
        (first, line), *others = kinds.items() or [(_TEXT, 0)]
        if others:
            raise self._wrong_kind(name, others[0][1], others[0][0], f"{first} as in line {line}")
        return first

    def _later_kinds(self, name: str) -> dict[str, int]:
        """The kind of the first value of a column that has none in the first lines."""
        for piece in self.pieces(self.stream()):
            for number, line in enumerate(piece.data.split(b"\n")):
                values = json_object(line)
                value = values.get(name) if isinstance(values, dict) else None
                if value is not None:
                    return {_KINDS[type(value)]: piece.first_line + number}
        return {}

    def _wrong_kind(self, name: str, line: int, kind: str, expected: str) -> InputError:
        if kind == _NESTED:
            cause, remedy = "nested: an array or an object", "name a column with plain values"
        else:
            cause, remedy = f"{kind}, not {expected}", "write all values of a column alike"
        return self.source.error(f"line {line}: the value of {name} is {cause}", remedy)

    def _batch(self, piece: Piece, schema: pa.Schema) -> pa.RecordBatch | None:
        """The columns; None if a line is not an object, or if a value is of another kind."""
        import pyarrow as pa
        from pyarrow import json as pa_json

        if not _one_object_a_line(piece.data):
            return None
        try:
            table = pa_json.read_json(
                pa.BufferReader(piece.data),
                read_options=pa_json.ReadOptions(use_threads=False, block_size=len(piece.data) + 1),
                parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
        except pa.ArrowInvalid:
            return None
        return table.select(schema.names).combine_chunks().to_batches()[0] if len(table) else None

    def _examined(self, piece: Piece, schema: pa.Schema, kinds: dict[str, str]) -> Parsed:
        """What can be read of a piece in which some lines are no objects or hold values of other kinds."""
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        bad: list[BadRecord] = []
        blank: list[int] = []
        error = None
        for number, line in enumerate(piece.data.split(b"\n")):
            place = piece.first_line + number
            values = json_object(line)
            if not line.strip():
                blank += [place] if line else []
            elif isinstance(values, str):
                bad.append(BadRecord(place, f"{values}: {_shown(line)}"))
            else:
                error = error or self._kind_error(values, kinds, place)
                for name, column in columns.items():
                    column.append(values.get(name))
            if error:
                return Parsed(None, bad, blank, error)
        arrays = [pa.array(column, schema.field(name).type) for name, column in columns.items()]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema) if arrays and len(arrays[0]) else None
        return Parsed(batch, bad, blank)

    def _kind_error(self, values: dict[str, Any], kinds: dict[str, str], line: int) -> InputError | None:
        for name, expected in kinds.items():
            value = values.get(name)
            kind = expected if value is None else _KINDS[type(value)]
            if kind != expected and (kind, expected) != (_INTEGER, _FLOAT):
                return self._wrong_kind(name, line, kind, f"{expected} as in the first lines")
            if kind == _INTEGER and value is not None and abs(value) > _MAX_INTEGER:
                return self.source.error(
                    f"line {line}: the value of {name} is {value}, more than 64 bits hold", "write it as text"
                )
        return None

    def row_lines(self, piece: Piece) -> np.ndarray:
        records = Records(piece.data, b"\n", quoted=False)
        return records.first_lines[~records.blank]


def json_object(line: bytes) -> dict[str, Any] | str:
    """The JSON object in a line, or what is wrong with it."""
    try:
        values = json.loads(line, object_pairs_hook=_unique)
        if not isinstance(values, dict):
            return "is not a JSON object"
        if b"\\u" in line:
            json.dumps(values, ensure_ascii=False).encode()  # halves of surrogate pairs have no encoding
    except _TwiceError as error:
        return f"has the key {error} twice"
    except (ValueError, RecursionError):
        return "is not a JSON object"
    return values


class _TwiceError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return values


def _one_object_a_line(data: bytes) -> bool:
    """Whether each line that is not empty begins and ends as an object does; pyarrow reads objects over more lines."""
    records = Records(data, b"\n", quoted=False)
    filled = ~records.blank
    first, last = records.bytes[records.starts[filled]], records.bytes[records.ends[filled] - 1]
    return bool((first == ord("{")).all() and (last == ord("}")).all())


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
