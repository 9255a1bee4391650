"""Logs written in every dialect, and what reading them must give: an independent reference in plain Python."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from dman_runtime.data.log_options import LogOptions

SEPARATORS = {"tab": "\t", "blank": " ", ",": ",", ";": ";", "|": "|", "::": "::"}  # option -> what is in the file
COLUMNS = ("user_id", "item_id", "timestamp", "position", "title")
INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_STAND_IN = "\x1f"  # for "::", which Python's csv cannot split at; no value holds it
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Event:
    """One row as it was meant; `user` and `item` may have blanks around them that do not count."""

    user: str
    item: str
    time: int = 0  # nanoseconds since 1970
    position: int = 0
    title: str = ""


@dataclass(frozen=True)
class Dialect:
    """How rows become the bytes of a file; separator and quote as in `LogOptions`."""

    format: str = "text"
    separator: str = ","
    quote: str = "double"
    quote_all: bool = False
    header: bool = True
    newline: str = "\n"
    last_newline: bool = True
    bom: bool = False
    encoding: str = "utf-8"
    compression: str = ""
    time_form: str = "s"
    parquet_ids: str = "string"
    columns: tuple[str, ...] = ("user_id", "item_id", "timestamp")

    @property
    def timed(self) -> bool:
        return "timestamp" in self.columns

    def options(self) -> LogOptions:
        """Everything about the files that an option can say."""
        if self.format != "text":
            return LogOptions(format=self.format)  # type: ignore[arg-type]
        options = LogOptions(
            format="text",
            separator=self.separator,
            quote=self.quote,  # type: ignore[arg-type]
            header=self.header,
            encoding=self.encoding,
        )
        return options if self.header else replace(options, **self.numbers())

    def numbers(self) -> dict[str, str]:
        """The options that name the columns of a file without a header."""
        roles = {"user_column": "user_id", "item_column": "item_id"}
        roles |= {"time_column": "timestamp", "position_column": "position"}
        return {
            option: str(self.columns.index(name) + 1) if name in self.columns else "none"
            for option, name in roles.items()
        }


@dataclass(frozen=True)
class WrittenLog:
    """Rows in parts, one file a part, and how they are written."""

    dialect: Dialect
    parts: list[list[Event]]
    blank_lines: list[int] = field(default_factory=list)  # a blank line comes before these lines of the first part

    @property
    def events(self) -> list[Event]:
        return [event for part in self.parts for event in part]

    def write(self, folder: Path) -> Path:
        """Writes a file, or a folder of files if there are several parts; gives its path."""
        if len(self.parts) == 1:
            return write_file(folder / f"log{_suffix(self.dialect)}", self.dialect, self.parts[0], self.blank_lines)
        inside = folder / "log"
        inside.mkdir()
        for number, part in enumerate(self.parts):
            path = inside / f"part-{number:05}{_suffix(self.dialect)}"
            write_file(path, self.dialect, part, self.blank_lines if number == 0 else [])
        return inside


def _suffix(dialect: Dialect) -> str:
    kinds = {"jsonl": ".jsonl", "parquet": ".parquet"}
    text = {"tab": ".tsv", "::": ".dat", ",": ".csv"}.get(dialect.separator, ".txt")
    compression = f".{dialect.compression}" if dialect.compression else ""
    return kinds.get(dialect.format, text) + compression


def write_file(path: Path, dialect: Dialect, events: list[Event], blank_lines: list[int]) -> Path:
    if dialect.format == "parquet":
        pq.write_table(_table(dialect, events), path)
        return path
    content = compress(encoded(dialect, text_of(dialect, events, blank_lines)), dialect.compression)
    path.write_bytes(content)
    return path


def encoded(dialect: Dialect, text: str) -> bytes:
    return ("\ufeff" + text if dialect.bom else text).encode(dialect.encoding)


def compress(content: bytes, compression: str) -> bytes:
    if compression == "zip":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("inside.csv", content)
        return archive.getvalue()
    if compression == "zst":
        return pa.Codec("zstd").compress(content, asbytes=True)
    one: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress}
    return one.get(compression, bytes)(content)


def text_of(dialect: Dialect, events: list[Event], blank_lines: list[int]) -> str:
    lines = [line_of(dialect, event) for event in events]
    if dialect.header and dialect.format == "text":
        lines.insert(0, SEPARATORS[dialect.separator].join(dialect.columns))
    for place in sorted(blank_lines, reverse=True):
        lines.insert(min(place, len(lines)), "")
    return dialect.newline.join(lines) + (dialect.newline if dialect.last_newline and lines else "")


def line_of(dialect: Dialect, event: Event) -> str:
    if dialect.format == "jsonl":
        return json.dumps(dict(zip(dialect.columns, _json_values(dialect, event), strict=True)), ensure_ascii=False)
    values = [quoted(value, dialect) for value in _texts(dialect, event)]
    return SEPARATORS[dialect.separator].join(values)


def quoted(value: str, dialect: Dialect) -> str:
    needs = any(part in value for part in (SEPARATORS[dialect.separator], '"', "\n", "\r", "\t", "\\", ":"))
    if dialect.quote == "none" or not (needs or dialect.quote_all or value != value.strip()):
        return value
    if dialect.quote == "backslash":
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return '"' + value.replace('"', '""') + '"'


def _texts(dialect: Dialect, event: Event) -> list[str]:
    texts = {
        "user_id": event.user,
        "item_id": event.item,
        "timestamp": time_text(event.time, dialect.time_form),
        "position": str(event.position),
        "title": event.title,
    }
    return [texts[name] for name in dialect.columns]


def _json_values(dialect: Dialect, event: Event) -> Iterator[Any]:
    for name, text in zip(dialect.columns, _texts(dialect, event), strict=True):
        number = (name == "timestamp" and dialect.time_form in TIME_UNITS) or name == "position"
        yield json.loads(text) if number else text


TIME_UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1, "float": 10**9}
ISO_FORMS = ("iso", "iso-T", "iso-ms", "iso-Z", "iso-us-Z", "iso-UTC", "iso-zone", "iso-zone-T")


def time_text(time: int, form: str) -> str:
    if form == "float":
        return str(Decimal(time) / 10**9) if time % 10**9 else f"{time // 10**9}.0"
    if form in TIME_UNITS:
        return str(time // TIME_UNITS[form])
    if form == "date":
        return _utc(time).strftime("%Y-%m-%d")
    gap, zone = "T" if "T" in form.replace("UTC", "") else " ", "+02:00" if "zone" in form else ""
    moment = _utc(time) + datetime.timedelta(hours=2 if zone else 0)
    digits = f".{moment.microsecond:06}"[: 4 if "ms" in form else 7] if "ms" in form or "us" in form else ""
    end = zone or ("Z" if "Z" in form else " UTC" if "UTC" in form else "")
    return moment.strftime(f"%Y-%m-%d{gap}%H:%M:%S") + digits + end


def resolution(form: str) -> int:
    """Nanoseconds: times are multiples of it in a file of this form."""
    if form == "date":
        return 86_400 * 10**9
    if form == "float":
        return 10**6
    return TIME_UNITS.get(form, 10**6 if "ms" in form else 10**3 if "us" in form else 10**9)


def _utc(time: int) -> datetime.datetime:
    return EPOCH + datetime.timedelta(microseconds=time // 1000)


def _table(dialect: Dialect, events: list[Event]) -> pa.Table:
    columns: dict[str, Any] = {}
    for name in dialect.columns:
        if name in ("user_id", "item_id"):
            texts = [getattr(event, name.removesuffix("_id")) for event in events]
            integers = dialect.parquet_ids == "integer"
            columns[name] = pa.array(
                [int(text) for text in texts] if integers else texts, _ID_TYPES[dialect.parquet_ids]
            )
        elif name == "timestamp":
            columns[name] = _parquet_times(dialect.time_form, [event.time for event in events])
        else:
            columns[name] = pa.array([getattr(event, name) for event in events])
    return pa.table(columns)


_ID_TYPES = {"string": pa.string(), "large": pa.large_string(), "integer": pa.int64(), "view": pa.string_view()}
_ID_TYPES["dictionary"] = pa.dictionary(pa.int32(), pa.string())


def _parquet_times(form: str, times: list[int]) -> pa.Array:
    if form == "float":
        return pa.array([time / 10**9 for time in times])
    if form in TIME_UNITS:
        return pa.array([time // TIME_UNITS[form] for time in times], pa.int64())
    if form == "date":
        return pa.array([time // resolution(form) for time in times], pa.int32()).cast(pa.date32())
    if form.startswith("timestamp"):
        _, unit, zone = form.split("-")
        kind = pa.timestamp(unit, zone or None)
        return pa.array([time // TIME_UNITS[unit] for time in times], pa.int64()).cast(kind)
    return pa.array([time_text(time, form) for time in times])


# -- what reading must give --------------------------------------------------------------------------------------------

Histories = dict[str, list[tuple[str, int]]]  # user -> (item, seconds since 1970), in the order of the events


def expected_log(dialect: Dialect, events: list[Event], *, exact_repeats: str = "auto") -> tuple[Histories, int]:
    """Histories by time, then by position, then by row, and how many exact repeats were left out."""
    keep = exact_repeats == "keep" or (exact_repeats == "auto" and (not dialect.timed or dialect.time_form == "date"))

    def order(event: Event) -> tuple[int, int]:
        return event.time if dialect.timed else 0, event.position if "position" in dialect.columns else 0

    left_out, found = 0, {}
    for user in dict.fromkeys(event.user.strip() for event in events):
        kept: dict[Any, tuple[str, int]] = {}
        own = [event for event in events if event.user.strip() == user]
        for number, event in enumerate(sorted(own, key=order)):
            item, time = event.item.strip(), event.time if dialect.timed else 0
            key = number if keep else (item, time, order(event)[1])
            left_out += key in kept
            kept.setdefault(key, (item, time // 10**9))
        found[user] = list(kept.values())
    return found, left_out


# -- strict reading of a text, to compare with -------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRow:
    """Values of a row, and the lines, from 1, that it begins and ends on."""

    values: list[str]
    first_line: int
    last_line: int


class Malformed(Exception):
    """A text that is no table; with the line where the bad row begins."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def strict_rows(text: str, separator: str, quote: str) -> list[TextRow]:
    """The rows of a text as Python's csv reads them when it is strict. Raises Malformed.

    Blank lines are left out, and so are lines of separators alone where these are blanks.
    """
    written = SEPARATORS[separator]
    if separator in ("::", "blank"):
        if _STAND_IN in text:
            raise Malformed(1)
        text, written = _with_stand_in(text, separator, quote), _STAND_IN
    if quote == "none":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=written, quoting=csv.QUOTE_NONE)
    else:
        doubled = quote == "double"
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=written, doublequote=doubled, escapechar=None if doubled else "\\", strict=True,
        )  # fmt: skip
    rows, line = [], 1
    try:
        for values in reader:
            if any(value.strip() for value in values) or (values and not written.isspace()):
                rows.append(
                    TextRow([v.replace(_STAND_IN, SEPARATORS[separator]) for v in values], line, reader.line_num)
                )
            line = reader.line_num + 1
    except csv.Error:
        raise Malformed(line) from None
    return rows


def _with_stand_in(text: str, separator: str, quote: str) -> str:
    """The text with one character for each separator outside of quotes. Blanks around lines are none."""
    pattern = "::" if separator == "::" else "[ \\t]+"
    values = {"double": '("[^"]*")|', "backslash": r'("(?:[^"\\]|\\.)*")|'}.get(quote, "()")
    text = re.sub(values + pattern, lambda found: found[1] or _STAND_IN, text, flags=re.DOTALL)
    edge = f"^{_STAND_IN}|{_STAND_IN}(?=\\r?$)"
    return re.sub(edge, "", text, flags=re.MULTILINE) if separator == "blank" else text


def even_width(rows: list[TextRow]) -> bool:
    return len({len(row.values) for row in rows}) == 1


# -- random logs -------------------------------------------------------------------------------------------------------

_ODD_IDS = ("null", "NA", "nan", "NULL", "None", "true", "007", "-0", "1e3", "0x1F", "", "'", "é", "日本", "\U0001f600")
_ODD_IDS += ("a b", "a,b", "a;b", "a|b", "a:b", "a\tb", 'a"b', '"a', 'a"', '"a"', "#a", "\\", "a\\b", "\\N", "-", "+7")
_ODD_IDS += ("user_id", "item_id", "9223372036854775807", "9223372036854775808", "12345678901234567890", "a\u2028b")
_RANDOM_ID = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs")), min_size=1, max_size=4)
_NUMBER_ID = st.integers(0, 30).map(str)
_WHOLE_FLOAT = re.compile(r"[-+]?[0-9]+\.[0-9]*|[-+]?\.[0-9]+")  # 7 and 7.0 in a column are refused
_TITLES = (
    "",
    "x",
    "The Best",
    "a, b",
    "a; b",
    "a|b",
    "a\tb",
    'say "hi"',
    '"Heroes',
    'Heroes"',
    '"',
    "two\nlines",
    "é ü",
)
_TITLES += ("back\\slash", "end\\", "a\u2028b", "a\x0bb", "two\r\nlines", '"quoted"', "::", "a: b", "''", '""', '","')


def _fits(dialect: Dialect, text: str, *, is_id: bool) -> bool:
    """Whether the value can be written in the dialect so that it can be read again."""
    try:
        text.encode(dialect.encoding)
    except UnicodeEncodeError:
        return False
    if is_id and (not text.strip() or _WHOLE_FLOAT.fullmatch(text.strip()) or re.search(r"[\x00-\x1f\x7f-\x9f]", text)):
        return False
    if dialect.format != "text":
        return not (dialect.parquet_ids == "integer" and is_id and not _fits_int64(text))
    if dialect.separator == "blank" and not text:  # two blanks in a row may be one separator
        return False
    if dialect.quote == "none":
        separators = {"::": ":", "blank": " \t"}.get(dialect.separator, SEPARATORS[dialect.separator])
        return not re.search(rf"[\r\n{re.escape(separators)}]", text)
    return True


def _fits_int64(text: str) -> bool:
    return bool(INTEGER.fullmatch(text)) and abs(int(text)) < 1 << 63


@st.composite
def dialects(draw: st.DrawFn) -> Dialect:
    format = draw(st.sampled_from(("text", "text", "text", "text", "jsonl", "parquet")))
    separator = draw(st.sampled_from(tuple(SEPARATORS)))
    timed = draw(st.integers(0, 5)) > 0
    extra = draw(st.sampled_from(((), ("position",), ("title",), ("title", "position"))))
    columns = draw(st.permutations(("user_id", "item_id", *(("timestamp",) if timed else ()), *extra)))
    forms = (*TIME_UNITS, *ISO_FORMS, "date")
    if format == "parquet":
        forms += ("timestamp-s-", "timestamp-ms-UTC", "timestamp-us-Europe/Berlin", "timestamp-ns-")
    quote = draw(st.sampled_from(("none", "double", "backslash")))
    if separator == "blank" and quote == "none":
        forms = tuple(form for form in forms if " " not in time_text(0, form)) if format == "text" else forms
    if separator == "::" and quote == "none" and format == "text":
        forms = tuple(form for form in forms if form in (*TIME_UNITS, "date"))
    encoding = draw(st.sampled_from(("utf-8", "utf-8", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "latin-1")))
    return Dialect(
        format=format,
        separator=separator,
        quote=quote,
        quote_all=draw(st.booleans()),
        header=format != "text" or draw(st.integers(0, 3)) > 0,
        newline=draw(st.sampled_from(("\n", "\r\n"))),
        last_newline=draw(st.integers(0, 4)) > 0,
        bom=format == "text" and encoding in ("utf-8", "utf-16-le", "utf-16-be") and draw(st.integers(0, 3)) == 0,
        encoding=encoding if format == "text" else "utf-8",
        compression=draw(st.sampled_from(("", "", "", "gz", "bz2", "zst", "zip"))) if format != "parquet" else "",
        time_form=draw(st.sampled_from(forms)),
        parquet_ids=draw(st.sampled_from(tuple(_ID_TYPES))) if format == "parquet" else "string",
        columns=tuple(columns),
    )


@st.composite
def written_logs(
    draw: st.DrawFn, dialect: st.SearchStrategy[Dialect] | None = None, *, max_parts: int = 3
) -> WrittenLog:
    """Logs of few users, items and times, so that ties are common."""
    chosen = draw(dialect if dialect is not None else dialects())

    def ids() -> list[str]:
        kinds = st.sampled_from((_NUMBER_ID, _RANDOM_ID, st.sampled_from(_ODD_IDS)))
        kind = draw(kinds) if chosen.parquet_ids != "integer" else _NUMBER_ID
        one = kind.filter(lambda text: _fits(chosen, text, is_id=True))
        return draw(st.lists(one, min_size=1, max_size=4, unique_by=str.strip))

    def with_blanks(texts: list[str]) -> list[str]:
        room = chosen.parquet_ids != "integer" and _fits(chosen, " ", is_id=False)
        return texts * 15 + [f" {text}" for text in texts] if room else texts

    users, items = ids(), ids()
    step = resolution(chosen.time_form)
    seconds = st.integers(1_000_000_000, 1_750_000_000).filter(lambda n: n % 86_400 != 0)  # else they may be only dates
    seconds = seconds.map(lambda n: n * 10**9 + n * 7919 % 10**9)
    if chosen.time_form == "s" and draw(st.booleans()):
        seconds = st.integers(-3, 100_000).filter(lambda n: n % 86_400 != 0).map(lambda n: n * 10**9)
    times = draw(st.lists(seconds.map(lambda n: n // step * step), min_size=1, max_size=4))
    titles = [title for title in _TITLES if _fits(chosen, title, is_id=False)]
    columns: tuple[Sequence[Any], ...] = (with_blanks(users), with_blanks(items), times, range(-1, 4), titles)

    def event(number: int) -> Event:
        values = []
        for column in columns:
            number, place = divmod(number, len(column))
            values.append(column[place])
        return Event(*values)

    row = st.integers(0, math.prod(map(len, columns)) - 1).map(event)  # one draw a row: many draws are slow
    parts = draw(st.lists(st.lists(row, min_size=1, max_size=12), min_size=1, max_size=max_parts))
    text = chosen.format != "parquet"
    blank_lines = draw(st.lists(st.integers(0, 14), max_size=2)) if text and draw(st.integers(0, 3)) == 0 else []
    return WrittenLog(chosen, parts, blank_lines)
