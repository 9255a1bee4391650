"""What becomes of events that come to a server late: their time is known, and before the end of the user's history.

By policy they are taken in the order of arrival, dropped, or put into their places by time (`merging` says what the
time of an event is, and that equal ones stay in the order of arrival). An event that belongs into the open segment
takes effect at once: nothing closed has seen that segment, so its events are taken out of the state and encoded again.
One that belongs before it takes effect when the record is made anew, and the state counts it as lacking until then.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dman_runtime.merging import BEFORE_ALL, joined_events
from dman_runtime.model.events import NO_EVENTS
from dman_runtime.model.times import filled_times
from dman_runtime.opened import OpenUser
from dman_runtime.store.base import Events, StateStore

LateEvents = Literal["arrival", "drop", "place"]
_LAST, _TAIL = 4, 64  # events that are read of the end of a history, first of all


class Placed(NamedTuple):
    """What became of events that were put into a history by time."""

    late: int = 0
    deferred: int = 0  # of those: of items that the model knows, and without effect before the record is made anew


def late_ones(user: OpenUser, times: NDArray[np.int64], store: StateStore) -> NDArray[np.bool_]:
    """Which of some new events (N) are late, each after those before it."""
    if not times.any():
        return np.zeros(len(times), np.bool_)
    return _late(times, _end_of(user, store))[0]


def place(user: OpenUser, events: Events, store: StateStore) -> Placed:
    """Puts new events (N) into the places that their times give them, and leaves the state to be advanced by them.

    Only the end of the history is read, and will be replaced, from before the earliest place on.
    """
    late = late_ones(user, events[1], store)
    found = _tail(user, events[1][late].min(), store) if late.any() else None
    if found is None:
        user.append(*events)
        return Placed()
    start, tail = found
    order = _order(tail[1], events[1])
    items, times = joined_events(tail, events)
    whole = items[order], times[order]
    moved = np.flatnonzero(order[: len(tail[0])] != np.arange(len(tail[0])))
    first = int(moved[0]) if len(moved) else len(tail[0])  # that the tail does not have, or has elsewhere
    deferred = _leave(user, whole, order < len(tail[0]), start, store)
    user.put_from(start + first, (whole[0][first:], whole[1][first:]))
    return Placed(int(late.sum()), deferred)


# -- times -------------------------------------------------------------------------------------------------------------


def _late(times: NDArray[np.int64], end: np.int64) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of events (N) are late behind a history that ends at a time; and (N) the end of it before each."""
    known = times != 0
    ends = np.maximum.accumulate(np.concatenate([[end], np.where(known, times, BEFORE_ALL)]))[:-1]
    return known & (times < ends), ends


def _end_of(user: OpenUser, store: StateStore) -> np.int64:
    """The effective time of the last event of a user's history; BEFORE_ALL without a known one."""
    size = _LAST
    while True:
        start = max(0, user.history_count - size)
        times = _events_from(user, start, store)[1]
        if len(known := times[times != 0]):
            return np.int64(known[-1])
        if not start:
            return np.int64(BEFORE_ALL)
        size *= 8


def _order(before: NDArray[np.int64], new: NDArray[np.int64]) -> NDArray[np.intp]:
    """The order of events at the times `before` (M), the end of a history, with new ones behind them (N).

    Each new one goes behind the last event that is not later, as if they came one by one.
    """
    filled = filled_times(before, BEFORE_ALL)
    earliest = np.minimum.accumulate(filled[::-1])[::-1]  # (M) of each event and those behind it: an older history
    _, ends = _late(new, filled[-1] if len(filled) else np.int64(BEFORE_ALL))  # may be out of order, and stays so
    return np.argsort(np.concatenate([earliest, np.where(new != 0, new, ends)]), kind="stable")


# -- histories ---------------------------------------------------------------------------------------------------------


def _events_from(user: OpenUser, start: int, store: StateStore) -> Events:
    """The events of a user's history from a position on, new ones included.

    The stored ones are read later than the head. If they have changed since, so has the version: the commit fails.
    """
    items, times = user.new_events
    if start >= user.kept or user.user_id is None:
        return items[start - user.kept :], times[start - user.kept :]
    return joined_events(store.history(user.user_id, start, user.kept), (items, times))


def _tail(user: OpenUser, moment: np.int64, store: StateStore) -> tuple[int, Events] | None:
    """The end of a user's history, from an event on that is not after a moment, if there is one, and its position.

    None where the history has changed since the user was opened.
    """
    size = _TAIL
    while True:
        start = max(0, user.history_count - size)
        items, times = _events_from(user, start, store)
        if len(items) != user.history_count - start:
            return None
        if len(before := np.flatnonzero((times != 0) & (times <= moment))):
            anchor = int(before[-1])
            return start + anchor, (items[anchor:], times[anchor:])
        if not start:
            return 0, (items, times)
        size *= 4


# -- states ------------------------------------------------------------------------------------------------------------


def _leave(user: OpenUser, whole: Events, old: NDArray[np.bool_], start: int, store: StateStore) -> int:
    """Leaves a state to be advanced by what it lacks of `whole` (N), the history from position `start` on, in which
    those of the events that are not `old` are new. Cuts it back where they lie in its open segment.

    Returns how many of them lie before that, which it goes on without.
    """
    state, known = user.state, user.projection.knows(whole[0])
    behind = user.event_count - state.closed_events  # events of the model in the open segment, and left
    known_old = np.flatnonzero(known & old)
    border = int(known_old[-behind - 1]) + 1 if len(known_old) > behind else 0  # behind the last closed one
    prefix = NO_EVENTS
    if len(known_old) < behind:
        prefix = (state.open_events + user.left)[: behind - len(known_old)]
    new_before = int((known & ~old)[:border].sum())
    new_behind = np.flatnonzero((known & ~old)[border:])
    unchanged = behind  # events behind the border, before the first new one
    if len(new_behind):
        unchanged = len(prefix) + int((known & old)[border:][: new_behind[0]].sum())
    left = prefix + user.projection.known_events((whole[0][border:], whole[1][border:]))
    encoded = state.event_count - state.closed_events
    if unchanged >= encoded:
        user.left = left[encoded:]
    elif state.can_be_cut:
        state.cut_back()
        user.left = left
    else:  # made anew, so that nothing is lacking
        earlier = _events_from(user, 0, store)
        user.renew(joined_events((earlier[0][:start], earlier[1][:start]), whole))
        return 0
    state.lacking += new_before
    return new_before
