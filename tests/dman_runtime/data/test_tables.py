"""Tables: the same rows from every format, every row accounted for, and errors that name the line."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from table_files import packed, rows_of, write_bytes

from dman_runtime.data import tables as tables_module
from dman_runtime.data.log_options import ANY_LOG, LogOptions
from dman_runtime.data.tables import Rows, Tables, open_tables, quoted
from dman_runtime.errors import InputError

SKIP = LogOptions(bad_rows="skip")


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "_SAMPLE_BYTES", 4096)


def table(folder: Path, text: str, name: str = "log.csv", options: LogOptions = ANY_LOG) -> Tables:
    return open_tables(write_bytes(folder / name, text.encode()), options)


def refused(folder: Path, text: str, name: str = "log.csv", options: LogOptions = ANY_LOG) -> InputError:
    with pytest.raises(InputError) as raised:
        rows_of(table(folder, text, name, options))
    return raised.value


def parquet(folder: Path, name: str = "log.parquet", **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


# -- the interface ---------------------------------------------------------------------------------------------------


def test_rows_come_with_their_file_and_number(tmp_path: Path) -> None:
    for number in (1, 2):
        write_bytes(tmp_path / f"part-{number}.csv", b"user_id,item_id\n" + b"a,1\n" * 300_000)
    tables = open_tables(tmp_path)
    expected = {file.path: 0 for file in tables.files}
    seen: list[Rows] = list(tables.batches(["item_id"]))
    for rows in seen:
        assert rows.first_row == expected[rows.file.path]
        expected[rows.file.path] += len(rows.batch)
        assert rows.batch.schema.names == ["item_id"]
        assert len(rows.batch) <= 1_000_000
    assert len(seen) > 2
    assert set(expected.values()) == {300_000}
    assert [file.rows for file in tables.files] == [300_000, 300_000]
    assert tables.files[0].bytes == (tmp_path / "part-1.csv").stat().st_size


def test_batches_start_again_at_each_call(tmp_path: Path) -> None:
    tables = table(tmp_path, "a,b\n1,2\n1\n\n3,4\n", options=SKIP)
    for _ in range(2):
        assert rows_of(tables) == [("1", "2"), ("3", "4")]
        assert (tables.bad_row_count, len(tables.bad_rows), tables.blank_lines) == (1, 1, 1)


def test_columns_come_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    write_bytes(tmp_path / "1.csv", b"a,b,c\n1,2,3\n")
    write_bytes(tmp_path / "2.csv", b"c,b,a\n6,5,4\n")
    found = [rows.batch.to_pydict() for rows in open_tables(tmp_path).batches(["c", "a"])]
    assert found == [{"c": ["3"], "a": ["1"]}, {"c": ["6"], "a": ["4"]}]
    assert [list(one) for one in found] == [["c", "a"]] * 2


def test_columns_that_are_missing_or_twice_there_are_refused(tmp_path: Path) -> None:
    tables = table(tmp_path, "a,b,a\nx,y,z\n")
    with pytest.raises(InputError, match="2 columns are named 'a'; keep one of them"):
        list(tables.batches(["a"]))
    with pytest.raises(InputError, match="no column 'd'; it has: a, b, a"):
        list(tables.batches(["d"]))
    assert [rows.batch.to_pydict() for rows in tables.batches(["b"])] == [{"b": ["y"]}]
    with pytest.raises(InputError, match="its first line looks like a row") as raised:
        list(table(tmp_path, "1,1\n2,2\n").batches(["1"]))
    assert raised.value.parameter == "no_header"


def test_header_without_rows_is_a_table_without_rows(tmp_path: Path) -> None:
    tables = table(tmp_path, "a,b\n")
    assert (rows_of(tables), tables.names) == ([], ["a", "b"])


def test_error_names_the_path(tmp_path: Path) -> None:
    error = table(tmp_path, "a,b\n1,2\n").error("cause", "remedy", parameter="header")
    assert (str(error), error.parameter) == (f"{tmp_path / 'log.csv'}: cause; remedy", "header")


def test_values_are_cut_in_messages() -> None:
    assert quoted("x" * 100) == f"'{'x' * 56}...'"
    assert quoted(7) == "7"


# -- formats ---------------------------------------------------------------------------------------------------------


def test_the_same_rows_come_from_every_format(tmp_path: Path) -> None:
    rows = [("a", "x"), ("b", "y")]
    lines = "".join(json.dumps({"user_id": user, "item_id": item}) + "\n" for user, item in rows)
    paths = [parquet(tmp_path, user_id=["a", "b"], item_id=["x", "y"])]
    paths += [write_bytes(tmp_path / name, lines.encode()) for name in ("a.jsonl", "a.ndjson", "a.json", "a.log", "a")]
    paths += [write_bytes(tmp_path / name, b"user_id,item_id\na,x\nb,y\n") for name in ("a.csv", "a.txt", "b", "a.dat")]
    paths.append(tmp_path / "parquet-without-extension")
    paths[-1].write_bytes(paths[0].read_bytes())
    for path in paths:
        assert rows_of(open_tables(path)) == rows, path


def test_format_can_be_fixed(tmp_path: Path) -> None:
    tables = table(tmp_path, '{"a": 1}\n', "log.csv", LogOptions(format="jsonl"))
    assert tables.files[0].dialect.startswith("JSON lines")
    tables = table(tmp_path, '{"a"\n{"b"\n', "log.json", LogOptions(format="text", quote="none"))
    assert rows_of(tables) == [('{"b"',)]
    assert "is not a Parquet file" in refused(tmp_path, "a,b\n1,2\n", "log.csv", LogOptions(format="parquet")).cause


def test_file_that_is_named_parquet_and_is_not_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "a,b\n1,2\n", "log.parquet").parameter == "format"


def test_json_array_is_refused_with_a_remedy(tmp_path: Path) -> None:
    error = refused(tmp_path, '\n [{"a": 1},\n {"a": 2}]\n', "log.json")
    assert "holds one JSON array; write one object a line" in str(error)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([7, 8], pa.uint8()), pa.uint8()),
        (pa.array(["7", "8"]), pa.string()),
        (pa.array(["7", "8"]).dictionary_encode(), pa.dictionary(pa.int32(), pa.string())),
        (pa.array([date(2024, 1, 1), None]), pa.date32()),
        (pa.array([1, 2], pa.timestamp("us", "Europe/Berlin")), pa.timestamp("us", "Europe/Berlin")),
    ],
    ids=["uint8", "text", "dictionary", "date", "timestamp"],  # str() of an array holds its address
)
def test_parquet_columns_come_as_they_are_stored(tmp_path: Path, values: pa.Array, kind: pa.DataType) -> None:
    tables = open_tables(parquet(tmp_path, x=values, **{"x.y": ["p", "q"]}))
    (rows,) = tables.batches(["x"])
    assert rows.batch["x"].type == kind
    assert rows.batch["x"].to_pylist() == values.to_pylist()
    assert (tables.files[0].typed, tables.files[0].dialect) == (True, "Parquet")
    assert tables.files[0].places([1]) == [f"{tables.path}: row 2"]


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path, user_id=["a"] * 1000, item_id=[str(n) for n in range(1000)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        open_tables(path)
    path.write_bytes(whole[:100] + bytes(500) + whole[600:])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        rows_of(open_tables(path))


def test_columns_whose_values_change_their_kind_from_file_to_file_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path, "1.parquet", x=pa.array([1], pa.int32()), y=pa.array([None], pa.int64()))
    parquet(tmp_path, "2.parquet", x=pa.array([2], pa.int64()), y=["text"])
    assert rows_of(open_tables(tmp_path)) == [(1, None), (2, "text")]
    path = parquet(tmp_path, "3.parquet", x=["3"], y=["text"])
    with pytest.raises(InputError) as raised:
        rows_of(open_tables(tmp_path))
    assert f"{path}: column 'x' holds text, but integers in {tmp_path / '1.parquet'}" in raised.value.cause


# -- JSON lines ------------------------------------------------------------------------------------------------------


def test_missing_keys_and_null_are_the_same(tmp_path: Path) -> None:
    text = '{"a": 1, "b": "x"}\n\n{"b": null, "c": true}\n  \n{"c": false, "a": 3}'
    tables = table(tmp_path, text, "log.jsonl")
    assert tables.names == ["a", "b", "c"]
    assert rows_of(tables) == [(1, "x", None), (None, None, True), (3, None, False)]
    assert tables.blank_lines == 2
    assert tables.files[0].places([0, 1, 2]) == [f"{tables.path}: line {line}" for line in (1, 3, 5)]


def test_json_values_keep_their_types(tmp_path: Path) -> None:
    text = '{"a": "2024-01-01", "b": "7", "c": 7, "d": 7.5, "e": true}\n{"d": 7}\n'
    (rows,) = table(tmp_path, text, "log.jsonl").batches(["a", "b", "c", "d", "e"])
    assert rows.batch.schema.types == [pa.string(), pa.string(), pa.int64(), pa.float64(), pa.bool_()]
    assert rows.batch["d"].to_pylist() == [7.5, 7.0]


@pytest.mark.parametrize("lines", [0, 1000])  # in the first lines, and behind them
@pytest.mark.usefixtures("small_sample")
@pytest.mark.parametrize(
    ("first", "other", "cause"),
    [
        ("7", '"8"', "the value of x is text, not an integer as in"),
        ('"7"', "8", "the value of x is an integer, not text as in"),
        ("7", "true", "the value of x is true or false, not an integer as in"),
        ("7", '{"y": 1}', "the value of x is nested: an array or an object"),
        ("7", "12345678901234567890", "the value of x is 12345678901234567890, more than 64 bits hold"),
    ],
)
def test_mixed_values_of_a_column_are_refused_with_the_line(
    tmp_path: Path, lines: int, first: str, other: str, cause: str
) -> None:
    text = f'{{"x": {first}}}\n' + f'{{"x": {first}}}\n' * lines + f'{{"x": {other}, "y": 1}}\n'
    assert f"line {lines + 2}: {cause}" in refused(tmp_path, text, "log.jsonl").cause
    if lines == 0:
        tables = table(tmp_path, text, "log.jsonl")
        assert [rows.batch["y"].to_pylist() for rows in tables.batches(["y"])] == [[None, 1]]  # x is not asked for


@pytest.mark.usefixtures("small_sample")
def test_type_of_a_column_is_found_behind_the_first_lines(tmp_path: Path) -> None:
    text = '{"x": null, "y": 1}\n' * 1000 + '{"x": 5, "y": 1}\n'
    batches = [rows.batch["x"] for rows in table(tmp_path, text, "log.jsonl").batches(["x"])]
    assert {batch.type for batch in batches} == {pa.int64()}
    assert batches[-1][-1].as_py() == 5


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": 1}{"a": 2}', "is not a JSON object"),
        ('{"a": 1', "is not a JSON object"),
        ("[1]", "is not a JSON object"),
        ("5", "is not a JSON object"),
        ('{"a": 1},', "is not a JSON object"),
        ('{"a": "\\ud800"}', "is not a JSON object"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('{"b": ' + "[" * 100_000, "is not a JSON object"),
    ],
)
def test_lines_that_are_no_objects_fail_or_are_skipped(tmp_path: Path, line: str, problem: str) -> None:
    text = f'{{"a": 1}}\n\n{line}\n{{"a": 3}}\n'
    error = refused(tmp_path, text, "log.jsonl")
    assert f"line 3 {problem}: " in error.cause
    assert error.parameter == "bad_rows"
    tables = table(tmp_path, text, "log.jsonl", SKIP)
    assert [row[:1] for row in rows_of(tables)] == [(1,), (3,)]
    assert (tables.bad_row_count, tables.bad_rows[0].place) == (1, f"{tables.path}: line 3")
    assert tables.files[0].where(1) == f"{tables.path}: line 4"


def test_object_over_two_lines_is_never_taken_for_a_row(tmp_path: Path) -> None:
    text = '{"a": 1}{"a": 2}\n{"a":\n3}\n{"a": 4}\n'  # three objects in three lines, but not one in each
    assert "line 1 is not a JSON object" in refused(tmp_path, text, "log.jsonl").cause
    tables = table(tmp_path, text, "log.jsonl", SKIP)
    assert (rows_of(tables), tables.bad_row_count) == ([(4,)], 3)


def test_keys_of_all_json_files_are_columns(tmp_path: Path) -> None:
    write_bytes(tmp_path / "1.json", b'{"a": 1}\n')
    write_bytes(tmp_path / "2.json", b'{"b": 2, "a": 3}\n')
    tables = open_tables(tmp_path)
    assert (tables.names, rows_of(tables)) == (["a", "b"], [(1, None), (3, 2)])


def test_json_without_objects_is_refused(tmp_path: Path) -> None:
    assert "no line of the first ones is a JSON object" in refused(tmp_path, '{\n"a": 1\n}\n', "log.json").cause


# -- bad rows --------------------------------------------------------------------------------------------------------

BAD = 'user_id,title,item_id\n\na,"two\nlines, x",1\nb,2\n\nc,x,3\nd,x,4,5\ne,x,6\n'


def test_wrong_number_of_values_is_refused_with_its_line(tmp_path: Path) -> None:
    error = refused(tmp_path, BAD)
    assert error.cause.endswith("log.csv: line 5 has 2 values instead of 3: 'b,2'")
    assert (error.remedy, error.parameter) == ("correct it, or leave such rows out (skip)", "bad_rows")


def test_bad_rows_are_skipped_counted_and_shown(tmp_path: Path) -> None:
    tables = table(tmp_path, BAD, options=SKIP)
    assert [row[::2] for row in rows_of(tables)] == [("a", "1"), ("c", "3"), ("e", "6")]
    assert tables.bad_row_count == 2
    assert [row.place for row in tables.bad_rows] == [f"{tables.path}: line {line}" for line in (5, 8)]
    assert tables.bad_rows[1].problem == "has 4 values instead of 3: 'd,x,4,5'"
    assert tables.files[0].places([0, 1, 2]) == [f"{tables.path}: line {line}" for line in (3, 7, 9)]


def test_first_five_bad_rows_of_all_files_are_kept(tmp_path: Path) -> None:
    for number in range(3):
        write_bytes(tmp_path / f"{number}.csv", b"a,b\n1,2\n" + b"1\n" * 3 + b"1,2\n" * 4)
    tables = open_tables(tmp_path, SKIP)
    assert len(rows_of(tables)) == 15
    assert tables.bad_row_count == 9
    assert [Path(row.place).name for row in tables.bad_rows] == [
        "0.csv: line 3",
        "0.csv: line 4",
        "0.csv: line 5",
        "1.csv: line 3",
        "1.csv: line 4",
    ]


def test_bad_row_far_into_a_log_is_named_by_its_line(tmp_path: Path) -> None:
    lines = 150_000  # several pieces
    text = "user_id,item_id\n" + "user-1,item-1\n" * lines + "user-1\n" + "user-1,item-1\n" * lines + 'x,"1\n'
    assert f"line {lines + 2} has 1 value instead of 2" in refused(tmp_path, text).cause  # the first error wins
    tables = table(tmp_path, text.removesuffix('x,"1\n'), options=SKIP)
    assert len(rows_of(tables)) == 2 * lines
    assert tables.files[0].where(2 * lines - 1) == f"{tables.path}: line {2 * lines + 2}"


def test_file_in_which_every_row_is_bad_is_refused(tmp_path: Path) -> None:
    assert (
        "none of its 2 rows can be read"
        in refused(tmp_path, "a,b\n1\n2\n", options=LogOptions(bad_rows="skip", separator=",")).cause
    )


def test_remedy_of_a_bad_row_is_what_may_cure_it(tmp_path: Path) -> None:
    text = "a,b,c\n" + "1,2,3\n" * 3
    assert refused(tmp_path, text + '1,"x, y",3\n', options=LogOptions(quote="none")).parameter == "quote"
    assert refused(tmp_path, text + "1,2\n" * 7, options=LogOptions(separator=",")).parameter == "separator"


# -- every row is counted --------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "user_id": st.none() | st.text(st.characters(exclude_categories=("Cs",)), max_size=5),
                "n": st.none() | st.integers(-(2**63) + 1, 2**63 - 1),
                "x": st.none() | st.floats(allow_nan=False, allow_infinity=False),
                "other": st.lists(st.integers(), max_size=2) | st.booleans(),
            },
        ),
        min_size=1,
        max_size=10,
    ),
    blank=st.sets(st.integers(0, 9)),
    ascii_only=st.booleans(),
    compression=st.sampled_from(("", "gz", "zst")),
)
def test_json_lines_come_back_exactly(
    tmp_path: Path, rows: list[dict[str, Any]], blank: set[int], ascii_only: bool, compression: str
) -> None:
    first: dict[str, Any] = {"user_id": "u", "n": 1, "x": 0.5}
    rows = [first, *rows]
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = "".join("\n" * (number in blank) + line + "\n" for number, line in enumerate(lines))
    tables = open_tables(write_bytes(tmp_path / "log.jsonl", text.encode(), compression))
    found = [row for rows_ in tables.batches(list(first)) for row in rows_.batch.to_pylist()]
    assert found == [{name: row.get(name) for name in first} for row in rows]


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.lists(
        st.sampled_from(['{"a": 1}', '{"a": "x"}', '{"a"', "}", "\n", "\n", " ", "[", "null", '{"a": 1.5}', "\\", '"']),
        max_size=20,
    ).map("".join),
    skip=st.booleans(),
)
def test_random_json_lines_give_one_row_a_line_or_an_error(tmp_path: Path, content: str, skip: bool) -> None:
    path = write_bytes(tmp_path / "log.jsonl", content.encode())
    try:
        tables = open_tables(path, SKIP if skip else ANY_LOG)
        found = rows_of(tables)
    except InputError:
        return
    values = []
    for line in filter(str.strip, content.split("\n")):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        values.append(value)
    good = [value for value in values if isinstance(value, dict)]
    assert found == [(value["a"],) for value in good]
    assert tables.bad_row_count == len(values) - len(good)
    assert skip or not tables.bad_row_count


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=80), compression=st.sampled_from(("gz", "bz2", "zip")), cut=st.integers(10, 90))
def test_random_bytes_in_archives_give_all_rows_or_an_error(
    tmp_path: Path, content: bytes, compression: str, cut: int
) -> None:
    """Of the archives that hold check sums. The damage begins behind the bytes that make them archives."""
    whole = packed(b"a,b\n" + b"1,2\n" * 3, compression)
    path = tmp_path / f"log.csv.{compression}"
    path.write_bytes(whole[:cut] + content + whole[cut + len(content) :])
    try:
        assert rows_of(open_tables(path)) == [("1", "2")] * 3
    except InputError as error:
        assert str(path) in error.cause
