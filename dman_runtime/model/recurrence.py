"""Advances user states by new events: encodes them, appends their hidden states, closes segments. numpy only.

One code path for a single event, an import of millions and a what-if: every round gives each user with events left
up to the rest of its open segment, then absorbs the segments that closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from dman_runtime.errors import BundleError
from dman_runtime.model.bundle import Bundle
from dman_runtime.model.state import StateBatch

ROWS_PER_RUN = 64  # users per call of a graph: large enough for speed, small enough to stay in cache


class Graphs(Protocol):
    """What `dman_runtime.model.encoder.Encoder` offers; shapes there."""

    def encode(
        self,
        item_embeddings: np.ndarray,
        new_lengths: np.ndarray,
        context: np.ndarray,
        context_lengths: np.ndarray,
        memory: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def abstract(self, memory: np.ndarray, segment_hidden: np.ndarray) -> np.ndarray: ...


def advance(states: StateBatch, new_items: Sequence[np.ndarray], *, bundle: Bundle, graphs: Graphs) -> None:
    """Appends `new_items[row]` (item indices, oldest first, may be empty) to each state, in place."""
    segment = states.shape.segment_length
    left = {row: items for row, items in enumerate(new_items) if len(items)}
    while left:
        pieces = []
        for row, items in left.items():
            open_places = segment - int(states.event_counts[row]) % segment
            pieces.append((row, items[:open_places]))
        left = {row: left[row][len(piece) :] for row, piece in pieces if len(piece) < len(left[row])}
        pieces.sort(key=lambda piece: len(piece[1]))  # runs of alike length waste no padding
        for start in range(0, len(pieces), ROWS_PER_RUN):
            part = pieces[start : start + ROWS_PER_RUN]
            _encode(states, part, bundle=bundle, graphs=graphs)
            _close_segments(states, [row for row, _ in part], bundle=bundle, graphs=graphs)


def _encode(states: StateBatch, pieces: Sequence[tuple[int, np.ndarray]], *, bundle: Bundle, graphs: Graphs) -> None:
    """Encodes the new items of some rows of `states`, at least one each, and appends what they leave behind.

    Row by row in numpy: for one user, where latency counts, that is faster than any indexing of a whole batch, and for
    many it is lost beside the graph.
    """
    shape, rows = states.shape, [row for row, _ in pieces]
    counts = states.counts[rows]
    new_lengths = np.array([len(items) for _, items in pieces], np.int64)
    new = np.zeros((len(pieces), int(new_lengths.max()), shape.width), np.float32)  # (R, S, D) left-aligned
    context = np.zeros((len(pieces), shape.layers, int(counts.max()), shape.width), np.float32)  # right-aligned
    memory = np.empty((len(pieces), *states.memory.shape[1:]), np.float32)
    for place, (row, items) in enumerate(pieces):
        memory[place] = states.memory[row]
        new[place, : len(items)] = bundle.item_embeddings[items]
        if count := int(counts[place]):
            context[place, 0, -count:] = bundle.item_embeddings[states.recent[row, :count]]
            context[place, 1:, -count:] = states.hidden[row, :, :count]
    visible = counts if shape.recurrent else states.event_counts[rows] % shape.segment_length
    embeddings, hidden = graphs.encode(new, new_lengths, context, visible, memory)
    for place, (row, items) in enumerate(pieces):
        begin = int(counts[place])
        end = begin + len(items)
        states.recent[row, begin:end] = items
        states.hidden[row, :, begin:end] = hidden[place, 1:, : len(items)]
    states.user_embeddings[rows] = embeddings
    states.counts[rows] += new_lengths
    states.event_counts[rows] += new_lengths


def _close_segments(states: StateBatch, rows: Sequence[int], *, bundle: Bundle, graphs: Graphs) -> None:
    """Where the open segment is full: absorb the one before it (eq. 4) and keep the full one as context."""
    segment, limit = states.shape.segment_length, states.shape.context_limit
    full = [row for row in rows if states.counts[row] == limit]
    if not full:
        return
    if states.shape.memory_slots:
        closed = np.empty((len(full), states.shape.layers, segment, states.shape.width), np.float32)
        closed[:, 0] = bundle.item_embeddings[states.recent[full, :segment]]
        closed[:, 1:] = states.hidden[full, :, :segment]
        states.memory[full] = graphs.abstract(states.memory[full].astype(np.float32, copy=False), closed)
    states.recent[full, :segment] = states.recent[full, segment:]
    states.hidden[full, :, :segment] = states.hidden[full, :, segment:]
    states.counts[full] = segment


def replay(histories: Sequence[np.ndarray], *, bundle: Bundle, graphs: Graphs) -> StateBatch:
    """The states of users with these histories (item indices, oldest first)."""
    states = StateBatch.empty(bundle, len(histories))
    advance(states, histories, bundle=bundle, graphs=graphs)
    return states


GOLDEN_TOLERANCE = 1e-3  # relative to the largest value; float32 on another machine or on CUDA stays far below


def check_golden(bundle: Bundle, graphs: Graphs) -> float:
    """Repeats in float32 the replay that PyTorch recorded at export, and returns the relative error.

    Raises BundleError when that is above GOLDEN_TOLERANCE.
    """
    exact = replace(bundle.manifest.state, dtype="float32")
    bundle = replace(bundle, manifest=replace(bundle.manifest, state=exact))
    golden = bundle.golden()
    states = replay([row[row >= 0] for row in golden["histories"]], bundle=bundle, graphs=graphs)
    error = max(
        _relative_error(states.user_embeddings, golden["user_embeddings"]),
        _relative_error(states.memory, golden["memories"]),
    )
    if not error <= GOLDEN_TOLERANCE:
        raise BundleError(
            f"{bundle.path}: the golden replay is off by {error:.1e} on this machine; "
            "use --provider cpu, or export the bundle again with this version of ONNX Runtime"
        )
    return error


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    if not expected.size:
        return 0.0
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
