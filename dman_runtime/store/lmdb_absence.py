"""Whether what an LMDB store does not find was never there.

A damaged key hides its entry, and one that sorts wrongly leads a search astray. Either way the search ends beside the
damaged entry: so a miss is believed if the keys on both sides are in order and belong to their values.
"""

from __future__ import annotations

from collections.abc import Callable

import lmdb

from dman_runtime.store.history import Bytes, DamagedError, read_head_only, record_start, seed_of
from dman_runtime.store.lmdb_layout import HEAD_SUFFIX, Databases, user_of

_ASTRAY = "keys are out of order"


def check_neighbours(
    txn: lmdb.Transaction, database: lmdb._Database, key: bytes, check: Callable[[bytes, Bytes], object]
) -> None:
    """Checks the entries on both sides of a key that is not there.

    `check` raises DamagedError where key and value do not belong together.
    """
    with txn.cursor(db=database) as cursor:
        if found := cursor.set_range(key):
            after = bytes(cursor.key())
            check(after, cursor.value())
            if after <= key:
                raise DamagedError(_ASTRAY)
        if cursor.prev() if found else cursor.last():
            before = bytes(cursor.key())
            check(before, cursor.value())
            if before >= key:
                raise DamagedError(_ASTRAY)


def check_no_user(txn: lmdb.Transaction, databases: Databases, user: bytes) -> None:
    """DamagedError where a user without a head may have had one."""

    def check(key: bytes, value: Bytes) -> None:
        check_entry(key, value, databases.legacy)

    check_neighbours(txn, databases.users, user + HEAD_SUFFIX, check)
    check_nothing_left(txn, databases, user)


def check_nothing_left(txn: lmdb.Transaction, databases: Databases, user: bytes) -> None:
    """DamagedError where a user without a head has a record, events or a seen set."""
    prefix = user + b"\0"
    for database in (databases.users, databases.history):
        with txn.cursor(db=database) as cursor:
            if cursor.set_range(prefix) and bytes(cursor.key()).startswith(prefix):
                raise DamagedError("a user's head is missing")
    if txn.get(user, db=databases.seen) is not None:
        raise DamagedError("a user's head is missing")


def check_entry(key: bytes, value: Bytes, legacy: bool) -> None:
    """DamagedError where an entry of `users` was not stored under its key."""
    user, number = user_of(key)
    if number:
        record_start(value, seed_of(user), number, legacy)
    else:
        read_head_only(value, seed_of(user), legacy)
