"""A backup is whole, checked and of one moment, or it is not there; so is a store that was restored from it."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path

import lmdb
import numpy as np
import pytest

from dman_runtime.cli import main
from dman_runtime.errors import StoreDamagedError, StoreError, StoreFullError, StoreUnavailableError, UsageError
from dman_runtime.jobs import backup as backup_module
from dman_runtime.jobs.backup import backup, restore
from dman_runtime.jobs.verifying import verify_store
from dman_runtime.store.base import Write
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.rollout import Rollout

USERS = [f"user {number}" for number in range(30)]


def fill(store: LmdbStore) -> None:
    items = store.add_items([f"item {number}" for number in range(50)])
    store.add_generation("bundle")
    store.set_rollout(Rollout(1, "bundle", bundles={"bundle": "/bundle"}))
    events = np.resize(items, 70)
    assert store.commit([Write(user, 0, {1: bytes(5000)}, events, events, [7]) for user in USERS]) == []


@pytest.fixture
def state(tmp_path: Path) -> Path:
    with LmdbStore.open(tmp_path / "state", map_size=64 << 20) as store:
        fill(store)
    return tmp_path / "state"


def content(path: Path) -> object:
    with LmdbStore.open(path, readonly=True) as store:
        users = {
            user: (
                store.get_many([user], 1),
                *(part.tolist() for part in store.history(user)),
                store.seen(user).tolist(),
            )
            for user in store.scan()
        }
        return users, store.generations(), store.rollout(), store.item_ids(range(50)), store.applied("user 3", [7, 8])


def leftovers(path: Path) -> list[str]:
    return [file.name for file in path.iterdir() if "partial" in file.name]


def test_store_restored_from_a_backup_is_the_one_that_was_copied(state: Path, tmp_path: Path) -> None:
    before = content(state)
    copied = backup(state, tmp_path / "backups" / "one")
    assert copied.counts["users"] == 30 and copied.bytes == (tmp_path / "backups/one/data.mdb").stat().st_size
    (data,) = (tmp_path / "backups" / "one").iterdir()
    assert data.name == "data.mdb" and data.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(state)  # the note beside it stays, and says which store belongs there
    restore(tmp_path / "backups" / "one", state)
    assert content(state) == before
    with LmdbStore.open(state, map_size=64 << 20) as store:
        store.delete("user 1")
    assert content(tmp_path / "backups" / "one") == before
    assert leftovers(tmp_path) == leftovers(tmp_path / "backups") == []


def test_backup_is_of_one_moment_while_others_write(state: Path, tmp_path: Path) -> None:
    """Each commit adds one event to every user: in a backup all have as many."""
    over, commits = threading.Event(), 0

    def write(store: LmdbStore) -> None:
        nonlocal commits
        while not over.is_set():
            heads = [stored.head for stored in store.get_many(USERS, 1) if stored]
            one = np.array([commits % 50])
            writes = [Write(user, head.version, {}, one, one) for user, head in zip(USERS, heads, strict=True)]
            assert store.commit(writes) == []
            commits += 1

    with LmdbStore.open(state, map_size=64 << 20) as store:
        thread = threading.Thread(target=write, args=(store,))
        thread.start()
        try:
            found = []
            for number in range(4):
                backup_of_the_same_process(store, tmp_path / f"backup {number}")
                with LmdbStore.open(tmp_path / f"backup {number}", readonly=True) as copy:
                    counts = {stored.head.history_count for stored in copy.get_many(USERS, 1) if stored}
                assert len(counts) == 1 and verify_store(tmp_path / f"backup {number}").sound
                found.append(*counts)
        finally:
            over.set()
            thread.join()
    assert found == sorted(found) and found[-1] > found[0] and commits > 4


def backup_of_the_same_process(store: LmdbStore, path: Path) -> None:
    """LMDB opens a file once in a process, so this test copies through the writer's own."""
    path.mkdir()
    store.copy_to(path)


def test_backup_overwrites_nothing(state: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="there exists") as caught:
        backup(state, tmp_path / "there")
    assert caught.value.parameter == "output"
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        backup(tmp_path / "missing", tmp_path / "new")
    assert not (tmp_path / "new").exists() and leftovers(tmp_path) == []


def test_restore_overwrites_nothing(state: Path, tmp_path: Path) -> None:
    backup(state, tmp_path / "backup")
    before = content(state)
    with pytest.raises(UsageError, match="state is not empty"):
        restore(tmp_path / "backup", state)
    assert content(state) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("somebody's")
    with pytest.raises(UsageError, match="other is not empty"):
        restore(tmp_path / "backup", other)
    (other / "file").unlink()
    restore(tmp_path / "backup", other)  # an empty mount point
    assert content(other) == before and leftovers(other) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "not one"])
def test_damaged_backup_is_refused(state: Path, tmp_path: Path, damage: str) -> None:
    backup(state, tmp_path / "backup")
    data = tmp_path / "backup" / "data.mdb"
    content = bytearray(data.read_bytes())
    if damage == "cut":
        data.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        for position in range(20_000, len(content), 1000):
            content[position] ^= 0x40
        data.write_bytes(content)
    else:
        data.write_bytes(b"a text")
    with pytest.raises(StoreError) as caught:
        restore(tmp_path / "backup", tmp_path / "new")
    assert not (tmp_path / "new").exists() and leftovers(tmp_path) == []
    assert str(tmp_path / "backup") in str(caught.value)


def test_damaged_store_makes_no_backup(state: Path, tmp_path: Path) -> None:
    with lmdb.open(str(state), max_dbs=10, map_size=64 << 20) as env:
        users = env.open_db(b"users", create=False)
        with env.begin(write=True) as txn:
            txn.put(b"user 3\0\0\0\0\0", b"damaged" * 20, db=users)
    with pytest.raises(StoreDamagedError, match="a user's head"):
        backup(state, tmp_path / "backup")
    assert not (tmp_path / "backup").exists() and leftovers(tmp_path) == []


def test_full_disk_leaves_nothing_half_done(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backup(state, tmp_path / "backup")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(backup_module.shutil, "copyfile", full)
    monkeypatch.setattr(LmdbStore, "copy_to", full)
    for call in (lambda: backup(state, tmp_path / "second"), lambda: restore(tmp_path / "backup", tmp_path / "new")):
        with pytest.raises(StoreFullError, match="no disk space left"):
            call()
    assert not (tmp_path / "second").exists() and not (tmp_path / "new").exists() and leftovers(tmp_path) == []


def test_another_store_is_not_restored_in_silence(state: Path, tmp_path: Path) -> None:
    """The note beside a state directory says which store belongs there."""
    with LmdbStore.open(tmp_path / "other", map_size=64 << 20) as store:
        fill(store)
    backup(tmp_path / "other", tmp_path / "backup")
    shutil.rmtree(state)
    restore(tmp_path / "backup", state)
    with pytest.raises(StoreError, match="is another one than"):
        LmdbStore.open(state, map_size=64 << 20)


def test_commands_copy_and_restore(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, new = str(tmp_path / "copy"), str(tmp_path / "new")
    assert main(["backup", "--state", str(state), "--output", copy, "--json"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"copied {state} to {copy} (") and "30 users" in first
    assert json.loads(last)["counts"]["users"] == 30
    assert main(["restore", "--backup", copy, "--state", new]) == 0
    assert capsys.readouterr().out.startswith(f"restored {copy} to {new} (")
    assert main(["restore", "--backup", copy, "--state", new]) == 2
    assert capsys.readouterr().err.startswith(f"error: {new} is not empty")
