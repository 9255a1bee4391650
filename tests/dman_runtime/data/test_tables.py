"""Tables as columns: the same values from every format and type, and errors that name the line."""

from __future__ import annotations

import gzip
import os
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_files import HEADER, as_tuple, parquet_log, text_log, write

from dman_runtime.data._old_tables import TableColumn, TableFile, quoted
from dman_runtime.data.ids import id_problem
from dman_runtime.data.logs import read_interactions
from dman_runtime.errors import InputError


def error_of(path: Path) -> str:
    """The message that a log is refused with."""
    with pytest.raises(InputError) as raised:
        read_interactions(path)
    return str(raised.value)


def test_gzipped_csv_reads_like_plain_csv(tmp_path: Path) -> None:
    plain = write(tmp_path / "log.csv", [("a", "1", 5), ("a", "2", 4)])
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert as_tuple(read_interactions(tmp_path / "log.csv.gz")) == as_tuple(read_interactions(plain))


def test_reading_does_not_depend_on_the_type_of_a_parquet_column(tmp_path: Path) -> None:
    expected = None
    for kind in (pa.int32(), pa.uint64(), pa.string(), pa.large_string(), pa.binary(), "dictionary"):
        ids = pa.array(["3", "20", "3"])
        ids = ids.dictionary_encode() if kind == "dictionary" else ids.cast(kind)
        log = as_tuple(read_interactions(parquet_log(tmp_path, user_id=ids, item_id=ids)))
        expected = expected or log
        assert log == expected
    assert expected is not None
    assert expected[:2] == (["3", "20"], ["3", "20"])


def test_quoted_separators_and_line_ends_do_not_split_rows(tmp_path: Path) -> None:
    text = 'user_id,note,item_id\r\n"a,b","two\nlines",1\r\n"say ""hi""",,2\r\n'
    assert read_interactions(text_log(tmp_path, text)).user_ids == ["a,b", 'say "hi"']


@pytest.mark.parametrize(
    "text", ["2024-01-31 12:00:00", "2024-01-31T12:00:00Z", "2024-01-31T13:00:00+01:00", "1706702400", "1706702400.9"]
)
def test_times_in_text_files_become_seconds(tmp_path: Path, text: str) -> None:
    log = read_interactions(text_log(tmp_path, f"user_id,item_id,timestamp\na,1,{text}\n"))
    assert log.timestamps.tolist() == [1706702400]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([datetime(2024, 1, 31, 12)], pa.timestamp("ns")),
        pa.array([datetime(2024, 1, 31, 12, tzinfo=UTC)], pa.timestamp("ms", "Europe/Berlin")),
        pa.array([1706702400.5]),
        pa.array([1706702400], pa.uint32()),
        pa.array(["1706702400"]),
    ],
    ids=str,
)
def test_times_in_parquet_become_seconds(tmp_path: Path, values: pa.Array) -> None:
    log = read_interactions(parquet_log(tmp_path, user_id=["a"], item_id=["b"], timestamp=values))
    assert log.timestamps.tolist() == [1706702400]


def test_dates_in_parquet_become_midnight_utc(tmp_path: Path) -> None:
    log = read_interactions(parquet_log(tmp_path, user_id=["a"], item_id=["b"], timestamp=[date(1970, 1, 3)]))
    assert log.timestamps.tolist() == [2 * 86_400]


@pytest.mark.parametrize("encoded", [b"user_id,item_id\n\xff,1\n", b"user_\xff,item_id\n1,1\n"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, encoded: bytes) -> None:
    (tmp_path / "log.csv").write_bytes(encoded)
    assert error_of(tmp_path / "log.csv").endswith("holds text that is not UTF-8; save the file as UTF-8")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.csv").endswith("no.csv: no such file; check the path")
    assert error_of(tmp_path).endswith(": is a folder; name a file in it")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = text_log(tmp_path, HEADER + "a,1,0\n")
    path.chmod(0)
    assert "Permission denied" in error_of(path)


@pytest.mark.parametrize(
    ("columns", "cause", "remedy"),
    [
        ({"user_id": [1.0, 2.0]}, "column 'user_id' has type double", "write the ids as integers or text"),
        ({"item_id": [True, False]}, "column 'item_id' has type bool", "write the ids as integers or text"),
        ({"user_id": ["a", None]}, "row 2: user_id has no value", "fill in or remove"),
        ({"item_id": pa.array(["a", None]).dictionary_encode()}, "row 2: item_id has no value", "fill in or remove"),
        ({"timestamp": [1, None]}, "row 2: timestamp has no value", "fill in or remove"),
        ({"timestamp": [1.0, float("inf")]}, "row 2: timestamp inf is not a time", "write seconds"),
        ({"timestamp": [True, False]}, "column 'timestamp' has type bool", "write seconds"),
        ({"timestamp": pa.array([1, 2**63], pa.uint64())}, "cannot be read as parquet", "check"),
        ({"position": [0.0, 1.0]}, "column 'position' has type double", "write integers"),
        ({"position": [0, None]}, "row 2: position has no value", "fill in or remove"),
        ({"user_id": pa.array([b"a", b"\xff"])}, "not UTF-8", "save the file as UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),  # str() of an array holds its address
)
def test_bad_parquet_column_is_refused(tmp_path: Path, columns: dict[str, object], cause: str, remedy: str) -> None:
    message = error_of(parquet_log(tmp_path, **{"user_id": ["a", "b"], "item_id": ["x", "y"], **columns}))
    assert cause in message
    assert remedy in message


def test_truncated_parquet_is_refused(tmp_path: Path) -> None:
    path = parquet_log(tmp_path, user_id=["a"], item_id=["b"])
    path.write_bytes(path.read_bytes()[:-3])
    assert "cannot be read as parquet" in error_of(path)


def test_bad_row_far_into_a_log_is_reported_by_its_line(tmp_path: Path) -> None:
    lines = 400_000  # several blocks of the streaming reader
    path = text_log(tmp_path, HEADER + "user-1,item-1,0\n" * lines + "user-1,,0\n")
    assert f"line {lines + 2}: item_id ''" in error_of(path)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), max_size=4) | st.sampled_from(["x" * 400, "x" * 401, "é" * 201]))
def test_tables_refuse_exactly_the_ids_that_the_rule_refuses(tmp_path: Path, text: str) -> None:
    file = TableFile(parquet_log(tmp_path, user_id=["any"]))
    column = TableColumn(file, "user_id", pa.array(["good", text, "good", text]), first_row=10)
    if (problem := id_problem(text)) is None:
        assert column.ids().to_pylist() == ["good", text, "good", text]
        return
    with pytest.raises(InputError) as raised:
        column.ids()
    assert raised.value.cause == f"{file.path}: row 12: user_id {quoted(text)} {problem}"
    assert raised.value.remedy.startswith("use ids of 1 to 400 bytes")
