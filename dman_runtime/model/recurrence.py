"""Advances user states by new events: encodes them, keeps their hidden states, closes segments. numpy only.

One code path for a single event, an import of millions and a what-if: every round gives each user with events left up
to the rest of the open segment, then absorbs the segments that closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dman_runtime.model.bundle import Bundle, StateShape
from dman_runtime.model.events import KnownEvents
from dman_runtime.model.rounding import rounded
from dman_runtime.model.sketch import kept as keep_best
from dman_runtime.model.state import State
from dman_runtime.model.times import NO_EVENT, NO_GAP, bucket, filled_times, quantised_one

ROWS_PER_RUN = 64  # users in one run of a graph: enough for speed, few enough to stay in cache


class Graphs(Protocol):
    """What `dman_runtime.model.encoder.Encoder` offers; shapes there."""

    @property
    def provider(self) -> str: ...

    @property
    def on_cuda(self) -> bool: ...

    def encode(
        self,
        item_embeddings: np.ndarray,
        new_lengths: np.ndarray,
        context: np.ndarray,
        context_lengths: np.ndarray,
        memory: np.ndarray,
        ages: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def abstract(self, memory: np.ndarray, segment_hidden: np.ndarray) -> np.ndarray: ...

    def read_at_request(
        self, sources: np.ndarray, memory: np.ndarray, ages: np.ndarray, gaps: np.ndarray
    ) -> np.ndarray: ...


class Piece(NamedTuple):
    """Some next events of one user, none of them beyond the open segment, and at least one."""

    state: State
    events: KnownEvents


def next_piece(state: State, events: KnownEvents) -> Piece:
    """As many of some events, at least one, as fit into the open segment, or into the next if that is full."""
    segment = state.shape.segment_length
    return Piece(state, events[: segment - state.segment_fill % segment])


def without_rest() -> None:
    """What jobs do between two pieces that nobody waits behind."""


def advance(
    states: Sequence[State],
    new_events: Sequence[KnownEvents],
    *,
    bundle: Bundle,
    graphs: Graphs,
    rest: Callable[[], None] = without_rest,
) -> None:
    """Appends `new_events[i]` (may be empty) to `states[i]`, in place. Calls `rest` behind each round of pieces."""
    left = [(state, events) for state, events in zip(states, new_events, strict=True) if len(events)]
    while left:
        pieces = [next_piece(state, events) for state, events in left]
        advance_pieces(pieces, bundle=bundle, graphs=graphs)
        rest()
        left = [
            (state, events[len(piece.events) :])
            for (state, events), piece in zip(left, pieces, strict=True)
            if len(piece.events) < len(events)
        ]


def advance_pieces(pieces: Sequence[Piece], *, bundle: Bundle, graphs: Graphs) -> None:
    """Appends one piece to each of some different states, in place."""
    ordered = sorted(pieces, key=lambda piece: len(piece.events))  # runs of similar length waste no padding
    for start in range(0, len(ordered), ROWS_PER_RUN):
        part = ordered[start : start + ROWS_PER_RUN]
        states = [state for state, _ in part]
        late = states[0].shape.answers_read_states
        if late:
            _close_full(states, bundle=bundle, graphs=graphs)
        _encode(part, bundle=bundle, graphs=graphs)
        if not late:
            _close_full(states, bundle=bundle, graphs=graphs)


def _encode(pieces: Sequence[Piece], *, bundle: Bundle, graphs: Graphs) -> None:
    """Encodes the pieces and keeps what they leave behind.

    Row by row: for one user, where latency counts, that is faster than any indexing of a whole batch, and for many
    users the graph takes far longer.
    """
    shape = pieces[0].state.shape
    lengths = [len(events) for _, events in pieces]
    contexts = [_context_before(state) for state, _ in pieces]
    new = np.zeros((len(pieces), max(lengths), shape.width), np.float32)  # (R, S, D) left-aligned
    context = np.zeros((len(pieces), shape.layers, max(contexts), shape.width), np.float32)  # right-aligned
    memory = np.empty((len(pieces), *bundle.initial_memory.shape), np.float32)
    ages = (
        np.zeros((len(pieces), new.shape[1], context.shape[2] + new.shape[1]), np.int64) if shape.sees_times else None
    )
    for row, (state, events) in enumerate(pieces):
        memory[row] = state.memory
        new[row, : len(events)] = bundle.item_embeddings[events.items]
        if count := contexts[row]:
            context[row, 0, -count:] = bundle.item_embeddings[state.recent[:count]]
            context[row, 1:, -count:] = state.hidden[:, :count]
        if ages is not None:
            _add_times(ages[row], new[row], context[row, 0], pieces[row], bundle)
    embeddings, hidden = graphs.encode(
        new, np.array(lengths, np.int64), context, np.array(contexts, np.int64), memory, ages
    )
    for row, (state, events) in enumerate(pieces):
        begin, end = contexts[row], contexts[row] + lengths[row]
        state.recent[begin:end] = events.items
        if ages is not None:
            state.last_time, state.last_is_known = int(state.times[end - 1]), bool(events.times[-1])
        state.hidden[:, begin:end] = hidden[row, 1:, : lengths[row]]
        state.user_embedding = embeddings[row]
        state.event_count, state.cut = state.event_count + lengths[row], False


def _context_before(state: State) -> int:
    """Positions of the context that a new event sees: without a segment that `_close_full` has taken out of it."""
    count, shape = state.context_length, state.shape
    return count - shape.segment_length if count == shape.context_limit else count


def _close_full(states: Sequence[State], *, bundle: Bundle, graphs: Graphs) -> None:
    """Closes the open segment of each state where it is full."""
    shape = states[0].shape
    full = [one for one in states if one.event_count and not one.event_count % shape.segment_length and not one.cut]
    if shape.closed == "int8" and shape.recurrent:
        for state in full:
            end = min(state.event_count, shape.context_limit)
            newest = slice(end - shape.segment_length, end)
            state.hidden[:, newest], state.closed = rounded(state.hidden[:, newest]), b""
    if shape.sketch_items:
        for state in full:
            state.sketch = keep_best(state.counts(), shape.sketch_items)
    if whole := [state for state in full if state.event_count >= shape.context_limit]:
        _close_segments(whole, bundle=bundle, graphs=graphs)


def _close_segments(states: Sequence[State], *, bundle: Bundle, graphs: Graphs) -> None:
    """Where the open segment is full: absorb the oldest of the context (eq. 4) and keep what remains.

    With recurrence the oldest is the segment before the full one, without it the full one itself.
    """
    shape = states[0].shape
    segment, kept = shape.segment_length, shape.context_limit - shape.segment_length
    if shape.memory_slots:
        closed = np.empty((len(states), shape.layers, segment, shape.width), np.float32)
        memory = np.empty((len(states), *bundle.initial_memory.shape), np.float32)
        for row, state in enumerate(states):
            memory[row] = state.memory
            closed[row, 0] = bundle.item_embeddings[state.recent[:segment]]
            if bundle.gap_embeddings is not None:
                _add_gaps(closed[row, 0], state.gaps[:segment], bundle.gap_embeddings)
            closed[row, 1:] = state.hidden[:, :segment]
        for state, new_memory in zip(states, graphs.abstract(memory, closed).astype(shape.dtype), strict=True):
            state.memory = new_memory
    for state in states:
        state.recent[:kept] = state.recent[segment:]
        state.times[:kept] = state.times[segment:]
        state.gaps[:kept] = state.gaps[segment:]
        state.hidden[:, :kept] = state.hidden[:, segment:]


def _add_times(ages: np.ndarray, new: np.ndarray, context: np.ndarray, piece: Piece, bundle: Bundle) -> None:
    """Fills in the `ages` (S, K) of a row; adds to its (S, D) new and (C, D) context items what gaps are worth.

    Times and gaps of the new events go into the state, behind its context, where nothing reads them yet.
    """
    state, events = piece
    count, fresh, table = _context_before(state), len(events), bundle.gap_embeddings
    assert table is not None
    moments, added = filled_times(events.times, state.last_time), slice(count, count + fresh)
    state.times[added], state.gaps[added] = moments, new_gaps(state, moments)
    _add_gaps(new[:fresh], state.gaps[added], table)
    _add_gaps(context[len(context) - count :], state.gaps[:count], table)
    ages[:fresh, len(context) - count : len(context) + fresh] = bucket(moments[:, None] - state.times[: added.stop])


def embeddings_at(
    states: Sequence[State], moments: Sequence[int | None], *, bundle: Bundle, graphs: Graphs
) -> np.ndarray:
    """(B, D) user embeddings for requests at these moments, as `moment_of` has them; for None those of the states."""
    embeddings = np.stack([state.user_embedding for state in states])
    asked = [(row, states[row], at) for row, at in enumerate(moments) if at is not None]
    for start in range(0, len(asked), ROWS_PER_RUN):
        part = asked[start : start + ROWS_PER_RUN]
        chosen = [row for row, _, _ in part]
        embeddings[chosen] = _read([state for _, state, _ in part], [moment for _, _, moment in part], bundle, graphs)
    return embeddings


class Last(NamedTuple):
    """What of a state decides the moment of a request."""

    shape: StateShape
    last_time: int
    last_is_known: bool


def moment_of(state: State | Last, moment: int | None) -> int | None:
    """The moment of a request as the model sees it; None for an unknown one, and for a model that sees no requests.

    A moment before the last event is unknown, and so is every moment if the time of that is: an application that gives
    no times must not seem to ask years after its users were last here. One that is later than training knew counts as
    the latest of them: no weight was trained for more. Then it is `quantised`, as in training.
    """
    if moment is None or not state.last_is_known or moment < state.last_time or state.shape.times != "request":
        return None
    return state.last_time + quantised_one(min(moment - state.last_time, state.shape.longest_gap))


def _read(states: Sequence[State], moments: Sequence[int], bundle: Bundle, graphs: Graphs) -> np.ndarray:
    """(B, D): the last layer, read once more from the time of the request."""
    shape, limit = states[0].shape, states[0].shape.context_limit
    sources = np.zeros((len(states), limit, shape.width), np.float32)  # right-aligned inputs of the last layer
    memory = np.empty((len(states), *bundle.initial_memory.shape[1:]), np.float32)
    ages = np.full(sources.shape[:2], NO_EVENT, np.int64)
    for row, (state, moment) in enumerate(zip(states, moments, strict=True)):
        count = state.context_length
        if shape.layers > 1:
            sources[row, limit - count :] = state.hidden[-1, :count]
        else:
            assert bundle.gap_embeddings is not None
            sources[row, limit - count :] = bundle.item_embeddings[state.recent[:count]]
            _add_gaps(sources[row, limit - count :], state.gaps[:count], bundle.gap_embeddings)
        memory[row], ages[row, limit - count :] = state.memory[-1], bucket(moment - state.times[:count])
    gaps = np.array([moment - state.last_time for state, moment in zip(states, moments, strict=True)], np.int64)
    return graphs.read_at_request(sources, memory, ages, bucket(gaps))


def new_gaps(state: State, times: np.ndarray) -> np.ndarray:
    """Buckets (n) of the time between each new event, at (n) seconds, and the one before.

    NO_GAP for a first event, and after one at an unknown time.
    """
    before = np.concatenate([[np.int64(state.last_time)], times[:-1]])
    return np.where(before == 0, NO_GAP, bucket(times - before))


def _add_gaps(rows: np.ndarray, gaps: np.ndarray, table: np.ndarray) -> None:
    """Adds to (n, D) item embeddings, in place, those of the (n) gaps before them."""
    known = gaps >= 0
    rows[known] += table[gaps[known]]


def replay(histories: Sequence[KnownEvents], *, bundle: Bundle, graphs: Graphs) -> list[State]:
    """The states of users with these histories."""
    states = [State.empty(bundle) for _ in histories]
    advance(states, histories, bundle=bundle, graphs=graphs)
    for state in states:
        state.history_count = state.event_count
    return states
