"""Reading gives exactly the rows that were written, whatever the dialect; a damaged file is named or read as it is.

`READING_EXAMPLES=100000` runs more examples than the tests of every day do.
"""

from __future__ import annotations

import datetime
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from log_dialects import (
    EPOCH,
    INTEGER,
    SEPARATORS,
    TIME_UNITS,
    Dialect,
    Event,
    Histories,
    Malformed,
    TextRow,
    WrittenLog,
    encoded,
    even_width,
    expected_log,
    strict_rows,
    text_of,
    time_text,
    written_logs,
)
from log_files import histories

from dman_runtime.data.input_report import InputReport
from dman_runtime.data.log_options import ANY_LOG, LogOptions
from dman_runtime.data.logs import open_log
from dman_runtime.errors import InputError

COLUMN_OPTIONS = ("user_column", "item_column", "time_column", "position_column")
UNIT_NAMES = {"seconds": "s", "milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}
EXAMPLES = int(os.environ.get("READING_EXAMPLES", "60"))
MANY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None if EXAMPLES > 1000 else settings.default.database,  # type: ignore[union-attr]
)


@contextmanager
def written(log: WrittenLog) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield log.write(Path(folder))


def read(path: Path, options: LogOptions, *, max_rows: int | None = None) -> tuple[Histories, InputReport]:
    with open_log(path, options, max_rows=max_rows) as log:
        found: Histories = {}
        for part in [log.whole()] if max_rows is None else log.parts():
            one = histories(part)
            assert not one.keys() & found.keys()
            found |= one
        return found, log.report


def read_asked(path: Path, log: WrittenLog) -> tuple[Histories, InputReport]:
    """Reads without options, and with those that the errors ask for: a reader may refuse, but must say what to do."""
    truth, options = log.dialect.options(), ANY_LOG
    if truth.encoding == "latin-1":  # its bytes may be UTF-8 too
        options = replace(options, encoding="latin-1")
    for _ in range(8):
        try:
            return read(path, options)
        except InputError as error:
            name = error.parameter
            assert name, f"no option cures this: {error}"
            headerless = name == "no_header" or name.endswith("_column")
            asked = (
                ("header", "user_column", "item_column", "time_column", "position_column") if headerless else (name,)
            )
            if headerless:
                assert not log.dialect.header, f"the columns have their usual names: {error}"
            given = {one: getattr(truth, one) for one in asked}
            if headerless and given == {one: getattr(options, one) for one in asked}:  # the columns that it lists tell
                given = {"separator": truth.separator}
            assert given != {one: getattr(options, one) for one in given}, f"the option does not cure: {error}"
            options = replace(options, **given)
    raise AssertionError("asks for ever more options")


def other_readings(log: WrittenLog) -> list[Histories]:
    """What the text also says, if it is a well-formed table in other dialects too: nobody can know which was meant."""
    dialect, found = log.dialect, []
    if dialect.format != "text":
        return []
    texts = [text_of(dialect, part, log.blank_lines if n == 0 else []) for n, part in enumerate(log.parts)]
    separators = [dialect.separator] if dialect.header else SEPARATORS
    for separator in separators:
        for quote in ("none", "double", "backslash"):
            try:
                parts = [strict_rows(text, separator, quote) for text in texts]
            except Malformed:
                continue
            rows = [row.values for part in parts for row in part[dialect.header :]]
            if even_width([row for part in parts for row in part]) and len(rows[0]) >= 2:
                found.append(_as_histories(log, rows))
    return [histories for histories in found if histories is not None]


def _as_histories(log: WrittenLog, rows: list[list[str]]) -> Histories | None:
    """Rows of text as histories, if each has one of the times that were written in its time column."""
    dialect = log.dialect
    times = {time_text(one.time, dialect.time_form): one.time for one in log.events}
    events = []
    for row in rows:
        if len(row) != len(dialect.columns):
            return None
        values = dict(zip(dialect.columns, row, strict=True))
        if dialect.timed and values["timestamp"] not in times:
            return None
        position = values.get("position", "0")
        if not re.fullmatch("-?[0-9]+", position):
            return None
        time = times[values["timestamp"]] if dialect.timed else 0
        events.append(Event(values["user_id"], values["item_id"], time, int(position)))
    return expected_log(dialect, events)[0]


def assert_types(report: InputReport, log: WrittenLog) -> None:
    dialect = log.dialect
    for found, written_ids in (
        (report.user_ids, [one.user for one in log.events]),
        (report.item_ids, [one.item for one in log.events]),
    ):
        if any(text != text.strip() for text in written_ids):
            continue
        integers = all(INTEGER.fullmatch(text) and -(1 << 63) <= int(text) < 1 << 63 for text in written_ids)
        if dialect.format != "text":
            integers = dialect.parquet_ids == "integer"
        assert found == ("integer" if integers else "text")


@MANY
@given(log=written_logs(), max_rows=st.sampled_from((None, 1, 3, 10)))
def test_a_log_in_any_dialect_is_read_as_it_was_written(log: WrittenLog, max_rows: int | None) -> None:
    expected, left_out = expected_log(log.dialect, log.events)
    with written(log) as path:
        found, report = read(path, log.dialect.options(), max_rows=max_rows)
    assert found == expected
    assert list(found) == list(expected) or max_rows is not None
    assert report.rows == len(log.events)
    assert report.events == report.rows - left_out == sum(map(len, expected.values()))
    assert report.trimmed_ids == sum(
        (one.user != one.user.strip()) + (one.item != one.item.strip()) for one in log.events
    )
    assert_types(report, log)


@MANY
@given(log=written_logs())
def test_the_dialect_of_a_log_is_found_out_or_asked_for(log: WrittenLog) -> None:
    options, dialect = log.dialect.options(), log.dialect
    with written(log) as path:
        if dialect.encoding in ("latin-1", "utf-16-le", "utf-16-be"):  # nothing in the bytes says so for certain
            try:
                unnamed = read(path, replace(options, encoding="auto"))[0]
                assert unnamed == expected_log(dialect, log.events)[0] or dialect.encoding == "latin-1"
            except InputError as error:
                assert error.parameter == "encoding"
        found, report = read_asked(path, log)
    expected = expected_log(dialect, log.events)[0]
    if found == expected:
        event("as written")
        assert report.rows == len(log.events)
    else:
        event("as another table that the text also is")
        assert found in other_readings(log)


# -- damage ------------------------------------------------------------------------------------------------------------

_Damage = st.tuples(
    st.sampled_from(("flip", "insert", "delete", "truncate", "repeat")),
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.sampled_from(b'",;\n\r\t \\0a'), st.integers(0, 255)),
    st.integers(1, 30),
)


def damaged(content: bytes, kind: str, place: float, byte: int, length: int) -> bytes:
    at = int(place * len(content))
    if kind == "flip":
        return content[:at] + bytes([byte]) + content[at + 1 :]
    if kind == "insert":
        return content[:at] + bytes([byte]) * (length % 3 + 1) + content[at:]
    if kind == "delete":
        return content[:at] + content[at + length :]
    if kind == "truncate":
        return content[:at]
    return content[: at + length] + content[at:]


_PLAIN = st.builds(
    Dialect,
    separator=st.sampled_from((",", "tab", ";", "|", "::")),
    quote=st.sampled_from(("none", "double")),
    quote_all=st.booleans(),
    newline=st.sampled_from(("\n", "\r\n")),
    time_form=st.sampled_from(("s", "ms", "iso-T")),
    columns=st.permutations(("user_id", "item_id", "timestamp", "title")).map(tuple),
)


def changed_lines(before: bytes, after: bytes) -> range:
    """Lines, from 1, of `after` that differ from `before`, and the one after them, as their end may have moved."""
    shorter = min(len(before), len(after))
    first = next((n for n in range(shorter) if before[n] != after[n]), shorter)
    same_end = 0
    while same_end < shorter - first and before[-1 - same_end] == after[-1 - same_end]:
        same_end += 1
    line = after.count(b"\n", 0, first) + 1
    return range(line, after.count(b"\n", 0, len(after) - same_end) + 3)


@MANY
@given(log=written_logs(_PLAIN, max_parts=1), damage=_Damage, told=st.booleans())
def test_a_damaged_file_is_refused_at_its_line_or_read_as_it_now_is(
    log: WrittenLog, damage: tuple[str, float, int, int], told: bool
) -> None:
    dialect = log.dialect
    before = encoded(dialect, text_of(dialect, log.parts[0], log.blank_lines))
    after = damaged(before, *damage)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("log.tsv" if dialect.separator == "tab" else "log.csv")
        path.write_bytes(after)
        options = dialect.options() if told else ANY_LOG
        try:
            found, report = read(path, options)
        except InputError as error:
            event("refused")
            check_place(error, before, after, dialect)
            return
    event("read")
    separator, quote, header = dialect_of(report)
    rows = strict_rows(after.decode(), separator, quote)
    if "an empty last value in every line" in report.files[0]["dialect"]:
        assert not any(row.values[-1] for row in rows[1:])
        rows = [rows[0], *(replace(row, values=row.values[:-1]) for row in rows[1:])]
    assert even_width(rows)
    assert found == histories_of(rows, report)
    assert report.rows == len(rows) - header


def check_place(error: InputError, before: bytes, after: bytes, dialect: Dialect) -> None:
    """The lines that the error names: one that was damaged, or where the table stops being one because of that."""
    lines = [int(number) for number in re.findall(r"\bline (\d+)", str(error))]
    if not lines:
        return
    allowed = set(changed_lines(before, after))
    if error.parameter == "quote":  # it names what contradicts itself, which may have been there before
        allowed |= {number for number, line in enumerate(after.split(b"\n"), 1) if b'"' in line}
    for quote in ("none", "double"):
        try:
            rows = strict_rows(after.decode(errors="replace"), dialect.separator, quote)
        except Malformed as malformed:
            allowed.add(malformed.line)
            continue
        # a value may begin above the damage that it now reaches
        allowed |= {row.first_line for row in rows if allowed & {*range(row.first_line, row.last_line + 1)}}
        widths = [len(row.values) for row in rows]
        allowed |= {row.first_line for row, width in zip(rows, widths, strict=True) if width != widths[0]}
    assert set(lines) & allowed, f"{error}: not {lines} but {sorted(allowed)}"


def dialect_of(report: InputReport) -> tuple[str, str, bool]:
    """Separator, quote and header, as the report says them."""
    words = report.files[0]["dialect"].split(", ")
    names = {"comma": ",", "semicolon": ";", "pipe": "|", "blanks": "blank", "tab": "tab", "::": "::"}
    (separator,) = [option for name, option in names.items() if name in words]
    quotes = {"quotes double": "double", "quotes with backslash": "backslash", "no quotes": "none"}
    (quote,) = [option for name, option in quotes.items() if any(word.startswith(name) for word in words)]
    return separator, quote, "header" in words


def histories_of(rows: list[TextRow], report: InputReport) -> Histories:
    """The rows of a table with a header as histories, in plain Python."""
    header = [name.strip() for name in rows[0].values]
    places = {role: header.index(name.strip()) for role, name in report.columns.items() if name != "none"}
    events = []
    for row in rows[1:]:
        user, item = (row.values[places[role]] for role in ("user", "item"))
        time = nanoseconds(row.values[places["time"]].strip(), report.time_unit) if "time" in places else 0
        events.append(Event(user, item, time))
    columns = ("user_id", "item_id", "timestamp") if "time" in places else ("user_id", "item_id")
    return expected_log(Dialect(columns=columns), events)[0]


def nanoseconds(text: str, unit: str) -> int:
    """A time as the reference understands it. Raises ValueError."""
    try:
        return int(Decimal(text) * TIME_UNITS[UNIT_NAMES[unit]])
    except (ArithmeticError, KeyError):
        moment = datetime.datetime.fromisoformat(text)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        return (aware - EPOCH) // datetime.timedelta(microseconds=1) * 1000


@given(log=written_logs())
def test_the_reference_reads_what_is_written(log: WrittenLog) -> None:
    dialect = log.dialect
    if dialect.format == "text":
        text = text_of(dialect, log.parts[0], log.blank_lines)
        rows = strict_rows(text, dialect.separator, dialect.quote)
        assert len(rows) == len(log.parts[0]) + dialect.header
        assert (
            _as_histories(log, [row.values for row in rows[dialect.header :]]) == expected_log(dialect, log.parts[0])[0]
        )
