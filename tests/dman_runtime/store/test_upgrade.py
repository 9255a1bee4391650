"""A store that format 3 wrote, opened by this release: nothing is lost, and all new values are in the new layout.

The layouts below are those of format 3, frozen here.
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from lmdb.verify import verify

from dman_runtime.errors import StoreDamagedError, StoreMismatchError
from dman_runtime.store import environment
from dman_runtime.store.base import Head, Write
from dman_runtime.store.catalogue import NOTHING_STANDS
from dman_runtime.store.history import unpack_chunk, unpack_head, unpack_seen
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_layout import LATER_NAMES, write_info

NAMES = ("meta", "items", "item_numbers", "users", "seen", "history")
ITEMS = [f"item-{number}" for number in range(100)]
COUNTS = {"none": 0, "few": 7, "chunk": 32, "many": 103}


def old_checksum(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def old_events(user_id: str) -> list[tuple[int, int]]:
    return [(number * 7 % 100, 1000 + number) for number in range(COUNTS[user_id])]


def old_users(txn: lmdb.Transaction, databases: dict[str, Any]) -> None:
    for version, (user_id, count) in enumerate(COUNTS.items(), start=11):
        events, key = [struct.pack("<Iq", *event) for event in old_events(user_id)], user_id.encode()
        full = count // 32 * 32
        ids = struct.pack("<2Q", 5, 2**64 - 1)
        head = struct.pack("<QQIHH", version, count, 1, 2, 0) + ids + b"".join(events[full:])
        txn.put(key + bytes(5), old_checksum(head), db=databases["users"])
        txn.put(key + b"\0\0\0\0\1", b"record of " + key, db=databases["users"])
        for chunk in range(full // 32):
            value = old_checksum(b"".join(events[32 * chunk : 32 * chunk + 32]))
            txn.put(key + b"\0" + struct.pack(">I", chunk), value, db=databases["history"])
        if full:
            items = sorted({item for item, _ in old_events(user_id)[:full]})
            bitmap = np.packbits(np.isin(np.arange(104), items), bitorder="little").tobytes()
            txn.put(key, old_checksum(b"\1" + bitmap.rstrip(b"\0")), db=databases["seen"])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store of format 3."""
    path = tmp_path / "state"
    path.mkdir()
    with lmdb.open(str(path), lib_version=0, max_dbs=6, map_size=64 << 20) as env, env.begin(write=True) as txn:
        databases = {name: env.open_db(name.encode(), txn=txn) for name in NAMES}
        txn.put(b"info", json.dumps({"format_version": 3}).encode(), db=databases["meta"])
        txn.put(b"generations", json.dumps(["bundle"]).encode(), db=databases["meta"])
        for number, item in enumerate(ITEMS):
            txn.put(struct.pack(">I", number), item.encode(), db=databases["items"])
            txn.put(item.encode(), struct.pack("<I", number), db=databases["item_numbers"])
        old_users(txn, databases)
    return path


def check_old_data(store: LmdbStore) -> None:
    assert store.item_ids(range(100)) == ITEMS and store.find_items(ITEMS).tolist() == list(range(100))
    assert store.generations() == {"bundle": 1}
    assert sorted(store.scan()) == sorted(COUNTS)
    for version, (user_id, count) in enumerate(COUNTS.items(), start=11):
        (stored,) = store.get_many([user_id], 1)
        assert stored == (Head(version, count, 1), b"record of " + user_id.encode())
        items, timestamps = store.history(user_id)
        assert list(zip(items.tolist(), timestamps.tolist(), strict=True)) == old_events(user_id)
        seen = sorted({item for item, _ in old_events(user_id)})
        view = store.ranking_view(user_id, 1, 6)
        assert view is not None and (view.history_count, view.record) == (count, b"record")
        assert store.seen(user_id).tolist() == sorted(set(view.seen.tolist())) == seen
        assert store.applied(user_id, [5, 6, 2**64 - 1]) == {5, 2**64 - 1}
    assert store.get_many(["unknown"], 1) == [None] and store.find_items(["unknown"]).tolist() == [-1]


def test_store_of_format_3_is_upgraded_in_place_with_one_line(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), LmdbStore.open(old) as store:
        check_old_data(store)
    assert [r.getMessage() for r in caplog.records] == [f"upgraded the state store {old} from format 3 to 4"]
    assert verify(str(old)) == []
    caplog.clear()
    for readonly in (True, False):  # it stays upgraded, and what the old release wrote stays readable
        with LmdbStore.open(old, readonly=readonly) as store:
            check_old_data(store)
    assert caplog.records == []


def test_readonly_open_says_to_open_it_for_writing_and_changes_nothing(old: Path) -> None:
    before = (old / "data.mdb").read_bytes()
    with pytest.raises(StoreMismatchError, match="has format 3, this release reads 4; open it once for writing"):
        LmdbStore.open(old, readonly=True)
    assert (old / "data.mdb").read_bytes() == before and [path.name for path in old.parent.iterdir()] == ["state"]


def test_values_of_format_3_are_written_anew_when_they_change(old: Path) -> None:
    with LmdbStore.open(old) as store:
        for user_id, count in COUNTS.items():
            (stored,) = store.get_many([user_id], 1)
            assert stored is not None
            items, times = np.arange(40) % 100, np.arange(40)
            assert store.commit([Write(user_id, stored.head.version, {1: b"new"}, items, times, [77])]) == []
            assert store.history(user_id)[1].tolist() == [*(when for _, when in old_events(user_id)), *range(40)]
            assert store.seen(user_id).tolist() == sorted({*(item for item, _ in old_events(user_id)), *range(40)})
            assert store.applied(user_id, [5, 77, 78]) == {5, 77}
            key, seed = user_id.encode(), zlib.crc32(user_id.encode())
            with store._env.read() as reading:
                databases, get = store._databases, reading.txn.get
                unpack_head(get(key + bytes(5), db=databases.users), seed, False)
                unpack_seen(get(key, db=databases.seen), seed, False)
                for chunk in range(count // 32, (count + 40) // 32):
                    unpack_chunk(get(key + b"\0\0\0\0" + bytes([chunk]), db=databases.history), seed, chunk, False)
        assert store.add_items(["new", "item-3"]).tolist() == [100, 3]
        assert store.add_generation("second") == 2 and store.generations() == {"bundle": 1, "second": 2}
        assert store.delete("many") == 143 and store.applied("many", [5, 77]) == {5, 77}
    with LmdbStore.open(old, readonly=True) as store:
        assert store.item_ids([3, 100]) == ["item-3", "new"]
        assert store.history("few")[1].tolist() == [*range(1000, 1007), *range(40)]


def test_damage_in_values_of_format_3_is_still_found(old: Path) -> None:
    with LmdbStore.open(old) as store:
        flips: list[tuple[str, bytes, int]] = [
            ("users", b"few\0\0\0\0\0", 9),
            ("history", b"many\0\0\0\0\1", 100),
            ("seen", b"many", 3),
            ("items", b"\0\0\0\7", 2),
            ("item_numbers", b"item-9", 0),
        ]
        for name, key, position in flips:
            database = getattr(store._databases, name)
            with store._env.write() as txn:
                value = bytearray(txn.get(key, db=database))
                value[position] ^= 1
                txn.put(key, bytes(value), db=database)
        for read in (
            lambda: store.get_many(["few"], 1),
            lambda: store.history("many"),
            lambda: store.seen("many"),
            lambda: store.item_ids([7]),
            lambda: store.find_items(["item-9"]),
        ):
            with pytest.raises(StoreDamagedError):
                read()
        assert store.item_ids([8]) == ["item-8"] and store.find_items(["item-8"]).tolist() == [8]


def test_crash_while_it_is_upgraded_leaves_format_3(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    def write_and_crash(*arguments: Any, **options: Any) -> None:
        write_info(*arguments, **options)
        raise Crash

    before = (old / "data.mdb").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(environment, "write_info", write_and_crash)
        LmdbStore.open(old)
    assert (old / "data.mdb").read_bytes() == before
    with LmdbStore.open(old) as store:
        check_old_data(store)


def test_store_without_the_later_databases_is_read_and_gets_them_when_it_is_written(tmp_path: Path) -> None:
    """Earlier releases of format 4 made none."""
    path = tmp_path / "state"
    with LmdbStore.open(path) as store:
        store.add_items(ITEMS)
    with lmdb.open(str(path), lib_version=0, max_dbs=9, map_size=64 << 20) as env:
        later = [env.open_db(name.encode(), create=False) for name in LATER_NAMES]
        with env.begin(write=True) as txn:
            for database in later:
                txn.drop(database)
    with LmdbStore.open(path, readonly=True) as store:
        assert (store.standing(), store.catalogue().off.tolist()) == (NOTHING_STANDS, [])
        assert store.sizes()[0] > 0 and store.shown("anna")[0].tolist() == []
    with LmdbStore.open(path) as store:
        assert store.standing() == NOTHING_STANDS
        assert store.switch_items([4], off=True) == 1
        shown = np.array([7]), np.array([60])
        assert store.commit([Write("anna", 0, {}, np.array([1]), np.array([2]), shown=shown)]) == []
    with LmdbStore.open(path, readonly=True) as store:
        assert (store.standing().catalogue_revision, store.catalogue().off.tolist()) == (1, [4])
        assert store.shown("anna")[0].tolist() == [7]
