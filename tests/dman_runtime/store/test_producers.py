"""How the LMDB store keeps sequences of producers: what its bytes say, damage, and stores of earlier releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
from lmdb.verify import verify

from dman_runtime.errors import StoreDamagedError
from dman_runtime.jobs.verifying import verify_store
from dman_runtime.store.base import Step, Write
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_layout import user_hash
from dman_runtime.store.producers import unpack_sequences

MAP = 32 << 20


def take(store: LmdbStore, user_id: str, steps: dict[int, Step]) -> list[str]:
    (stored,) = store.get_many([user_id], 1)
    version, events = stored.head.version if stored else 0, (np.zeros(1, np.uint32), np.zeros(1, np.int64))
    store.add_items(["item"])
    return store.commit([Write(user_id, version, {}, *events, sequences=steps)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with LmdbStore.open(tmp_path / "state", map_size=MAP) as store:
        for user_id in ("anna", "bob", "carl"):
            take(store, user_id, {1: Step(None, 5), 2: Step(None, 2**64 - 1)})
    return tmp_path / "state"


def without_producers(path: Path) -> None:
    """As a store of the release before is."""
    with lmdb.open(str(path), lib_version=0, max_dbs=16, map_size=MAP) as env:
        handle = env.open_db(b"producers", create=False)
        with env.begin(write=True) as txn:
            txn.drop(handle)


def test_producer_takes_sixteen_bytes(path: Path) -> None:
    with LmdbStore.open(path, readonly=True) as store, store._env.read() as reading:
        for user_id in ("anna", "bob", "carl"):
            key = user_hash(user_id.encode(), store._env.store_id)
            value = reading.txn.get(key, db=store._databases.producers)
            assert (len(key), len(value)) == (16, 2 * 16 + 4)
            assert unpack_sequences(key, value) == {1: 5, 2: 2**64 - 1}


def test_key_tells_users_and_stores_apart() -> None:
    keys = {user_hash(user, store) for user in (b"a", b"b", b"ab") for store in ("one", "two")}
    assert len(keys) == 6
    assert user_hash(b"a", "store").hex() == "460239c5ecfed524b1a46a7391bc5b16"  # BLAKE2b, key "store"


def test_id_of_a_deleted_user_is_in_no_byte(tmp_path: Path) -> None:
    user_id = "somebody-who-leaves"
    with LmdbStore.open(tmp_path / "state", map_size=MAP) as store:
        take(store, user_id, {1: Step(None, 5)})
        take(store, "other", {1: Step(None, 5)})
        store.delete(user_id)
        (tmp_path / "copy").mkdir()
        store.copy_to(tmp_path / "copy")
    data = (tmp_path / "copy" / "data.mdb").read_bytes()
    assert b"other" in data and user_id.encode() not in data
    with LmdbStore.open(tmp_path / "copy", map_size=MAP) as copy:
        assert copy.sequences(user_id, [1]) == {1: 5}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda value: bytes([value[0] ^ 1]) + value[1:],
    "cut": lambda value: value[:-16],
    "short": lambda value: value[:3],
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_entry_is_an_error_and_no_update_passes_it(path: Path, name: str) -> None:
    with LmdbStore.open(path, map_size=MAP) as store:
        key = user_hash(b"anna", store._env.store_id)
        with store._env.write() as txn:
            txn.put(
                key, DAMAGE[name](bytes(txn.get(key, db=store._databases.producers))), db=store._databases.producers
            )
        with pytest.raises(StoreDamagedError):
            store.sequences("anna", [1])
        with pytest.raises(StoreDamagedError):
            take(store, "anna", {1: Step(None, 9)})
        assert take(store, "anna", {}) == []  # without a producer nothing is read of it
        assert store.delete("anna") == 2


def test_entry_under_another_key_hides_nothing(path: Path) -> None:
    with LmdbStore.open(path, map_size=MAP) as store:
        producers, key = store._databases.producers, user_hash(b"anna", store._env.store_id)
        with store._env.write() as txn:
            value = bytes(txn.get(key, db=producers))
            txn.delete(key, db=producers)
            txn.put(bytes([key[0], key[1] ^ 1]) + key[2:], value, db=producers)
        assert store.sequences("bob", [1]) == {1: 5}
        with pytest.raises(StoreDamagedError):
            store.sequences("anna", [1])


# -- stores of earlier releases ----------------------------------------------------------------------------------------


def test_store_without_the_database_is_read_and_gets_it_from_a_writer(path: Path) -> None:
    without_producers(path)
    with LmdbStore.open(path, readonly=True) as store:
        assert store.sequences("anna", [1]) == {} and store.stats().producer_users == 0
    assert verify_store(path).counts["producers"] == 0
    with LmdbStore.open(path, map_size=MAP) as store:
        assert store.sequences("anna", [1]) == {} and store.stats().producer_users == 0
        assert take(store, "anna", {1: Step(None, 3)}) == []
    with LmdbStore.open(path, readonly=True) as store:
        assert store.sequences("anna", [1]) == {1: 3} and store.stats().producer_users == 1
    assert list(verify(str(path))) == []
    assert verify_store(path).counts["producers"] == 1
