"""Deleted means deleted: after a compaction no byte of who has gone is found, and all others are as they were."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lmdb
import numpy as np
import pytest
from contract.processes import finish, release, say, start

from dman_runtime.cli import main
from dman_runtime.data.added_items import AddedItem
from dman_runtime.errors import StoreDamagedError, StoreMismatchError, StoreUnavailableError, UsageError
from dman_runtime.jobs import backup as backup_module
from dman_runtime.jobs import compacting
from dman_runtime.jobs.backup import backup, restore
from dman_runtime.jobs.compacting import compact
from dman_runtime.jobs.verifying import verify_store
from dman_runtime.presence import Presence, Present
from dman_runtime.store import lmdb_compact
from dman_runtime.store.base import IdTypes, Step, Write
from dman_runtime.store.catalogue import Addition
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_layout import pack_info, read_info, write_info
from dman_runtime.store.rollout import Rollout

GONE, RARE = "who-has-gone-7q", "rare-item-of-one-user-7q"
PRODUCER = 77
USERS = ["none", "few", "some", "many"]
COUNTS = dict(zip([*USERS, GONE], (0, 5, 40, 300, 100), strict=True))
ITEMS = [f"item {number}" for number in range(60)]
MAP = 64 << 20


def fill(path: Path) -> None:
    """Users of three generations with request ids in heads and beside them, items that nobody has, and a deletion."""
    with LmdbStore.open(path, map_size=MAP) as store:
        numbers = store.add_items([*ITEMS[:30], RARE, *ITEMS[30:], "only shown", "only added"])
        common = np.delete(numbers, [30, 7, 61, 62])  # item 7: only the bundle would know it
        for bundle in ("first", "second", "third"):
            store.add_generation(bundle)
        store.set_rollout(Rollout(1, "second", bundles={"first": "/1", "second": "/2"}))
        store.switch_items([60, 3], off=True)  # 60: nobody has it
        store.append_additions([Addition(62, AddedItem("A title", like=(ITEMS[0],)))])
        store.remember_id_types(IdTypes("text", "text"))
        for round_ in range(3):
            for user, count in COUNTS.items():
                (stored,) = store.get_many([user], 1)
                events = common[: len(common) - 1][np.arange(round_ * count, (round_ + 1) * count) % (len(common) - 1)]
                if user == GONE and count:
                    events[::9] = numbers[30]
                records = {generation: f"{user} {generation} {round_}".encode() * 40 for generation in (1, 2, 3)}
                ids = range(round_ * 15, round_ * 15 + 15)
                version = stored.head.version if stored else 0
                steps = {PRODUCER: Step(round_ - 1 if round_ else None, round_)}
                shown = (numbers[[61, 30 if user == GONE else 3]], np.full(2, 3600))
                write = Write(user, version, records, events, np.arange(count), list(ids), sequences=steps, shown=shown)
                assert store.commit([write]) == []
        assert store.delete(GONE) == 3 * COUNTS[GONE]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    fill(tmp_path / "state")
    return tmp_path / "state"


def content(path: Path) -> dict[str, Any]:
    """All that the store says, but for items that no history has."""
    with LmdbStore.open(path, readonly=True) as store, store.snapshot() as snapshot:
        found = {user: [part.tolist() for part in snapshot.history(user)] for user in store.scan()}
        return {
            "users": {number: snapshot.get_many([*COUNTS, "nobody"], number) for number in (1, 2, 3)},
            "histories": found,
            "items": {user: snapshot.item_ids(items) for user, (items, _) in found.items()},
            "seen": [snapshot.seen(user).tolist() for user in COUNTS],
            "applied": [snapshot.applied(user, range(100)) for user in [*COUNTS, "nobody"]],
            "shown": [[part.tolist() for part in snapshot.shown(user)] for user in [*COUNTS, "nobody"]],
            "sequences": [snapshot.sequences(user, [PRODUCER, 1]) for user in [*COUNTS, "nobody"]],
            "meta": (store.generations(), store.rollout(), store.id_types()),
            "catalogue": (store.catalogue().revision, store.catalogue().off.tolist(), store.catalogue().added),
        }


def found_in(folder: Path, text: str) -> list[str]:
    """The files below a folder that have a text in their bytes or their names."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return [file.name for file in files if text.encode() in file.read_bytes() or text in str(file)]


def leftovers(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if file.name not in ("data.mdb", "lock.mdb"))


def test_nothing_of_a_deleted_user_is_found_and_all_else_is_as_it_was(state: Path, tmp_path: Path) -> None:
    before = content(state)
    assert found_in(state, GONE) == found_in(state, RARE) == ["data.mdb"]  # what was freed is still there
    backup(state, tmp_path / "backup before")
    assert found_in(tmp_path / "backup before", RARE) == ["data.mdb"]

    result = compact(state, map_size=MAP)
    assert found_in(state, GONE) == found_in(state, RARE) == []
    assert content(state) == before and before["applied"][4] == set(range(45))
    assert before["sequences"] == [{PRODUCER: 2}] * len(COUNTS) + [{}]
    assert before["shown"][0][0] == [61, 3] and before["shown"][4:] == [[[], []]] * 2
    assert result.freed_items == 2 and result.counts["items"] == len(ITEMS) + 1
    assert result.bytes == (state / "data.mdb").stat().st_size < result.bytes_before
    assert verify_store(state).sound and leftovers(state) == []
    assert (state / "data.mdb").stat().st_mode & 0o777 == 0o600

    backup(state, tmp_path / "backup")
    assert found_in(tmp_path / "backup", GONE) == found_in(tmp_path / "backup", RARE) == []
    assert content(tmp_path / "backup") == before


def test_late_retry_of_a_deleted_user_brings_nobody_back(state: Path) -> None:
    compact(state, map_size=MAP)
    none = np.zeros(0, np.int64)
    with LmdbStore.open(state, map_size=MAP) as store:
        assert store.applied(GONE, [0, 44, 45]) == {0, 44}
        assert store.commit([Write(GONE, 0, {}, none, none, [44])]) == [GONE]
        assert store.commit([Write(GONE, 0, {}, none, none, [45])]) == []  # a new life, which knows of the old one
        assert store.applied(GONE, range(100)) == set(range(46))


def without_hashes(path: Path) -> None:
    """Makes what an earlier release would have made: the ids of users are in the keys of request ids."""

    def write_older_info(txn: lmdb.Transaction, meta: lmdb._Database) -> None:
        write_info(txn, meta)
        info = read_info(txn, meta)
        txn.put(b"info", pack_info({name: value for name, value in info.items() if name != "hashed_owners"}), db=meta)

    with patch("dman_runtime.store.environment.write_info", write_older_info):
        fill(path)


def test_request_ids_of_an_earlier_release_are_kept_without_the_ids_of_users(tmp_path: Path) -> None:
    state = tmp_path / "state"
    without_hashes(state)
    before = content(state)
    with LmdbStore.open(state, readonly=True) as store, store.snapshot() as snapshot:
        keys = [bytes(key) for key, _ in snapshot.txn.cursor(db=store._databases.requests)]
    assert sum(GONE.encode() in key for key in keys) == 45 and verify_store(state).sound
    compact(state, map_size=MAP)
    assert found_in(state, GONE) == found_in(state, RARE) == []
    assert content(state) == before and verify_store(state).sound
    compact(state, map_size=MAP)
    assert content(state) == before


def test_freed_numbers_are_given_to_new_items(state: Path) -> None:
    compact(state, map_size=MAP)
    with LmdbStore.open(state, map_size=MAP) as store:
        assert store.find_items([RARE, "item 7", "item 8"]).tolist() == [-1, -1, 8]
        assert store.stats().items == 61
        with pytest.raises(StoreDamagedError, match="without an id"):
            store.item_ids([30])
        assert store.add_items(["item 8", "new", "other", "third", "fourth", "new"]).tolist() == [8, 7, 30, 63, 64, 7]
        assert store.item_ids([7, 8, 30, 60, 63]) == ["new", "item 8", "other", "item 59", "third"]
        assert store.stats().items == 65
    assert verify_store(state).problems == ()
    freed = compact(state, map_size=MAP).freed_items
    assert freed == 4 and verify_store(state).counts["items"] == 61


def test_free_number_that_is_damaged_is_found(state: Path) -> None:
    compact(state, map_size=MAP)
    with LmdbStore.open(state, map_size=MAP) as store, store._env.write() as txn:
        assert txn.delete(b"\0\0\0\0\x1e", db=store._databases.item_numbers)
    assert verify_store(state).problems == ("item 0000001e: the item has no number, or another one",)


@pytest.mark.parametrize("how", ["compacted", "restored"])
def test_versions_go_on(state: Path, tmp_path: Path, how: str) -> None:
    """A version never comes again: LMDB counts the transactions of a copy from one."""
    with LmdbStore.open(state, map_size=MAP) as store:
        none = np.zeros(0, np.int64)
        store.commit([Write("later", 0, {}, none, none)])
        (stored,) = store.get_many(["later"], 1)
        assert stored is not None
        last = stored.head.version
        store.delete("later")
    if how == "compacted":
        compact(state, map_size=MAP)
    else:
        backup(state, tmp_path / "backup")
        shutil.rmtree(state)
        restore(tmp_path / "backup", state)
    with LmdbStore.open(state, map_size=MAP) as store:
        for number in range(3):
            (before,) = store.get_many(["few"], 1)
            assert before and store.commit([Write("few", before.head.version, {}, none, none, [number])]) == []
            (after,) = store.get_many(["few"], 1)
            assert after and after.head.version > last
            last = after.head.version
    assert verify_store(state).sound


def test_empty_store_can_be_compacted(tmp_path: Path) -> None:
    LmdbStore.open(tmp_path / "state", map_size=MAP).close()
    assert compact(tmp_path / "state", map_size=MAP).counts["users"] == 0
    with LmdbStore.open(tmp_path / "state", map_size=MAP) as store:
        assert store.add_items(["a"]).tolist() == [0]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_store_that_a_server_uses_is_left_alone(state: Path) -> None:
    before = (state / "data.mdb").read_bytes()
    presence = Presence(state)
    presence.tell(Present(4711, "bundle", "/bundle"))
    with pytest.raises(UsageError, match="server processes 4711 use"):
        compact(state, map_size=MAP)
    presence.close()
    process = start(OPEN, state)
    release([process])
    with pytest.raises(StoreUnavailableError, match=r"other processes have the state store .* open; stop them"):
        compact(state, map_size=MAP)
    assert finish(process) == ""
    assert (state / "data.mdb").read_bytes() == before and leftovers(state) == ["workers"]


OPEN = """
with LmdbStore.open(sys.argv[1], map_size=64 << 20):
    print("ready", flush=True)
    sys.stdin.readline()
    sys.stdin.readline()
"""


def test_damaged_store_is_left_alone(state: Path) -> None:
    with LmdbStore.open(state, map_size=MAP) as store, store._env.write() as txn:
        txn.put(b"some\0\0\0\0\2", b"damage", db=store._databases.users)
    before = (state / "data.mdb").read_bytes()
    with pytest.raises(StoreDamagedError, match="a record is not the one of its key"):
        compact(state, map_size=MAP)
    assert (state / "data.mdb").read_bytes() == before and leftovers(state) == []
    with LmdbStore.open(state, map_size=MAP) as store, store._env.write() as txn:
        txn.put(b"some\0\0\0\0\0", b"damage", db=store._databases.users)
    with pytest.raises(StoreDamagedError, match=f"{state} is corrupted .a user's head"):
        compact(state, map_size=MAP)
    assert leftovers(state) == []


def test_part_that_this_release_does_not_know_is_not_lost(state: Path) -> None:
    with lmdb.open(str(state), map_size=MAP, max_dbs=20, lib_version=0) as env:
        env.open_db(b"of tomorrow")
    with pytest.raises(StoreMismatchError, match="parts of another release: of tomorrow; compact it with that"):
        compact(state, map_size=MAP)
    assert leftovers(state) == []


def test_missing_store_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        compact(tmp_path / "state", map_size=MAP)
    assert list(tmp_path.iterdir()) == []


# -- others meanwhile --------------------------------------------------------------------------------------------------


OPEN_MEANWHILE = """
print("ready", flush=True)
sys.stdin.readline()
with LmdbStore.open(sys.argv[1], map_size=64 << 20) as store:
    number = int(store.add_items(["later"])[0])
    store.check()
print(number)
"""


def test_process_that_opens_the_store_meanwhile_waits_for_the_new_one(state: Path) -> None:
    process = start(OPEN_MEANWHILE, state)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    replace = compacting._replace

    def late(state: Path, partial: Path) -> None:
        say(process, "")
        time.sleep(1.5)  # it has the old file open, and waits for the lock
        replace(state, partial)

    with patch.object(compacting, "_replace", late):
        compact(state, map_size=MAP)
    assert finish(process) == "7\n"  # a number that the compaction has freed
    assert verify_store(state).sound


class Killed(BaseException):
    pass


@contextmanager
def dying_at(step: int) -> Iterator[list[str]]:
    """Ends the process, in effect, before one of the steps; the list names those that were begun."""
    steps: list[str] = []

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            steps.append(name)
            if len(steps) > step:
                raise Killed
            return call(*arguments, **options)

        return wrapper

    with patch.object(backup_module.shutil, "rmtree", lambda *_, **__: None):  # a killed process does not clean up
        places = [
            (lmdb_compact._Copy, "put_items"), (lmdb_compact._Copy, "put_unchanged"), (lmdb_compact._Copy, "put_meta"),
            (backup_module, "sync"), (backup_module, "verify_store"), (compacting, "sync"),
            (compacting.Path, "replace"), (compacting.Path, "unlink"),
        ]  # fmt: skip
        patches = [patch.object(place, name, wrapped(name, getattr(place, name))) for place, name in places]
        for one in patches:
            one.start()
        try:
            yield steps
        finally:
            for one in patches:
                one.stop()


def test_death_at_any_step_leaves_the_old_store_or_the_new_one(state: Path) -> None:
    before, outcomes, step = content(state), [], 0
    while True:
        with dying_at(step) as steps:
            try:
                compact(state, map_size=MAP)
            except Killed:
                pass
            else:
                break
        outcomes.append((steps[-1], bool(found_in(state, RARE))))
        assert content(state) == before
        with LmdbStore.open(state, map_size=MAP) as store:  # and it can be written to
            assert store.add_items(["item 1"]).tolist() == [1]
        step += 1
    assert ("replace", True) in outcomes and outcomes[-1] == ("sync", False)
    assert leftovers(state) != []
    compact(state, map_size=MAP)
    assert found_in(state, RARE) == found_in(state, GONE) == [] and leftovers(state) == []
    assert content(state) == before and step > 10


def test_command_says_what_was_done(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compact", "--state", str(state), "--json"]) == 0
    text, last = capsys.readouterr().out.strip().splitlines()
    assert text.startswith(f"compacted {state}: 0.1 MB instead of ")
    assert "items that no history has: 2 removed; read back: 3 generations, 61 items" in text
    assert json.loads(last)["freed_items"] == 2
