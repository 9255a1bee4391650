"""Which items a user comes back to: a bounded sketch of a history. numpy only; training has the same in torch.

The sketch holds the R items with the largest decayed counts, with their counts at H half-lives. It changes when a
segment closes; until then the items of the open segment are counted beside it. So it is the same for any split of a
history. A count is in events: half-life h means that an event counts half when h more have come.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

HALF_LIVES = (2.0, 8.0, 32.0, 128.0, math.inf)
RATES = np.array([2.0 ** (-1 / life) for life in HALF_LIVES], np.float32)  # (H) what is left of a count per event


class Sketch(NamedTuple):
    items: np.ndarray  # (r) int64 item indices, r <= R
    counts: np.ndarray  # (r, H) float32


EMPTY = Sketch(np.zeros(0, np.int64), np.zeros((0, len(HALF_LIVES)), np.float32))


def counted(sketch: Sketch, events: np.ndarray) -> Sketch:
    """The sketch's items, then the others of the (n) later `events` in order, with their counts after the last."""
    count = len(events)
    if not count:
        return sketch
    distinct, first, place = np.unique(events, return_index=True, return_inverse=True)
    within = np.zeros((len(distinct), len(HALF_LIVES)), np.float32)
    np.add.at(within, place, RATES ** np.arange(count - 1, -1, -1, dtype=np.float32)[:, None])
    counts = sketch.counts * RATES**count
    order = np.argsort(sketch.items)
    at = np.searchsorted(sketch.items, distinct, sorter=order)
    known = np.zeros(len(distinct), bool)
    inside = at < len(order)
    known[inside] = sketch.items[order[at[inside]]] == distinct[inside]
    counts[order[at[known]]] += within[known]
    new = np.flatnonzero(~known)
    new = new[np.argsort(first[new])]
    return Sketch(np.concatenate([sketch.items, distinct[new]]), np.concatenate([counts, within[new]]))


def kept(sketch: Sketch, size: int) -> Sketch:
    """The `size` items that weigh most, heaviest first; ties in order."""
    best = np.argsort(-np.log1p(sketch.counts).sum(axis=1), kind="stable")[:size]
    return Sketch(sketch.items[best], sketch.counts[best])
