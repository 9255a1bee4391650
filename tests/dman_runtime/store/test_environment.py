"""Opening, refusing and filling the files of an LMDB store, and sharing them with other processes."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from contract.processes import Process, finish, say, start
from lmdb.verify import verify

from dman_runtime.errors import StoreDamagedError, StoreError, StoreFullError, StoreMismatchError, StoreUnavailableError
from dman_runtime.store import environment as environment_module
from dman_runtime.store.base import Write
from dman_runtime.store.lmdb import DEFAULT_MAP_SIZE, LmdbStore
from dman_runtime.store.lmdb_layout import FORMAT_VERSION

MIB = 1 << 20


def open_with_items(path: Path, **options: Any) -> LmdbStore:
    """A store with the items item-0 to item-99, numbered 0 to 99."""
    store = LmdbStore.open(path, **options)
    store.add_items([f"item-{number}" for number in range(100)])
    return store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStore]:
    with open_with_items(tmp_path / "state") as opened:
        yield opened


def write(user_id: str, expected_version: int = 0, items: Any = (), record: bytes = b"record") -> Write:
    times = 1000 + np.arange(len(items))
    return Write(user_id, expected_version, {1: record}, np.array(items, np.uint32), times)


def record_of(store: LmdbStore, user_id: str) -> bytes | None:
    (stored,) = store.get_many([user_id], 1)
    return stored.record if stored else None


def version_of(store: LmdbStore, user_id: str) -> int:
    (stored,) = store.get_many([user_id], 1)
    return stored.head.version if stored else 0


def problems(path: Path) -> list[str]:
    """What LMDB's own verifier finds wrong with the file."""
    return list(verify(str(path)))


def other_database(path: Path, names: tuple[str, ...], info: bytes | None) -> None:
    """What another program, or another release, leaves in a directory."""
    with lmdb.open(str(path), lib_version=0, max_dbs=10) as env, env.begin(write=True) as txn:
        for name in names:
            env.open_db(name.encode(), txn=txn)
        txn.put(b"theirs", b"value")
        if info is not None:
            txn.put(b"info", info, db=env.open_db(b"meta", txn=txn))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, FORMAT_VERSION + 1])
@pytest.mark.parametrize("readonly", [False, True])
def test_open_refuses_another_format_in_one_line_and_leaves_it_alone(
    tmp_path: Path, version: int, readonly: bool
) -> None:
    info = json.dumps({"format_version": version, "bundle_id": "bundle-1", "item_count": 100}).encode()
    other_database(tmp_path, ("meta", "state", "history", "seen"), info)
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(StoreMismatchError, match=f"format {version}.*reads {FORMAT_VERSION}; import the log") as caught:
        LmdbStore.open(tmp_path, readonly=readonly)
    assert caught.value.parameter == "state" and "\n" not in str(caught.value)
    assert (tmp_path / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("names", [(), ("other",), ("meta",), ("meta", "items", "users")])
def test_open_refuses_the_database_of_another_program_and_leaves_it_alone(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    other_database(tmp_path, names, None)
    before = (tmp_path / "data.mdb").read_bytes()
    for readonly in (False, True):
        with pytest.raises(StoreMismatchError) as caught:
            LmdbStore.open(tmp_path, readonly=readonly)
        assert caught.value.parameter == "state" and "another directory" in caught.value.remedy
    assert (tmp_path / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("info", [b"", b"\xff", b"[3]", b"3", b'"3"', b"null", b"{", b'{"version": 3}'])
def test_open_refuses_a_description_that_is_not_ours(tmp_path: Path, info: bytes) -> None:
    other_database(tmp_path, ("meta",), info)
    with pytest.raises(StoreMismatchError, match="another directory"):
        LmdbStore.open(tmp_path)


def test_open_readonly_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("state", "empty"):
        with pytest.raises(StoreUnavailableError, match="does not exist") as caught:
            LmdbStore.open(tmp_path / name, readonly=True)
        assert caught.value.parameter == "state"
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("content", [b"hello", b"\0" * 8192, bytes(range(256)) * 256])
def test_open_refuses_garbage_and_leaves_it_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    for readonly in (False, True):
        with pytest.raises(StoreUnavailableError, match=r"corrupted .*restore a backup"):
            LmdbStore.open(tmp_path, readonly=readonly)
    assert [path.name for path in tmp_path.iterdir()] == ["data.mdb"]
    assert (tmp_path / "data.mdb").read_bytes() == content


@pytest.mark.parametrize("kept", [5000, 8192, 40_000, -4096])
def test_open_refuses_a_truncated_file_instead_of_crashing(store: LmdbStore, kept: int) -> None:
    store.commit([write(f"u{number}", items=[1], record=bytes(20_000)) for number in range(20)])
    store.close()
    data = store.path / "data.mdb"
    os.truncate(data, kept if kept > 0 else data.stat().st_size + kept)
    for readonly in (False, True):
        with pytest.raises(StoreUnavailableError, match="corrupted"):
            LmdbStore.open(store.path, readonly=readonly)


def test_open_refuses_the_format_of_lmdb_1(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), lib_version=1) as env, env.begin(write=True) as txn:
        txn.put(b"key", b"value")
    with pytest.raises(StoreUnavailableError, match=r"format of LMDB 0\.9"):
        LmdbStore.open(tmp_path)


def test_open_refuses_a_path_that_cannot_be_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StoreUnavailableError, match="is a file"):
        LmdbStore.open(tmp_path / "file")
    for path in (tmp_path / "file" / "state", Path("/proc/state"), Path("/proc/self")):
        with pytest.raises(StoreUnavailableError) as caught:
            LmdbStore.open(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_store_opens_once_in_a_process(store: LmdbStore) -> None:
    with pytest.raises(StoreUnavailableError, match="already open in this process"):
        LmdbStore.open(store.path)
    assert store.commit([write("a")]) == []  # and the first one still works


def test_environment_is_opened_durable(store: LmdbStore) -> None:
    env = store._env._environment()
    flags = env.flags()
    assert {name: flags[name] for name in ("sync", "metasync", "writemap", "map_async", "lock")} == {
        "sync": True, "metasync": True, "writemap": False, "map_async": False, "lock": True,
    }  # fmt: skip
    assert env.max_readers() >= 2048


def test_failure_in_a_write_undoes_it_and_the_store_goes_on(store: LmdbStore) -> None:
    class Stop(BaseException):
        pass

    store.commit([write("a", items=[1])])
    with pytest.raises(Stop), store._env.write() as txn:
        txn.drop(store._env.databases["users"], delete=False)
        raise Stop
    assert list(store.scan()) == ["a"]
    assert store.commit([write("b")]) == []


# -- other processes -------------------------------------------------------------------------------------------------

FORK = """
    store = LmdbStore.open(sys.argv[1])
    store.add_items(["item-0"])
    if os.fork() == 0:
        for call in (lambda: store.get_many(["a"], 1), lambda: store.commit([]), lambda: store.delete("a"),
                     store.flush, store.stats, lambda: store.add_items(["a"]), lambda: list(store.scan())):
            try:
                call()
            except StoreError as error:
                print(error, flush=True)
        store.close()
        os._exit(0)
    os.wait()
    print(store.commit([Write("a", 0, {}, np.array([0]), np.array([1]))]), store.history("a")[1].tolist())
"""


@pytest.mark.slow
def test_store_refuses_to_work_in_a_forked_child_and_goes_on_in_the_parent(tmp_path: Path) -> None:
    *child, parent = finish(start(FORK, tmp_path / "state")).splitlines()
    assert len(child) == 7 and all("opened before a fork; open it in each process" in line for line in child)
    assert parent == "[] [1]"


INSPECT = """
    with LmdbStore.open(sys.argv[1], readonly=True) as store:
        print(store.get_many(["a"], 1)[0].record, store.history("a")[0].tolist(), store.item_ids([3]),
              store.generations(), store.stats().map_size, store.add_items(["item-5"]), store.add_generation("bundle"))
        store.flush()
        for call in (lambda: store.commit([]), lambda: store.delete("a"), lambda: store.add_items(["new"]),
                     lambda: store.add_generation("new"), lambda: store.drop_records(1)):
            try:
                call()
            except StoreError as error:
                print(error)
"""


@pytest.mark.slow
def test_readonly_store_reads_while_a_server_has_it_open(tmp_path: Path) -> None:
    with open_with_items(tmp_path / "state", map_size=2 * DEFAULT_MAP_SIZE) as store:
        store.add_generation("bundle")
        store.commit([write("a", items=[3])])
        before = (store.path / "data.mdb").read_bytes()
        found, *refused = finish(start(INSPECT, store.path)).splitlines()
        assert (store.path / "data.mdb").read_bytes() == before
    assert found == f"b'record' [3] ['item-3'] {{'bundle': 1}} {2 * DEFAULT_MAP_SIZE} [5] 1"
    assert len(refused) == 5 and all("read-only; open it for writing" in line for line in refused)


GROW = """
    with LmdbStore.open(sys.argv[1], map_size=64 << 20) as store:
        store.commit([Write("big", 0, {1: bytes(8 << 20)}, np.array([]), np.array([]))])
"""


@pytest.mark.slow
def test_store_grown_by_another_process_asks_for_one_map_size(tmp_path: Path) -> None:
    with open_with_items(tmp_path / "state", map_size=MIB) as store:
        store.commit([write("a")])
        finish(start(GROW, store.path))
        with pytest.raises(StoreUnavailableError, match="same map size") as caught:
            store.get_many(["a"], 1)
        assert caught.value.parameter == "map_size_mib"
    with LmdbStore.open(tmp_path / "state", map_size=MIB) as store:  # the file is larger: it wins
        assert record_of(store, "a") == b"record" and store.stats().map_size > 8 * MIB


# -- a map that grows ------------------------------------------------------------------------------------------------


def fill_map(path: Path) -> None:
    """Fills most of a map of 2 MiB."""
    with open_with_items(path, map_size=2 * MIB) as store, suppress(StoreFullError):
        for number in range(200):
            store.commit([write(f"user-{number}", record=bytes(10_000))])


def test_map_that_is_nearly_full_grows_when_the_store_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill_map(tmp_path / "state")
    with caplog.at_level(logging.INFO), LmdbStore.open(tmp_path / "state", map_size=2 * MIB) as store:
        assert store.sizes()[2] == 4 * MIB
        assert store.commit([write("later", record=bytes(800_000))]) == []
    assert f"the state store {tmp_path / 'state'} now has a map of 4 MiB" in caplog.messages
    with LmdbStore.open(tmp_path / "state", map_size=MIB) as store:
        assert store.sizes()[2] == 4 * MIB
    with LmdbStore.open(tmp_path / "state", map_size=8 * MIB) as store:
        assert store.sizes()[2] == 8 * MIB
    assert problems(tmp_path / "state") == []


ADD_MUCH = """
    with LmdbStore.open(sys.argv[1], map_size=2 << 20) as store:
        print(store.sizes()[2], flush=True)
        for line in sys.stdin:
            try:
                users = [f"{line.strip()}-{number}" for number in range(8)]
                print(store.commit([Write(user, 0, {1: bytes(10_000)}, [], []) for user in users]), flush=True)
            except StoreFullError:
                print("full", flush=True)
"""


def answer(process: Process, line: str) -> str:
    say(process, line)
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_processes_that_open_a_store_whose_map_has_grown_write_side_by_side(tmp_path: Path) -> None:
    fill_map(tmp_path / "state")
    processes = [start(ADD_MUCH, tmp_path / "state") for _ in range(3)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == f"{4 * MIB}\n"
    found = [[answer(process, f"{number}-{round_}") for round_ in range(3)] for number, process in enumerate(processes)]
    assert found == [["[]"] * 3] * 3  # behind the first two MiB, and each reads what the others have added
    for process in processes:
        assert finish(process) == ""
    assert problems(tmp_path / "state") == []


@pytest.mark.slow
def test_map_stays_as_it_is_while_others_use_the_store(tmp_path: Path) -> None:
    """They could not read what is added behind the end of theirs."""
    path = tmp_path / "state"
    open_with_items(path, map_size=2 * MIB).close()
    first = start(ADD_MUCH, path)
    assert first.stdout is not None and first.stdout.readline() == f"{2 * MIB}\n"
    number = 0
    while answer(first, f"first-{number}") == "[]":
        number += 1
    second = start(ADD_MUCH, path)
    assert second.stdout is not None and second.stdout.readline() == f"{2 * MIB}\n"
    assert answer(second, "second") == "full" and answer(first, "again") == "full"
    assert [finish(process) for process in (first, second)] == ["", ""]
    assert problems(path) == []


READ_WHILE_IT_GROWS = """
    from dman_runtime.store import files
    files._GROWTH = 4096
    with LmdbStore.open(sys.argv[1], readonly=True) as store:
        for line in sys.stdin:
            print([len(user.record) for user in store.get_many(line.split(), 1)], flush=True)
"""


@pytest.mark.slow
def test_readonly_store_follows_a_file_that_grows(tmp_path: Path) -> None:
    with open_with_items(tmp_path / "state") as store:
        store.commit([write("0", record=bytes(10))])
        process = start(READ_WHILE_IT_GROWS, store.path)
        assert process.stdout is not None
        for number in range(1, 4):
            say(process, f"{number - 1} 0")
            assert process.stdout.readline() == f"[{10**number}, 10]\n"
            size = (store.path / "data.mdb").stat().st_size
            store.commit(
                [write(f"{number}", record=bytes(10 ** (number + 1))), write(f"more {number}", record=bytes(MIB))]
            )
            assert (store.path / "data.mdb").stat().st_size > size + MIB
        assert finish(process) == ""


READ_IN_TWO_MOMENTS = """
    from dman_runtime.store import files
    files._GROWTH = 4096
    with LmdbStore.open(sys.argv[1], readonly=True) as store:
        with store.snapshot() as outer:
            print("ready", flush=True)
            sys.stdin.readline()
            try:
                store.get_many(["a"], 1)
            except StoreError as error:
                print(error, error.parameter)
            print(len(outer.get_many(["a"], 1)[0].record))
        print(len(store.get_many(["a"], 1)[0].record))
"""


@pytest.mark.slow
def test_map_of_a_readonly_store_stays_while_a_snapshot_reads_it(tmp_path: Path) -> None:
    with open_with_items(tmp_path / "state") as store:
        store.commit([write("a", record=bytes(100_000))])
        process = start(READ_IN_TWO_MOMENTS, store.path)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        store.commit([write("a", version_of(store, "a"), record=bytes(MIB))])
        error, before, after = finish(process).splitlines()
    assert error.endswith("was grown by another process while it was read; try again ")
    assert (before, after) == ("100000", f"{MIB}")


LITTLE_SPACE = """
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for options in ({"readonly": True}, {}, {"map_size": 1 << 30}):
        try:
            with LmdbStore.open(sys.argv[1], **options) as store:
                print(len(store.get_many(["a"], 1)[0].record), store.stats().map_size)
        except StoreError as error:
            print(error, error.parameter)
"""


@pytest.mark.slow
def test_little_address_space_is_enough_to_read_and_a_writer_is_told_what_helps(tmp_path: Path) -> None:
    with open_with_items(tmp_path / "state") as store:
        store.commit([write("a", record=bytes(100_000))])
    reader, writer, small_writer = finish(start(LITTLE_SPACE, tmp_path / "state")).splitlines()
    assert reader == f"100000 {DEFAULT_MAP_SIZE}"
    assert writer.endswith("address space; lower the map size or raise `ulimit -v` map_size_mib")
    assert small_writer == f"100000 {1 << 30}"


def test_reader_without_address_space_is_told_what_its_command_takes(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **options: object) -> None:
        raise lmdb.MemoryError("mmap")

    store.close()
    monkeypatch.setattr(lmdb, "open", opened)
    with pytest.raises(StoreUnavailableError, match=r"address space; raise `ulimit -v`$") as caught:
        LmdbStore.open(store.path, readonly=True)
    assert caught.value.parameter == ""


def test_store_out_of_reader_slots_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "_MAX_READERS", 1)
    with open_with_items(tmp_path / "state") as store:
        env = store._env._environment()
        held = [env.begin() for _ in range(env.max_readers())]
        with pytest.raises(StoreUnavailableError, match="no free reader slot"):
            store.get_many(["a"], 1)
        held.clear()
        assert store.get_many(["a"], 1) == [None]


@pytest.mark.parametrize(
    "error", [lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.CursorFullError, lmdb.BadTxnError]
)
def test_pages_that_lmdb_cannot_follow_are_damage(store: LmdbStore, error: type[lmdb.Error]) -> None:
    with pytest.raises(StoreDamagedError, match="corrupted"), store.snapshot():
        raise error("mdb_get")
    with pytest.raises(StoreDamagedError, match="corrupted"), store._env.write():
        raise error("mdb_put")
    assert store.commit([write("a")]) == []


# -- full ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("record_bytes", "events", "group"), [(10, 5, 64), (500, 300, 4), (20_000, 1, 4)])
def test_full_map_loses_nothing_and_deletions_make_room(
    tmp_path: Path, record_bytes: int, events: int, group: int
) -> None:
    with open_with_items(tmp_path / "state", map_size=MIB) as store:
        stored: dict[str, bytes] = {}
        with pytest.raises(StoreFullError, match=r"full \(map size 1 MiB\); restart with a larger") as caught:
            while True:
                batch = [f"user-{len(stored) + number}" for number in range(group)]
                records = {user_id: user_id.encode() + bytes(record_bytes) for user_id in batch}
                store.commit([write(name, 0, np.arange(events) % 100, record) for name, record in records.items()])
                stored |= records
        assert caught.value.parameter == "map_size_mib"
        assert set(store.scan()) == set(stored)
        for user_id, record in stored.items():
            assert record_of(store, user_id) == record and len(store.history(user_id)[0]) == events
        for user_id in list(stored)[:40]:
            assert store.delete(user_id) == events
        assert store.commit([write("after", record=bytes(record_bytes))]) == []
    assert problems(tmp_path / "state") == []


def test_map_filled_to_the_last_commit_leaves_pages_for_deletions(tmp_path: Path) -> None:
    with open_with_items(tmp_path / "state", map_size=MIB) as store:
        events, commits = 1000, 0
        while events:  # ever smaller commits take what the larger ones left; without a reserve no deletion fits then
            user_id = f"user-{commits % 10}"
            try:
                store.commit([write(user_id, version_of(store, user_id), np.arange(events) % 100)])
                commits += 1
            except StoreFullError:
                events //= 3
        for number in range(10):
            assert store.delete(f"user-{number}") is not None


def test_map_filled_with_items_keeps_their_numbers_and_lets_users_go(tmp_path: Path) -> None:
    with open_with_items(tmp_path / "state", map_size=MIB) as store:
        store.commit([write("a", items=[1, 2, 3])])
        count = 100
        with pytest.raises(StoreFullError):
            while True:
                ids = [f"{number}-{'x' * 300}" for number in range(count, count + 50)]
                assert store.add_items(ids).tolist() == list(range(count, count + 50))
                count += 50
        assert store.stats().items == count
        assert store.find_items(ids).tolist() == [-1] * 50
        assert store.item_ids([count - 1]) == [f"{count - 1}-{'x' * 300}"]
        assert store.delete("a") == 3


@pytest.mark.parametrize(
    ("map_size", "record_bytes"),
    [
        (MIB, 500),
        (MIB, 5000),
        (4 * MIB, 1900),
        pytest.param(16 * MIB, 500, marks=pytest.mark.slow),
        pytest.param(16 * MIB, 1900, marks=pytest.mark.slow),
    ],
)
def test_records_of_a_generation_can_be_dropped_from_a_full_map(
    tmp_path: Path, map_size: int, record_bytes: int
) -> None:
    with open_with_items(tmp_path / "state", map_size=map_size) as store:
        users, group = 0, 100
        while group:
            try:
                store.commit([write(f"user-{users + n}", 0, [1] * 31, bytes(record_bytes)) for n in range(group)])
                users += group
            except StoreFullError:
                group //= 3
        assert store.drop_records(1) == users
        assert store.commit([write("after", record=bytes(record_bytes))]) == []


LIMITED = """
    import resource
    store = LmdbStore.open(sys.argv[1])
    events = store.add_items(["0", "1", "2"]), np.arange(3)
    store.commit([Write(f"old-{number}", 0, {1: bytes(20_000)}, *events) for number in range(20)])
    limit = (Path(sys.argv[1]) / "data.mdb").stat().st_size + int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
    for _ in range(2):
        try:
            store.commit([Write(f"new-{number}", 0, {1: bytes(20_000)}, *events) for number in range(40)])
        except StoreFullError as error:
            print(error)
    print(len(list(store.scan())), len(store.get_many(["old-7"], 1)[0].record), store.history("old-7")[0].tolist())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(store.commit([Write("new-1", 0, {1: bytes(20_000)}, *events)]), store.history("new-1")[1].tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 50_000])  # the write fails at once (EFBIG), or is cut short (EIO to LMDB)
def test_full_disk_stores_nothing_and_writing_goes_on_when_there_is_room(tmp_path: Path, room: int) -> None:
    *errors, old, new = finish(start(LIMITED, tmp_path / "state", room)).splitlines()
    assert len(errors) == 2 and all("no disk space left" in error for error in errors)
    assert old == "20 20000 [0, 1, 2]"
    assert new == "[] [0, 1, 2]"
    assert problems(tmp_path / "state") == []


ENTER = """
    import resource
    resource.setrlimit(getattr(resource, sys.argv[2]), (int(sys.argv[3]), resource.RLIM_INFINITY))
    try:
        LmdbStore.open(sys.argv[1])
    except StoreError as error:
        print(type(error).__name__, error, error.parameter)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "size", "answer"),
    [
        ("RLIMIT_FSIZE", 0, "StoreFullError .* no disk space"),
        ("RLIMIT_AS", 32 << 30, "StoreUnavailableError .*; lower the map size .* map_size_mib"),
    ],
)
def test_open_without_room_for_its_files_says_so(tmp_path: Path, limit: str, size: int, answer: str) -> None:
    assert re.match(answer, finish(start(ENTER, tmp_path / "state", limit, size)))


# -- closed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [LmdbStore.flush, LmdbStore.stats, lambda store: list(store.scan())])
def test_closed_store_says_what_to_do(store: LmdbStore, call: Callable[[LmdbStore], object]) -> None:
    store.close()
    with pytest.raises(StoreError, match=r"state is closed; open it again"):
        call(store)
