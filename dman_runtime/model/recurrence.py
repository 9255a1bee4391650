"""Advances user states by new events: encodes them, keeps their hidden states, closes segments. numpy only.

One code path for a single event, an import of millions and a what-if: every round gives each user with events left up
to the rest of the open segment, then absorbs the segments that closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dman_runtime.model.bundle import Bundle
from dman_runtime.model.state import State

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
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def abstract(self, memory: np.ndarray, segment_hidden: np.ndarray) -> np.ndarray: ...


class Piece(NamedTuple):
    """Some next events of one user, none of them beyond the open segment, and at least one."""

    state: State
    items: np.ndarray  # (n) item indices, oldest first


def next_piece(state: State, items: np.ndarray) -> Piece:
    """As many of the `items` (N), N > 0, as fit into the open segment."""
    return Piece(state, items[: state.shape.segment_length - state.segment_fill])


def advance(states: Sequence[State], new_items: Sequence[np.ndarray], *, bundle: Bundle, graphs: Graphs) -> None:
    """Appends `new_items[i]` (item indices, oldest first, may be empty) to `states[i]`, in place."""
    left = [(state, items) for state, items in zip(states, new_items, strict=True) if len(items)]
    while left:
        pieces = [next_piece(state, items) for state, items in left]
        advance_pieces(pieces, bundle=bundle, graphs=graphs)
        left = [
            (state, items[len(piece.items) :])
            for (state, items), piece in zip(left, pieces, strict=True)
            if len(piece.items) < len(items)
        ]


def advance_pieces(pieces: Sequence[Piece], *, bundle: Bundle, graphs: Graphs) -> None:
    """Appends one piece to each of some different states, in place."""
    ordered = sorted(pieces, key=lambda piece: len(piece.items))  # runs of similar length waste no padding
    for start in range(0, len(ordered), ROWS_PER_RUN):
        part = ordered[start : start + ROWS_PER_RUN]
        closing = _encode(part, bundle=bundle, graphs=graphs)
        if closing:
            _close_segments(closing, bundle=bundle, graphs=graphs)


def _encode(pieces: Sequence[Piece], *, bundle: Bundle, graphs: Graphs) -> list[State]:
    """Encodes the pieces and keeps what they leave behind; returns the states whose context is now full.

    Row by row: for one user, where latency counts, that is faster than any indexing of a whole batch, and for many
    users the graph takes far longer.
    """
    shape = pieces[0].state.shape
    lengths = [len(items) for _, items in pieces]
    contexts = [state.context_length for state, _ in pieces]
    new = np.zeros((len(pieces), max(lengths), shape.width), np.float32)  # (R, S, D) left-aligned
    context = np.zeros((len(pieces), shape.layers, max(contexts), shape.width), np.float32)  # right-aligned
    memory = np.empty((len(pieces), *bundle.initial_memory.shape), np.float32)
    for row, (state, items) in enumerate(pieces):
        memory[row] = state.memory
        new[row, : len(items)] = bundle.item_embeddings[items]
        if count := contexts[row]:
            context[row, 0, -count:] = bundle.item_embeddings[state.recent[:count]]
            context[row, 1:, -count:] = state.hidden[:, :count]
    embeddings, hidden = graphs.encode(new, np.array(lengths, np.int64), context, np.array(contexts, np.int64), memory)
    closing = []
    for row, (state, items) in enumerate(pieces):
        begin, end = contexts[row], contexts[row] + lengths[row]
        state.recent[begin:end] = items
        state.hidden[:, begin:end] = hidden[row, 1:, : lengths[row]]
        state.user_embedding = embeddings[row]
        state.event_count += lengths[row]
        if end == shape.context_limit:
            closing.append(state)
    return closing


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
            closed[row, 1:] = state.hidden[:, :segment]
        for state, new_memory in zip(states, graphs.abstract(memory, closed).astype(shape.dtype), strict=True):
            state.memory = new_memory
    for state in states:
        state.recent[:kept] = state.recent[segment:]
        state.hidden[:, :kept] = state.hidden[:, segment:]


def replay(histories: Sequence[np.ndarray], *, bundle: Bundle, graphs: Graphs) -> list[State]:
    """The states of users with these histories (item indices, oldest first)."""
    states = [State.empty(bundle) for _ in histories]
    advance(states, histories, bundle=bundle, graphs=graphs)
    for state in states:
        state.history_count = state.event_count
    return states
