"""The file of all records: round trip, equal bytes, size, atomic changes, and files that are damaged or not ours."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dman_runtime.errors import UsageError
from tools import record_file, report
from tools.record_file import FORMAT, SCHEMA, Record, add, change_records, drop, read_records, records_bytes

USERS = 2000
RESULT = {"hr@10": 0.1 + 0.2, "ndcg@10": 1 / 3, "seen_kept": {"hr@10": 0.25, "ndcg@10": 0.125}}


def record(name: str, seed: int = 0, limit: int = 500, users: int = USERS) -> Record:
    """A record whose ranks are spread like real ones: log-uniform up to 3,400."""
    random = np.random.default_rng(seed)
    ranks = np.minimum(np.exp(random.uniform(0, np.log(3400), users)), limit + 1).astype(np.uint16)
    content: dict[str, Any] = {
        "command": "python -m dman_train.train --data data/log.csv",
        "machine": "x86_64",
        "parameters": 1_099_464,
        "state_bytes": None if seed % 2 else 15_936,
        "model": {"variant": "dman", "memory_slots": 10, "gone": "ö"},
        "train": {"seed": seed, "learning_rate": 0.004},
        "data": {"min_user_events": 5},
        "dataset": {"name": "log", "fingerprint": "2fabd1", "users": users, "items": 3400, "events": 10_000},
        "versions": {"torch": "2.13.0"},
        "epochs": [{"epoch": 1.0, "loss": 6.11066}],
        "metrics": {"test": RESULT, "valid": RESULT, "epochs": 1, "training_seconds": 1.5},
    }
    return Record(name, content, ranks, random.integers(0, 4, users).astype(np.uint8), limit)


def same(one: Record, other: Record) -> bool:
    return (
        (one.name, one.content, one.rank_limit) == (other.name, other.content, other.rank_limit)
        and [list(one.content[part]) for part in ("model", "train")]
        == [list(other.content[part]) for part in ("model", "train")]  # labels list options in this order
        and np.array_equal(one.ranks, other.ranks)
        and np.array_equal(one.groups, other.groups)
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of two records."""
    path = tmp_path / "records.parquet"
    path.write_bytes(records_bytes([record("a"), record("b", 1, limit=254)]))
    return path


def test_records_come_back_as_they_were(file: Path) -> None:
    first, second = read_records(file)
    assert same(first, record("a")) and same(second, record("b", 1, limit=254))
    assert first.ranks.dtype == np.uint16 and first.ranks.max() == 501 and second.ranks.max() == 255


def test_records_file_that_does_not_exist_holds_none(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.parquet") == []


def test_same_records_give_the_same_bytes_whatever_the_order_and_the_past(file: Path) -> None:
    expected = records_bytes([record("a"), record("b", 1)])
    assert records_bytes([record("b", 1), record("a")]) == expected
    add(file, record("c", 3))
    add(file, record("b", 1))
    drop(file, ["c"])
    assert file.read_bytes() == expected


@pytest.mark.slow
def test_ranks_up_to_500_take_little_more_than_those_up_to_254() -> None:
    sizes = {limit: len(records_bytes([record(str(i), i, limit, 6000) for i in range(8)])) for limit in (254, 500)}
    values = np.concatenate([record(str(i), i, 500, 6000).ranks for i in range(8)])
    share = np.unique(values, return_counts=True)[1] / len(values)
    entropy = -(share * np.log2(share)).sum() * len(values) / 8
    groups = 8 * 6000 / 4  # random here, while runs of one dataset share them
    assert sizes[500] < 1.25 * sizes[254]
    assert sizes[500] < 1.15 * (entropy + groups) + 10_000


def test_groups_that_records_share_are_stored_once() -> None:
    one = record("0")
    same_groups = records_bytes([replace(record(str(i), i), groups=one.groups) for i in range(8)])
    own_groups = records_bytes([record(str(i), i) for i in range(8)])
    assert len(own_groups) - len(same_groups) > 6 * USERS / 4


# Changes


def test_added_record_replaces_the_one_of_its_name(file: Path) -> None:
    add(file, record("b", 7))
    add(file, record("c", 3))
    assert [found.name for found in read_records(file)] == ["a", "b", "c"]
    assert same(read_records(file)[1], record("b", 7))


def test_unknown_name_drops_nothing(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"has no record x, y; .*"):
        drop(file, ["a", "x", "y"])
    assert file.read_bytes() == before
    drop(file, ["a", "a", "b"])
    assert read_records(file) == []


@pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (Path, "replace")], ids=["write", "rename"])
def test_change_that_fails_leaves_the_old_file_alone(
    owner: object, step: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
        add(file, record("c", 3))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_reader_sees_the_old_file_or_the_new_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads just before the new file takes its name, when all of it has been written."""
    names, replace_file = [], Path.replace

    def watched(source: Path, target: Path) -> Path:
        names.append([found.name for found in read_records(file)])
        return replace_file(source, target)

    monkeypatch.setattr(Path, "replace", watched)
    add(file, record("c", 3))
    assert names == [["a", "b"]] and [found.name for found in read_records(file)] == ["a", "b", "c"]


@pytest.mark.slow
def test_two_changes_at_once_lose_nothing(file: Path) -> None:
    inside, other_done = threading.Event(), threading.Event()

    def slow(records: dict[str, Record]) -> None:
        records["c"] = record("c", 3)
        inside.set()
        assert not other_done.wait(0.3), "the other one waits for this one to end"

    def other() -> None:
        inside.wait()
        add(file, record("d", 4))
        other_done.set()

    threads = [threading.Thread(target=change_records, args=(file, slow)), threading.Thread(target=other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.name for found in read_records(file)] == ["a", "b", "c", "d"]


# Files that cannot be used

ROW: dict[str, Any] = record_file._row(record("a"))


def with_row(**changes: object) -> Callable[[], bytes]:
    def build() -> bytes:
        return written(pa.Table.from_pylist([ROW | changes], schema=SCHEMA))

    return build


def written(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b'{"format_version": 1}\n',
    "another table": lambda: written(pa.table({"x": [1]})),
    "our format, other columns": lambda: written(pa.table({"x": [1]}).replace_schema_metadata(FORMAT)),
    "later version": lambda: written(SCHEMA.empty_table().replace_schema_metadata(FORMAT | {b"version": b"3"})),
    "a null": lambda: written(
        pa.table([pa.array([None], field.type) for field in SCHEMA], names=SCHEMA.names).replace_schema_metadata(FORMAT)
    ),
    "names twice": lambda: written(pa.Table.from_pylist([ROW, ROW], schema=SCHEMA)),
    "no JSON": with_row(model="{"),
    "another JSON": with_row(metrics="[]"),
    "no metrics": with_row(metrics='{"test": {}}'),
    "no dataset name": with_row(dataset="{}"),
    "no ranks": with_row(ranks=[], groups=b""),
    "fewer groups than ranks": with_row(groups=b"\0"),
    "rank 0": with_row(ranks=[0] * USERS),
    "rank above the limit": with_row(ranks=[502] * USERS),
    "unknown group": with_row(groups=b"\4" * USERS),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_file_that_is_not_ours_is_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(HOSTILE[kind]())
    assert report.main(["--records", str(path), "--out", str(tmp_path / "out.md")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.parquet" in error and "--records" in error
    assert not (tmp_path / "out.md").exists()


def test_directory_instead_of_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--records", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_damaged_byte_is_found_or_changes_nothing(file: Path) -> None:
    whole, expected = file.read_bytes(), read_records(file)
    refused = 0
    for position in np.random.default_rng(0).integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        file.write_bytes(damaged)
        try:
            found = read_records(file)
        except UsageError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert len(found) == 2 and all(map(same, found, expected))
    assert refused > 250


def test_cut_file_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="restore it from git"):
            read_records(file)


def test_damaged_file_is_not_overwritten(file: Path) -> None:
    file.write_bytes(b"damaged")
    with pytest.raises(UsageError):
        add(file, record("c", 3))
    assert file.read_bytes() == b"damaged"
