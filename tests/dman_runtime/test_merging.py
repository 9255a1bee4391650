"""Merging of events into a history, beside references of a few lines of plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dman_runtime.merging import first_known, joined_events, merge_events, unrecognised
from dman_runtime.model.times import filled_times
from dman_runtime.store.base import Events

Pairs = list[tuple[int, int]]  # item number and time
some_events = st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 4)), max_size=12)
timed_events = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=12)


def events(pairs: Sequence[tuple[int, int]]) -> Events:
    return np.array([item for item, _ in pairs], np.uint32), np.array([time for _, time in pairs], np.int64)


def pairs(found: Events) -> Pairs:
    items, times = found
    assert items.dtype == np.uint32 and times.dtype == np.int64
    return list(zip(items.tolist(), times.tolist(), strict=True))


def merged(history: Pairs, new: Pairs, *, keep_order: bool = False) -> tuple[Pairs, int, bool]:
    """The history afterwards, how many events are new, and whether the old history is no longer its beginning."""
    added, whole = merge_events(events(history), events(new), keep_order=keep_order)
    after = pairs(whole) if whole is not None else pairs(joined_events(events(history), added))
    return after, len(added[0]), whole is not None


CASES = {
    "into nothing": ([], [(1, 5), (2, 6)], [(1, 5), (2, 6)], 2, False),
    "nothing": ([(1, 5)], [], [(1, 5)], 0, False),
    "the same again": ([(1, 5), (2, 6)], [(1, 5), (2, 6)], [(1, 5), (2, 6)], 0, False),
    "newer ones": ([(1, 5), (2, 6)], [(2, 6), (3, 6), (1, 9)], [(1, 5), (2, 6), (3, 6), (1, 9)], 2, False),
    "older ones": ([(1, 5), (2, 6)], [(3, 4), (4, 5)], [(3, 4), (1, 5), (4, 5), (2, 6)], 2, True),
    "three of one, and one is stored": ([(1, 5)], [(1, 5), (1, 5), (1, 5)], [(1, 5), (1, 5), (1, 5)], 2, False),
    "one of three that are stored": ([(1, 5), (1, 5), (1, 5)], [(1, 5)], [(1, 5), (1, 5), (1, 5)], 0, False),
    "the same item at another time": ([(1, 5)], [(1, 6)], [(1, 5), (1, 6)], 1, False),
    "another item at the same time": ([(1, 5)], [(2, 5)], [(1, 5), (2, 5)], 1, False),
    "no times at all": ([(1, 0), (2, 0)], [(1, 0), (3, 0), (1, 0)], [(1, 0), (2, 0), (3, 0), (1, 0)], 2, False),
    "without time behind times": ([(1, 5), (2, 6)], [(3, 0)], [(1, 5), (2, 6), (3, 0)], 1, False),
    "unknown time stays behind": ([(1, 5), (2, 0), (3, 9)], [(4, 7)], [(1, 5), (2, 0), (4, 7), (3, 9)], 1, True),
    "unknown time, equal one": ([(1, 5), (2, 0), (3, 9)], [(4, 5)], [(1, 5), (2, 0), (4, 5), (3, 9)], 1, True),
    "unknown time goes along": ([(1, 5), (2, 0)], [(4, 3)], [(4, 3), (1, 5), (2, 0)], 1, True),
    "unknown time at the start": ([(1, 0), (2, 6)], [(3, 4)], [(1, 0), (3, 4), (2, 6)], 1, True),
    "new ones of unknown time": ([(1, 9)], [(2, 0), (3, 4), (4, 0)], [(2, 0), (3, 4), (4, 0), (1, 9)], 3, True),
    "a history out of order": ([(1, 9), (2, 5)], [(3, 6)], [(2, 5), (3, 6), (1, 9)], 1, True),
    "out of order, newer": ([(1, 9), (2, 5)], [(3, 9)], [(1, 9), (2, 5), (3, 9)], 1, False),
    "new ones out of order": ([(1, 3)], [(2, 9), (3, 5)], [(1, 3), (3, 5), (2, 9)], 2, False),
    "before the time an export filled in": ([(1, 0), (2, 6)], [(3, 4), (1, 6)], [(1, 0), (3, 4), (2, 6)], 1, True),
    "exported before another came in": ([(1, 0), (3, 4), (2, 6)], [(1, 6)], [(1, 0), (3, 4), (2, 6), (1, 6)], 1, False),
    "two without, one of them found by time": ([(1, 1), (2, 0), (2, 6), (2, 0)], [(2, 0), (2, 1)], None, 0, False),
    "the time an export filled in": ([(1, 5), (2, 0), (2, 0)], [(1, 5), (2, 5)], [(1, 5), (2, 0), (2, 0)], 0, False),
    "once for each time filled in": ([(1, 5), (2, 0)], [(2, 5), (2, 5)], [(1, 5), (2, 0), (2, 5)], 1, False),
    "filled in from behind": ([(1, 0), (2, 7)], [(1, 7), (2, 7)], [(1, 0), (2, 7)], 0, False),
    "far apart": ([(1, -(2**63)), (2, 2**63 - 1)], [(3, 1)], [(1, -(2**63)), (3, 1), (2, 2**63 - 1)], 1, True),
}  # fmt: skip


@pytest.mark.parametrize(("history", "new", "after", "added", "rebuilt"), CASES.values(), ids=CASES)
def test_merge_of(history: Pairs, new: Pairs, after: Pairs | None, added: int, rebuilt: bool) -> None:
    assert merged(history, new) == (history if after is None else after, added, rebuilt)


KEPT = {
    "newer ones": ([(1, 9), (2, 5)], [(3, 9), (4, 1)], [(1, 9), (2, 5), (3, 9), (4, 1)], False),
    "older ones": ([(1, 9), (2, 5)], [(3, 4), (4, 2)], [(3, 4), (4, 2), (1, 9), (2, 5)], True),
    "between": ([(1, 3), (2, 1), (3, 9)], [(4, 5), (5, 2)], [(1, 3), (2, 1), (4, 5), (5, 2), (3, 9)], True),
    "known ones": ([(1, 9), (2, 5)], [(2, 5), (1, 9)], [(1, 9), (2, 5)], False),
}


@pytest.mark.parametrize(("history", "new", "after", "rebuilt"), KEPT.values(), ids=KEPT)
def test_merge_that_keeps_the_order_of(history: Pairs, new: Pairs, after: Pairs, rebuilt: bool) -> None:
    found, _, was_rebuilt = merged(history, new, keep_order=True)
    assert (found, was_rebuilt) == (after, rebuilt)


@given(some_events, some_events)
@example([(1, 5), (1, 5)], [(1, 5), (1, 5), (1, 5)])
def test_unrecognised_are_the_last_ones_that_have_no_partner(history: Pairs, new: Pairs) -> None:
    if any(time == 0 for _, time in history):
        history = [(item, time + 10) for item, time in history]
    left, expected = Counter(history), []
    for event in new:
        expected.append(not left[event])
        left[event] -= left[event] > 0
    assert unrecognised(events(history), events(new)).tolist() == expected


@given(some_events, some_events, st.booleans())
def test_merge_twice_is_merge_once(history: Pairs, new: Pairs, keep_order: bool) -> None:
    if history and history[0][1] == 0:  # the first known time can change, and with it what an export says of this event
        history = [(history[0][0], 6), *history[1:]]
    after, _, _ = merged(history, new, keep_order=keep_order)
    assert merged(after, new, keep_order=keep_order) == (after, 0, False)
    assert merged(after, history, keep_order=keep_order) == (after, 0, False)


@given(some_events, some_events, st.booleans())
def test_merge_loses_nothing_and_adds_what_is_new(history: Pairs, new: Pairs, keep_order: bool) -> None:
    after, added, rebuilt = merged(history, new, keep_order=keep_order)
    is_new = unrecognised(events(history), events(new))
    assert Counter(after) == Counter(history) + Counter(event for event, one in zip(new, is_new, strict=True) if one)
    assert (len(after), added) == (len(history) + is_new.sum(), is_new.sum())
    if not rebuilt:
        assert after[: len(history)] == history


@given(timed_events, timed_events, st.data())
def test_merge_in_any_order_of_parts_is_one_sort_by_time(one: Pairs, two: Pairs, data: st.DataObject) -> None:
    """Where no two events have one time, as ties keep the order in which they came."""
    every = [(item, 10 * number + time) for number, (item, time) in enumerate(one + two)]
    parts = data.draw(st.permutations(every))
    cut = len(one)
    after, _, _ = merged([], sorted(parts[:cut], key=lambda event: event[1]))
    after, _, _ = merged(after, parts[cut:])
    assert after == sorted(every, key=lambda event: event[1])


@given(some_events)
def test_filled_times_are_those_of_the_event_before(found: Pairs) -> None:
    times = [time for _, time in found]
    first = next((time for time in times if time), 77)
    expected = list[int]()
    for time in times:
        expected.append(time or (expected[-1] if expected else first))
    array = events(found)[1]
    assert first_known(array, 77) == first
    assert filled_times(array, first_known(array, 77)).tolist() == expected
