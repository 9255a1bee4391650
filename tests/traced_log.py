"""A log in which every event is an item of its own, so that tests can trace each event."""

from __future__ import annotations

import numpy as np

USER_EVENTS = (1, 2, 3, 6, 7, 11, 12, 26, 0, 40)  # around the borders of pieces of 5; two users without a target
OFFSETS = np.concatenate([[0], np.cumsum(USER_EVENTS)]).astype(np.int64)
EVENTS = np.arange(OFFSETS[-1], dtype=np.int32)
TIMES = 1_000_000 + np.cumsum(np.arange(len(EVENTS)) % 7 * 50)  # seconds; some events are at once
TRAINABLE = [user for user, events in enumerate(USER_EVENTS) if events >= 2]


def user_of(event: int) -> int:
    return int(np.searchsorted(OFFSETS, event, side="right") - 1)
