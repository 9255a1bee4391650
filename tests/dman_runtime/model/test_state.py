"""What a state holds of a history: counts and borders."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dman_runtime.model.bundle import StateShape
from dman_runtime.model.generation import Generation
from dman_runtime.model.state import State, absorbed_segments, context_length

RECURRENT = StateShape(segment_length=5, memory_slots=4, layers=2, width=32, recurrent=True, dtype="float16")
ONE_SEGMENT = replace(RECURRENT, recurrent=False)
LATE = replace(RECURRENT, times="request")  # answers read the state once more


@pytest.mark.parametrize(
    ("events", "positions", "absorbed"),
    [(0, 0, 0), (1, 1, 0), (4, 4, 0), (5, 5, 0), (9, 9, 0), (10, 5, 1), (14, 9, 1), (15, 5, 2), (103, 8, 19)],
)
def test_state_holds_one_to_two_segments_and_the_rest_in_memory(events: int, positions: int, absorbed: int) -> None:
    assert (context_length(events, RECURRENT), absorbed_segments(events, RECURRENT)) == (positions, absorbed)


@pytest.mark.parametrize(
    ("events", "positions", "absorbed"),
    [(0, 0, 0), (1, 1, 0), (4, 4, 0), (5, 0, 1), (9, 4, 1), (10, 0, 2), (14, 4, 2), (15, 0, 3), (103, 3, 20)],
)
def test_state_without_recurrence_holds_its_open_segment_and_the_rest_in_memory(
    events: int, positions: int, absorbed: int
) -> None:
    assert (context_length(events, ONE_SEGMENT), absorbed_segments(events, ONE_SEGMENT)) == (positions, absorbed)


@pytest.mark.parametrize(
    ("events", "positions", "absorbed"),
    [(0, 0, 0), (1, 1, 0), (5, 5, 0), (9, 9, 0), (10, 10, 0), (11, 6, 1), (15, 10, 1), (16, 6, 2), (103, 8, 19)],
)
@pytest.mark.parametrize("shape", [LATE, replace(RECURRENT, sketch_items=8)], ids=["requests", "returns"])
def test_state_that_answers_read_again_holds_a_full_segment_until_the_next_event(
    shape: StateShape, events: int, positions: int, absorbed: int
) -> None:
    assert (context_length(events, shape), absorbed_segments(events, shape)) == (positions, absorbed)


@pytest.mark.parametrize(("events", "positions", "absorbed"), [(0, 0, 0), (5, 5, 0), (6, 1, 1), (10, 5, 1), (11, 1, 2)])
def test_state_without_recurrence_holds_a_full_segment_until_the_next_event_too(
    events: int, positions: int, absorbed: int
) -> None:
    shape = replace(LATE, recurrent=False)
    assert (context_length(events, shape), absorbed_segments(events, shape)) == (positions, absorbed)


def test_state_that_sees_event_times_only_closes_segments_at_once() -> None:
    assert not replace(RECURRENT, times="events").answers_read_states


@pytest.mark.parametrize(
    ("shape", "positions"), [(RECURRENT, [0, 4, 5, 9, 8]), (ONE_SEGMENT, [0, 4, 0, 4, 3])], ids=["recurrent", "not"]
)
def test_state_knows_its_context_and_the_fill_of_its_segment(
    exact: Generation, shape: StateShape, positions: list[int]
) -> None:
    state = State.empty(replace(exact.bundle, manifest=replace(exact.bundle.manifest, state=shape)))
    limit = 10 if shape.recurrent else 5
    assert (state.recent.shape, state.hidden.shape) == ((limit,), (1, limit, 32))
    for events, context, fill in zip((0, 4, 5, 14, 103), positions, (0, 4, 0, 4, 3), strict=True):
        state.event_count = events
        assert (state.context_length, state.segment_fill) == (context, fill)


def test_empty_states_share_nothing_that_is_written_to(exact: Generation) -> None:
    one, other = State.empty(exact.bundle), State.empty(exact.bundle)
    one.recent[:], one.hidden[:], one.memory[:] = 7, 7, 7
    assert not other.recent.any() and not (other.hidden == 7).all()
    assert (other.memory == exact.bundle.initial_memory).all()
