"""How the LMDB store writes one user: head, history, seen set, records, request ids, what was shown.

`lmdb` has the layout.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import lmdb
import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.base import Head, Write
from dman_runtime.store.checks import check_replacement
from dman_runtime.store.history import (
    CHUNK_EVENTS,
    EVENT,
    RECENT_IDS,
    DamagedError,
    Spilled,
    StoredHead,
    add_seen,
    count_of,
    events_of,
    pack_chunk,
    pack_head,
    pack_record,
    seed_of,
    split_events,
    unpack_head,
)
from dman_runtime.store.lmdb_absence import check_no_user
from dman_runtime.store.lmdb_layout import HEAD_SUFFIX, Databases, numbered_key, user_of
from dman_runtime.store.lmdb_reads import NO_SEEN, read_chunk, read_seen
from dman_runtime.store.lmdb_shown import put_shown
from dman_runtime.store.request_ids import MAX_IDS, spill, spilled_of_nobody

_NO_EVENTS = events_of(NO_SEEN, NO_SEEN)


def put_user(txn: lmdb.Transaction, databases: Databases, write: Write, head: bytes | None, now: float) -> int:
    """Puts what a write changes of its user, whose stored head is `head`; returns the bytes put.

    Raises ValueError, DamagedError and TooManyRequestIdsError, with a part of it put.
    """
    user = write.user_id.encode()
    shown = put_shown(txn, databases, user, write.shown, now) if len(write.shown[0]) else 0
    if write.only_shows:
        return shown
    seed = seed_of(user)
    if head is None:
        before = StoredHead(Head(0, 0, 0), _NO_EVENTS, spilled=spilled_of_nobody(txn, databases, user, now))
    else:
        before = unpack_head(head, seed, databases.legacy)
    count, tail = before.head.history_count, before.tail
    if write.replace_from is not None:  # the new chunks cover the old ones, as the history does not become shorter
        check_replacement(write, count)
        _drop_records(txn, databases, user, kept=write.records)
        count, tail = write.replace_from, _cut(txn, databases, user, before, write.replace_from, write.items)
    chunks, tail = split_events(tail, events_of(write.items, write.timestamps))
    put = _put_chunks(txn, databases, user, count, chunks) if len(chunks) else 0
    recent, spilled = before.recent_ids, before.spilled
    if write.request_ids:
        recent, spilled = _remember(txn, databases, user, before, write.request_ids, now)
    after = Head(txn.id(), count + len(write.items), max(write.records, default=before.head.generation))
    values = {0: pack_head(StoredHead(after, tail, recent, spilled), seed)}
    values |= {number: pack_record(record, seed, number) for number, record in write.records.items()}
    for number, value in values.items():
        txn.put(numbered_key(user, number), value, db=databases.users)
    return shown + put + sum(map(len, values.values()))


def _cut(
    txn: lmdb.Transaction,
    databases: Databases,
    user: bytes,
    before: StoredHead,
    start: int,
    items: NDArray[np.integer],
) -> NDArray[np.void]:
    """The events that stay, but for those in full chunks, of a history that is replaced by `items` from `start` on.

    The seen set keeps the items that are replaced and come again: they are in the new chunks, or in the new tail.
    """
    seed = seed_of(user)
    first, full = start // CHUNK_EVENTS, before.head.history_count // CHUNK_EVENTS
    last = full if first else min(full, bool(start))  # from the first chunk on, all of the set is made anew
    chunks = [read_chunk(txn, databases, user, seed, number) for number in range(first, last)]
    events = np.frombuffer(b"".join(part.tobytes() for part in (*chunks, before.tail)), EVENT)
    kept, replaced = np.split(events, [start - first * CHUNK_EVENTS])
    if first and not np.isin(replaced["item"], items).all():
        kept_chunks = [read_chunk(txn, databases, user, seed, number)["item"] for number in range(first)]
        seen = add_seen(None, np.unique(np.concatenate(kept_chunks)), seed, databases.legacy)
        assert seen is not None
        txn.put(user, seen, db=databases.seen)
    return kept


def _put_chunks(txn: lmdb.Transaction, databases: Databases, user: bytes, count: int, events: NDArray[np.void]) -> int:
    """Puts full chunks of events behind the first `count` events, and adds their items to the seen set."""
    seed, first = seed_of(user), count // CHUNK_EVENTS
    values = [
        pack_chunk(events[start : start + CHUNK_EVENTS], seed, first + start // CHUNK_EVENTS)
        for start in range(0, len(events), CHUNK_EVENTS)
    ]
    for number, value in enumerate(values, start=first):
        txn.put(numbered_key(user, number), value, db=databases.history)
    before = read_seen(txn, databases, user) if first else None
    seen = add_seen(before, events["item"], seed, databases.legacy)
    if seen is not None:
        txn.put(user, seen, db=databases.seen)
    return sum(map(len, values)) + len(seen or b"")


def _drop_records(txn: lmdb.Transaction, databases: Databases, user: bytes, *, kept: Collection[int]) -> None:
    """Removes the records of a user but those of some generations."""
    with txn.cursor(db=databases.users) as cursor:
        found = cursor.set_range(numbered_key(user, 1))
        while found and bytes(cursor.key()).startswith(user + b"\0"):
            found = cursor.next() if user_of(bytes(cursor.key()))[1] in kept else cursor.delete()


def _remember(
    txn: lmdb.Transaction, databases: Databases, user: bytes, before: StoredHead, request_ids: Sequence[int], now: float
) -> tuple[tuple[int, ...], Spilled]:
    """The recent ids of a user with new ones behind them. If they become too many, the older ones are spilled."""
    new = tuple(dict.fromkeys(one for one in request_ids if one not in before.recent_ids))
    recent = before.recent_ids + new
    if len(recent) <= RECENT_IDS:
        return recent, before.spilled
    kept = new[-RECENT_IDS:]
    moved = recent[: -len(kept)]
    return kept, spill(txn, databases, user, moved, before=before.spilled, now=now, limit=MAX_IDS)


def delete_user(txn: lmdb.Transaction, databases: Databases, user: bytes, now: float) -> int | None:
    """Removes all of a user but the request ids; the number of events removed, or None. Raises DamagedError."""
    head = txn.get(user + HEAD_SUFFIX, db=databases.users)
    count = None if head is None else count_of(head)
    _spill_recent(txn, databases, user, head, now)
    removed = [_delete_prefix(txn, database, user + b"\0") for database in (databases.users, databases.history)]
    removed.append(int(txn.delete(user, db=databases.seen)))
    assert databases.shown is not None
    txn.delete(user, db=databases.shown)
    if head is None:
        if not any(removed):
            check_no_user(txn, databases, user)
            return None
        count = CHUNK_EVENTS * removed[1]  # of a user whose head is missing
    return count


def _spill_recent(
    txn: lmdb.Transaction, databases: Databases, user: bytes, head: bytes | memoryview | None, now: float
) -> None:
    """Keeps the recent request ids of a user who is deleted, as far as the head can be read. Without a limit."""
    try:
        found = None if head is None else unpack_head(head, seed_of(user), databases.legacy)
    except DamagedError:
        return
    if found and found.recent_ids:
        spill(txn, databases, user, found.recent_ids, before=found.spilled, now=now)


def _delete_prefix(txn: lmdb.Transaction, database: lmdb._Database, prefix: bytes) -> int:
    with txn.cursor(db=database) as cursor:
        found, count = cursor.set_range(prefix), 0
        while found and bytes(cursor.key()).startswith(prefix):
            found, count = cursor.delete(), count + 1
    return count
