"""Checks of everything that an LMDB store holds, for `jobs.verifying`. Everything is read in pieces of one moment each,
so that a server may go on writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from lmdb.verify import VerifyError, verify

from dman_runtime.data.ids import id_problem
from dman_runtime.store.environment import Environment
from dman_runtime.store.files import map_size_to_read
from dman_runtime.store.history import (
    CHUNK_EVENTS,
    Bytes,
    DamagedError,
    record_start,
    seed_of,
    unpack_chunk,
    unpack_head,
    unpack_seen,
)
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_catalogue import check_entry, read_catalogue
from dman_runtime.store.lmdb_errors import store_errors
from dman_runtime.store.lmdb_items import checked_number, is_free, item_count, key_of
from dman_runtime.store.lmdb_layout import (
    HEAD_SUFFIX,
    NOTHING_SET,
    NUMBER,
    Databases,
    decoded,
    numbered_key,
    read_generations,
    read_id_types,
    read_rollout,
    user_of,
)
from dman_runtime.store.marker import missing
from dman_runtime.store.producers import unpack_sequences
from dman_runtime.store.request_ids import is_sound
from dman_runtime.store.shown import unpacked_shown

MAX_PROBLEMS = 100  # that are named; more are counted
_PIECE = 2000  # entries read from one moment
Entries = list[tuple[bytes, Bytes]]


@dataclass
class Problems:
    """What was found, and the first of it in words."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.first) < MAX_PROBLEMS:
            self.first.append(text)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Notes the damage that is found in this block."""
        try:
            yield
        except DamagedError as error:
            self.add(f"{what}: {error}")


# -- pages -------------------------------------------------------------------------------------------------------------


def verify_structure(path: Path, problems: Problems) -> None:
    """Checks every page of the file, without LMDB. Raises StoreError where there is nothing to check."""
    with store_errors(path, 0, readonly=True):
        if not (path / "data.mdb").is_file():
            raise missing(path)
        found = _page_problems(path)
        if found:  # or a server wrote meanwhile: a snapshot keeps it from changing the pages that are in use
            found = _page_problems_of_a_snapshot(path)
        for text in found:
            problems.add(f"data.mdb: {text}")


def _page_problems(path: Path) -> list[str]:
    try:
        return list(verify(str(path)))  # type: ignore[no-untyped-call]
    except VerifyError as error:
        return [str(error)]


def _page_problems_of_a_snapshot(path: Path) -> list[str]:
    found: list[str] = []
    for _ in range(3):  # the newest description of the file may change while it is read
        options: dict[str, Any] = {"map_size": map_size_to_read(path), "readonly": True, "create": False}
        options["lock"] = (path / "lock.mdb").exists()  # else nobody writes
        with lmdb.open(str(path), lib_version=0, **options) as env, env.begin():
            found = _page_problems(path)
        if not found:
            break
    return found


# -- values ------------------------------------------------------------------------------------------------------------


def verify_contents(store: LmdbStore, problems: Problems) -> dict[str, int]:
    """Checks every value of an open store; returns how many of each kind there are. Raises StoreError."""
    contents = _Contents(store._env, store._databases, problems)
    contents.check_generations()
    contents.check_items()
    contents.check_catalogue()
    contents.check_users()
    contents.check_leftovers()
    contents.check_shown()
    contents.check_request_ids()
    contents.check_producers()
    return contents.counts


class _Contents:
    def __init__(self, env: Environment, databases: Databases, problems: Problems) -> None:
        self._env, self._databases, self._problems = env, databases, problems
        names = (
            "generations items items_off items_added users events records seen_sets users_shown_items request_ids "
            "producers"
        )
        self.counts = dict.fromkeys(names.split(), 0)

    def _pieces(self, database: lmdb._Database) -> Iterator[tuple[lmdb.Transaction, Entries]]:
        """All entries in order, some at a time with the transaction that they are read in."""
        start = b""
        while True:
            with self._env.read() as reading, reading.txn.cursor(db=database) as cursor:
                found = cursor.set_range(start) if start else cursor.first()
                entries = [(bytes(key), value) for key, value in islice(cursor, _PIECE)] if found else []
                yield reading.txn, entries
            if len(entries) < _PIECE:
                return
            start = entries[-1][0] + b"\0"

    def check_generations(self) -> None:
        with self._env.read() as reading, self._problems.of("meta"):
            bundle_ids = read_generations(reading.txn, self._databases.meta, legacy=self._databases.legacy)
            self.counts["generations"] = len(bundle_ids)
            read_id_types(reading.txn, self._databases.meta)
            read_rollout(reading.txn, self._databases.meta, NOTHING_SET)

    # -- items -----------------------------------------------------------------------------------------------------

    def check_items(self) -> None:
        """Both directions of the item table, and that they say the same."""
        databases, count = self._databases, 0
        for txn, entries in self._pieces(databases.items):
            for key, value in entries:
                with self._problems.of(f"item {key.hex()}"):
                    if key != NUMBER.pack(count):
                        raise DamagedError(f"item {count} is missing")
                    item = key_of(txn, databases, count, value)
                    other = txn.get(item, db=databases.item_numbers)
                    if other is None or checked_number(txn, databases, item, other) != count:
                        raise DamagedError("the item has no number, or another one")
                    self.counts["items"] += not is_free(count, value)
                count += 1
        for txn, entries in self._pieces(databases.item_numbers):
            for key, value in entries:
                with self._problems.of(f"item {_shown(key)}"):
                    number = checked_number(txn, databases, key, value)
                    other = txn.get(NUMBER.pack(number), db=databases.items)
                    if other is None or key_of(txn, databases, number, other) != key:
                        raise DamagedError("the number of the item is that of another one")

    def check_catalogue(self) -> None:
        if self._databases.catalogue is None:
            return
        for txn, entries in self._pieces(self._databases.catalogue):
            for key, value in entries:
                with self._problems.of(f"catalogue entry {key.hex()}"):
                    check_entry(key, value, item_count(txn, self._databases))
        with self._env.read() as reading, self._problems.of("catalogue"):
            catalogue = read_catalogue(reading.txn, self._databases)
            self.counts |= {"items_off": len(catalogue.off), "items_added": len(catalogue.added)}

    # -- users -----------------------------------------------------------------------------------------------------

    def check_users(self) -> None:
        user = b""
        for txn, entries in self._pieces(self._databases.users):
            for key, value in entries:
                with self._problems.of(f"entry {_shown(key)}"):
                    found, number = user_of(key)
                    if number == 0:
                        user = found
                        self.counts["users"] += 1
                        self._check_user(txn, user, value)
                    else:
                        self.counts["records"] += 1
                        if found != user:
                            raise DamagedError("a record of a user without a head")
                        record_start(value, seed_of(user), number, self._databases.legacy)

    def _check_user(self, txn: lmdb.Transaction, user: bytes, value: Bytes) -> None:
        """A head with all that belongs to it."""
        databases, seed = self._databases, seed_of(user)
        name = repr(decoded(user))
        if problem := id_problem(decoded(user)):
            raise DamagedError(f"user id {name} {problem}")
        stored = unpack_head(value, seed, databases.legacy)
        self.counts["events"] += stored.head.history_count
        items = [stored.tail["item"]]
        full = stored.head.history_count // CHUNK_EVENTS
        for number in range(full):
            with self._problems.of(f"user {name}, events from {number * CHUNK_EVENTS}"):
                chunk = txn.get(numbered_key(user, number), db=databases.history)
                if chunk is None:
                    raise DamagedError("a piece of the history is missing")
                items.append(unpack_chunk(chunk, seed, number, databases.legacy)["item"])
        with self._problems.of(f"user {name}"):
            if len(items) == full + 1:  # of a damaged history, nobody knows what was seen
                self._check_seen(txn, user, np.unique(np.concatenate(items[1:])) if full else None, items[0])
            every = np.concatenate(items)
            if len(every) and int(every.max()) >= txn.stat(databases.items)["entries"]:
                raise DamagedError("the history has an item without an id")
            if txn.get(numbered_key(user, full), db=databases.history) is not None:
                raise DamagedError("there are more events than the head counts")

    def _check_seen(self, txn: lmdb.Transaction, user: bytes, items: np.ndarray | None, tail: np.ndarray) -> None:
        """The set has the items of the chunks, and may have those of the tail."""
        value = txn.get(user, db=self._databases.seen)
        if (value is None) != (items is None):
            raise DamagedError("the set of seen items is missing, or there should be none")
        if value is not None and items is not None:
            self.counts["seen_sets"] += 1
            seen = unpack_seen(value, seed_of(user), self._databases.legacy)
            if not np.array_equal(np.setdiff1d(seen, np.setdiff1d(tail, items)), items):
                raise DamagedError("the set of seen items is not that of the history")

    def check_leftovers(self) -> None:
        """Histories and seen sets of users that have no head."""
        databases = self._databases
        parts: list[tuple[lmdb._Database, Callable[[bytes], bytes]]] = [
            (databases.history, lambda key: user_of(key)[0]),
            (databases.seen, lambda key: key),
        ]
        for database, owner in parts:
            for txn, entries in self._pieces(database):
                for key, _ in entries:
                    with self._problems.of(f"entry {_shown(key)}"):
                        if txn.get(owner(key) + HEAD_SUFFIX, db=databases.users) is None:
                            raise DamagedError("it belongs to a user without a head")

    def check_shown(self) -> None:
        if self._databases.shown is None:
            return
        for txn, entries in self._pieces(self._databases.shown):
            for key, value in entries:
                self.counts["users_shown_items"] += 1
                with self._problems.of(f"shown to {_shown(key)}"):
                    items, _ = unpacked_shown(key, value)
                    if id_problem(decoded(key)):
                        raise DamagedError("the id of the user is damaged")
                    if len(items) and int(items.max()) >= item_count(txn, self._databases):
                        raise DamagedError("an item without an id was shown")

    # -- request ids -----------------------------------------------------------------------------------------------

    def check_request_ids(self) -> None:
        for _, entries in self._pieces(self._databases.requests):
            for key, value in entries:
                self.counts["request_ids"] += 1
                if not is_sound(self._databases, key, bytes(value)):
                    self._problems.add(f"request id {_shown(key)}: it is damaged")

    # -- sequences -------------------------------------------------------------------------------------------------

    def check_producers(self) -> None:
        """The sequences of producers; they are counted by user and producer."""
        if self._databases.producers is None:
            return
        for _, entries in self._pieces(self._databases.producers):
            for key, value in entries:
                with self._problems.of(f"entry {key.hex()}"):
                    self.counts["producers"] += len(unpack_sequences(key, value))


def _shown(key: bytes) -> str:
    return repr(key)[2:-1]
