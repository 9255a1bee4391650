"""What the users of an LMDB store were shown: one value a user, also of users who have no head. `history` packs it."""

from __future__ import annotations

from itertools import islice

import lmdb

from dman_runtime.store.base import NOTHING_SHOWN, Events
from dman_runtime.store.history import DamagedError, events_of, pack_shown, seed_of
from dman_runtime.store.lmdb_layout import Databases
from dman_runtime.store.shown import joined_shown, still_shown, unpacked_shown


def read_shown(txn: lmdb.Transaction, databases: Databases, user: bytes) -> Events:
    """All that is stored, also what no longer counts; copies. Raises DamagedError."""
    value = None if databases.shown is None else txn.get(user, db=databases.shown)
    return NOTHING_SHOWN if value is None else unpacked_shown(user, value)


def put_shown(txn: lmdb.Transaction, databases: Databases, user: bytes, shown: Events, now: float) -> int:
    """Adds items and for how many seconds each counts, and drops what counts no longer; returns the bytes put.

    What is damaged is replaced.
    """
    assert databases.shown is not None
    try:
        before = read_shown(txn, databases, user)
    except DamagedError:
        before = NOTHING_SHOWN
    value = pack_shown(events_of(*joined_shown(before, shown, now)), seed_of(user))
    txn.put(user, value, db=databases.shown)
    return len(value)


def expired_users(txn: lmdb.Transaction, databases: Databases, start: bytes, now: float, most: int) -> list[bytes]:
    """Of the first `most` users from a key on: those of whom nothing counts any more; and behind them the key to go on
    with, empty at the end. Raises DamagedError."""
    assert databases.shown is not None
    found: list[bytes] = []
    with txn.cursor(db=databases.shown) as cursor:
        entries = list(islice(cursor, most)) if cursor.set_range(start or b"\0") else []
        for key, value in entries:
            user = bytes(key)
            if not len(still_shown(unpacked_shown(user, value), now)[0]):
                found.append(user)
        last = bytes(entries[-1][0]) + b"\0" if len(entries) == most else b""
    return [*found, last]


def drop_expired(txn: lmdb.Transaction, databases: Databases, users: list[bytes], now: float) -> None:
    """Removes what some users were shown, where nothing of it counts any more."""
    assert databases.shown is not None
    for user in users:
        if not len(still_shown(read_shown(txn, databases, user), now)[0]):
            txn.delete(user, db=databases.shown)
