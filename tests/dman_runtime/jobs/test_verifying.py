"""`verify` finds nothing in a sound store, and names what is damaged in any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from contract.processes import finish, start

from dman_runtime.data.added_items import AddedItem
from dman_runtime.data.ids import INTEGER, TEXT
from dman_runtime.errors import StoreUnavailableError
from dman_runtime.jobs.verifying import format_report, verify_store
from dman_runtime.store import lmdb_verify
from dman_runtime.store.base import IdTypes, Step, Write
from dman_runtime.store.catalogue import Addition
from dman_runtime.store.history import CHUNK_EVENTS, StoredHead, add_seen, pack_head, seed_of, unpack_head, unpack_seen
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_layout import user_hash
from dman_runtime.store.rollout import Rollout

EVENTS = 2 * CHUNK_EVENTS + 3
USERS = ("a", "b", "no events")


def events_of(user_id: str) -> np.ndarray:
    return np.arange(0 if user_id == "no events" else EVENTS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with three users, their records and request ids."""
    with LmdbStore.open(tmp_path / "state", map_size=64 << 20) as store:
        store.add_items([f"item-{number}" for number in range(100)])
        store.switch_items([7, 8], off=True)
        store.append_additions([Addition(9, AddedItem("New"))])
        store.add_generation("bundle")
        store.remember_id_types(IdTypes(TEXT, INTEGER))
        store.set_rollout(Rollout(1, "bundle", bundles={"bundle": "/bundle"}))
        for user_id in (*USERS, "deleted"):
            events = events_of(user_id)
            records, steps = {1: b"one", 2: bytes(9000)}, {7: Step(None, 5)} if len(events) else {}
            store.commit([Write(user_id, 0, records, events, events, range(40), sequences=steps)])
        store.delete("deleted")
    return tmp_path / "state"


def put(path: Path, database: str, key: bytes, change: Callable[[bytes], bytes | None]) -> None:
    with LmdbStore.open(path, map_size=64 << 20) as store, store._env.write() as txn:
        handle = getattr(store._databases, database)
        value = change(bytes(txn.get(key, b"", db=handle)))
        if value is None:
            assert txn.delete(key, db=handle)
        else:
            txn.put(key, value, db=handle)


def flipped(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])


def removed(value: bytes) -> None:
    assert value


def with_more_events(value: bytes) -> bytes:
    """A head with the right checksum that counts another chunk."""
    stored = unpack_head(value, seed_of(b"a"), False)
    head = stored.head._replace(history_count=stored.head.history_count + CHUNK_EVENTS)
    return pack_head(StoredHead(head, stored.tail, stored.recent_ids, stored.spilled), seed_of(b"a"))


def test_sound_store_is_sound_and_counted(path: Path) -> None:
    before = (path / "data.mdb").read_bytes()
    report = verify_store(path)
    assert report.problems == () and report.sound and report.exit_status == 0
    assert report.counts == {
        "generations": 1, "items": 100, "items_off": 2, "items_added": 1, "users": 3, "events": 2 * EVENTS,
        "records": 6, "seen_sets": 2, "users_shown_items": 0, "request_ids": 3 * 24 + 40, "producers": 3,
        "records_lacking_late_events": 0,
    }  # fmt: skip
    assert format_report(report).splitlines()[-1] == f"the state store {path} is sound"
    assert json.loads(json.dumps(report.as_dict()))["sound"] is True
    assert (path / "data.mdb").read_bytes() == before


def test_empty_store_is_sound(tmp_path: Path) -> None:
    LmdbStore.open(tmp_path / "state").close()
    assert verify_store(tmp_path / "state").sound


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        verify_store(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


HEAD, CHUNK_1 = b"a" + bytes(5), b"a\0\0\0\0\1"
DAMAGE: dict[str, tuple[str, bytes, Callable[[bytes], bytes | None], str]] = {
    "generations": ("meta", b"generations", flipped, "meta: the list of generations is damaged"),
    "id types": ("meta", b"id_types", flipped, "meta: the entry that says what the ids are is damaged"),
    "roll-out": ("meta", b"rollout", flipped, "meta: the entry that says which bundles serve is damaged"),
    "item": ("items", b"\0\0\0\7", flipped, "item 00000007: an entry of the item table is damaged"),
    "switched item": ("catalogue", b"o\0\0\0\7", flipped, "catalogue entry 6f00000007: an entry of the catalogue is"),
    "missing switch": ("catalogue", b"o\0\0\0\7", removed, "catalogue: the catalogue does not hold the items it count"),
    "added item": ("catalogue", b"a\0\0\0\0", flipped, "catalogue entry 6100000000: an entry of the catalogue is"),
    "missing addition": ("catalogue", b"a\0\0\0\0", removed, "catalogue: the catalogue does not hold the items it c"),
    "revision": ("catalogue", b"r", flipped, "catalogue: the revision of the catalogue is damaged"),
    "missing item": ("items", b"\0\0\0\7", removed, "item 7 is missing"),
    "item number": ("item_numbers", b"item-7", flipped, "item item-7: an entry of the item table is damaged"),
    "missing item number": ("item_numbers", b"item-7", removed, "item 00000007: the item has no number"),
    "head": ("users", HEAD, flipped, r"entry a\x00\x00\x00\x00\x00: a user's head is damaged"),
    "missing head": ("users", HEAD, removed, r"entry a\x00\x00\x00\x00\x01: a record of a user without a head"),
    "head that counts more": ("users", HEAD, with_more_events, "events from 64: a piece of the history is missing"),
    "record": ("users", b"a\0\0\0\0\1", lambda value: b"\0" + value[1:], "a record is not the one of its key"),
    "shorter record": ("users", b"a\0\0\0\0\2", lambda value: value[:-1], "a record is not the one of its key"),
    "chunk": ("history", CHUNK_1, flipped, "user 'a', events from 32: a piece of a history is damaged"),
    "missing chunk": ("history", CHUNK_1, removed, "user 'a', events from 32: a piece of the history is missing"),
    "another chunk": ("history", b"a\0\0\0\0\2", lambda _: b"more", "'a': there are more events than the head counts"),
    "chunk of nobody": ("history", b"c\0\0\0\0\1", lambda _: b"chunk", "it belongs to a user without a head"),
    "seen": ("seen", b"a", flipped, "user 'a': a set of seen items is damaged"),
    "missing seen": ("seen", b"a", removed, "user 'a': the set of seen items is missing"),
    "seen of nobody": ("seen", b"c", lambda _: b"seen", "entry c: it belongs to a user without a head"),
    "seen of no chunk": ("seen", b"no events", lambda _: b"seen", "or there should be none"),
    "strange key": ("users", b"short", lambda _: b"value", "entry short: a key of a user is damaged"),
    "request id": ("requests", b"\0\0\0\1a\0" + bytes(8), lambda _: b"1234", "it is damaged"),
}  # fmt: skip


def test_every_piece_of_a_history_may_be_damaged(path: Path) -> None:
    for chunk in range(2):
        put(path, "history", b"a\0\0\0\0" + bytes([chunk]), flipped)
    report = verify_store(path)
    assert [problem for problem in report.problems if "user 'a'" in problem] == [
        "user 'a', events from 0: a piece of a history is damaged",
        "user 'a', events from 32: a piece of a history is damaged",
    ]


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(path: Path, name: str) -> None:
    database, key, change, expected = DAMAGE[name]
    put(path, database, key, change)
    report = verify_store(path)
    assert not report.sound and report.exit_status == 1
    assert any(expected in problem for problem in report.problems), report.problems
    *lines, last = format_report(report).splitlines()
    assert last.startswith(f"the state store {path} is damaged (") and last.endswith("; restore a backup")
    assert set(report.problems) <= set(lines)
    assert not any("'b'" in problem for problem in report.problems)  # nobody else is concerned


def test_damaged_sequences_of_a_producer_are_found(path: Path) -> None:
    with LmdbStore.open(path, readonly=True) as store:
        key = user_hash(b"a", store._env.store_id)
    put(path, "producers", key, flipped)
    problem = f"entry {key.hex()}: the sequences of a user's producers are damaged"
    assert verify_store(path).problems == (problem,)
    put(path, "producers", key, flipped)
    put(path, "producers", b"another key 1234", lambda _: bytes(20))
    assert [text.partition(": ")[2] for text in verify_store(path).problems] == [problem.partition(": ")[2]]


def test_seen_set_of_other_items_is_found(path: Path) -> None:
    with LmdbStore.open(path, map_size=64 << 20) as store, store._env.write() as txn:
        value = bytes(txn.get(b"a", db=store._databases.seen))
        other = unpack_seen(value, seed_of(b"a"), False)[:-1]
        less = add_seen(None, other, seed_of(b"a"), False)
        assert less is not None
        txn.put(b"a", less, db=store._databases.seen)
    assert verify_store(path).problems == ("user 'a': the set of seen items is not that of the history",)


def test_damaged_pages_are_found_and_their_values_not_read(path: Path) -> None:
    data = bytearray((path / "data.mdb").read_bytes())
    for page in range(2, len(data) // 4096):
        if b"item-50" in data[page * 4096 : page * 4096 + 4096]:
            data[page * 4096 + 10] ^= 0x40  # its flags
    (path / "data.mdb").write_bytes(data)
    report = verify_store(path)
    assert not report.sound and report.counts == {} and report.problems[0].startswith("data.mdb: ")
    assert "the values were not read" in format_report(report)


def test_many_problems_are_counted_and_the_first_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LmdbStore.open(path, map_size=64 << 20) as store, store._env.write() as txn:
        for number in range(300):
            txn.put(b"x%d" % number, b"seen", db=store._databases.seen)
    report = verify_store(path)
    assert report.problem_count == 300 and len(report.problems) == 100
    assert "and 200 more" in format_report(report).splitlines()


@pytest.mark.parametrize("piece", [1, 2, 7])
def test_pieces_of_any_size_give_the_same(path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    whole = verify_store(path)
    monkeypatch.setattr(lmdb_verify, "_PIECE", piece)
    assert verify_store(path) == whole


BUSY = """
with LmdbStore.open(sys.argv[1], map_size=64 << 20) as store:
    items = store.add_items([f"item-{number}" for number in range(100)])
    print("ready", flush=True)
    number = 0
    while number <= 20 or not os.path.exists(sys.argv[1] + "/stop"):
        user = f"busy-{number % 7}"
        (found,) = store.get_many([user], 1)
        if number % 10 == 9:
            store.delete(user)
        else:
            times = np.arange(20)
            records = {1: bytes(number % 9000)}
            store.commit([Write(user, found.head.version if found else 0, records, items[:20], times, [number])])
        number += 1
    print(number)
"""


@pytest.mark.slow
def test_store_that_a_server_writes_to_is_sound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(BUSY, path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    monkeypatch.setattr(lmdb_verify, "_PIECE", 5)
    for _ in range(20):
        assert verify_store(path).problems == ()
    assert process.poll() is None, "it stopped before the checks did"
    (path / "stop").touch()
    assert int(finish(process)) > 20


def test_verifying_leaves_no_file_in_a_copy(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "data.mdb").write_bytes((path / "data.mdb").read_bytes())
    assert verify_store(copy).sound
    assert [file.name for file in copy.iterdir()] == ["data.mdb"]
    with LmdbStore.open(copy, map_size=64 << 20) as store:  # whoever uses it keeps the lock
        store.check()
        lock = (copy / "lock.mdb").stat().st_ino
        reader = start(READ, copy)
        assert finish(reader) == "3\n"
        store.check()
        assert (copy / "lock.mdb").stat().st_ino == lock


READ = """
with LmdbStore.open(sys.argv[1], readonly=True) as store:
    print(len(list(store.scan())))
"""
