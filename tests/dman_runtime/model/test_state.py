"""What a state holds of a history: counts and borders."""

from __future__ import annotations

import pytest

from dman_runtime.model.bundle import StateShape
from dman_runtime.model.generation import Generation
from dman_runtime.model.state import State, absorbed_segments, context_length

SHAPE = StateShape(segment_length=5, memory_slots=4, layers=2, width=32, recurrent=True, dtype="float16")


@pytest.mark.parametrize(
    ("events", "positions", "absorbed"),
    [(0, 0, 0), (1, 1, 0), (4, 4, 0), (5, 5, 0), (9, 9, 0), (10, 5, 1), (14, 9, 1), (15, 5, 2), (103, 8, 19)],
)
def test_state_holds_one_to_two_segments_and_the_rest_in_memory(events: int, positions: int, absorbed: int) -> None:
    assert (context_length(events, SHAPE), absorbed_segments(events, SHAPE)) == (positions, absorbed)


@pytest.mark.parametrize(("events", "positions", "fill"), [(0, 0, 0), (4, 4, 4), (5, 5, 0), (14, 9, 4), (103, 8, 3)])
def test_state_knows_its_context_and_the_fill_of_its_segment(
    exact: Generation, events: int, positions: int, fill: int
) -> None:
    state = State.empty(exact.bundle)
    state.event_count = events
    assert (state.context_length, state.segment_fill) == (positions, fill)


def test_empty_states_share_nothing_that_is_written_to(exact: Generation) -> None:
    one, other = State.empty(exact.bundle), State.empty(exact.bundle)
    one.recent[:], one.hidden[:], one.memory[:] = 7, 7, 7
    assert not other.recent.any() and not (other.hidden == 7).all()
    assert (other.memory == exact.bundle.initial_memory).all()
