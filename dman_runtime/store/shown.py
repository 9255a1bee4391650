"""What users were shown, as a store keeps it: a bounded list of items, each of which counts until a moment. Pure."""

from __future__ import annotations

import numpy as np

from dman_runtime.store.base import MAX_SHOWN, Events
from dman_runtime.store.history import Bytes, seed_of, unpack_shown


def unpacked_shown(user: bytes, value: Bytes) -> Events:
    """All that is stored, also what no longer counts; copies. Raises DamagedError."""
    events = unpack_shown(value, seed_of(user))
    return events["item"].astype(np.uint32), events["timestamp"].astype(np.int64)


def still_shown(shown: Events, now: float) -> Events:
    """Those of (N) items that count at a moment."""
    items, until = shown
    counts = until > now
    return items[counts], until[counts]


def joined_shown(before: Events, shown: Events, now: float) -> Events:
    """What counts once (M) more items, each for so many seconds, were shown: distinct, the latest last."""
    items, until = still_shown(before, now)
    ends = dict(zip(items.tolist(), until.tolist(), strict=True))
    for item, seconds in zip(*(part.tolist() for part in map(np.asarray, shown)), strict=True):
        ends[item] = max(int(now) + seconds, ends.pop(item, 0))  # pop: it goes to the end
    latest = list(ends.items())[-MAX_SHOWN:]
    return np.array([item for item, _ in latest], np.uint32), np.array([end for _, end in latest], np.int64)
