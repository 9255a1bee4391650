"""Tables on disk as batches of rows: text in any dialect, JSON lines and Parquet, in files, folders and archives.

pyarrow is imported only when a table is read: a server never reads one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dman_runtime.data.files.detection import Detector
from dman_runtime.data.files.encodings import decoded_sample, find_encoding
from dman_runtime.data.files.json_rows import JsonRows
from dman_runtime.data.files.line_rows import LineReader, Tally
from dman_runtime.data.files.parquet_rows import ParquetReader
from dman_runtime.data.files.sources import FORMATS, JSON_LINES, PARQUET, TEXT, Source, error_of, find_sources
from dman_runtime.data.files.text_rows import TextRows
from dman_runtime.data.input_report import BadRow
from dman_runtime.data.log_options import ANY_LOG, AUTO, LogOptions
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_SAMPLE_BYTES = 1 << 20
_NO_ROWS = "give a file with at least one row"


class Reader(Protocol):
    """Reads one file."""

    names: list[str]
    words: list[str]  # the dialect, for people
    typed: bool

    def batches(self, names: list[str], tally: Tally) -> Iterator[pa.RecordBatch]: ...

    def places(self, rows: Sequence[int]) -> list[str]: ...


@dataclass
class TableFile:
    """One file of a table, or one member of an archive."""

    path: str  # "x.zip: base.csv" for a member
    bytes: int  # on disk
    dialect: str  # in words, for people
    typed: bool  # values keep the types that the file gives them; else all are text
    reader: Reader
    looks_headerless: bool = False
    first_line: tuple[str, ...] = ()
    free_keys: bool = False  # a row may lack columns
    quotes: str = ""  # what they mean in it: none, double or backslash; empty without any, and where that was given
    rows: int = 0  # known after reading

    @property
    def names(self) -> list[str]:
        return self.reader.names

    def where(self, row: int) -> str:
        """The place of a row that was given out, numbered from 0: "log.csv: line 17". Reads the file again."""
        return self.places([row])[0]

    def places(self, rows: Sequence[int]) -> list[str]:
        """The places of many rows, in one pass."""
        return self.reader.places(rows)


def quoted(value: object) -> str:
    """The value as Python writes it, cut to about 60 characters: for messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}...'"


@dataclass(frozen=True)
class Rows:
    """Some rows of a file, in its order."""

    batch: pa.RecordBatch
    file: TableFile
    first_row: int  # number of the first one among the rows that the file gives out, from 0
    number: int = 0  # of the file among those of the table


class Tables:
    """The files at a path as one table. `open_tables` makes it."""

    def __init__(self, path: str, files: list[TableFile], ignored: list[str], options: LogOptions) -> None:
        self.path, self.files, self.ignored = path, files, ignored
        self.looks_headerless = any(file.looks_headerless for file in files)
        # names that are data differ for that reason, which is said when columns are looked for
        self.names = files[0].names if self.looks_headerless else _common_names(files)
        self.first_line = list(files[0].first_line)
        self._skip = options.bad_rows == "skip"
        self._tally = Tally(self._skip)

    @property
    def bad_row_count(self) -> int:
        """Rows left out because they cannot be read, as far as the files have been read."""
        return self._tally.bad_row_count

    @property
    def bad_rows(self) -> list[BadRow]:
        """The first of them."""
        return self._tally.bad_rows

    @property
    def blank_lines(self) -> int:
        return self._tally.blank_lines

    def error(self, cause: str, remedy: str, *, parameter: str = "") -> InputError:
        return error_of(self.path, cause, remedy, parameter=parameter)

    def batches(self, names: list[str]) -> Iterator[Rows]:
        """All rows, file after file, with these columns. Starts again at each call. Raises InputError."""
        for name in names:
            if self.names.count(name) != 1:
                raise self._no_such_column(name)
        _common_names(self.files)
        self._tally = tally = Tally(self._skip)
        kinds: dict[str, tuple[str, str]] = {}
        for number, file in enumerate(self.files):
            first_row = 0
            for batch in file.reader.batches(names, tally):
                _check_kinds(batch, file, kinds)
                yield Rows(batch, file, first_row, number)
                first_row += len(batch)
            file.rows = first_row

    def _no_such_column(self, name: str) -> InputError:
        if (count := self.names.count(name)) and self.looks_headerless:
            return self.error(
                f"{count} columns are named {name!r}: its first line looks like a row",
                "say that there is no header",
                parameter="no_header",
            )
        if count:
            return self.error(f"{count} columns are named {name!r}", "keep one of them")
        return self.error(f"no column {name!r}; it has: {', '.join(self.names)[:300]}", "name one of these")


def open_tables(path: str | Path, options: LogOptions = ANY_LOG) -> Tables:
    """The table in a file, in the files of a folder, or in those that a glob pattern matches.

    Finds out how the files are written, from their beginnings. Raises InputError.
    """
    sources, ignored = find_sources(path)
    files = []
    for source in sources:
        if file := _open_file(source, options):
            files.append(file)
        else:  # Spark also compresses parts that hold nothing
            ignored.append(f"{source.path} (empty)")
    if not files:
        raise sources[0].error("the file is empty", _NO_ROWS)
    _require_one_quoting(files)
    return Tables(str(path), files, ignored, options)


def _open_file(source: Source, options: LogOptions) -> TableFile | None:
    """The file, ready to be read; None if nothing is in it."""
    with source.open() as (stream, packed):
        head = b""
        while len(head) < _SAMPLE_BYTES and (block := stream.read(_SAMPLE_BYTES - len(head))):
            head += block
        complete = not stream.read(1)
    if not head:
        return None
    if head[257:262] == b"ustar":
        raise source.error("is a tar archive", "unpack it, and give the folder")
    words = [packed] if packed else []
    kind = _format(source, head, options)
    if kind == PARQUET:
        return _table_file(source, ParquetReader(source), words)
    encoding = find_encoding(source, head, options.encoding)
    sample = decoded_sample(source, head, encoding, complete=complete)
    words = [encoding.words, *words]
    if kind == JSON_LINES:
        file = _table_file(source, LineReader(source, JsonRows(source, encoding, sample)), words)
        file.free_keys = True
        return file
    detected = Detector(source, options, sample, complete=complete).dialect()
    file = _table_file(source, LineReader(source, TextRows(source, encoding, detected)), words)
    file.looks_headerless, file.first_line = detected.looks_headerless, detected.first_line
    file.quotes = detected.quote if detected.has_quotes and not detected.quote_given else ""
    return file


def _require_one_quoting(files: list[TableFile]) -> None:
    """Raise InputError if quotes, or backslashes beside them, mean one thing in a file and another in the next."""
    quoted_files = [file for file in files if file.quotes]
    for file in quoted_files:
        first = quoted_files[0]
        if file.quotes != first.quotes:
            raise error_of(
                file.path,
                f"its quotes have another meaning than those of {first.path}: {file.dialect}, and {first.dialect}",
                "say how values are quoted in all files, none if quotes belong to them",
                parameter="quote",
            )


def _table_file(source: Source, reader: Reader, words: list[str]) -> TableFile:
    return TableFile(source.path, source.bytes, ", ".join([*reader.words, *words]), reader.typed, reader)


def _format(source: Source, head: bytes, options: LogOptions) -> str:
    """Text, JSON lines or Parquet: as the option, the content or the name says."""
    begin = head[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    is_parquet = head.startswith(b"PAR1")
    if options.format != AUTO:
        found = str(options.format)
    else:
        found = FORMATS.get(Path(source.name).suffix, TEXT)
        if is_parquet:
            found = PARQUET
        elif found == TEXT and begin.startswith(b"{") and _is_json_object(begin):
            found = JSON_LINES
    if found == PARQUET and not is_parquet:
        raise source.error("is not a Parquet file", "give its format, or check that it is complete", parameter="format")
    if found == JSON_LINES and begin.startswith(b"["):
        raise source.error("holds one JSON array", "write one object a line (JSON lines)")
    return found


def _is_json_object(begin: bytes) -> bool:
    try:
        return isinstance(json.loads(begin.split(b"\n", 1)[0]), dict)
    except ValueError:
        return False


def _check_kinds(batch: pa.RecordBatch, file: TableFile, kinds: dict[str, tuple[str, str]]) -> None:
    """Raise InputError if a column has values of another kind than in an earlier file; `kinds` remembers them."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind = _kind(column.type)
        known, path = kinds.get(name, (kind, file.path))
        if column.null_count < len(column):
            if kind != known:
                raise error_of(
                    file.path,
                    f"column {name!r} holds {kind}, but {known} in {path}",
                    "give files whose columns have the same types",
                )
            kinds[name] = known, path


def is_text_type(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())


def _kind(arrow_type: pa.DataType) -> str:
    """What the values of a type are, whatever their size and encoding."""
    import pyarrow as pa

    kind = arrow_type.value_type if pa.types.is_dictionary(arrow_type) else arrow_type
    if is_text_type(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "integers"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "numbers with a point"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "times"
    return str(kind)


def _common_names(files: list[TableFile]) -> list[str]:
    """The names of the columns, which all files must have, but for JSON, where keys may be missing.

    Raises InputError.
    """
    first = files[0]
    if all(file.free_keys for file in files):
        return list(dict.fromkeys(name for file in files for name in file.names))
    for file in files[1:]:
        if sorted(file.names) != sorted(first.names):
            remedy, parameter = "give files with the same columns", ""
            if not file.typed and len(file.names) == len(first.names):
                remedy, parameter = f"{remedy}, or say that there is no header", "no_header"
            elif not file.typed:
                remedy, parameter = f"{remedy}, or say what separates them", "separator"
            raise error_of(
                file.path,
                f"has other columns than {first.path}: {', '.join(file.names)[:200]} instead of "
                f"{', '.join(first.names)[:200]}",
                remedy,
                parameter=parameter,
            )
    return first.names
