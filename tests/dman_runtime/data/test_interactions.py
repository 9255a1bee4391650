"""Reading of interaction logs and item files: same events whatever the format, and errors that carry the remedy."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dman_runtime.data import interactions as module
from dman_runtime.data.interactions import (
    Columns,
    Interactions,
    ItemInfo,
    iter_interactions,
    read_interactions,
    read_items,
)
from dman_runtime.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[3]
DATA = REPOSITORY.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")

Row = tuple[str, str, int]  # user, item, time
PLAIN_ID = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=6)
INTEGER_ID = st.integers(-50, 10**20).map(str)


@st.composite
def logs(draw: st.DrawFn) -> list[Row]:
    """Rows with few users, items and times, so that ties are common."""
    users, items = (draw(st.lists(draw(st.sampled_from((PLAIN_ID, INTEGER_ID))), min_size=1, max_size=4)) for _ in "ui")
    # "1.0" alone in a column is refused; another test says so
    row = st.tuples(st.sampled_from([*users, "x"]), st.sampled_from([*items, "7"]), st.integers(-3, 3))
    return [("x", "7", 0), *draw(st.lists(row, max_size=40))]


def write(path: Path, rows: Iterable[Row]) -> Path:
    """The rows as a file in the format that the name asks for."""
    rows = list(rows)
    if path.suffix == ".parquet":
        columns = zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True)
        pq.write_table(pa.table({name: list(values) for name, values in columns}), path)
        return path
    separator = "," if path.suffix == ".csv" else "\t"
    lines = [("user_id", "item_id", "timestamp"), *((quoted(u), quoted(i), str(t)) for u, i, t in rows)]
    path.write_text("".join(separator.join(line) + "\n" for line in lines), encoding="utf-8", newline="")
    return path


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def histories(log: Interactions) -> dict[str, list[tuple[str, int]]]:
    """External ids and times by user."""
    return {
        user: [(log.item_ids[i], int(t)) for i, t in zip(log.history(u), log.user_timestamps(u), strict=True)]
        for u, user in enumerate(log.user_ids)
    }


def expected_histories(rows: list[Row]) -> dict[str, list[tuple[str, int]]]:
    """The reference: Python's stable sort by time, user by user."""
    users = dict.fromkeys(user for user, _, _ in rows)
    return {user: sorted(((i, t) for u, i, t in rows if u == user), key=lambda event: event[1]) for user in users}


def as_tuple(log: Interactions) -> tuple[object, ...]:
    arrays = (log.offsets.tolist(), log.items.tolist(), log.timestamps.tolist())
    return log.user_ids, log.item_ids, *arrays, log.integer_user_ids, log.integer_item_ids


def text_log(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def parquet_log(folder: Path, **columns: object) -> Path:
    path = folder / "log.parquet"
    pq.write_table(pa.table(columns), path)
    return path


# --- the same events from every format ---------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=logs())
def test_reading_gives_stably_sorted_histories_in_every_format(tmp_path: Path, rows: list[Row]) -> None:
    logs_read = [read_interactions(write(tmp_path / f"log{kind}", rows)) for kind in (".csv", ".tsv", ".parquet")]
    assert histories(logs_read[0]) == expected_histories(rows)
    assert list(histories(logs_read[0])) == list(expected_histories(rows))  # users by first appearance
    assert as_tuple(logs_read[0]) == as_tuple(logs_read[1]) == as_tuple(logs_read[2])
    assert len({log.fingerprint() for log in logs_read}) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=logs(), max_events=st.integers(1, 12))
def test_iterating_gives_the_histories_of_reading(tmp_path: Path, rows: list[Row], max_events: int) -> None:
    for kind in (".csv", ".parquet"):
        path = write(tmp_path / f"log{kind}", rows)
        whole = read_interactions(path)
        parts = list(iter_interactions(path, max_events=max_events))
        assert sum(part.num_users for part in parts) == whole.num_users  # no user in two parts
        assert {u: h for part in parts for u, h in histories(part).items()} == histories(whole)
        assert all(len(part) <= max_events or part.num_users == 1 for part in parts)
        assert {part.integer_item_ids for part in parts} == {whole.integer_item_ids}
        assert {part.integer_user_ids for part in parts} == {whole.integer_user_ids}


def test_iterating_over_many_batches_keeps_users_whole_and_ties_in_file_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users = rng.zipf(1.5, 200_000) % 3000
    path = parquet_log(tmp_path, user_id=users, item_id=np.arange(len(users)), timestamp=rng.integers(0, 5, len(users)))
    whole = read_interactions(path)
    parts = list(iter_interactions(path, max_events=5_000))
    assert len(parts) > 10
    assert all(len(part) <= 5_000 or part.num_users == 1 for part in parts)
    assert {u: h for part in parts for u, h in histories(part).items()} == histories(whole)


def test_iterating_takes_one_part_and_no_temporary_files_when_the_log_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", None)  # calling it would fail
    path = text_log(tmp_path, "user_id,item_id\na,1\nb,2\na,3\n")
    (part,) = iter_interactions(path, max_events=3)
    assert as_tuple(part) == as_tuple(read_interactions(path))


def test_iterating_leaves_no_temporary_files_when_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(spill))
    path = write(tmp_path / "log.csv", [(f"u{n}", "7", 0) for n in range(50)])
    parts = iter_interactions(path, max_events=10)
    next(parts)
    assert list(spill.iterdir())
    parts.close()  # type: ignore[attr-defined]
    assert not list(spill.iterdir())


def test_movielens_ratings_give_the_same_as_csv(tmp_path: Path) -> None:
    rows = [("2", "1193", 30), ("1", "661", 20), ("2", "10", 20), ("2", "9", 30)]
    ratings = text_log(tmp_path, "".join(f"{u}::{i}::5::{t}\n" for u, i, t in rows), "ratings.dat")
    log = read_interactions(ratings)
    assert as_tuple(log) == as_tuple(read_interactions(write(tmp_path / "log.csv", rows)))
    assert histories(log)["2"] == [("10", 20), ("1193", 30), ("9", 30)]
    assert log.item_ids == ["9", "10", "661", "1193"]


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


def test_interactions_module_loads_pyarrow_only_on_use() -> None:
    code = "import sys, dman_runtime.data.interactions; sys.exit('pyarrow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


# --- ids, order and times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "integer", "ordered"),
    [
        (["10", "9", "-3", "0"], True, ["-3", "0", "9", "10"]),
        (["10", "9", "007"], False, ["007", "10", "9"]),
        (["10", "9", "1.0"], False, ["1.0", "10", "9"]),
        (["1", "-0"], False, ["-0", "1"]),
        (["1", "+2"], False, ["+2", "1"]),
        (["1", " 2"], False, [" 2", "1"]),
        (["b", "a", "NA", "null"], False, ["NA", "a", "b", "null"]),
        (["18446744073709551616", "9"], True, ["9", "18446744073709551616"]),
    ],
)
def test_ids_count_as_integers_only_when_all_are_canonical(
    tmp_path: Path, ids: list[str], integer: bool, ordered: list[str]
) -> None:
    log = read_interactions(write(tmp_path / "log.csv", [(item, item, 0) for item in ids]))
    assert (log.integer_user_ids, log.integer_item_ids) == (integer, integer)
    assert log.item_ids == ordered
    assert log.user_ids == ids


def test_position_column_orders_events_before_time_does(tmp_path: Path) -> None:
    text = "user_id,item_id,timestamp,position\na,1,10,2\na,2,20,0\na,3,30,0\n"
    assert histories(read_interactions(text_log(tmp_path, text))) == {"a": [("2", 20), ("3", 30), ("1", 10)]}


def test_events_keep_file_order_without_time_and_position(tmp_path: Path) -> None:
    log = read_interactions(text_log(tmp_path, "user_id,item_id\na,3\nb,9\na,1\na,2\n"))
    assert histories(log) == {"a": [("3", 0), ("1", 0), ("2", 0)], "b": [("9", 0)]}


def test_fractions_of_a_second_order_events_although_times_are_whole(tmp_path: Path) -> None:
    log = read_interactions(text_log(tmp_path, "user_id,item_id,timestamp\na,1,5.75\na,2,5.25\na,3,5\na,4,-0.5\n"))
    assert histories(log) == {"a": [("4", -1), ("3", 5), ("2", 5), ("1", 5)]}


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


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = text_log(tmp_path, "who,what,when,nth\na,x,7,1\na,y,8,0\n")
    log = read_interactions(path, columns=Columns(user="who", item="what", time="when", position="nth"))
    assert histories(log) == {"a": [("y", 8), ("x", 7)]}


def test_quoted_separators_and_line_ends_do_not_split_rows(tmp_path: Path) -> None:
    text = 'user_id,note,item_id\r\n"a,b","two\nlines",1\r\n"say ""hi""",,2\r\n'
    assert read_interactions(text_log(tmp_path, text)).user_ids == ["a,b", 'say "hi"']


# --- Interactions ------------------------------------------------------------------------------------------------


def test_interactions_have_the_documented_shapes_and_types(tmp_path: Path) -> None:
    log = read_interactions(write(tmp_path / "log.csv", [("b", "5", 1), ("a", "4", 1), ("b", "4", 2)]))
    assert (len(log), log.num_users, log.offsets.tolist(), log.items.tolist()) == (3, 2, [0, 2, 3], [1, 0, 0])
    assert (log.offsets.dtype, log.items.dtype, log.timestamps.dtype) == (np.int64, np.int32, np.int64)
    assert np.shares_memory(log.history(0), log.items)


def test_filter_drops_items_first_and_repeats_until_nothing_changes(tmp_path: Path) -> None:
    # z is rare, so c is left with one event, so y becomes rare, so b falls too; a and d share w and x.
    rows = [("c", "z", 0), ("c", "y", 1), ("b", "y", 0), ("b", "w", 1)]
    rows += [(user, item, time) for user in "ad" for time, item in enumerate("wx")]
    log = read_interactions(write(tmp_path / "log.csv", rows), min_user_events=2, min_item_events=2)
    assert histories(log) == {"a": [("w", 0), ("x", 1)], "d": [("w", 0), ("x", 1)]}
    assert log.item_ids == ["w", "x"]


def test_filter_may_leave_nothing_of_interactions(tmp_path: Path) -> None:
    log = read_interactions(write(tmp_path / "log.csv", [("a", "1", 0)]))
    empty = log.filtered(min_user_events=2, min_item_events=0)
    assert as_tuple(empty) == ([], [], [0], [], [], False, True)


def test_repeated_share_counts_what_the_same_user_had_before(tmp_path: Path) -> None:
    rows = [("a", "1", 0), ("b", "1", 1), ("a", "2", 2), ("a", "1", 3), ("a", "1", 4)]
    assert read_interactions(write(tmp_path / "log.csv", rows)).repeated_share() == pytest.approx(2 / 5)


def test_fingerprint_is_stable_and_sees_ids_order_and_items(tmp_path: Path) -> None:
    rows = [("a", "1", 0), ("b", "2", 0), ("a", "2", 1)]
    fingerprint = read_interactions(write(tmp_path / "log.csv", rows)).fingerprint()
    assert fingerprint == "2f757641a7f80e4ea732747e1e7fe2b14c7f060aab3e4fc34216ace961000b75"
    for other in ([("A", "1", 0), *rows[1:]], [*rows[1:], rows[0]], [("a", "1", 2), *rows[1:]], rows[:2]):
        assert read_interactions(write(tmp_path / "log.csv", other)).fingerprint() != fingerprint


# --- errors ------------------------------------------------------------------------------------------------------

HEADER = "user_id,item_id,timestamp\n"
MALFORMED = HEADER + "a,1,0\n" * 30 + "a,1\n"
BAD_TEXT = [  # file name, content, cause, remedy
    ("log.csv", "", "the file is empty", "give one with a header"),
    ("log.csv", "\n\n", "no rows", "give a file"),
    ("log.csv", HEADER, "a header but no rows", "give a log"),
    ("log.csv", HEADER.rstrip(), "a header but no rows", "give a file"),
    ("log.json", "{}", "unknown extension '.json'", "give a .csv, .tsv or .txt"),
    ("log", "x", "unknown extension ''", "give a .csv"),
    ("log.csv", "uid,item_id\na,1\n", "no column 'user_id'; it has: uid, item_id;", "the column that holds the users"),
    ("log.csv", "user_id,iid\na,1\n", "no column 'item_id'; it has: user_id, iid;", "the column that holds the items"),
    ("log.txt", HEADER + "a,1,0\n", "it has: user_id,item_id,timestamp;", "name the column that"),
    ("log.csv", "user_id,user_id,item_id\na,a,1\n", "2 columns are named 'user_id'", "keep one"),
    ("log.csv", HEADER + "a,1,0\n,1,0\n", "line 3: user_id '' is empty", "use ids of 1 to 400 bytes"),
    ("log.csv", HEADER + "a,1,0\na,,0\n", "line 3: item_id '' is empty", "use ids of 1 to 400 bytes"),
    ("log.csv", HEADER + "a\x07,1,0\n", r"line 2: user_id 'a\x07' holds control characters", "remove such rows"),
    ("log.csv", HEADER + f"{'é' * 201},1,0\n", "is longer than 400 bytes", "use ids of"),
    ("log.csv", HEADER + "1.0,1,0\n2.0,2,0\n", "column 'user_id' holds numbers such as 1.0", "as integers or text"),
    ("log.csv", HEADER + "a,1,5\na,2,6\na,3,soon\na,4,never\n", "line 4: timestamp 'soon' is not a time", "seconds"),
    ("log.csv", HEADER + "a,1,5\na,2,\n", "line 3: timestamp '' is not a time", "write seconds"),
    ("log.csv", HEADER + "a,1,5.5\na,2,nan\n", "line 3: timestamp nan is not a time", "write seconds"),
    ("log.csv", "user_id,item_id,position\na,1,0\na,2,1.5\n", "line 3: position '1.5' is not an integer", "whole"),
    ("log.csv", MALFORMED, "line 32 is malformed (Expected 3 columns, got 2: a,1)", "quotes around values"),
    ("log.tsv", MALFORMED.replace(",", "\t"), "line 32 is malformed", "every line needs"),
    ("ratings.dat", "1::2::3::4\n1::2::3\n", "line 2 is malformed", "user::item::rating::timestamp"),
    ("log.parquet", "PAR1 not really", "cannot be read as parquet", "check that the file is complete"),
    ("log.csv.gz", "not gzip", "cannot be read as csv", "check that the file is complete"),
]


@pytest.mark.parametrize(("name", "content", "cause", "remedy"), BAD_TEXT)
def test_bad_file_is_refused_with_cause_and_remedy(
    tmp_path: Path, name: str, content: str, cause: str, remedy: str
) -> None:
    path = text_log(tmp_path, content, name)
    for read in (read_interactions, lambda path: list(iter_interactions(path, max_events=2))):
        with pytest.raises(InputError) as raised:
            read(path)
        message = str(raised.value)
        assert message.startswith(f"{path}: ")
        assert cause in message
        assert remedy in message.removeprefix(str(path)).replace(cause, "", 1)
        assert "\n" not in message
        assert raised.value.__cause__ is None
        assert raised.value.__suppress_context__ or raised.value.__context__ is None


def error_of(path: Path, columns: Columns = module.DEFAULT_COLUMNS) -> str:
    with pytest.raises(InputError) as raised:
        read_interactions(path, columns=columns)
    return str(raised.value)


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


@pytest.mark.parametrize("name", ["time", "position", "user", "item"])
def test_named_column_that_is_absent_is_refused(tmp_path: Path, name: str) -> None:
    path = text_log(tmp_path, HEADER + "a,1,0\n")
    with pytest.raises(InputError) as raised:
        read_interactions(path, columns=Columns(**{name: "when"}))
    assert raised.value.cause == f"{path}: no column 'when'; it has: user_id, item_id, timestamp"
    assert raised.value.remedy == f"name the column that holds the {name}s"
    assert raised.value.parameter == f"{name}_column"


@pytest.mark.parametrize(
    ("columns", "parameter"),
    [(Columns(user="item_id"), "user_column"), (Columns(item="user_id"), "item_column")],
    ids=["user", "item"],
)
def test_column_named_for_two_purposes_is_refused(tmp_path: Path, columns: Columns, parameter: str) -> None:
    with pytest.raises(InputError, match=r"column '\w+' is named for two purposes; name another column") as raised:
        read_interactions(text_log(tmp_path, HEADER + "a,1,0\n"), columns=columns)
    assert raised.value.parameter == parameter


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
    ids=str,
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


@pytest.mark.parametrize("minimum", ["min_user_events", "min_item_events"])
def test_filter_that_leaves_nothing_is_refused(tmp_path: Path, minimum: str) -> None:
    path = text_log(tmp_path, HEADER + "a,1,0\n")
    with pytest.raises(InputError, match=r"log.csv: no row of 1 is left .* per item; lower these minimums") as raised:
        read_interactions(path, **{minimum: 5})
    assert raised.value.parameter == minimum


def test_full_temporary_folder_is_reported_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "absent"))
    path = write(tmp_path / "log.csv", [("a", "1", 0), ("b", "1", 0)])
    with pytest.raises(InputError, match=r"log.csv: cannot be split into parts in .*absent.* set TMPDIR"):
        list(iter_interactions(path, max_events=1))


def test_max_events_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_events must be at least 1, not 0"):
        iter_interactions(tmp_path / "log.csv", max_events=0)


# --- items -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet"])
def test_items_have_titles_and_the_other_columns_as_attributes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"items{kind}"
    if kind == ".parquet":
        table = {"item_id": [2, 1], "title": ["Up, up", None], "year": [2009, None], "genres": [["a", "b"], []]}
        pq.write_table(pa.table(table), path)
    else:
        lines = ["item_id,title,year,genres", "2,'Up, up',2009,a|b", "1,,,"]
        text = "\n".join(lines).replace(",", "\t" if kind == ".tsv" else ",").replace("'Up\t up'", "'Up, up'")
        path.write_text(text.replace("'", '"') + "\n")
    assert read_items(path) == {"2": ItemInfo("Up, up", {"year": "2009", "genres": "a|b"}), "1": ItemInfo("", {})}


def test_items_read_movielens_movies_in_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "movies.dat"
    path.write_bytes("1::Toy Story (1995)::Animation|Comedy\r\n11::Misérables: Les\x85::Drama\n".encode("latin-1"))
    assert read_items(path) == {
        "1": ItemInfo("Toy Story (1995)", {"genres": "Animation|Comedy"}),
        "11": ItemInfo("Misérables: Les\x85", {"genres": "Drama"}),
    }


@pytest.mark.parametrize(
    ("name", "content", "cause", "remedy"),
    [
        ("items.csv", "id,title\n1,a\n", "no column 'item_id'; it has: id, title", "the column that holds the items"),
        ("items.csv", "item_id,name\n1,a\n", "no column 'title'", "rename the column that holds the titles to 'title'"),
        ("items.csv", "item_id,title\n1,a\n2,b\n1,c\n", "line 4: item '1' appears a second time", "keep one row"),
        ("items.csv", "item_id,title\n,a\n", "line 2: item_id '' is empty", "use ids of 1 to 400 bytes"),
        ("items.csv", "item_id,title\n", "no rows", "give a file"),
        ("movies.dat", "1::a::b\n2::c\n", "line 2 is '2::c'", "every line needs item::title::genres"),
    ],
)
def test_bad_item_file_is_refused(tmp_path: Path, name: str, content: str, cause: str, remedy: str) -> None:
    with pytest.raises(InputError) as raised:
        read_items(text_log(tmp_path, content, name))
    assert cause in str(raised.value)
    assert remedy in str(raised.value)


# --- real data ---------------------------------------------------------------------------------------------------


@needs_data
def test_movielens_1m_has_the_published_size_and_order() -> None:
    path = DATA / "ml-1m" / "interactions.parquet"
    log = read_interactions(path, min_item_events=5)
    assert (log.num_users, len(log.item_ids), len(log)) == (6040, 3416, 999_611)
    table = pq.read_table(path, columns=["user_id", "item_id", "position"]).slice(0, 53)  # all of user 1
    by_position = table.sort_by("position")["item_id"].to_pylist()
    assert [int(log.item_ids[i]) for i in log.history(0)] == by_position


@needs_data
@pytest.mark.parametrize(
    ("name", "users", "items", "events"),
    [
        ("ml-100k", 943, 1682, 100_000),
        ("wikipedia-edits", 8227, 1000, 157_474),
        ("amazon-beauty", 40_226, 54_542, 353_962),
        ("taobao-userbehavior-sample", 814, 55_233, 84_287),
    ],
)
def test_public_logs_are_read_completely(name: str, users: int, items: int, events: int) -> None:
    log = read_interactions(DATA / name / "interactions.parquet")
    assert (log.num_users, len(log.item_ids), len(log)) == (users, items, events)


@needs_data
def test_movielens_items_have_their_titles() -> None:
    items = read_items(DATA / "ml-1m" / "items.csv")
    assert len(items) == 3883
    assert items["2"] == ItemInfo("Jumanji (1995)", {"genres": "Adventure|Children's|Fantasy"})
