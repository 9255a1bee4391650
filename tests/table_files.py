"""Tables for tests: random rows, written in any dialect, encoding and compression, and read back."""

from __future__ import annotations

import bz2
import gzip
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from hypothesis import strategies as st

from dman_runtime.data.log_options import ANY_LOG, LogOptions
from dman_runtime.data.tables import Tables, open_tables

NAMES = ("user_id", "item_id", "title", "timestamp")
SEPARATORS = (",", "\t", ";", "|", "::", " ")
_UNICODE = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
ENCODINGS = (*_UNICODE, "latin-1", "cp1252", "koi8-r", "gb18030")
COMPRESSIONS = ("", "gz", "bz2", "zst", "zip")


@dataclass(frozen=True)
class Written:
    """A table, and how its file is written."""

    rows: list[tuple[str, ...]]
    separator: str
    quote: str  # none, double or backslash
    quote_all: bool
    line_end: str
    encoding: str
    compression: str
    last_line_end: bool
    blank_before: frozenset[int]  # rows with an empty line before them
    header: bool = True
    trailing: bool = False

    @property
    def options(self) -> LogOptions:
        """All that is known about the dialect."""
        encoding = self.encoding if self.encoding not in ("utf-8", "utf-8-sig") else "auto"
        return LogOptions(separator=self.separator, quote=self.quote, header=self.header, encoding=encoding)

    def text(self) -> str:
        """The content of the file, with the line of each row in `lines`."""
        records = [self._record(row, number) for number, row in enumerate(self.rows)]
        header = [self._record(NAMES, -1)] if self.header else []
        text = "".join(record + self.line_end for record in header + records)
        return text if self.last_line_end else text.removesuffix(self.line_end)

    def _record(self, values: Sequence[str], number: int) -> str:
        blank = self.line_end if number in self.blank_before else ""
        end = self.separator if self.trailing and number >= 0 else ""
        return blank + self.separator.join(map(self._value, values)) + end

    def _value(self, value: str) -> str:
        if self.quote == "none" or not (self.quote_all or set(value) & set(f'"\r\n\\{self.separator}') or not value):
            return value
        if self.quote == "double":
            return '"' + value.replace('"', '""') + '"'
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def lines(self) -> list[int]:
        """The line, from 1, on which each row begins."""
        found, line = [], 1 + self.header
        for number, row in enumerate(self.rows):
            line += number in self.blank_before
            found.append(line)
            line += 1 + sum(value.count(self.line_end if self.line_end == "\r" else "\n") for value in row)
        return found

    def write(self, folder: Path, name: str = "log.csv") -> Path:
        return write_bytes(folder / name, self.text().encode(self.encoding), self.compression)


def write_bytes(path: Path, content: bytes, compression: str = "") -> Path:
    """A file of that content, packed; its name says how."""
    if compression:
        path = path.with_name(f"{path.name}.{compression}")
    path.write_bytes(packed(content, compression, path.name.removesuffix(".zip")))
    return path


def packed(content: bytes, compression: str, member: str = "log.csv") -> bytes:
    if compression == "gz":
        return gzip.compress(content, 1)
    if compression == "bz2":
        return bz2.compress(content, 1)
    if compression == "zst":
        return pa.Codec("zstd").compress(content, asbytes=True)
    if compression == "zip":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
            members.writestr(member, content)
        return archive.getvalue()
    return content


@st.composite
def written_tables(draw: st.DrawFn, *, known: bool) -> Written:
    """Any table; one that is not `known` to the reader has values that leave no doubt about its dialect."""
    separator, quote = draw(st.sampled_from(SEPARATORS)), draw(st.sampled_from(("none", "double", "backslash")))
    encoding = draw(st.sampled_from(ENCODINGS if known else _UNICODE))
    line_end = draw(st.sampled_from(("\n", "\r\n", "\r") if quote == "none" else ("\n", "\r\n")))
    forbidden = "\0\x1f\r\ufeff" + ("" if known else "".join(set("".join(SEPARATORS)) - {separator}))
    if quote == "none":
        forbidden += f'\n"{separator}' if not known else f"\n{separator[0]}"
    if separator == " ":
        forbidden += " \t"
    if not known:
        forbidden += '\\"\n'
    alphabet = st.characters(codec=encoding, exclude_characters=forbidden, exclude_categories=("Cs",))
    common = st.sampled_from([one for one in f'ab7é"\n\\, {separator}' if one not in forbidden] or ["a"])
    value = st.text(alphabet | common, min_size=separator == " " and quote == "none", max_size=6)
    try:
        "é".encode(encoding)
    except UnicodeError:
        value = value.map(lambda text: text.replace("é", "e"))
    header = draw(st.booleans()) if known else True
    rows = draw(st.lists(st.tuples(*[value] * len(NAMES)), min_size=1, max_size=8))
    return Written(
        rows,
        separator,
        quote,
        quote_all=draw(st.booleans()) if known else quote != "none",
        line_end=line_end,
        encoding=encoding,
        compression=draw(st.sampled_from(COMPRESSIONS)),
        last_line_end=draw(st.booleans()),
        blank_before=frozenset(draw(st.sets(st.integers(0, len(rows) - 1), max_size=2))),
        header=header,
        trailing=header and separator != " " and draw(st.booleans()),
    )


def rows_of(tables: Tables) -> list[tuple[str | None, ...]]:
    """All rows as Python values."""
    names = list(tables.names)
    found: list[tuple[str | None, ...]] = []
    for rows in tables.batches(names):
        columns = [rows.batch.column(number).to_pylist() for number in range(len(names))]
        found += list(zip(*columns, strict=True))
    return found


def read(path: Path, options: LogOptions = ANY_LOG) -> list[tuple[str | None, ...]]:
    return rows_of(open_tables(path, options))


def reference_rows(text: str, separator: str, quote: str) -> list[list[str]]:
    """The values of a text, character by character; blank lines are left out, a quoted nothing is a value."""
    rows: list[list[str]] = []
    row, value, inside, quoted, position = [], "", False, False, 0
    if quote == "backslash":
        text = text.replace("\\\\", "\0").replace('\\"', '""').replace("\0", "\\")
    text = text if text.endswith("\n") else text + "\n"
    while position < len(text):
        here = text[position]
        step = 1
        if quote != "none" and here == '"':
            if inside and text[position + 1] == '"':
                value, step = value + '"', 2
            else:
                inside, quoted = not inside, True
        elif inside:
            value += here
        elif text.startswith(separator, position) or (separator == " " and here == "\t"):
            row, value, step = [*row, value], "", len(separator)
        elif here == "\n":
            row, value = [*row, value.removesuffix("\r")], ""
            row = [one for one in row if one] if separator == " " and quote == "none" else row
            rows, row, quoted = [*rows, row] if quoted or row not in ([""], []) else rows, [], False
        else:
            value += here
        position += step
    return rows
