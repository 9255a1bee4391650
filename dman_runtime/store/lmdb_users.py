"""How the LMDB store writes one user: head, history, seen set, records, request ids, what was shown.

`lmdb` has the layout.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import lmdb

from dman_runtime.store import checks
from dman_runtime.store.base import Head, Write
from dman_runtime.store.changes import NOBODY, changed_history
from dman_runtime.store.history import (
    CHUNK_EVENTS,
    RECENT_IDS,
    DamagedError,
    Spilled,
    StoredHead,
    count_of,
    pack_head,
    pack_record,
    seed_of,
    unpack_head,
)
from dman_runtime.store.lmdb_absence import check_no_user
from dman_runtime.store.lmdb_layout import HEAD_SUFFIX, Databases, numbered_key, user_of
from dman_runtime.store.lmdb_reads import read_chunk, read_seen
from dman_runtime.store.lmdb_shown import put_shown
from dman_runtime.store.request_ids import spill, spilled_of_nobody


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
        before = NOBODY._replace(spilled=spilled_of_nobody(txn, databases, user, now))
    else:
        before = unpack_head(head, seed, databases.legacy)
    if write.replace_from is not None:
        _drop_records(txn, databases, user, kept=write.records)
    changed = changed_history(
        before,
        write,
        seed,
        chunks=lambda start, stop: [read_chunk(txn, databases, user, seed, number) for number in range(start, stop)],
        seen=lambda: read_seen(txn, databases, user),
        legacy=databases.legacy,
    )
    for number, chunk in changed.chunks.items():
        txn.put(numbered_key(user, number), chunk, db=databases.history)
    if changed.seen is not None:
        txn.put(user, changed.seen, db=databases.seen)
    recent, spilled = before.recent_ids, before.spilled
    if write.request_ids:
        recent, spilled = _remember(txn, databases, user, before, write.request_ids, now)
    after = Head(txn.id(), changed.history_count, max(write.records, default=before.head.generation))
    values = {0: pack_head(StoredHead(after, changed.tail, recent, spilled), seed)}
    values |= {number: pack_record(record, seed, number) for number, record in write.records.items()}
    for number, value in values.items():
        txn.put(numbered_key(user, number), value, db=databases.users)
    put = (*values.values(), *changed.chunks.values(), changed.seen or b"")
    return shown + sum(map(len, put))


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
    return kept, spill(txn, databases, user, moved, before=before.spilled, now=now, limit=checks.MAX_IDS)


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
