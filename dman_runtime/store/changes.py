"""What a write makes of a stored history: new chunks, the tail of the head, the set of seen items. Pure.

For stores that keep the bytes of `history`; how they read and put them is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.base import NO_EVENTS, Head, Write
from dman_runtime.store.checks import check_replacement
from dman_runtime.store.history import (
    CHUNK_EVENTS,
    EVENT,
    Bytes,
    Chunks,
    StoredHead,
    add_seen,
    events_of,
    pack_chunk,
    split_events,
)

NOBODY = StoredHead(Head(0, 0, 0), events_of(*NO_EVENTS))


class Changed(NamedTuple):
    """What is to be put."""

    history_count: int
    tail: NDArray[np.void]  # of the head
    chunks: Mapping[int, bytes]
    seen: bytes | None  # None: stays as it is


def changed_history(
    before: StoredHead, write: Write, seed: int, *, chunks: Chunks, seen: Callable[[], Bytes], legacy: bool = False
) -> Changed:
    """The history of a user, whose head is `before`, with the events of a write.

    `chunks` and `seen` read what is stored, and are called only where it matters. Raises ValueError, DamagedError.
    """
    count, tail, kept_seen = before.head.history_count, before.tail, None
    if write.replace_from is not None:  # the new chunks cover the old ones, as the history does not become shorter
        check_replacement(write, count)
        tail, kept_seen = _cut(before, write.replace_from, write.items, seed, chunks, legacy)
        count = write.replace_from
    full, tail = split_events(tail, events_of(write.items, write.timestamps))
    if not len(full):
        return Changed(count + len(write.items), tail, {}, kept_seen)
    first = count // CHUNK_EVENTS
    packed = {
        first + start // CHUNK_EVENTS: pack_chunk(
            full[start : start + CHUNK_EVENTS], seed, first + start // CHUNK_EVENTS
        )
        for start in range(0, len(full), CHUNK_EVENTS)
    }
    seen_before = (kept_seen if kept_seen is not None else seen()) if first else None
    seen_after = add_seen(seen_before, full["item"], seed, legacy)
    return Changed(count + len(write.items), tail, packed, seen_after if seen_after is not None else kept_seen)


def _cut(
    before: StoredHead, start: int, items: NDArray[np.integer], seed: int, chunks: Chunks, legacy: bool
) -> tuple[NDArray[np.void], bytes | None]:
    """The events that stay, but for those in full chunks, of a history that is replaced by `items` from `start` on; and
    the set of seen items, where it loses some.

    The set keeps the items that are replaced and come again: they are in the new chunks, or in the new tail.
    """
    first, full = start // CHUNK_EVENTS, before.head.history_count // CHUNK_EVENTS
    last = full if first else min(full, bool(start))  # from the first chunk on, all of the set is made anew
    parts = [part.tobytes() for part in (*chunks(first, last), before.tail)]
    kept, replaced = np.split(np.frombuffer(b"".join(parts), EVENT), [start - first * CHUNK_EVENTS])
    if not first or np.isin(replaced["item"], items).all():
        return kept, None
    kept_items = np.unique(np.concatenate([chunk["item"] for chunk in chunks(0, first)]))
    return kept, add_seen(None, kept_items, seed, legacy)
