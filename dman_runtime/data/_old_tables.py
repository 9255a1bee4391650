"""Tables on disk as batches of checked columns: CSV, TSV, Parquet and MovieLens' `.dat`.

pyarrow is imported only when a table is read: a server never reads one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dman_runtime.data.ids import CONTROL_CHARACTERS, MAX_ID_BYTES, RULE, id_problem
from dman_runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".dat": ":"}
_RATINGS = ("user_id", "_1", "item_id", "_2", "rating", "_3", "timestamp")  # `::` is two `:` around an empty column
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class TableFile:
    """A table on disk: its column names, its rows in batches, and errors that name it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.kind = Path(self.path.name.lower().removesuffix(".gz")).suffix
        if not self.path.exists():
            raise self.error("no such file", "check the path")
        if self.path.is_dir():
            raise self.error("is a folder", "name a file in it")
        if self.kind not in (".parquet", *_SEPARATORS):
            raise self.error(
                f"unknown extension {self.path.suffix!r}",
                "give a .csv, .tsv or .txt (both with tabs), .parquet or .dat (MovieLens) file",
            )
        if not self.path.stat().st_size:
            raise self.error("the file is empty", "give one with a header and rows")

    def error(self, cause: str, remedy: str, *, parameter: str = "") -> InputError:
        return InputError(f"{self.path}: {cause}", remedy, parameter=parameter)

    def where(self, row: int) -> str:
        """The row or line of the file to look at; `row` counts from 0."""
        if self.kind == ".parquet":
            return f"row {row + 1}"
        return f"line {row + (1 if self.kind == '.dat' else 2)}"

    @cached_property
    def names(self) -> list[str]:
        import pyarrow.parquet as pq

        with self.errors():
            if self.kind == ".parquet":
                return list(pq.read_schema(str(self.path)).names)
            with self._open_text([]) as reader:
                return [name for name in reader.schema.names if self.kind != ".dat" or name[0] != "_"]

    def require(self, name: str, remedy: str, *, parameter: str = "") -> None:
        """Raise InputError, with this remedy if the column is absent, unless one column has that name."""
        if name not in self.names:
            cause = f"no column {name!r}; it has: {', '.join(self.names)[:300]}"
            raise self.error(cause, remedy, parameter=parameter)
        if self.names.count(name) > 1:
            raise self.error(f"{self.names.count(name)} columns are named {name!r}", "keep one of them")

    def batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of some columns in file order. Text files give all values as text."""
        import pyarrow.parquet as pq

        with self.errors():
            if self.kind == ".parquet":
                with pq.ParquetFile(str(self.path)) as parquet:
                    yield from parquet.iter_batches(batch_size=1 << 16, columns=names)
            else:
                with self._open_text(names) as reader:
                    yield from reader

    def _open_text(self, names: list[str]) -> Any:
        import pyarrow as pa
        from pyarrow import csv

        movielens = self.kind == ".dat"
        return csv.open_csv(
            str(self.path),  # pyarrow decompresses .gz
            # with threads, errors have no line numbers; a block must hold the longest line
            read_options=csv.ReadOptions(
                use_threads=False, block_size=4 << 20, column_names=_RATINGS if movielens else None
            ),
            parse_options=csv.ParseOptions(
                delimiter=_SEPARATORS[self.kind],
                quote_char=False if movielens else '"',
                newlines_in_values=not movielens,
            ),
            convert_options=csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string())),
        )

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn every error of pyarrow and the system into InputError."""
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self.error(*self._explained(" ".join(str(error).split()))) from None

    def _explained(self, problem: str) -> tuple[str, str]:
        """Cause and remedy for the message of an error."""
        if "Empty CSV" in problem:
            return "a header but no rows", "give a file with at least one row"
        if "utf-8" in problem.lower() or "utf8" in problem.lower():
            return "holds text that is not UTF-8", "save the file as UTF-8"
        if malformed := re.search(r"Row #(\d+): (Expected.*)", problem):
            shape = (
                "user::item::rating::timestamp"
                if self.kind == ".dat"
                else "one value per column, with quotes around values that contain separators"
            )
            return f"line {malformed[1]} is malformed ({malformed[2][:200]})", f"every line needs {shape}"
        cause = f"cannot be read as {self.kind[1:]} ({problem[:200]})"
        return cause, "check that the file is complete and of this format"


def quoted(value: object) -> str:
    """The value as Python writes it, cut to about 60 characters: for messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}...'"


@dataclass(frozen=True)
class TableColumn:
    """One column of a batch of rows, to be checked and converted. All methods raise InputError."""

    file: TableFile
    name: str
    values: pa.Array
    first_row: int  # number of the batch's first row in the file, from 0

    def bad_value(self, row: int, problem: str, remedy: str) -> InputError:
        return self.file.error(f"{self.file.where(self.first_row + row)}: {self.name} {problem}", remedy)

    def bad_type(self, remedy: str) -> InputError:
        return self.file.error(f"column {self.name!r} has type {self.values.type}", remedy)

    def ids(self) -> pa.DictionaryArray:
        """Valid ids (`ids.id_problem`) as a dictionary of text, its values in order of first appearance."""
        import pyarrow as pa
        import pyarrow.compute as pc

        values = self._complete()
        if not (pa.types.is_integer(values.type) or _is_text(values.type)):
            raise self.bad_type("write the ids as integers or text")
        ids = values.cast(pa.string()).dictionary_encode()
        ids.dictionary.validate(full=True)  # checks that it is UTF-8
        size = pc.binary_length(ids.dictionary)
        wrong_size = pc.or_(pc.equal(size, 0), pc.greater(size, MAX_ID_BYTES))
        bad = pc.or_(wrong_size, pc.match_substring_regex(ids.dictionary, CONTROL_CHARACTERS))
        code = bad.index(True).as_py()
        if code >= 0:
            row, text = int(np.argmax(ids.indices.to_numpy() == code)), ids.dictionary[code].as_py()
            remedy = f"{RULE}, or remove such rows"
            raise self.bad_value(row, f"{quoted(text)} {id_problem(text)}", remedy)
        return ids

    def integers(self) -> np.ndarray:
        """Integers, or text that holds integers, as (N,) int64."""
        import pyarrow as pa

        values = self._complete()
        if _is_text(values.type):
            values = self._parsed(values, pa.int64(), expected="an integer", remedy="write whole numbers")
        if not pa.types.is_integer(values.type):
            raise self.bad_type("write integers")
        integers: np.ndarray = values.cast(pa.int64()).to_numpy()
        return integers

    def seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """Times as (N,) int64 seconds since 1970, rounded down, and the rest as (N,) int32 nanoseconds."""
        import pyarrow as pa

        values = self._complete()
        if _is_text(values.type):
            kinds = (pa.int64(), pa.float64(), pa.timestamp("ns"), pa.timestamp("ns", "UTC"))
            remedy = "write seconds since 1970, or every time as 2024-01-31 12:00:00"
            values = self._parsed(values, *kinds, expected="a time", remedy=remedy)
        if pa.types.is_integer(values.type):
            return values.cast(pa.int64()).to_numpy(), np.zeros(len(values), dtype=np.int32)
        if pa.types.is_date(values.type):
            values = values.cast(pa.timestamp("s"))
        if pa.types.is_timestamp(values.type):  # UTC if it names no zone
            per_second = _PER_SECOND[values.type.unit]
            whole, part = np.divmod(values.cast(pa.int64()).to_numpy(), per_second)
            return whole, (part * (10**9 // per_second)).astype(np.int32)
        if not (pa.types.is_floating(values.type) or pa.types.is_decimal(values.type)):
            raise self.bad_type("write seconds since 1970 or timestamps")
        floats = values.cast(pa.float64()).to_numpy()
        bad = ~(np.abs(floats) < 2.0**62)  # NaN too
        if bad.any():
            row = int(np.argmax(bad))
            raise self.bad_value(row, f"{floats[row]} is not a time", "write seconds since 1970")
        whole = np.floor(floats)
        return whole.astype(np.int64), ((floats - whole) * 1e9).astype(np.int32)

    def _complete(self) -> pa.Array:
        import pyarrow as pa

        values = self.values.dictionary_decode() if pa.types.is_dictionary(self.values.type) else self.values
        if values.null_count:
            row = values.is_null().index(True).as_py()
            raise self.bad_value(row, "has no value", "fill in or remove such rows")
        return values

    def _parsed(self, values: pa.Array, *kinds: pa.DataType, expected: str, remedy: str) -> pa.Array:
        """Text as the first of these types that fits all values."""
        import pyarrow as pa

        def parse(part: pa.Array) -> pa.Array | None:
            for kind in kinds:
                try:
                    return part.cast(kind)
                except pa.ArrowInvalid:
                    continue
            return None

        texts = values.cast(pa.string())
        parsed = parse(texts)
        if parsed is not None:
            return parsed
        good, bad = 0, len(texts)  # bisect for the shortest prefix that does not parse: its last value is the bad one
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if parse(texts[:middle]) is None else (middle, bad)
        raise self.bad_value(bad - 1, f"{quoted(texts[bad - 1].as_py())} is not {expected}", remedy)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
