"""Where events go that come to a history late: which of them it holds already, and their places by time. Pure.

An event is (item number, time in seconds). A time of 0 is unknown: such an event stays behind the one before it, so its
*effective* time is that of its predecessor. Before the first known time there is nothing to stay behind.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dman_runtime.model.times import filled_times
from dman_runtime.store.base import Events

BEFORE_ALL = np.iinfo(np.int64).min  # a time before every other


class Merged(NamedTuple):
    """What became of events that were merged into a history."""

    added: int  # events that the history did not hold
    known: int  # of those: of items that the model knows
    rebuilt: bool  # the history was put in order anew, as they do not all belong behind it


def first_known(times: NDArray[np.int64], default: int | np.int64) -> int | np.int64:
    """The first time that is known, or the default."""
    known = np.flatnonzero(times)
    return times[known[0]] if len(known) else default


def unrecognised(history: Events, events: Events) -> NDArray[np.bool_]:
    """Which of some events (N) a history does not hold. One event of the history recognises one of them.

    Item and time must be equal. An event of the history without a time also recognises one at its effective time, as
    that is what a log of it says (`jobs.exporting`). At the beginning that is the first known time: an event that comes
    in before it changes what a log says, so that a log exported earlier is no longer recognised there.
    """
    new = _unpaired(history, events)
    timed, unknown = events[1] != 0, history[1] == 0
    pending = new & timed
    if pending.any() and unknown.any():  # those first: an event without a time has a choice of partners
        times = filled_times(history[1], first_known(history[1], 0))
        partners = history[0][unknown], times[unknown]
        asking = events[0][pending], events[1][pending]
        new[pending] = _unpaired(partners, asking)
        left = partners[0][_unpaired(asking, partners)]
        untimed = events[0][~timed], events[1][~timed]
        new[~timed] = _unpaired((left, np.zeros(len(left), np.int64)), untimed)
    return new


def _unpaired(history: Events, events: Events) -> NDArray[np.bool_]:
    """Which events (N) have no partner: of k equal ones, j of them in the history, the last k - j have none."""
    items, times = joined_events(history, events)
    order = np.lexsort((times, items))  # stable: those of the history come first among equal ones
    items, times, of_history = items[order], times[order], order < len(history[0])
    begins = np.ones(len(order), bool)  # a run of equal events
    begins[1:] = (items[1:] != items[:-1]) | (times[1:] != times[:-1])
    run = np.cumsum(begins) - 1
    position = np.arange(len(order)) - np.flatnonzero(begins)[run]
    new = ~of_history & (position >= 2 * np.bincount(run, weights=of_history)[run])
    unpaired = np.zeros(len(events[0]), bool)
    unpaired[order[new] - len(history[0])] = True
    return unpaired


def merge_events(history: Events, events: Events, *, keep_order: bool = False) -> tuple[Events, Events | None]:
    """The events (N) that a history (M) lacks, and the history with them; None if they all belong behind it.

    Everything is sorted by effective time; equal ones stay in order, those of the history first. Events without any
    time go to the end. With `keep_order`, neither the history nor the events change their order among themselves,
    whatever their times say.
    """
    new = unrecognised(history, events)
    added = events[0][new], events[1][new]
    stored = filled_times(history[1], BEFORE_ALL)
    newest = stored.max(initial=BEFORE_ALL)
    times = filled_times(added[1], first_known(added[1], newest))
    if keep_order:
        stored, times = np.maximum.accumulate(stored), np.maximum.accumulate(times)
    if (times >= newest).all():
        order = np.argsort(times, kind="stable")
        return (added[0][order], added[1][order]), None
    order = np.argsort(np.concatenate([stored, times]), kind="stable")
    items, timestamps = joined_events(history, added)
    return added, (items[order], timestamps[order])


def joined_events(first: Events, second: Events) -> Events:
    """Two parts of a history, one behind the other."""
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])
