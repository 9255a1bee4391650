"""The state store against a real LMDB: what it promises to keep, refuse and survive."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lmdb.verify import verify

from dman_runtime.errors import StoreError, StoreFullError, StoreMismatchError, StoreUnavailableError
from dman_runtime.store import lmdb as store_module
from dman_runtime.store.lmdb import (
    CHUNK_EVENTS,
    DEFAULT_MAP_SIZE,
    FORMAT_VERSION,
    StateStore,
    StoredUser,
    StoreInfo,
    Write,
    read_store_info,
    user_key,
)

ITEM_IDS = [f"item-{index}" for index in range(100)]
MIB = 1 << 20


def open_store(path: Path, **options: Any) -> StateStore:
    return StateStore.open(path, **{"bundle_id": "bundle-1", "item_ids": ITEM_IDS, **options})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    with open_store(tmp_path / "state") as opened:
        yield opened


def write(user_id: str, expected_version: int = 0, items: Any = (), record: bytes = b"record") -> Write:
    """Events whose timestamps are 1000, 1001, ..."""
    return Write(user_id, expected_version, record, np.array(items, np.uint32), 1000 + np.arange(len(items)))


def version_of(store: StateStore, user_id: str) -> int:
    user = store.get(user_id)
    return user.version if user else 0


def contents(store: StateStore, name: str) -> dict[bytes, bytes]:
    """Every key and value of one database."""
    with store._read() as txn:
        return {bytes(key): bytes(value) for key, value in txn.cursor(db=getattr(store._dbs, name))}


def problems(path: Path) -> list[str]:
    """What LMDB's own verifier finds wrong with the file."""
    return list(verify(str(path)))  # type: ignore[no-untyped-call]


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    """Run a script in another process, with the names the scripts below use."""
    header = "import os, sys, time, numpy as np\nfrom pathlib import Path\nfrom dman_runtime.store.lmdb import *\n"
    header += "ITEM_IDS = [f'item-{index}' for index in range(100)]\n"
    command = [sys.executable, "-c", header + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def release(processes: "list[subprocess.Popen[str]]") -> None:
    """Let scripts that say they are ready go, all at once."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# --- One store against a model ---------------------------------------------------------------------------------------

USERS = ("a", "ab", "b c", "ü", "z" * 400)


class StoreMatchesModel(RuleBasedStateMachine):
    """Random commits, conflicts, deletions and reopenings leave what a dictionary of lists would hold."""

    @initialize()
    def create(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(store_module, "CHUNK_EVENTS", 4)
        self.patch.setattr(store_module, "_SCAN_USERS", 2)
        self.directory = TemporaryDirectory()
        self.store = open_store(Path(self.directory.name))
        self.model: dict[str, tuple[StoredUser, list[tuple[int, int]]]] = {}
        self.last_version = 0

    def teardown(self) -> None:
        self.store.close()
        assert problems(Path(self.directory.name)) == []
        self.directory.cleanup()
        self.patch.undo()

    @rule(
        batch=st.dictionaries(
            st.sampled_from(USERS),
            st.tuples(
                st.sampled_from([*["right"] * 8, "zero", "stale"]),
                st.binary(max_size=5000),
                st.lists(st.tuples(st.integers(0, 99), st.integers(-(2**63), 2**63 - 1)), max_size=11),
            ),
        )
    )
    def commit(self, batch: dict[str, tuple[str, bytes, list[tuple[int, int]]]]) -> None:
        writes, expected = [], []
        for user_id, (kind, record, events) in batch.items():
            stored = self.model[user_id][0].version if user_id in self.model else 0
            version = {"right": stored, "zero": 0, "stale": stored + 1}[kind]
            items, timestamps = [item for item, _ in events], np.array([when for _, when in events], np.int64)
            writes.append(Write(user_id, version, record, np.array(items, np.uint32), timestamps))
            expected.append(version == stored)
        assert self.store.commit(writes) == all(expected)
        before = self.last_version
        for user_id, (_, record, events) in batch.items() if all(expected) else ():
            history = [*self.model.get(user_id, (None, []))[1], *events]
            found = self.store.get(user_id)
            assert found is not None and found.version > before
            self.last_version = max(self.last_version, found.version)
            self.model[user_id] = StoredUser(found.version, len(history), record), history

    @rule(user_id=st.sampled_from(USERS))
    def delete(self, user_id: str) -> None:
        known = self.model.pop(user_id, None)
        assert self.store.delete(user_id) == (None if known is None else len(known[1]))

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = open_store(Path(self.directory.name))

    @rule(user_id=st.sampled_from(USERS), limit=st.integers(0, 30))
    def read_the_end_of_a_history(self, user_id: str, limit: int) -> None:
        events = self.model.get(user_id, (None, []))[1]
        items, timestamps = self.store.history(user_id, limit=limit)
        assert list(zip(items.tolist(), timestamps.tolist(), strict=True)) == events[max(0, len(events) - limit) :]

    @invariant()
    def everything_agrees(self) -> None:
        assert list(self.store.user_ids()) == sorted(self.model, key=str.encode)
        assert self.store.stats().users == len(self.model)
        for user_id, (user, with_seen) in zip(
            USERS, zip(self.store.get_many(USERS), map(self.store.get_with_seen, USERS), strict=True), strict=True
        ):
            known, events = self.model.get(user_id, (None, []))
            items, timestamps = self.store.history(user_id)
            assert user == known
            assert items.dtype == np.uint32 and timestamps.dtype == np.int64
            assert list(zip(items.tolist(), timestamps.tolist(), strict=True)) == events
            if known is None:
                assert with_seen is None
            else:
                assert with_seen is not None and with_seen[0] == known and with_seen[1].dtype == np.uint32
                assert set(with_seen[1].tolist()) == {item for item, _ in events}


TestStoreMatchesModel = StoreMatchesModel.TestCase
TestStoreMatchesModel.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# --- Writes ----------------------------------------------------------------------------------------------------------


def test_commit_with_one_stale_version_stores_nothing(store: StateStore) -> None:
    store.commit([write("a", items=[1]), write("b", items=[2])])
    before = {name: contents(store, name) for name in ("meta", "state", "seen", "history")}
    batch = [write("a", version_of(store, "a"), [4]), write("b", version_of(store, "b") + 1, [3]), write("new")]
    assert store.commit(batch) is False
    assert store.commit(batch[::-1]) is False
    assert {name: contents(store, name) for name in before} == before


def test_commit_with_version_zero_refuses_an_existing_user(store: StateStore) -> None:
    assert store.commit([write("a", items=[1])])
    assert not store.commit([write("a", items=[2])])


def test_version_of_a_deleted_user_is_never_given_again(store: StateStore) -> None:
    store.commit([write("a", items=[1])])
    before = version_of(store, "a")
    store.delete("a")
    store.close()
    with open_store(store.path) as reopened:
        reopened.commit([write("a", items=[1])])
        assert version_of(reopened, "a") > before
        assert not reopened.commit([write("a", before, [2])])


@pytest.mark.parametrize(
    ("items", "timestamps"),
    [
        (np.array([100]), np.array([1])),
        (np.array([-1]), np.array([1])),
        (np.array([2**32 + 1]), np.array([1])),
        (np.array([1.0]), np.array([1])),
        (np.array([1]), np.array([1.5])),
        (np.array([1]), np.array([2**63], np.uint64)),
        (np.array([1, 2]), np.array([1])),
        (np.array([[1]]), np.array([[1]])),
    ],
)
def test_commit_refuses_bad_events_and_stores_nothing(
    store: StateStore, items: np.ndarray[Any, Any], timestamps: np.ndarray[Any, Any]
) -> None:
    with pytest.raises(ValueError, match="item"):
        store.commit([write("good", items=[1]), Write("bad", 0, b"", items, timestamps)])
    assert list(store.user_ids()) == []


def test_commit_refuses_a_user_named_twice(store: StateStore) -> None:
    with pytest.raises(ValueError, match="twice"):
        store.commit([write("a"), write("a")])
    assert store.get("a") is None


def test_append_to_a_long_history_changes_the_state_alone_until_a_chunk_is_full(store: StateStore) -> None:
    items = np.arange(100_000, dtype=np.uint32) % 90
    store.commit([write("long", items=items), write("other", items=items[:300])])
    before = {name: contents(store, name) for name in store._dbs._fields}

    def changed() -> dict[str, list[bytes]]:
        after = {name: contents(store, name) for name in before}
        return {name: [key for key in after[name] if after[name][key] != before[name].get(key)] for name in before}

    chunk, filled = divmod(100_000, CHUNK_EVENTS)
    for count in range(filled, CHUNK_EVENTS - 1):
        store.commit([write("long", version_of(store, "long"), [90 + count % 10])])
        assert changed() == {"meta": [], "state": [b"long"], "seen": [], "history": []}
    store.commit([write("long", version_of(store, "long"), [7])])
    key = b"long\0" + chunk.to_bytes(4, "big")
    assert changed() == {"meta": [], "state": [b"long"], "seen": [b"long"], "history": [key]}
    assert store.history("long", limit=3)[0].tolist() == [91, 92, 7]


def test_history_reads_only_the_chunks_that_hold_the_last_events(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit([write("long", items=np.arange(10 * CHUNK_EVENTS + 1) % 100)])
    read: list[int] = []
    original = StateStore._chunk

    def spy(self: StateStore, txn: Any, key: bytes, chunk: int) -> Any:
        read.append(chunk)
        return original(self, txn, key, chunk)

    monkeypatch.setattr(StateStore, "_chunk", spy)
    assert len(store.history("long", limit=1)[0]) == 1
    assert read == []
    assert len(store.history("long", limit=2)[0]) == 2
    assert read == [9]


def test_history_refuses_a_negative_limit(store: StateStore) -> None:
    with pytest.raises(ValueError, match="limit"):
        store.history("a", limit=-1)


def test_seen_takes_the_shorter_of_list_and_bitmap(store: StateStore) -> None:
    many = np.resize([*range(50, 60), 99], CHUNK_EVENTS)
    store.commit([write("few", items=np.resize([5, 3], CHUNK_EVENTS)), write("many", items=many), write("new", 0, [1])])
    assert contents(store, "seen") == {
        b"few": b"\0" + np.array([3, 5], "<u4").tobytes(),
        b"many": b"\1" + np.packbits(np.isin(np.arange(100), many), bitorder="little").tobytes(),
    }


def test_delete_leaves_no_trace_of_the_user_and_nothing_else_changed(store: StateStore) -> None:
    store.commit([write("a", items=[1] * 600), write("ab", items=[2] * 600)])
    before = {name: contents(store, name) for name in ("state", "seen", "history")}
    assert store.delete("a") == 600
    for name, values in before.items():
        kept = {key: value for key, value in values.items() if key.startswith(b"ab")}
        assert contents(store, name) == kept


@pytest.mark.parametrize("user_id", ["", "x" * 401, "ü" * 201, "a\0b", "a\nb", "a\x7f", "a\x85", "\ud800"])
def test_user_key_refuses_what_callers_should_have_refused(user_id: str) -> None:
    with pytest.raises(ValueError):
        user_key(user_id)


def test_user_ids_holds_no_snapshot_between_users(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_SCAN_USERS", 3)
    names = [f"u{number}" for number in range(6)]  # a whole number of batches
    store.commit([write(name) for name in names])
    seen = []
    for user_id in store.user_ids():
        seen.append(user_id)
        snapshots = store._environment().readers().splitlines()[1:]
        assert all(line.endswith("-") for line in snapshots)
        store.delete(user_id)
    assert seen == names


def test_readers_see_whole_commits_while_a_thread_writes(store: StateStore) -> None:
    failures: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for found in map(store.get_with_seen, ["a", "b"]):
                if found and int(found[0].record) != len(found[1]):
                    failures.append(f"{found}")

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(90):
        batch = [write(user, version_of(store, user), [number], b"%d" % (number + 1)) for user in ("a", "b")]
        assert store.commit(batch)
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_environment_is_opened_durable(store: StateStore) -> None:
    flags = store._environment().flags()
    assert {name: flags[name] for name in ("sync", "metasync", "writemap", "map_async", "lock")} == {
        "sync": True, "metasync": True, "writemap": False, "map_async": False, "lock": True,
    }  # fmt: skip
    assert store._environment().max_readers() >= 2048


# --- Several processes and crashes -----------------------------------------------------------------------------------

INCREMENT = """
    worker, rounds = int(sys.argv[2]), int(sys.argv[3])
    conflicts = 0
    print("ready", flush=True)
    sys.stdin.readline()
    with StateStore.open(sys.argv[1], bundle_id="bundle-1", item_ids=ITEM_IDS) as store:
        for number in range(rounds):
            while conflicts < 10_000:
                user = store.get("shared")
                version, count = (user.version, int(user.record)) if user else (0, 0)
                event = np.array([worker]), np.array([worker * 1000 + number])
                if store.commit([Write("shared", version, b"%d" % (count + 1), *event)]):
                    break
                conflicts += 1
    print(conflicts)
"""


def test_two_processes_writing_one_user_lose_nothing(tmp_path: Path) -> None:
    processes = [start(INCREMENT, tmp_path / "state", worker, 60) for worker in (1, 2)]
    release(processes)
    assert sum(int(finish(process)) for process in processes) > 0  # there were conflicts to survive
    with open_store(tmp_path / "state") as store:
        found = store.get_with_seen("shared")
        assert found is not None and (found[0].record, found[0].event_count) == (b"120", 120)
        assert set(found[1].tolist()) == {1, 2}
        timestamps = store.history("shared")[1].tolist()
        assert sorted(timestamps) == [worker * 1000 + number for worker in (1, 2) for number in range(60)]
        assert [when for when in timestamps if when < 2000] == list(range(1000, 1060))


STREAM = """
    with StateStore.open(sys.argv[1], bundle_id="bundle-1", item_ids=ITEM_IDS) as store:
        while True:
            users = store.get_many(["a", "b"])
            count = users[0].event_count if users[0] else 0
            new = np.arange(count, count + 1 + count % 3)
            record = b"%d " % (count + len(new)) + bytes(20_000)
            writes = [Write(name, user.version if user else 0, record, new % 100, new)
                      for name, user in zip("ab", users)]
            assert store.commit(writes)
            print(count + len(new), flush=True)
"""


def test_kill_in_a_stream_of_commits_keeps_every_acknowledged_event_once(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    acknowledged = 0
    for _ in range(8):
        process = start(STREAM, tmp_path / "state")
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        time.sleep(random.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.communicate(timeout=60)[0].split("\n")[:-1]
        acknowledged = int(lines[-1]) if lines else acknowledged
        with open_store(tmp_path / "state") as store:
            counts = set()
            for user_id in ("a", "b"):
                found = store.get_with_seen(user_id)
                assert found is not None
                counts.add(found[0].event_count)
                assert int(found[0].record.split()[0]) == found[0].event_count
                items, timestamps = store.history(user_id)
                assert timestamps.tolist() == list(range(found[0].event_count))
                assert set(found[1].tolist()) == set(items.tolist())
            assert len(counts) == 1
            assert acknowledged <= counts.pop() <= acknowledged + 3  # at most the commit that was not answered
    assert problems(tmp_path / "state") == []


CREATE = """
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with StateStore.open(sys.argv[1], bundle_id=sys.argv[2], item_ids=ITEM_IDS) as store:
            print(store.bundle_id, len(store.item_ids))
    except StoreMismatchError:
        print("mismatch")
"""


def test_processes_that_create_a_store_at_once_agree_on_one(tmp_path: Path) -> None:
    processes = [start(CREATE, tmp_path / "state", bundle) for bundle in ("one", "one", "two", "two")]
    release(processes)
    said = [finish(process).strip() for process in processes]
    assert sorted(said) in (["mismatch", "mismatch", f"{name} 100", f"{name} 100"] for name in ("one", "two"))


FORK = """
    store = StateStore.open(sys.argv[1], bundle_id="bundle-1", item_ids=ITEM_IDS)
    if os.fork() == 0:
        for call in (lambda: store.get("a"), lambda: store.commit([]), lambda: store.delete("a"), store.flush,
                     lambda: list(store.user_ids())):
            try:
                call()
            except StoreError as error:
                print(error, flush=True)
        store.close()
        os._exit(0)
    os.wait()
    print(store.commit([Write("a", 0, b"", np.array([1]), np.array([1]))]), store.get("a").event_count)
"""


def test_store_refuses_to_work_in_a_forked_child_and_goes_on_in_the_parent(tmp_path: Path) -> None:
    *child, parent = finish(start(FORK, tmp_path / "state")).splitlines()
    assert len(child) == 5 and all("opened before a fork" in line for line in child)
    assert parent == "True 1"


INSPECT = """
    print(read_store_info(sys.argv[1]))
    with StateStore.open(sys.argv[1], readonly=True) as store:
        print(store.get("a").record, store.history("a")[0].tolist(), store.item_ids[3], store.stats().map_size)
        for call in (lambda: store.commit([]), lambda: store.delete("a")):
            try:
                call()
            except StoreError as error:
                print(error)
"""


def test_readonly_store_reads_while_a_server_has_it_open(tmp_path: Path) -> None:
    with open_store(tmp_path / "state", map_size=2 * DEFAULT_MAP_SIZE) as store:
        store.commit([write("a", items=[3])])
        info, user, *refused = finish(start(INSPECT, store.path)).splitlines()
    assert info == str(StoreInfo("bundle-1", FORMAT_VERSION, 1))
    assert user == f"b'record' [3] item-3 {2 * DEFAULT_MAP_SIZE}"
    assert len(refused) == 2 and all("read-only" in line for line in refused)


GROW = """
    with StateStore.open(sys.argv[1], bundle_id="bundle-1", item_ids=ITEM_IDS, map_size=64 << 20) as store:
        store.commit([Write("big", 0, bytes(8 << 20), np.array([], int), np.array([], int))])
"""


def test_store_grown_by_another_process_asks_for_one_map_size(tmp_path: Path) -> None:
    with open_store(tmp_path / "state", map_size=MIB) as store:
        store.commit([write("a")])
        finish(start(GROW, store.path))
        with pytest.raises(StoreUnavailableError, match="same --map-size-mib"):
            store.get("a")
    with open_store(tmp_path / "state", map_size=MIB) as store:  # the file is larger: it wins
        assert store.get("a") is not None and store.stats().map_size > 8 * MIB


def test_store_out_of_reader_slots_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MAX_READERS", 1)
    with open_store(tmp_path / "state") as store:
        env = store._environment()
        held = [env.begin() for _ in range(env.max_readers())]
        with pytest.raises(StoreUnavailableError, match="no free reader slot"):
            store.get("a")
        held.clear()
        assert store.get("a") is None


# --- Full ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("record_bytes", "events", "group"), [(10, 5, 64), (500, 300, 4), (20_000, 1, 4)])
def test_full_map_loses_nothing_and_deletions_make_room(
    tmp_path: Path, record_bytes: int, events: int, group: int
) -> None:
    with open_store(tmp_path / "state", map_size=MIB) as store:
        stored: dict[str, bytes] = {}
        with pytest.raises(StoreFullError, match=r"full \(map size 1 MiB\).*--map-size-mib"):
            while True:
                batch = [f"user-{len(stored) + number}" for number in range(group)]
                records = {user_id: user_id.encode() + bytes(record_bytes) for user_id in batch}
                store.commit([write(name, 0, np.arange(events) % 100, record) for name, record in records.items()])
                stored |= records
        assert set(store.user_ids()) == set(stored)
        for user_id, record in stored.items():
            user = store.get(user_id)
            assert user is not None and user.record == record and len(store.history(user_id)[0]) == events
        for user_id in list(stored)[:40]:
            assert store.delete(user_id) == events
        assert store.commit([write("after", record=bytes(record_bytes))])
    assert problems(tmp_path / "state") == []


def test_map_filled_to_the_last_commit_leaves_pages_for_deletions(tmp_path: Path) -> None:
    with open_store(tmp_path / "state", map_size=MIB) as store:
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


LIMITED = """
    import resource
    store = StateStore.open(sys.argv[1], bundle_id="bundle-1", item_ids=ITEM_IDS)
    events = np.arange(3), np.arange(3)
    store.commit([Write(f"old-{number}", 0, bytes(20_000), *events) for number in range(20)])
    limit = (Path(sys.argv[1]) / "data.mdb").stat().st_size + int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
    for _ in range(2):
        try:
            store.commit([Write(f"new-{number}", 0, bytes(20_000), *events) for number in range(40)])
        except StoreFullError as error:
            print(error)
    print(len(list(store.user_ids())), len(store.get("old-7").record), store.history("old-7")[0].tolist())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(store.commit([Write("new-1", 0, bytes(20_000), *events)]), store.get("new-1").event_count)
"""


@pytest.mark.parametrize("room", [0, 50_000])  # the write fails at once (EFBIG), or is cut short (EIO to LMDB)
def test_full_disk_stores_nothing_and_writing_goes_on_when_there_is_room(tmp_path: Path, room: int) -> None:
    *errors, old, new = finish(start(LIMITED, tmp_path / "state", room)).splitlines()
    assert len(errors) == 2 and all("no disk space left" in error for error in errors)
    assert old == "20 20000 [0, 1, 2]"
    assert new == "True 3"
    assert problems(tmp_path / "state") == []


ENTER = """
    import resource
    resource.setrlimit(getattr(resource, sys.argv[2]), (int(sys.argv[3]), resource.RLIM_INFINITY))
    try:
        StateStore.open(sys.argv[1], bundle_id="bundle-1", item_ids=ITEM_IDS)
    except StoreError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("limit", "size", "answer"),
    [("RLIMIT_FSIZE", 0, "StoreFullError .* no disk space"), ("RLIMIT_AS", 32 << 30, ".*; lower --map-size-mib")],
)
def test_open_without_room_for_its_files_says_so(tmp_path: Path, limit: str, size: int, answer: str) -> None:
    assert re.match(answer, finish(start(ENTER, tmp_path / "state", limit, size)))


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_open_refuses_the_store_of_another_bundle(store: StateStore) -> None:
    store.commit([write("a", items=[1])])
    store.close()
    with pytest.raises(StoreMismatchError, match=r"bundle-1.*bundle-2.*import") as caught:
        open_store(store.path, bundle_id="bundle-2")
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreMismatchError, match=r"100 items.*99"):
        open_store(store.path, item_ids=ITEM_IDS[:99])
    with StateStore.open(store.path) as same:
        assert (same.bundle_id, same.item_ids, same.get("a")) == ("bundle-1", tuple(ITEM_IDS), same.get("a"))
        assert same.delete("a") == 1


def test_open_refuses_another_format_version(store: StateStore) -> None:
    info = json.dumps({"format_version": FORMAT_VERSION + 1, "bundle_id": "bundle-1", "item_count": 100}).encode()
    with store._write() as txn:
        txn.put(b"info", info, db=store._dbs.meta)
    store.close()
    for opening in (lambda: open_store(store.path), lambda: read_store_info(store.path)):
        with pytest.raises(StoreMismatchError, match=f"format version {FORMAT_VERSION + 1}, not {FORMAT_VERSION}"):
            opening()


def test_open_refuses_the_database_of_another_program_and_leaves_it_alone(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), lib_version=0) as env, env.begin(write=True) as txn:
        txn.put(b"theirs", b"value")
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(StoreMismatchError, match="another program"):
        open_store(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == before


def test_open_without_a_bundle_creates_nothing(tmp_path: Path) -> None:
    for options in ({}, {"readonly": True}, {"bundle_id": "bundle-1", "readonly": True}):
        with pytest.raises(StoreUnavailableError, match="does not exist"):
            StateStore.open(tmp_path / "state", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        read_store_info(tmp_path / "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("content", [b"hello", b"\0" * 8192, bytes(range(256)) * 256])
def test_open_refuses_garbage_and_leaves_it_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    for readonly in (False, True):
        with pytest.raises(StoreUnavailableError, match=r"corrupted .*restore a backup"):
            open_store(tmp_path, readonly=readonly)
    assert [path.name for path in tmp_path.iterdir()] == ["data.mdb"]
    assert (tmp_path / "data.mdb").read_bytes() == content


@pytest.mark.parametrize("kept", [5000, 8192, 40_000, -4096])
def test_open_refuses_a_truncated_file_instead_of_crashing(store: StateStore, kept: int) -> None:
    store.commit([write(f"u{number}", items=[1], record=bytes(20_000)) for number in range(20)])
    store.close()
    data = store.path / "data.mdb"
    os.truncate(data, kept if kept > 0 else data.stat().st_size + kept)
    for readonly in (False, True):
        with pytest.raises(StoreUnavailableError, match="corrupted"):
            open_store(store.path, readonly=readonly)


def test_open_refuses_the_format_of_lmdb_1(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), lib_version=1) as env, env.begin(write=True) as txn:
        txn.put(b"key", b"value")
    with pytest.raises(StoreUnavailableError, match=r"format of LMDB 0\.9"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("database", "value"),
    [
        ("state", b"short"),
        ("state", bytes(8) + b"\5" + bytes(20)),
        ("seen", b""),
        ("seen", b"\7"),
        ("seen", b"\1\0"),
        ("history", b"short"),
    ],
)
def test_unreadable_value_is_reported_as_corruption(store: StateStore, database: str, value: bytes) -> None:
    store.commit([write("a", items=[1] * CHUNK_EVENTS)])
    key = b"a\0\0\0\0\0" if database == "history" else b"a"
    with store._write() as txn:
        txn.put(key, value, db=getattr(store._dbs, database))
    with pytest.raises(StoreUnavailableError, match="corrupted"):
        store.get_with_seen("a")
        store.history("a")


def test_open_refuses_a_path_that_cannot_be_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StoreUnavailableError, match="is a file"):
        open_store(tmp_path / "file")
    for path in (tmp_path / "file" / "state", Path("/proc/state"), Path("/proc/self")):
        with pytest.raises(StoreUnavailableError) as caught:
            open_store(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_store_opens_once_in_a_process(store: StateStore) -> None:
    with pytest.raises(StoreUnavailableError, match="already open in this process"):
        open_store(store.path)
    assert store.commit([write("a")])  # and the first one still works


def test_closed_store_says_so(store: StateStore) -> None:
    store.flush()
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.get("a")
    with pytest.raises(StoreError, match="is closed"):
        store.commit([write("a")])
