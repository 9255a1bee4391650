"""Interaction logs: the same events from every format, whole or in parts, and errors that carry the remedy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MOVIELENS, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_files import (
    HEADER,
    KEEP,
    Row,
    as_tuple,
    expected_histories,
    histories,
    logs,
    parquet_log,
    parts_of,
    text_log,
    write,
)

from dman_runtime.data.hash_counts import id_hashes
from dman_runtime.data.log_options import LogOptions
from dman_runtime.data.logs import open_log, read_interactions
from dman_runtime.errors import InputError

needs_data = pytest.mark.skipif(not MOVIELENS.is_dir(), reason=f"no data sets in {MOVIELENS.parent}")


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=logs())
def test_reading_gives_stably_sorted_histories_in_every_format(tmp_path: Path, rows: list[Row]) -> None:
    logs_read = [read_interactions(write(tmp_path / f"log{kind}", rows), KEEP) for kind in (".csv", ".tsv", ".parquet")]
    assert histories(logs_read[0]) == expected_histories(rows)
    assert list(histories(logs_read[0])) == list(expected_histories(rows))  # users by first appearance
    assert as_tuple(logs_read[0]) == as_tuple(logs_read[1])
    assert not logs_read[2].integer_user_ids  # strings of Parquet stay strings
    assert histories(logs_read[2]) == histories(logs_read[0])
    assert len({log.fingerprint() for log in logs_read[:2]}) == 1


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=logs(), max_events=st.integers(1, 12))
def test_iterating_gives_the_histories_of_reading(tmp_path: Path, rows: list[Row], max_events: int) -> None:
    for kind in (".csv", ".parquet"):
        path = write(tmp_path / f"log{kind}", rows)
        whole = read_interactions(path, KEEP)
        parts = parts_of(path, KEEP, max_rows=max_events)
        assert sum(part.num_users for part in parts) == whole.num_users  # no user in two parts
        assert {u: h for part in parts for u, h in histories(part).items()} == histories(whole)
        assert all(len(part) <= max_events or part.num_users == 1 for part in parts)
        assert {part.integer_item_ids for part in parts} == {whole.integer_item_ids}
        assert {part.integer_user_ids for part in parts} == {whole.integer_user_ids}


@pytest.mark.slow
def test_iterating_over_many_batches_keeps_users_whole_and_ties_in_file_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users = rng.zipf(1.5, 200_000) % 3000
    path = parquet_log(tmp_path, user_id=users, item_id=np.arange(len(users)), timestamp=rng.integers(0, 5, len(users)))
    whole = read_interactions(path)
    parts = parts_of(path, max_rows=5_000)
    assert len(parts) > 10
    assert all(len(part) <= 5_000 or part.num_users == 1 for part in parts)
    assert {u: h for part in parts for u, h in histories(part).items()} == histories(whole)


def test_movielens_ratings_give_the_same_as_csv(tmp_path: Path) -> None:
    rows = [("2", "1193", 30), ("1", "661", 20), ("2", "10", 20), ("2", "9", 30)]
    ratings = text_log(tmp_path, "".join(f"{u}::{i}::5::{t}\n" for u, i, t in rows), "ratings.dat")
    log = read_interactions(ratings)
    assert as_tuple(log) == as_tuple(read_interactions(write(tmp_path / "log.csv", rows)))
    assert histories(log)["2"] == [("10", 20), ("1193", 30), ("9", 30)]
    assert log.item_ids == ["9", "10", "661", "1193"]


@pytest.mark.slow
def test_log_reader_loads_pyarrow_only_on_use() -> None:
    code = "import sys, dman_runtime.data.logs, dman_runtime.data.items\n"
    code += "sys.exit(not {'pyarrow', 'torch'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


MALFORMED = HEADER + "a,1,0\n" * 30 + "a,1\n"
BAD_TEXT = [  # file name, content, cause, remedy
    ("log.csv", "", "the file is empty", "give one with rows"),
    ("log.csv", "\n\n", "the file holds no lines", "give rows"),
    ("log.csv", HEADER, "a header but no rows", "give a log"),
    ("log.csv", HEADER.rstrip(), "a header but no rows", "give a log"),
    ("log.csv", "who,item_id\na,1\n", "no column 'user_id', nor another known name for users; it has: who, item_id;",
     "the column that holds the users"),
    ("log.csv", "user_id,what\na,x\n", "no column 'item_id', nor another known name for items; it has: user_id, what;",
     "the column that holds the items"),
    ("log.csv", "user_id,user_id,item_id\na,a,1\n", "2 columns are named 'user_id'", "keep one"),
    ("log.csv", "h1,1,1600000000\nh1,2,1600000001\n", "its first line ('h1', '1', '1600000000') looks like data",
     "name the columns by their numbers, such as user_column 1, item_column 2, time_column 3"),
    ("log.csv", MALFORMED, "line 32 has 2 values instead of 3: 'a,1'", "leave such rows out"),
    ("ratings.dat", "1::2::3::4\n1::2::3\n", "line 2 has 3 values instead of 4", "leave such rows out"),
    ("log.parquet", "PAR1 not really", "cannot be read as Parquet", "check that the file is complete"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "cause", "remedy"), BAD_TEXT)
def test_bad_file_is_refused_with_cause_and_remedy(
    tmp_path: Path, name: str, content: str, cause: str, remedy: str
) -> None:
    path = text_log(tmp_path, content, name)
    for read in (read_interactions, lambda path: parts_of(path, max_rows=2)):
        with pytest.raises(InputError) as raised:
            read(path)
        message = str(raised.value)
        assert message.startswith(str(path))
        assert cause in message
        assert remedy in message.removeprefix(str(path)).replace(cause, "", 1)
        assert "\n" not in message
        assert raised.value.__cause__ is None
        assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize("minimum", ["min_user_events", "min_item_events"])
def test_filter_that_leaves_nothing_is_refused(tmp_path: Path, minimum: str) -> None:
    path = text_log(tmp_path, HEADER + "a,1,0\n")
    with pytest.raises(InputError, match=r"log.csv: no row of 1 is left .* per item; lower these minimums") as raised:
        read_interactions(path, **{minimum: 5})
    assert raised.value.parameter == minimum


def test_unusable_temporary_folder_is_reported_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    path = write(tmp_path / "log.csv", [("a", "1", 0), ("b", "1", 0)])
    with pytest.raises(InputError, match=r"log.csv: cannot be split into parts in .*absent.*; .* set TMPDIR"):
        parts_of(path, max_rows=1)


def test_lack_of_any_temporary_folder_is_reported_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_usable() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "gettempdir", none_usable)
    path = write(tmp_path / "log.csv", [("a", "1", 0), ("b", "1", 0)])
    with pytest.raises(InputError, match=r"cannot be split into parts in a temporary folder: .* set TMPDIR"):
        parts_of(path, max_rows=1)


def test_max_rows_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_rows must be at least 1, not 0"):
        parts_of(tmp_path / "log.csv", max_rows=0)


@pytest.mark.slow
@needs_data
def test_movielens_1m_has_the_published_size_and_order() -> None:
    path = MOVIELENS / "interactions.parquet"
    log = read_interactions(path, min_item_events=5)
    assert (log.num_users, len(log.item_ids), len(log)) == (6040, 3416, 999_611)
    table = pq.read_table(path, columns=["user_id", "item_id", "position"]).slice(0, 53)  # all of user 1
    by_position = table.sort_by("position")["item_id"].to_pylist()
    assert [int(log.item_ids[i]) for i in log.history(0)] == by_position


@pytest.mark.slow
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
    log = read_interactions(MOVIELENS.parent / name / "interactions.parquet", LogOptions(exact_repeats="keep"))
    assert (log.num_users, len(log.item_ids), len(log)) == (users, items, events)


# -- several files -----------------------------------------------------------------------------------------------------


def write_parts(folder: Path, parts: dict[str, list[Row]]) -> Path:
    for name, rows in parts.items():
        write(folder / name, rows)
    return folder


@pytest.mark.parametrize("max_rows", [1000, 30])
def test_report_says_whether_users_are_in_several_files(tmp_path: Path, max_rows: int) -> None:
    rows = [(f"u{n % 20}", f"i{n % 7}", n) for n in range(200)]
    expected = expected_histories(rows)
    by_user = {f"{part}.parquet": [row for row in rows if int(row[0][1:]) % 3 == part] for part in range(3)}
    by_time = {"0.parquet": rows[:90], "1.parquet": rows[90:95], "2.parquet": rows[95:]}
    (tmp_path / "user").mkdir()
    (tmp_path / "time").mkdir()
    spilled = "; the log is worked on in parts, through temporary files" * (max_rows < len(rows))
    for folder, parts, several, words in (
        ("user", by_user, 0, f"each user is in one of the files{spilled}"),
        ("time", by_time, 20, f"20 of 20 users are in several files: their events are brought together{spilled}"),
    ):
        with open_log(write_parts(tmp_path / folder, parts), max_rows=max_rows) as log:
            found = {user: events for part in log.parts() for user, events in histories(part).items()}
            assert (log.report.users_in_several_files, log.report.split) == (several, bool(spilled))
            assert f"by user    {words}\n" in log.report.table()
        assert found == expected


def test_user_in_files_of_different_types_is_one_user(tmp_path: Path) -> None:
    numbers, texts = write(tmp_path / "a.csv", [("7", "1", 5), ("8", "1", 5)]), tmp_path / "b.csv"
    write(texts, [("7", "1", 6), ("x", "1", 6)])
    with open_log(tmp_path) as log:
        assert (log.report.users, log.report.users_in_several_files) == (3, 1)
    with open_log(numbers) as log:
        assert log.report.users_in_several_files is None
        assert "by user" not in log.report.table()


def test_hash_of_an_id_is_the_same_in_every_process() -> None:
    found = id_hashes(pa.array(["user", "", "a", "ä", "\U0001f600" * 100]))
    assert [f"{one:016x}" for one in found.tolist()] == [
        "aa51175e35d66178",
        "0000000000000000",
        "ee8c2baf6343e5c3",
        "2cd5420bd9cc1f7f",
        "ec150b95e0b0574c",
    ]
    many = id_hashes(pa.array([f"{n}" for n in range(100_000)] + [f"user-{n:09}" for n in range(100_000)]))
    assert len(np.unique(many)) == len(many)
    assert np.bincount((many >> np.uint64(59)).astype(int), minlength=32).max() < 1.05 * len(many) / 32
