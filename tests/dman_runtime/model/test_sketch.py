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
from dman_runtime.model.generation import Generation
from dman_runtime.model.sketch import EMPTY, HALF_LIVES, Sketch, counted, kept
from dman_train import returns as in_training
from dman_train.returns import NO_ITEM, follow

T, R = 5, 6
Histories = st.lists(st.integers(0, 14), min_size=1, max_size=60)


def literal_counts(history: list[int], item: int) -> list[float]:
    """Each event counts 1, and half of that when as many events as the half-life have come after it."""
    ages = [len(history) - 1 - place for place, event in enumerate(history) if event == item]
    return [sum(1.0 if life == math.inf else 2.0 ** (-age / life) for age in ages) for life in HALF_LIVES]


@given(history=Histories, cut=st.integers(0, 60))
def test_counts_are_decayed_sums_over_the_history(history: list[int], cut: int) -> None:
    found = counted(counted(EMPTY, np.array(history[:cut], np.int64)), np.array(history[cut:], np.int64))
    assert found.items.tolist() == list(dict.fromkeys(history)), "in the order in which they came first"
    expected = [literal_counts(history, item) for item in found.items.tolist()]
    np.testing.assert_allclose(found.counts, expected, rtol=1e-4)


def test_nothing_counted_is_the_same_sketch() -> None:
    sketch = counted(EMPTY, np.array([3, 3, 1]))
    assert counted(sketch, np.zeros(0, np.int64)) is sketch
    assert counted(EMPTY, np.zeros(0, np.int64)).items.tolist() == []


def test_kept_are_the_heaviest_and_of_equals_the_first() -> None:
    counts = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 9], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0.5]], np.float32)
    sketch = Sketch(np.array([4, 7, 2, 9]), counts)  # weights: 3.5, 2.3, 3.5, 0.4
    assert kept(sketch, 3).items.tolist() == [4, 2, 7]
    assert kept(sketch, 1).items.tolist() == [4]
    assert kept(sketch, 9).items.tolist() == [4, 2, 7, 9]
    np.testing.assert_array_equal(kept(sketch, 3).counts, counts[[0, 2, 1]])


@settings(deadline=None)
@given(history=Histories)
def test_sketch_in_training_equals_the_sketch_in_service(history: list[int]) -> None:
    """At every position of every segment the same candidates with the same counts, and the same items kept."""
    served, trained = EMPTY, in_training.Sketch.empty(1, R, torch.device("cpu"))
    for start in range(0, len(history), T):
        segment = history[start : start + T]
        padded = torch.tensor([segment + [0] * (T - len(segment))])
        found, after = follow(trained, padded, torch.tensor([len(segment)]))
        for position in range(len(segment)):
            here = counted(served, np.array(segment[: position + 1]))
            by_item = dict(zip(found.items[0].tolist(), found.counts[0, position].numpy(), strict=True))
            counts = [by_item[item] for item in here.items.tolist()]
            np.testing.assert_allclose(counts, np.log1p(here.counts), rtol=1e-4, atol=1e-6)
            later = set(by_item) - set(here.items.tolist()) - {NO_ITEM}
            assert all(not by_item[item].any() for item in later), "an item that comes later counts nothing yet"
        if len(segment) == T:
            served, trained = kept(counted(served, np.array(segment)), R), after
            assert [item for item in trained.items[0].tolist() if item != NO_ITEM] == served.items.tolist()


def test_places_without_an_item_count_nothing() -> None:
    found, after = follow(
        in_training.Sketch.empty(2, R, torch.device("cpu")),
        torch.tensor([[3, 3, 1, 0, 0], [7, 0, 0, 0, 0]]),
        torch.tensor([3, 1]),
    )
    assert found.items.tolist() == [
        [NO_ITEM] * R + [3, NO_ITEM, 1, NO_ITEM, NO_ITEM],
        [NO_ITEM] * R + [7] + [NO_ITEM] * 4,
    ]
    assert not found.counts.transpose(1, 2)[found.items == NO_ITEM].any()
    assert after.items.tolist() == [[3, 1] + [NO_ITEM] * 4, [7] + [NO_ITEM] * 5]


def test_restarted_sketch_has_forgotten_the_rows_that_start() -> None:
    _, sketch = follow(
        in_training.Sketch.empty(2, R, torch.device("cpu")), torch.tensor([[1] * T, [2] * T]), torch.tensor([T, T])
    )
    after = sketch.restarted(torch.tensor([True, False]))
    assert after.items[0].tolist() == [NO_ITEM] * R and not after.counts[0].any()
    assert torch.equal(after.items[1], sketch.items[1]) and torch.equal(after.counts[1], sketch.counts[1])


@pytest.fixture(scope="module", params=[True, False], ids=["recurrent", "without recurrence"])
def generation(request: pytest.FixtureRequest) -> Generation:
    shape = StateShape(
        segment_length=T, memory_slots=2, layers=2, width=4, recurrent=request.param, dtype="float16", sketch_items=R
    )
    return Generation.of(bundle_of(shape, 15), ZeroGraphs())


@settings(deadline=None)
@given(history=Histories, cuts=st.lists(st.integers(0, 60), max_size=6))
def test_any_split_of_a_history_gives_the_same_sketch(
    generation: Generation, history: list[int], cuts: list[int]
) -> None:
    (whole,) = generation.replay([events_of(history)])
    state, borders = generation.unpack(None), sorted({0, len(history), *(min(cut, len(history)) for cut in cuts)})
    for start, end in pairwise(borders):
        generation.advance([state], [events_of(history[start:end])])
        state = generation.unpack(generation.pack(state))
    for found, expected in ((state.sketch, whole.sketch), (state.counts(), whole.counts())):
        np.testing.assert_array_equal(found.items, expected.items)
        np.testing.assert_array_equal(found.counts, expected.counts)
    assert len(state.sketch.items) <= R


def test_what_comes_often_stays_whatever_comes_in_between(generation: Generation) -> None:
    state, random = generation.unpack(None), np.random.default_rng(0)
    history = np.column_stack([np.full(500, 3), random.integers(4, 15, (500, 4))]).ravel()
    generation.advance([state], [events_of(history)])
    assert state.counts().items[0] == 3
    assert state.counts().counts[0, -1] == 500
