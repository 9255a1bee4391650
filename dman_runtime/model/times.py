"""Times as the model sees them: seconds between two moments, in buckets of half an octave. numpy only.

Training and serving use this one table, so that a border means the same to both.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

BUCKETS = 64
ANY_GAP = 1 << 40  # seconds: longer than any
NO_EVENT = BUCKETS  # instead of a bucket where nothing happened: the padding before a first event
NO_GAP = -1  # nothing came before, or the moment is unknown
# Bucket b >= 1 begins at 2^((b-1)/2) seconds, the last one has no end: 2^31 s are 68 years. Bucket 0 is "at once".
BORDERS = 2.0 ** (np.arange(BUCKETS - 1) / 2)
FIRST_SECONDS = np.concatenate([[0], np.ceil(BORDERS)]).astype(np.int64)  # (BUCKETS) the first whole second of each
_BORDERS, _FIRST_SECONDS = BORDERS.tolist(), FIRST_SECONDS.tolist()


def bucket(seconds: np.ndarray) -> np.ndarray:
    """Buckets, int64, of int64 seconds of any shape. What lies in the future counts as now."""
    return np.searchsorted(BORDERS, seconds, side="right")


def quantised(seconds: np.ndarray) -> np.ndarray:
    """What int64 seconds from a last event to a request count as: the first second of their bucket, or 0 if negative.

    So an answer changes with the bucket only, and one that was computed stays right until the next.
    """
    return FIRST_SECONDS[bucket(seconds)]


def quantised_one(seconds: int) -> int:
    """The same of one number: NumPy takes several times as long for it."""
    return _FIRST_SECONDS[bisect_right(_BORDERS, seconds)]


def filled_times(times: np.ndarray, first: int | np.int64) -> np.ndarray:
    """Seconds (N) where the unknown ones (0) become that of the event before, those at the beginning `first`."""
    known = times != 0
    if known.all():
        return times
    last_known = np.maximum.accumulate(np.where(known, np.arange(len(times)), -1))  # (N) positions, -1: none yet
    return np.where(last_known >= 0, times[last_known], first)
