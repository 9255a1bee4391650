"""Which items a user comes back to: a bounded sketch of a history. numpy only; training has the same in torch.

The sketch holds the R items with the largest decayed counts: their counts at H half-lives, and when each came last. It
changes when a segment closes; until then the items of the open segment are counted beside it. So it is the same for any
split of a history. A count is in events: half-life h means that an event counts half when h more have come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dman_runtime.model.events import KnownEvents
from dman_runtime.model.times import bucket

HALF_LIVES = (2.0, 8.0, 32.0, 128.0, math.inf)
RATES = np.array([2.0 ** (-1 / life) for life in HALF_LIVES], np.float32)  # (H) what is left of a count per event


class Sketch(NamedTuple):
    items: np.ndarray  # (r) int64 item indices, r <= R
    counts: np.ndarray  # (r, H) float32
    ages: np.ndarray  # (r) int64 events that came after the last one of the item
    times: np.ndarray  # (r) int64 seconds of the last one of the item; 0 unknown

    def at(self, rows: np.ndarray) -> Sketch:
        return Sketch(*(values[rows] for values in self))


EMPTY = Sketch(
    np.zeros(0, np.int64), np.zeros((0, len(HALF_LIVES)), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64)
)


def counted(sketch: Sketch, events: KnownEvents) -> Sketch:
    """The sketch's items, then the others of n later events in order, as they are after the last one."""
    count, size = len(events), len(sketch.items)
    if not count:
        return sketch
    row_of = {item: row for row, item in enumerate(sketch.items.tolist())}
    rows = [row_of.setdefault(item, len(row_of)) for item in events.items.tolist()]  # for a segment faster than numpy
    age = np.arange(count - 1, -1, -1)  # (n) events that came after each
    counts = np.zeros((len(row_of), len(HALF_LIVES)), np.float32)
    counts[:size] = sketch.counts * RATES**count
    np.add.at(counts, rows, RATES ** age[:, None].astype(np.float32))
    ages, times = np.empty(len(row_of), np.int64), np.empty(len(row_of), np.int64)
    ages[:size], times[:size] = sketch.ages + count, sketch.times
    ages[rows], times[rows] = age, events.times  # of several events of an item the last one stays
    return Sketch(np.fromiter(row_of, np.int64, len(row_of)), counts, ages, times)


def kept(sketch: Sketch, size: int) -> Sketch:
    """The `size` items that weigh most, heaviest first; ties in order."""
    return sketch.at(np.argsort(-np.log1p(sketch.counts).sum(axis=1), kind="stable")[:size])


def return_scores(sketch: Sketch, embedding: np.ndarray, moment: int, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """(r) what is added to the scores of the sketch's items, as `dman_train.returns.ReturnTerm` has it.

    Args:
        embedding: (D) of the user.
        moment: Seconds of the request; that of the last event if unknown, 0 if that is unknown too.
        weights: `Bundle.returns`.
    """
    by_count = weights["by_user"] @ embedding + weights["bias"] + weights["by_item"][sketch.items]  # (r, H)
    scores: np.ndarray = (np.log1p(sketch.counts) * by_count).sum(axis=1) + weights["by_age"][bucket(sketch.ages)]
    if "by_gap" in weights and moment:
        scores += np.where(sketch.times != 0, weights["by_gap"][bucket(moment - sketch.times)], 0)
    return scores
