"""How LMDB is used: which B-trees a call touches, and what damaged values do. The promises are in `tests/contract`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dman_runtime.errors import StoreUnavailableError
from dman_runtime.store import lmdb as lmdb_module
from dman_runtime.store.base import Write
from dman_runtime.store.history import CHUNK_EVENTS
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_reads import LmdbSnapshot


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
        original = lmdb_module.add_seen
        patch.setattr(lmdb_module, "add_seen", lambda *args: puts.append(original(*args)) or puts[-1])
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
    original = LmdbSnapshot._chunk

    def spy(self: LmdbSnapshot, user: bytes, seed: int, chunk: int) -> Any:
        read.append(chunk)
        return original(self, user, seed, chunk)

    monkeypatch.setattr(LmdbSnapshot, "_chunk", spy)
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
    "commit": lambda store: store.commit([write("a", version_of(store, "a"), [1] * CHUNK_EVENTS)]),
}


@pytest.mark.parametrize(
    ("database", "key", "value", "fails"),
    [
        ("users", b"a" + HEAD, b"", "get_many ranking_view history seen commit"),
        ("users", b"a" + HEAD, b"short", "get_many ranking_view history seen commit"),
        ("users", b"a" + HEAD, bytes(28), "get_many ranking_view history seen commit"),
        ("seen", b"a", b"", "ranking_view seen commit"),
        ("seen", b"a", b"\1\0", "ranking_view seen commit"),
        ("seen", b"a", bytes(9), "ranking_view seen commit"),
        ("history", b"a" + CHUNK, b"short", "history"),
        ("history", b"a" + CHUNK, bytes(12 * CHUNK_EVENTS + 4), "history"),
        ("history", b"a" + CHUNK, None, "history"),
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
        except StoreUnavailableError as error:
            assert "corrupted" in str(error) and "restore a backup" in str(error)
            failing.append(name)
    assert failing == fails.split()
    assert store.seen("b").tolist() == [1, 2]  # nobody else is concerned
    assert store.delete("a") is not None
    assert store.get_many(["a"], 1) == [None] and list(store.scan()) == ["b"]
    assert store.commit([write("a", items=[3])]) == []
    assert store.history("a")[0].tolist() == store.seen("a").tolist() == [3]
