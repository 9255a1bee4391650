"""What users come back to: counts against a literal sum, the same in torch, and the same for any split."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import events_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_graphs import ZeroGraphs, bundle_of

from dman_runtime.model.bundle import StateShape
from dman_runtime.model.events import NO_EVENTS, KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.model.sketch import EMPTY, HALF_LIVES, Sketch, counted, kept
from dman_runtime.model.times import NO_GAP, bucket
from dman_train import returns as in_training
from dman_train.returns import NO_ITEM, follow

T, R = 5, 6
Histories = st.lists(st.integers(0, 14), min_size=1, max_size=60)


def literal_counts(history: list[int], item: int) -> list[float]:
    """Each event counts 1, and half of that when as many events as the half-life have come after it."""
    ages = [len(history) - 1 - place for place, event in enumerate(history) if event == item]
    return [sum(1.0 if life == math.inf else 2.0 ** (-age / life) for age in ages) for life in HALF_LIVES]


def timed(history: list[int]) -> KnownEvents:
    """Event i at 1000 + 7 i seconds, where i is even; else at the time of the event before."""
    places = np.arange(len(history)) // 2 * 2
    return KnownEvents(np.array(history, np.int64), 1000 + 7 * places)


@given(history=Histories, cut=st.integers(0, 60))
def test_counts_are_decayed_sums_over_the_history(history: list[int], cut: int) -> None:
    events = timed(history)
    found = counted(counted(EMPTY, events[:cut]), events[cut:])
    assert found.items.tolist() == list(dict.fromkeys(history)), "in the order in which they came first"
    expected = [literal_counts(history, item) for item in found.items.tolist()]
    np.testing.assert_allclose(found.counts, expected, rtol=1e-4)
    last = [len(history) - 1 - history[::-1].index(item) for item in found.items.tolist()]
    assert found.ages.tolist() == [len(history) - 1 - place for place in last]
    assert found.times.tolist() == events.times[last].tolist()


def test_nothing_counted_is_the_same_sketch() -> None:
    sketch = counted(EMPTY, timed([3, 3, 1]))
    assert counted(sketch, NO_EVENTS) is sketch
    assert counted(EMPTY, NO_EVENTS).items.tolist() == []


def test_kept_are_the_heaviest_and_of_equals_the_first() -> None:
    counts = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 9], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0.5]], np.float32)
    sketch = Sketch(np.array([4, 7, 2, 9]), counts, np.arange(4), np.arange(10, 14))  # weights: 3.5, 2.3, 3.5, 0.4
    assert kept(sketch, 3).items.tolist() == [4, 2, 7]
    assert kept(sketch, 1).items.tolist() == [4]
    assert kept(sketch, 9).items.tolist() == [4, 2, 7, 9]
    np.testing.assert_array_equal(kept(sketch, 3).counts, counts[[0, 2, 1]])
    assert (kept(sketch, 3).ages.tolist(), kept(sketch, 3).times.tolist()) == ([0, 2, 1], [10, 12, 11])


@settings(deadline=None)
@given(history=Histories)
def test_sketch_in_training_equals_the_sketch_in_service(history: list[int]) -> None:
    """At every position of every segment the same candidates with the same counts, and the same items kept."""
    served, trained = EMPTY, in_training.Sketch.empty(1, R, torch.device("cpu"))
    for start in range(0, len(history), T):
        segment = timed(history)[start : start + T]
        padded, times = (torch.from_numpy(np.pad(x, (0, T - len(x))))[None] for x in (segment.items, segment.times))
        found, after = follow(trained, padded, torch.tensor([len(segment)]), times)
        place = {item: row for row, item in enumerate(found.items[0].tolist()) if item != NO_ITEM}
        for position in range(len(segment)):
            here = counted(served, segment[: position + 1])
            rows = [place[item] for item in here.items.tolist()]
            counts, ages, moments = (x[0, position].numpy() for x in found[1:])
            np.testing.assert_allclose(counts[rows], np.log1p(here.counts), rtol=1e-4, atol=1e-6)
            assert ages[rows].tolist() == bucket(here.ages).tolist()
            assert moments[rows].tolist() == here.times.tolist()
            later = sorted(set(range(len(counts))) - set(rows))
            assert not counts[later].any(), "an item that comes later counts nothing yet"
            assert (ages[later] == NO_GAP).all()
        if len(segment) == T:
            served, trained = kept(counted(served, segment), R), after
            assert [item for item in trained.items[0].tolist() if item != NO_ITEM] == served.items.tolist()


def test_places_without_an_item_count_nothing() -> None:
    found, after = follow(
        in_training.Sketch.empty(2, R, torch.device("cpu")),
        torch.tensor([[3, 3, 1, 0, 0], [7, 0, 0, 0, 0]]),
        torch.tensor([3, 1]),
        torch.zeros(2, T, dtype=torch.int64),
    )
    assert found.items.tolist() == [
        [NO_ITEM] * R + [3, NO_ITEM, 1, NO_ITEM, NO_ITEM],
        [NO_ITEM] * R + [7] + [NO_ITEM] * 4,
    ]
    assert not found.counts.transpose(1, 2)[found.items == NO_ITEM].any()
    assert after.items.tolist() == [[3, 1] + [NO_ITEM] * 4, [7] + [NO_ITEM] * 5]


def test_restarted_sketch_has_forgotten_the_rows_that_start() -> None:
    _, sketch = follow(
        in_training.Sketch.empty(2, R, torch.device("cpu")),
        torch.tensor([[1] * T, [2] * T]),
        torch.tensor([T, T]),
        torch.arange(2 * T).view(2, T),
    )
    after = sketch.restarted(torch.tensor([True, False]))
    assert after.items[0].tolist() == [NO_ITEM] * R
    assert all(torch.equal(one[1], other[1]) for one, other in zip(after, sketch, strict=True))
    items = torch.tensor([[5, 6, 5, 5, 5]] * 2)
    found, _ = follow(after, items, torch.tensor([T, T]), torch.ones(2, T, dtype=torch.int64))
    fresh, _ = follow(
        in_training.Sketch.empty(2, R, torch.device("cpu")),
        items,
        torch.tensor([T, T]),
        torch.ones(2, T, dtype=torch.int64),
    )
    came = found.ages[0] >= 0
    assert torch.equal(found.items[0], fresh.items[0]) and torch.equal(found.ages[0], fresh.ages[0])
    assert torch.equal(found.counts[0], fresh.counts[0]) and torch.equal(found.times[0][came], fresh.times[0][came])


@pytest.fixture(scope="module", params=[True, False], ids=["recurrent", "without recurrence"])
def generation(request: pytest.FixtureRequest) -> Generation:
    shape = StateShape(
        segment_length=T,
        memory_slots=2,
        layers=2,
        width=4,
        recurrent=request.param,
        dtype="float16",
        sketch_items=R,
        times="events",
    )
    return Generation.of(bundle_of(shape, 15), ZeroGraphs())


@settings(deadline=None)
@given(history=Histories, cuts=st.lists(st.integers(0, 60), max_size=6))
def test_any_split_of_a_history_gives_the_same_sketch(
    generation: Generation, history: list[int], cuts: list[int]
) -> None:
    (whole,) = generation.replay([timed(history)])
    state, borders = generation.unpack(None), sorted({0, len(history), *(min(cut, len(history)) for cut in cuts)})
    for start, end in pairwise(borders):
        generation.advance([state], [timed(history)[start:end]])
        state = generation.unpack(generation.pack(state))
    for found, expected in ((state.sketch, whole.sketch), (state.counts(), whole.counts())):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(state.sketch.items) <= R


def test_what_comes_often_stays_whatever_comes_in_between(generation: Generation) -> None:
    state, random = generation.unpack(None), np.random.default_rng(0)
    history = np.column_stack([np.full(500, 3), random.integers(4, 15, (500, 4))]).ravel()
    generation.advance([state], [events_of(history)])
    assert state.counts().items[0] == 3
    assert state.counts().counts[0, -1] == 500
