"""The files of a store while it is open and before it is: removed, replaced, cut, empty, unmounted, shared."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.processes import finish, release, say, start

from dman_runtime.errors import StoreError, StoreGoneError, StoreMismatchError, StoreUnavailableError
from dman_runtime.store.base import Write
from dman_runtime.store.files import StoreFiles
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.marker import marker_path

NONE = np.zeros(0, np.int64)


def add(store: LmdbStore, user_id: str) -> None:
    assert store.commit([Write(user_id, 0, {1: b"record"}, NONE, NONE, [1])]) == []


def created(path: Path, *users: str) -> Path:
    with LmdbStore.open(path) as store:
        store.add_items(["item"])
        for user_id in users:
            add(store, user_id)
    return path


# -- gone while it is open ---------------------------------------------------------------------------------------------


def remove_directory(path: Path) -> None:
    shutil.rmtree(path)


def replace_directory(path: Path) -> None:
    """What a volume that is mounted over the directory looks like."""
    other = created(path.with_name("other"), "b")
    path.rename(path.with_name("moved"))
    other.rename(path)


def empty_directory(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.mkdir()


def remove_data(path: Path) -> None:
    (path / "data.mdb").unlink()


def replace_data(path: Path) -> None:
    shutil.copy(path / "data.mdb", path / "copy")
    (path / "copy").rename(path / "data.mdb")


def cut_data(path: Path) -> None:
    """To what LMDB calls an empty database. Nothing may read any more: that would be SIGBUS."""
    os.truncate(path / "data.mdb", 0)


LOSSES: list[Callable[[Path], None]] = [remove_directory, replace_directory, empty_directory, remove_data, replace_data]


@pytest.mark.parametrize("lose", LOSSES)
def test_write_to_a_store_that_is_gone_is_never_acknowledged(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    with LmdbStore.open(tmp_path / "state") as store:
        store.add_items(["item"])
        add(store, "a")
        store.check()
        lose(store.path)
        writes: list[Callable[[], object]] = [
            lambda: add(store, "b"),
            lambda: store.delete("a"),
            lambda: store.add_items(["new"]),
            lambda: store.add_generation("new"),
            lambda: store.drop_records(1),
            store.check,
        ]
        for write in writes:
            with pytest.raises(StoreGoneError, match="while it was open; mount its volume or restore it, then restart"):
                write()
        assert store.find_items(["item"]).tolist() == [0]  # what is mapped can be read


@pytest.mark.parametrize("name", ["lock.mdb", "data.mdb"])
def test_check_notices_each_file(tmp_path: Path, name: str) -> None:
    with LmdbStore.open(tmp_path / "state") as store:
        (store.path / name).unlink()
        with pytest.raises(StoreGoneError, match="was removed"):
            store.check()


def test_store_that_comes_back_stays_gone_for_this_process(tmp_path: Path) -> None:
    """Others may have written to it in the meantime, with another lock."""
    with LmdbStore.open(tmp_path / "state") as store:
        store.path.rename(tmp_path / "away")
        with pytest.raises(StoreGoneError):
            store.check()
        (tmp_path / "away").rename(store.path)
        for call in (store.check, lambda: add(store, "a")):
            with pytest.raises(StoreGoneError, match="was removed"):
                call()
    with LmdbStore.open(tmp_path / "state") as store:
        add(store, "a")


def test_loss_between_commit_and_reply_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LmdbStore.open(tmp_path / "state") as store:
        original = store._databases
        monkeypatch.setattr(store._env, "keep_reserve", lambda *_: shutil.rmtree(store.path))  # in the transaction
        with pytest.raises(StoreGoneError, match="was removed"):
            store.commit([Write("a", 0, {}, NONE, NONE)])
        assert original is store._databases


CUT = """
store = LmdbStore.open(sys.argv[1])
store.commit([Write("a", 0, {1: bytes(50_000)}, np.array([]), np.array([]))])
os.truncate(os.path.join(sys.argv[1], "data.mdb"), 0)
try:
    store.check()
except StoreError as error:
    print(type(error).__name__, error, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_data_that_is_cut_short_is_noticed(tmp_path: Path) -> None:
    assert "StoreGoneError" in (line := finish(start(CUT, tmp_path / "state"))) and "was cut short" in line


def test_file_that_grows_in_many_threads_is_not_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may look at the file, be overtaken by one that sees it larger, and compare then."""
    with LmdbStore.open(tmp_path / "state") as store:
        files = store._env._files
        original = StoreFiles._compare

        def overtaken(self: StoreFiles, name: str) -> int:
            size = original(self, name)
            self._size = size + 4096
            return size

        monkeypatch.setattr(StoreFiles, "_compare", overtaken)
        files.check_data()


# -- gone before it is opened ------------------------------------------------------------------------------------------


def marker(path: Path) -> dict[str, Any]:
    found = json.loads(marker_path(path).read_text())
    assert set(found) == {"store_id", "comment"} and "dman" in found["comment"]
    return dict(found)


def test_creation_leaves_a_note_of_which_store_belongs_there(tmp_path: Path) -> None:
    created(tmp_path / "state")
    created(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.dman-store",
        ".state.dman-store",
        "other",
        "state",
    ]
    assert marker(tmp_path / "state")["store_id"] != marker(tmp_path / "other")["store_id"]


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def empty_data(path: Path) -> None:
    (path / "lock.mdb").unlink()
    (path / "data.mdb").write_bytes(b"")


@pytest.mark.parametrize("lose", [shutil.rmtree, empty, empty_data])
@pytest.mark.parametrize("options", [{}, {"readonly": True}, {"must_exist": True}])
def test_store_that_was_there_and_is_not_is_not_created_anew(
    tmp_path: Path, lose: Callable[[Path], None], options: dict[str, bool]
) -> None:
    path = created(tmp_path / "state", "a")
    lose(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        StoreUnavailableError, match=r"missing or empty, and .*mount its volume or restore a backup"
    ) as caught:
        LmdbStore.open(path, **options)
    assert str(marker_path(path)) in str(caught.value) and caught.value.parameter == "state"
    assert sorted(tmp_path.rglob("*")) == before
    if not options:
        marker_path(path).unlink()  # the remedy
        with LmdbStore.open(path) as store:
            assert list(store.scan()) == []


@pytest.mark.parametrize("readonly", [False, True])
def test_another_store_than_belongs_there_is_refused(tmp_path: Path, readonly: bool) -> None:
    path, other = created(tmp_path / "state", "a"), created(tmp_path / "other", "b")
    shutil.rmtree(path)
    other.rename(path)
    with pytest.raises(StoreMismatchError, match=r"is another one than .*remove that file to accept this store"):
        LmdbStore.open(path, readonly=readonly)
    marker_path(path).unlink()
    with LmdbStore.open(path) as store:
        assert list(store.scan()) == ["b"]
    assert marker(path) == marker(tmp_path / "other")


def test_backup_of_the_store_is_accepted(tmp_path: Path) -> None:
    path = created(tmp_path / "state", "a")
    (tmp_path / "backup").mkdir()
    shutil.copy(path / "data.mdb", tmp_path / "backup")
    with LmdbStore.open(path) as store:
        add(store, "b")
    shutil.rmtree(path)
    (tmp_path / "backup").rename(path)
    with LmdbStore.open(path) as store:
        assert list(store.scan()) == ["a"]


def test_copied_store_gets_a_note_and_a_readonly_one_none(tmp_path: Path) -> None:
    path, copy = created(tmp_path / "state", "a"), tmp_path / "copy"
    shutil.copytree(path, copy)
    with LmdbStore.open(copy, readonly=True) as store:
        assert list(store.scan()) == ["a"]
    assert not marker_path(copy).exists()
    LmdbStore.open(copy).close()
    assert marker(copy) == marker(path)


def test_interrupted_creation_is_finished(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "data.mdb").touch()
    with LmdbStore.open(tmp_path / "state") as store:
        add(store, "a")
    assert marker(tmp_path / "state")


@pytest.mark.parametrize("interrupted", [False, True])
def test_store_that_must_exist_is_never_created(tmp_path: Path, interrupted: bool) -> None:
    path = tmp_path / "state"
    if interrupted:
        path.mkdir()
        (path / "data.mdb").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreUnavailableError, match="does not exist, and none may be created") as caught:
        LmdbStore.open(path, must_exist=True)
    assert caught.value.parameter == "state_must_exist"
    assert sorted(tmp_path.rglob("*")) == before
    created(path, "a")
    with LmdbStore.open(path, must_exist=True) as store:
        assert list(store.scan()) == ["a"]


def test_note_is_beside_the_link_to_a_volume(tmp_path: Path) -> None:
    """An unmounted volume leaves the link, and an empty directory behind it."""
    volume = tmp_path / "volume"
    volume.mkdir()
    (tmp_path / "state").symlink_to(volume / "state")
    (volume / "state").mkdir()
    created(tmp_path / "state", "a")
    assert marker_path(tmp_path / "state") == tmp_path / ".state.dman-store" and marker(tmp_path / "state")
    empty(volume / "state")
    with pytest.raises(StoreUnavailableError, match="missing or empty"):
        LmdbStore.open(tmp_path / "state")


def test_note_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    marker_path(tmp_path / "state").mkdir()
    with caplog.at_level(logging.WARNING), pytest.raises(StoreUnavailableError):
        LmdbStore.open(tmp_path / "state")  # a directory is no note
    marker_path(tmp_path / "state").rmdir()
    partial = marker_path(tmp_path / "state").with_name(f".state.dman-store.{os.getpid()}")
    partial.mkdir()
    with caplog.at_level(logging.WARNING), LmdbStore.open(tmp_path / "state") as store:
        add(store, "a")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"cannot write {marker_path(tmp_path / 'state')} ([Errno 21] Is a directory")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_damaged_note_is_refused(tmp_path: Path, text: str) -> None:
    path = created(tmp_path / "state")
    marker_path(path).write_text(text)
    with pytest.raises(StoreUnavailableError, match="is damaged; remove it if the state store beside it is right"):
        LmdbStore.open(path)


# -- other processes ---------------------------------------------------------------------------------------------------

HOLD = """
with LmdbStore.open(sys.argv[1], readonly=len(sys.argv) > 2) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print(store.commit([Write("held", 0, {}, np.array([]), np.array([]))]))
    except StoreError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("readonly", [False, True])
def test_lock_file_that_was_removed_keeps_others_out_while_the_store_is_used(tmp_path: Path, readonly: bool) -> None:
    path = created(tmp_path / "state", "a")
    holder = start(HOLD, path, *["readonly"] * readonly)
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    with LmdbStore.open(path) as store:  # as long as the file is there, anybody may
        assert list(store.scan()) == ["a"]
    (path / "lock.mdb").unlink()
    for options in ({}, {"readonly": True}):
        with pytest.raises(
            StoreUnavailableError, match=r"lock.mdb was removed while other processes use .*stop them all"
        ):
            LmdbStore.open(path, **options)
    assert not (path / "lock.mdb").exists()
    say(holder, "")
    answer = finish(holder)
    assert answer == "[]\n" or readonly
    with LmdbStore.open(path) as store:  # nobody else uses it now
        assert sorted(store.scan()) == (["a"] if readonly else ["a", "held"])


@pytest.mark.slow
def test_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    path = created(tmp_path / "state", "a")
    holder = start(HOLD, path)
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    (path / "lock.mdb").unlink()
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=60)
    with LmdbStore.open(path) as store:
        add(store, "b")


OPEN = """
print("ready", flush=True)
sys.stdin.readline()
with LmdbStore.open(sys.argv[1]) as store:
    print(store.commit([Write(sys.argv[2], 0, {}, np.array([]), np.array([]))]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", ["new", "without lock.mdb", "whole"])
def test_processes_that_open_a_store_at_once_all_can(tmp_path: Path, state: str) -> None:
    path = tmp_path / "state"
    if state != "new":
        created(path)
    if state == "without lock.mdb":
        (path / "lock.mdb").unlink()
    processes = [start(OPEN, path, f"user-{number}") for number in range(5)]
    release(processes)
    assert [finish(process) for process in processes] == ["[]\n"] * 5
    with LmdbStore.open(path) as store:
        assert sorted(store.scan()) == [f"user-{number}" for number in range(5)]


READ = """
store = LmdbStore.open(sys.argv[1], readonly=True)
with store.snapshot() as snapshot:
    print(len(snapshot.get_many(["a"], 1)), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_maintain_frees_the_snapshot_of_a_killed_reader_and_the_file_stops_growing(tmp_path: Path) -> None:
    def write_more(store: LmdbStore) -> int:
        """How much the file grows by 300 commits."""
        before = store.stats().file_bytes
        for _ in range(300):
            (stored,) = store.get_many(["a"], 1)
            assert stored is not None
            store.commit([Write("a", stored.head.version, {1: bytes(16_000)}, NONE, NONE)])
        return store.stats().file_bytes - before

    with LmdbStore.open(created(tmp_path / "state", "a")) as store:
        write_more(store)
        assert write_more(store) < 100_000 and store.maintain() == 0
        reader = start(READ, store.path)
        assert reader.stdout is not None and reader.stdout.readline() == "1\n"
        assert store.maintain() == 0  # it lives
        reader.send_signal(signal.SIGKILL)
        reader.communicate(timeout=60)
        assert write_more(store) > 300 * 16_000
        assert store.maintain() == 1
        assert write_more(store) < 100_000
        assert store.maintain() == 0


def test_closed_store_lets_go_of_its_files(tmp_path: Path) -> None:
    path = created(tmp_path / "state")
    (path / "lock.mdb").unlink()
    with LmdbStore.open(path) as store:  # nobody holds a lock
        store.check()
    with pytest.raises(StoreError, match="is closed"):
        add(store, "a")
