"""A store written anew, for `jobs.compacting`: nothing comes along that nobody has any more.

LMDB leaves what was removed in free pages, and in the gaps of pages that are in use: a copy page by page, such as a
backup, has the gaps too. So every entry is put into a new environment. Most of them as they are; but items that no
history has are left out, and request ids name their users by hashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np

from dman_runtime.errors import StoreMismatchError
from dman_runtime.store.environment import Environment
from dman_runtime.store.history import DamagedError, seed_of, unpack_chunk, unpack_head
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_catalogue import read_catalogue
from dman_runtime.store.lmdb_errors import store_errors
from dman_runtime.store.lmdb_items import checked_item, is_free, item_count, put_free, put_item
from dman_runtime.store.lmdb_layout import HASHED, NAMES, NUMBER, Databases, hash_key_of, pack_info, read_info, user_of
from dman_runtime.store.request_ids import request_value, with_owner
from dman_runtime.store.shown import unpacked_shown

_BATCH = 1000  # entries of a transaction: some MB of records
Entry = tuple[bytes, bytes]


def rewrite(store: LmdbStore, directory: Path) -> int:
    """Writes all of a store that is open `alone` into a new `data.mdb` in an existing directory.

    Returns how many items are left out, as no history has them. Raises StoreError.
    """
    env, databases = store._env, store._databases
    with store_errors(env.path, env.map_size, readonly=False), env.read() as reading:
        copy = _Copy(env, reading.txn, databases, directory)
        try:
            copy.check_names()
            freed = copy.put_items()
            copy.put_requests()
            copy.put_meta()
            for name in set(NAMES) - {"meta", "items", "item_numbers", "requests"}:
                copy.put_unchanged(name)
        finally:
            copy.close()
    env.continue_versions(directory)
    return freed


class _Copy:
    """The new environment, and the moment of the old one that is read."""

    def __init__(self, env: Environment, txn: lmdb.Transaction, databases: Databases, directory: Path) -> None:
        self._txn, self._old, self._env_path = txn, databases, env.path
        self._new = lmdb.open(
            str(directory), lib_version=0, map_size=env.map_size, max_dbs=len(NAMES), mode=0o600, lock=False,
            sync=False, readahead=False,
        )  # fmt: skip
        self._info = {**read_info(txn, databases.meta), **HASHED}
        handles = {name: self._new.open_db(name.encode()) for name in NAMES}
        self._databases = Databases.of(handles, legacy=databases.legacy, hash_key=hash_key_of(self._info))

    def close(self) -> None:
        """The file is not synced yet."""
        self._new.close()

    def check_names(self) -> None:
        """StoreMismatchError for a database that this release does not know, and would lose."""
        with self._txn.cursor() as cursor:
            unknown = {bytes(name).decode(errors="replace") for name in cursor.iternext(values=False)} - set(NAMES)
        if unknown:
            raise StoreMismatchError(
                f"the state store {self._env_path} has parts of another release: {', '.join(sorted(unknown))}",
                "compact it with that release",
            )

    def put_unchanged(self, name: str) -> None:
        """What this module does not read."""
        self._put_all(name, self._entries(getattr(self._old, name)), in_order=True)

    def put_meta(self) -> None:
        entries = ((key, value) for key, value in self._entries(self._old.meta) if key != b"info")
        self._put_all("meta", [*entries, (b"info", pack_info(self._info))])

    def put_requests(self) -> None:
        """Request ids, with hashes of the users in their keys."""
        entries = self._entries(self._old.requests)
        if not self._old.hash_key:
            keys = (with_owner(key, self._databases.owner) for key, _ in entries)
            entries = ((key, request_value(key)) for key in keys)
        self._put_all("requests", entries)

    def put_items(self) -> int:
        """The items that histories have. Numbers of others become free; returns how many do."""
        used, freed = self._used_items(), 0
        for batch in _batches(self._entries(self._old.items)):
            with self._new.begin(write=True) as txn:
                for key, value in batch:
                    (number,) = NUMBER.unpack(key)
                    if used[number]:
                        put_item(
                            txn, self._databases, number, checked_item(self._txn, self._old, number, value).encode()
                        )
                    else:
                        freed += not is_free(number, value)
                        put_free(txn, self._databases, number)
        return freed

    def _used_items(self) -> np.ndarray:
        """Whether anybody has an item, by its number (N) bool: a history, what a user was shown, the catalogue.

        Raises DamagedError.
        """
        used, legacy = np.zeros(item_count(self._txn, self._old), bool), self._old.legacy
        catalogue = read_catalogue(self._txn, self._old)
        _mark(used, catalogue.off)
        _mark(used, np.array([addition.number for addition in catalogue.added], np.uint32))
        for key, value in self._entries(self._old.history):
            user, number = user_of(key)
            _mark(used, unpack_chunk(value, seed_of(user), number, legacy)["item"])
        for key, value in self._entries(self._old.users):
            user, number = user_of(key)
            if number == 0:
                _mark(used, unpack_head(value, seed_of(user), legacy).tail["item"])
        for user, value in self._entries(self._old.shown):
            _mark(used, unpacked_shown(user, value)[0])
        return used

    def _entries(self, database: lmdb._Database | None) -> Iterator[Entry]:
        assert database is not None  # a store that is open to be written has all of them
        with self._txn.cursor(db=database) as cursor:
            for key, value in cursor:
                yield bytes(key), bytes(value)

    def _put_all(self, name: str, entries: Iterable[Entry], *, in_order: bool = False) -> None:
        for batch in _batches(entries):
            with self._new.begin(write=True, db=getattr(self._databases, name)) as txn:
                for key, value in batch:
                    if not txn.put(key, value, append=in_order, overwrite=False):
                        raise DamagedError("keys are out of order")


def _mark(used: np.ndarray, items: np.ndarray) -> None:
    if int(items.max(initial=0)) >= len(used) and len(items):
        raise DamagedError("an item without an id is in use")
    used[items] = True


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    left = iter(entries)
    while batch := list(islice(left, _BATCH)):
        yield batch
