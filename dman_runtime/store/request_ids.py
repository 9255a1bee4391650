"""The request ids of applied updates, by time: what a head no longer keeps.

A head keeps the last few ids of its user. When it is full they are *spilled* into the database `requests`, under the
period of PERIOD_SECONDS in which that happens:

    period u32 big-endian, owner, id u64 big-endian  ->  CRC-32 of the key, u32 little-endian

The owner is a hash of the user id, so that nothing here names a user who was deleted; in stores of earlier releases it
is the id and byte 0.

The last KEPT_PERIODS periods before the present one are kept, so an id is remembered for at least REMEMBER_SECONDS.
Older ones are one range at the front of the database, that whoever spills next removes a part of. The ids of a
deleted user are spilled too: a retry that comes late does not bring the user back.

**Clocks.** Periods are those of the wall clock, but those of one user never go backwards: after the clock was set back,
ids go into the user's last period, until the clock is there again. A clock that is set back by more than a day makes
updates of the time in between unknown, and one that is set forward makes ids expire earlier by as much.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Collection

import lmdb

from dman_runtime.store.base import REMEMBER_SECONDS
from dman_runtime.store.checks import PERIOD_SECONDS, too_many_request_ids
from dman_runtime.store.history import DamagedError, Spilled
from dman_runtime.store.lmdb_layout import USER_HASH_BYTES, Databases

KEPT_PERIODS = REMEMBER_SECONDS // PERIOD_SECONDS
SWEPT_PER_COMMIT = 256
_PERIOD, _ID, _CHECKSUM = struct.Struct(">I"), struct.Struct(">Q"), struct.Struct("<I")


def period_of(now: float) -> int:
    """The period of a time in seconds since 1970."""
    return max(KEPT_PERIODS, int(now // PERIOD_SECONDS))


def period_to_spill(now: float, last: int) -> int:
    """The period that ids go into, for a user whose last ones went into `last`."""
    period = period_of(now)
    return last if period < last <= period + KEPT_PERIODS else period


def find_requests(
    txn: lmdb.Transaction, databases: Databases, user: bytes, ids: Collection[int], *, now: float, last: int | None
) -> set[int]:
    """Those of some ids that are remembered here. `last` is the last period of the user; None: not known."""
    requests, owner, period = databases.requests, databases.owner(user), period_of(now)
    if last is None:  # no head: a new user, or a deleted one
        last = period + KEPT_PERIODS if txn.stat(requests)["entries"] else 0
    periods = range(period - KEPT_PERIODS, min(last, period + KEPT_PERIODS) + 1)
    return {one for one in ids if any(_holds(txn, requests, request_key(each, owner, one)) for each in periods)}


def _holds(txn: lmdb.Transaction, requests: lmdb._Database, key: bytes) -> bool:
    value = txn.get(key, db=requests)
    if value is not None and value != request_value(key):
        raise DamagedError("a request id is damaged")
    return value is not None


def spilled_of_nobody(txn: lmdb.Transaction, databases: Databases, user: bytes, now: float) -> Spilled:
    """Where the ids of a user without a head are: what the deletion of an earlier life has left."""
    period, owner = period_of(now), databases.owner(user)
    if txn.stat(databases.requests)["entries"]:
        with txn.cursor(db=databases.requests) as cursor:
            for each in range(period + KEPT_PERIODS, period - KEPT_PERIODS - 1, -1):
                prefix, count = _PERIOD.pack(each) + owner, 0
                found = cursor.set_range(prefix)
                while found and bytes(cursor.key()).startswith(prefix):
                    count, found = count + 1, cursor.next()
                if count:
                    return Spilled(each, count)
    return Spilled()


def spill(
    txn: lmdb.Transaction,
    databases: Databases,
    user: bytes,
    ids: Collection[int],
    *,
    before: Spilled,
    now: float,
    limit: int | None = None,
) -> Spilled:
    """Moves ids here. TooManyRequestIdsError if that makes more than `limit` in one period."""
    period = period_to_spill(now, before.period)
    count = len(ids) + (before.ids if before.period == period else 0)
    if limit is not None and count > limit:
        raise too_many_request_ids(user.decode(), limit)
    owner = databases.owner(user)
    for one in ids:
        key = request_key(period, owner, one)
        txn.put(key, request_value(key), db=databases.requests)
    sweep(txn, databases.requests, now, SWEPT_PER_COMMIT)
    return Spilled(period, count)


def sweep(txn: lmdb.Transaction, requests: lmdb._Database, now: float, most: int) -> int:
    """Removes at most so many ids that need not be remembered any more, and returns how many."""
    end, swept = oldest_kept(now), 0
    with txn.cursor(db=requests) as cursor:
        found = cursor.first()
        while found and swept < most and bytes(cursor.key()[:4]) < end:
            found, swept = cursor.delete(), swept + 1
    return swept


def has_expired(txn: lmdb.Transaction, requests: lmdb._Database, now: float) -> bool:
    with txn.cursor(db=requests) as cursor:
        return cursor.first() and bytes(cursor.key()[:4]) < oldest_kept(now)


def oldest_kept(now: float) -> bytes:
    """How the keys begin of the oldest ids that are remembered."""
    return _PERIOD.pack(period_of(now) - KEPT_PERIODS)


def is_sound(databases: Databases, key: bytes, value: bytes) -> bool:
    """Whether an entry is what was put here."""
    owner = key[_PERIOD.size : -_ID.size]
    whole = len(owner) == USER_HASH_BYTES if databases.hash_key else len(owner) > 1 and owner.endswith(b"\0")
    return whole and value == request_value(key)


def with_owner(key: bytes, owner: Callable[[bytes], bytes]) -> bytes:
    """A key that holds the id of its user, with what stands for the user elsewhere."""
    return key[: _PERIOD.size] + owner(key[_PERIOD.size : -_ID.size - 1]) + key[-_ID.size :]


def request_key(period: int, owner: bytes, one: int) -> bytes:
    return _PERIOD.pack(period) + owner + _ID.pack(one)


def request_value(key: bytes) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(key))
