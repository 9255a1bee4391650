"""How LMDB is used: which B-trees a call touches, and what damaged values do. The promises are in `tests/contract`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from dman_runtime.data.ids import INTEGER, TEXT
from dman_runtime.errors import StoreDamagedError
from dman_runtime.store import changes, files, lmdb_reads
from dman_runtime.store import lmdb as lmdb_module
from dman_runtime.store.base import IdTypes, Write
from dman_runtime.store.history import CHUNK_EVENTS, pack_record, seed_of
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_layout import Databases, pack_text


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStore]:
    """With the items item-0 to item-99, numbered 0 to 99."""
    with LmdbStore.open(tmp_path / "state") as opened:
        opened.add_items([f"item-{number}" for number in range(100)])
        yield opened


def write(user_id: str, expected_version: int = 0, items: Any = (), records: dict[int, bytes] | None = None) -> Write:
    times = 1000 + np.arange(len(items))
    return Write(user_id, expected_version, records or {1: b"record"}, np.array(items, np.uint32), times)


def version_of(store: LmdbStore, user_id: str) -> int:
    (stored,) = store.get_many([user_id], 1)
    return stored.head.version if stored else 0


def contents(store: LmdbStore) -> dict[str, dict[bytes, bytes]]:
    """Every key and value of every database."""
    with store._env.read() as reading:
        return {
            name: {bytes(key): bytes(value) for key, value in reading.txn.cursor(db=database)}
            for name, database in store._env.databases.items()
        }


def put(store: LmdbStore, database: str, key: bytes, value: bytes | None) -> None:
    """Damages a value, or removes it."""
    with store._env.write() as txn:
        if value is None:
            assert txn.delete(key, db=store._env.databases[database])
        else:
            txn.put(key, value, db=store._env.databases[database])


HEAD, RECORD = b"\0" + bytes(4), b"\0\0\0\0\1"
CHUNK = HEAD  # the first
EVENTS = np.arange(1), np.arange(1)


@pytest.mark.slow
def test_append_to_a_long_history_changes_users_alone_until_a_chunk_is_full(store: LmdbStore) -> None:
    items = np.arange(100_000) % 90
    store.commit([write("long", items=items), write("other", items=items[:300])])
    before = contents(store)

    def changed() -> dict[str, set[bytes]]:
        after = contents(store)
        changes = {name: {k for k in after[name] if after[name][k] != before[name].get(k)} for name in before}
        return {name: keys for name, keys in changes.items() if keys}

    chunk, filled = divmod(100_000, CHUNK_EVENTS)
    for number in range(filled, CHUNK_EVENTS - 1):
        store.commit([write("long", version_of(store, "long"), [90 + number % 10], {1: b"%d" % number})])
        assert changed() == {"users": {b"long" + HEAD, b"long" + RECORD}}
    store.commit([write("long", version_of(store, "long"), [7], {2: b"other generation"})])
    new_keys = {b"long\0" + chunk.to_bytes(4, "big")}
    users = {b"long" + HEAD, b"long" + RECORD, b"long\0\0\0\0\2"}
    assert changed() == {"users": users, "seen": {b"long"}, "history": new_keys}
    assert store.history("long", 99_999)[0].tolist()[-2:] == [90 + (CHUNK_EVENTS - 2) % 10, 7]


def test_commit_of_seen_items_leaves_the_seen_set_alone(store: LmdbStore) -> None:
    store.commit([write("a", items=[5] * CHUNK_EVENTS)])
    before = contents(store)["seen"]
    puts: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        original = changes.add_seen
        patch.setattr(changes, "add_seen", lambda *args: puts.append(original(*args)) or puts[-1])
        store.commit([write("a", version_of(store, "a"), [5] * CHUNK_EVENTS)])
    assert puts == [None]
    assert contents(store)["seen"] == before


@pytest.mark.parametrize(
    ("start", "stop", "chunks"),
    [
        (0, 1, [0]),
        (CHUNK_EVENTS - 1, CHUNK_EVENTS + 1, [0, 1]),
        (CHUNK_EVENTS, 2 * CHUNK_EVENTS, [1]),
        (9 * CHUNK_EVENTS + 1, None, [9]),
        (10 * CHUNK_EVENTS, None, []),
        (10 * CHUNK_EVENTS - 1, 10 * CHUNK_EVENTS, [9]),
        (5, 5, []),
        (10 * CHUNK_EVENTS + 2, None, []),
        (0, None, [*range(10)]),
    ],
)
def test_history_reads_only_the_chunks_it_needs(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch, start: int, stop: int | None, chunks: list[int]
) -> None:
    store.commit([write("long", items=np.arange(10 * CHUNK_EVENTS + 2) % 100)])
    read: list[int] = []
    original = lmdb_reads.read_chunk

    def spy(txn: lmdb.Transaction, databases: Databases, user: bytes, seed: int, chunk: int) -> Any:
        read.append(chunk)
        return original(txn, databases, user, seed, chunk)

    monkeypatch.setattr(lmdb_reads, "read_chunk", spy)
    items, _ = store.history("long", start, stop)
    assert items.tolist() == (np.arange(10 * CHUNK_EVENTS + 2) % 100)[start:stop].tolist()
    assert read == chunks


def test_delete_leaves_no_key_of_the_user_and_nothing_else_changed(store: LmdbStore) -> None:
    records = {1: b"one", 2: b"two", 2**32 - 1: b"last"}
    store.commit([write(user, items=np.arange(600) % 100, records=records) for user in ("a", "ab", "a b", "`", "b")])
    before = contents(store)
    assert store.delete("a") == 600
    for name, values in before.items():
        kept = {key: value for key, value in values.items() if not key.startswith(b"a\0") and key != b"a"}
        assert contents(store)[name] == kept
    assert len(before["users"]) == len(contents(store)["users"]) + 4


def test_refused_commit_changes_no_byte(store: LmdbStore) -> None:
    store.commit([write("a", items=[1]), write("b", items=[2])])
    before = contents(store)
    batch = [write("a", version_of(store, "a"), [4] * 40), write("b", version_of(store, "b") + 1, [3]), write("new")]
    assert store.commit(batch) == store.commit(batch[::-1]) == ["b"]
    with pytest.raises(ValueError, match="item numbers"):
        store.commit([batch[0], write("b", version_of(store, "b"), [100])])
    assert contents(store) == before


def test_scan_holds_no_snapshot_between_users(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_module, "_SCAN_USERS", 3)
    names = [f"u{number}" for number in range(6)]  # a whole number of batches
    store.commit([write(name) for name in names])
    seen = []
    for user_id in store.scan():
        seen.append(user_id)
        snapshots = store._env._environment().readers().splitlines()[1:]
        assert snapshots and all(line.endswith("-") for line in snapshots)
        store.delete(user_id)
    assert seen == names


def test_drop_records_works_in_pieces(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_module, "_DROPPED_PER_COMMIT", 3)
    monkeypatch.setattr(lmdb_module, "_SCAN_USERS", 2)
    store.commit([write(f"u{number}", records={1: b"one", 2: b"two"}) for number in range(7)])
    assert store.drop_records(1) == 7
    assert [stored and stored.record for stored in store.get_many([f"u{number}" for number in range(7)], 1)] == [
        None
    ] * 7
    assert [stored and stored.record for stored in store.get_many(["u0", "u6"], 2)] == [b"two", b"two"]


# -- damage ----------------------------------------------------------------------------------------------------------

READS: dict[str, Callable[[LmdbStore], object]] = {
    "get_many": lambda store: store.get_many(["a"], 1),
    "ranking_view": lambda store: store.ranking_view("a", 1, 10),
    "history": lambda store: store.history("a"),
    "seen": lambda store: store.seen("a"),
    "applied": lambda store: store.applied("a", [1]),
    "commit": lambda store: store.commit([write("a", version_of(store, "a"), [1] * CHUNK_EVENTS)]),
}


@pytest.mark.parametrize(
    ("database", "key", "value", "fails"),
    [
        ("users", b"a" + HEAD, b"", "get_many ranking_view history seen applied commit"),
        ("users", b"a" + HEAD, b"short", "get_many ranking_view history seen applied commit"),
        ("users", b"a" + HEAD, bytes(28), "get_many ranking_view history seen applied commit"),
        ("seen", b"a", b"", "ranking_view seen commit"),
        ("seen", b"a", b"\1\0", "ranking_view seen commit"),
        ("seen", b"a", bytes(9), "ranking_view seen commit"),
        ("history", b"a" + CHUNK, b"short", "history"),
        ("history", b"a" + CHUNK, bytes(12 * CHUNK_EVENTS + 4), "history"),
        ("history", b"a" + CHUNK, None, "history"),
        ("seen", b"a", None, "ranking_view seen commit"),
        ("users", b"a" + HEAD, None, "get_many ranking_view history seen commit"),
    ],
)
def test_damaged_value_is_reported_as_corruption_and_can_be_deleted(
    store: LmdbStore, database: str, key: bytes, value: bytes | None, fails: str
) -> None:
    store.commit([write(user, items=[1] * CHUNK_EVENTS + [2]) for user in ("a", "b")])
    put(store, database, key, value)
    failing = []
    for name, read in READS.items():
        try:
            read(store)
        except StoreDamagedError as error:
            assert error.status == "DATA_LOSS" and "`dman-runtime verify` lists what is damaged" in error.remedy
            assert "corrupted" in str(error) and "restore a backup" in str(error)
            failing.append(name)
    assert failing == fails.split()
    assert store.seen("b").tolist() == [1, 2]  # nobody else is concerned
    assert store.delete("a") is not None
    assert store.get_many(["a"], 1) == [None] and list(store.scan()) == ["b"]
    assert store.commit([write("a", items=[3])]) == []
    assert store.history("a")[0].tolist() == store.seen("a").tolist() == [3]


@pytest.mark.parametrize(
    ("database", "key", "value"),
    [
        ("users", b"a" + RECORD, pack_record(b"x", seed_of(b"a"), 1)),
        ("history", b"a" + CHUNK, b"anything"),
        ("history", b"a\0\0\0\0\7", b"anything"),
        ("seen", b"a", b"anything"),
    ],
)
def test_anything_of_a_user_without_a_head_is_damage_and_never_a_new_user(
    store: LmdbStore, database: str, key: bytes, value: bytes
) -> None:
    put(store, database, key, value)
    for user in ("b", "ab", "`"):
        assert store.get_many([user], 1) == [None] and store.ranking_view(user, 1, 1) is None
    for read in (
        lambda: store.get_many(["a"], 1),
        lambda: store.ranking_view("a", 1, 10),
        lambda: store.history("a"),
        lambda: store.seen("a"),
        lambda: store.commit([write("a", items=[3])]),
    ):
        with pytest.raises(StoreDamagedError, match="corrupted"):
            read()
    assert store.delete("a") is not None  # the way out
    assert store.get_many(["a"], 1) == [None]
    assert store.commit([write("a", items=[3])]) == []


@pytest.mark.parametrize("position", [0, 4, 5])
@pytest.mark.parametrize("bit", range(8))
def test_user_whose_key_is_damaged_is_not_taken_for_a_new_one(store: LmdbStore, position: int, bit: int) -> None:
    """The entry of user-5 stays where it was, under a key that is wrong in one bit."""
    store.commit([Write(f"user-{number}", 0, {}, *EVENTS) for number in range(10)])
    flip_key(store, b"user-5" + HEAD, position, bit)
    with reopened(store) as damaged:
        for read in (damaged.history, damaged.seen, lambda user: damaged.get_many([user], 1), damaged.delete):
            with pytest.raises(StoreDamagedError):
                read("user-5")


@pytest.mark.parametrize("position", [0, 4, 6])
@pytest.mark.parametrize("bit", range(7))
def test_item_whose_key_is_damaged_is_not_taken_for_a_new_one(store: LmdbStore, position: int, bit: int) -> None:
    flip_key(store, b"item-57", position, bit)
    with reopened(store) as damaged:
        for call in (damaged.find_items, damaged.add_items):
            with pytest.raises(StoreDamagedError):
                call(["item-57"])


def test_item_table_that_has_lost_its_end_gives_no_number_twice(store: LmdbStore) -> None:
    put(store, "items", b"\0\0\0\x63", None)
    with store._env.write() as txn:
        txn.put(b"\0\0\0\xff", b"x", db=store._databases.items)
    with pytest.raises(StoreDamagedError, match="does not hold the items it counts"):
        store.add_items(["new"])
    with pytest.raises(StoreDamagedError, match="missing from the item table"):
        store.item_ids([99])


def test_damaged_record_counts_as_missing_and_is_logged(store: LmdbStore, caplog: pytest.LogCaptureFixture) -> None:
    records = {1: b"record of a", 2: b"another"}
    store.commit([write("a", items=[1], records=records), write("b", items=[1], records={1: b"record of b"})])
    with store._env.read() as reading:
        of_b = bytes(reading.txn.get(b"b" + RECORD, db=store._databases.users))
    for damaged in (of_b, b"", b"123", of_b[:-1]):
        caplog.clear()
        put(store, "users", b"a" + RECORD, damaged)
        (found,) = store.get_many(["a"], 1)
        view = store.ranking_view("a", 1, 10)
        assert found is not None and found.record is None and view is not None and view.record is None
        assert [record.getMessage() for record in caplog.records] == [
            "the record of user 'a' is damaged; it counts as missing"
        ] * 2
    (other,) = store.get_many(["a"], 2)
    assert other is not None and other.record == b"another"


@pytest.mark.parametrize("names", [["user-1", "user-2"], ["a"]])
def test_scan_notices_a_user_without_a_head(store: LmdbStore, names: list[str]) -> None:
    store.commit([write(name) for name in names])
    put(store, "users", names[-1].encode() + HEAD, None)
    with pytest.raises(StoreDamagedError, match="head is missing"):
        list(store.scan())


def test_generations_are_checked(store: LmdbStore) -> None:
    store.add_generation("bundle")
    put(store, "meta", b"generations", b'["bundlf"]' + contents(store)["meta"][b"generations"][-5:])
    for call in (store.generations, lambda: store.add_generation("other")):
        with pytest.raises(StoreDamagedError, match="list of generations"):
            call()


def flip_key(store: LmdbStore, key: bytes, position: int, bit: int) -> None:
    """Flips a bit of a key where it lies in the file, in every page that has it; closes the store."""
    store.close()
    path = store.path / "data.mdb"
    data, found = bytearray(path.read_bytes()), 0
    header = b"\0\0\0\0" + len(key).to_bytes(2, "little")  # how LMDB begins an entry, after the size of the value
    while (found := data.find(header + key, found + 1)) >= 0:
        data[found + len(header) + position] ^= 1 << bit
    assert path.read_bytes() != data
    path.write_bytes(data)


def reopened(store: LmdbStore) -> LmdbStore:
    """As a large file is opened: its pages are not checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHECKED_BYTES", 0)
        return LmdbStore.open(store.path)


@pytest.mark.parametrize(
    "value",
    [b"", b"{}", b'{"items": "text", "users": "text"}', b'{"items": "text", "users": 1}\0', b"[1, 2]\0", b"\xff\0"],
)
def test_id_types_are_checked(store: LmdbStore, value: bytes) -> None:
    text, end, _ = value.partition(b"\0")
    put(store, "meta", b"id_types", pack_text(text, 0) if end else value)
    with pytest.raises(StoreDamagedError, match="what the ids are is damaged"):
        store.id_types()
    store.remember_id_types(IdTypes(TEXT, INTEGER))
    assert store.id_types() == IdTypes(TEXT, INTEGER)
    assert contents(store)["meta"][b"id_types"] == pack_text(b'{"items": "integer", "users": "text"}', 0)
