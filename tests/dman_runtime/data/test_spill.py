"""Rows split into parts of complete users: nothing is lost or reordered, and no file stays behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_files import as_tuple, parts_of, text_log, write

from dman_runtime.data.logs import open_log, read_interactions
from dman_runtime.data.spill import HASH, split_by_user


def batch(rows: list[tuple[str, int]]) -> pa.RecordBatch:
    users, numbers = [user for user, _ in rows], [number for _, number in rows]
    return pa.RecordBatch.from_pydict({"user": users, "number": pa.array(numbers, pa.int64())})


def hashed(rows: pa.RecordBatch) -> pa.RecordBatch:
    hashes = [hash(user) % (1 << 64) for user in rows["user"].to_pylist()]
    return rows.append_column(HASH, pa.array(hashes, pa.uint64()))


def one_hash(rows: pa.RecordBatch) -> pa.RecordBatch:
    hashes = [(user == "another") << 63 for user in rows["user"].to_pylist()]
    return rows.append_column(HASH, pa.array(hashes, pa.uint64()))


def rows_of(part: Iterable[pa.RecordBatch]) -> list[tuple[str, int]]:
    return [(row["user"], row["number"]) for batch in part for row in batch.to_pylist()]


def by_user(rows: list[tuple[str, int]]) -> dict[str, list[int]]:
    return {user: [n for u, n in rows if u == user] for user, _ in rows}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    users=st.lists(st.integers(0, 60).map(str), min_size=1, max_size=150),
    batch_rows=st.integers(1, 40),
    max_rows=st.integers(1, 30),
)
def test_parts_hold_complete_users_in_order_within_the_limit(users: list[str], batch_rows: int, max_rows: int) -> None:
    rows = [(user, number) for number, user in enumerate(users)]
    batches = [batch(rows[start : start + batch_rows]) for start in range(0, len(rows), batch_rows)]
    parts = [rows_of(part) for part in split_by_user(batches, hashed, max_rows=max_rows)]
    assert sum(len(by_user(part)) for part in parts) == len(set(users))  # no user in two parts
    assert {u: numbers for part in parts for u, numbers in by_user(part).items()} == by_user(rows)
    assert all(len(part) <= max_rows or len(by_user(part)) == 1 for part in parts)


def test_small_users_share_parts_instead_of_one_file_each() -> None:
    rows = [(str(n), n) for n in range(1000)]
    parts = [rows_of(part) for part in split_by_user([batch(rows)], hashed, max_rows=500)]
    assert sorted(row for part in parts for row in part) == sorted(rows)
    assert len(parts) <= 3


def test_users_with_one_hash_stay_in_one_part() -> None:
    """Their rows cannot be separated, which must not split them for ever."""
    rows = [(user, n) for n in range(5) for user in ("plumless", "buckeroo", "another")]
    parts = [sorted(by_user(rows_of(part))) for part in split_by_user([batch(rows)], one_hash, max_rows=2)]
    assert sorted(parts) == [["another"], ["buckeroo", "plumless"]]


def test_rows_that_fit_are_one_part_without_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryDirectory", None)  # calling it would fail
    path = text_log(tmp_path, "user_id,item_id\na,1\nb,2\na,3\n")
    (part,) = parts_of(path, max_rows=3)
    assert as_tuple(part) == as_tuple(read_interactions(path))


def test_temporary_files_are_gone_when_iteration_is_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spill))
    path = write(tmp_path / "log.csv", [(f"u{n}", "7", 0) for n in range(50)])
    with open_log(path, max_rows=10) as log:
        next(log.parts())
        assert list(spill.iterdir())
    assert not list(spill.iterdir())
