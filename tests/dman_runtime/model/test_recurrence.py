"""The recurrence over the real graphs: states do not depend on company or on cuts, and forget nothing."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TINY_ITEMS, assert_close, events_of

from dman_runtime.model.generation import Generation
from dman_runtime.model.recurrence import ROWS_PER_RUN, next_piece
from dman_runtime.model.state import State

T = 5  # the tiny model's segment length
EXACT = 1e-4  # relative, in root mean square: float32 arithmetic in another order


def assert_same_state(found: State, expected: State) -> None:
    count = expected.context_length
    assert (found.event_count, found.history_count) == (expected.event_count, expected.history_count)
    np.testing.assert_array_equal(found.recent[:count], expected.recent[:count])
    assert_close(found.hidden[:, :count], expected.hidden[:, :count], EXACT)
    assert_close(found.memory, expected.memory, EXACT)
    assert_close(found.user_embedding, expected.user_embedding, EXACT)


def test_state_does_not_depend_on_who_shares_the_batch(exact: Generation) -> None:
    random = np.random.default_rng(3)
    histories = [events_of(random.integers(0, TINY_ITEMS, 1 + row % 23)) for row in range(2 * ROWS_PER_RUN + 7)]
    together = exact.replay(histories)
    for row in range(0, len(histories), 13):
        assert_same_state(together[row], exact.replay([histories[row]])[0])


def test_state_forgets_no_event_of_a_long_history(exact: Generation) -> None:
    """The first event, long since absorbed, still matters: the memory is not a window."""
    random = np.random.default_rng(4)
    history = random.integers(0, TINY_ITEMS, 8 * T + 2)
    changed = history.copy()
    changed[0] = (history[0] + 1) % TINY_ITEMS
    one, other = exact.replay([events_of(history), events_of(changed)])
    assert np.abs(one.memory - other.memory).max() > 1e-6


@pytest.mark.parametrize("before", [0, 1, 4, 5, 9, 10, 13])
@pytest.mark.parametrize("count", [1, 4, 5, 6, 23])
def test_next_piece_fills_the_open_segment_and_no_more(exact: Generation, before: int, count: int) -> None:
    state = State.empty(exact.bundle)
    state.event_count = before
    piece = next_piece(state, events_of(range(count)))
    assert piece.state is state
    assert piece.events.items.tolist() == list(range(min(count, T - before % T)))


def test_pieces_one_by_one_give_the_state_of_one_replay(exact: Generation) -> None:
    history = events_of(np.random.default_rng(5).integers(0, TINY_ITEMS, 5 * T + 3))
    state, left = State.empty(exact.bundle), history[:2]
    exact.advance_pieces([next_piece(state, left)])  # a short one first, so that pieces do not begin with segments
    left = history[2:]
    while len(left):
        piece = next_piece(state, left)
        exact.advance_pieces([piece])
        left = left[len(piece.events) :]
    state.history_count = len(history)
    assert_same_state(state, exact.replay([history])[0])


def test_advance_by_nothing_runs_no_graph_and_changes_nothing(exact: Generation) -> None:
    state = exact.replay([events_of(range(7))])[0]
    before = exact.pack(state)
    exact.advance([state], [events_of([])])
    exact.advance([], [])
    assert exact.pack(state) == before


def test_replay_counts_the_whole_history(exact: Generation) -> None:
    states = exact.replay([events_of(range(n)) for n in (0, 3, 12)])
    assert [(state.event_count, state.history_count) for state in states] == [(0, 0), (3, 3), (12, 12)]
