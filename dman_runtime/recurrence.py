"""Advances user states by new events: encodes them, appends their hidden states, closes segments. numpy only.

One code path for a single event, an import of millions and a what-if: every round gives each user with events left
up to the rest of its open segment, then absorbs the segments that closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from dman_runtime.bundle import Bundle, BundleError
from dman_runtime.state import StateBatch

ROWS_PER_RUN = 64  # users per call of a graph: large enough for speed, small enough to stay in cache


class Graphs(Protocol):
    """What `dman_runtime.encoder.Encoder` offers; shapes there."""

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
    lengths = np.array([len(items) for items in new_items], np.int64)
    done = np.zeros(len(states), np.int64)
    segment = states.shape.segment_length
    while (active := np.flatnonzero(done < lengths)).size:
        take = np.minimum(segment - states.event_counts[active] % segment, lengths[active] - done[active])
        order = np.argsort(take, kind="stable")  # runs of alike length waste no padding
        for start in range(0, len(order), ROWS_PER_RUN):
            part = order[start : start + ROWS_PER_RUN]
            rows, counts = active[part], take[part]
            items = np.zeros((len(rows), int(counts.max())), np.int64)
            for i, row in enumerate(rows):
                items[i, : counts[i]] = new_items[row][done[row] : done[row] + counts[i]]
            _encode(states, rows, items, counts, bundle=bundle, graphs=graphs)
            _close_segments(states, rows, bundle=bundle, graphs=graphs)
        done[active] += take


def _encode(
    states: StateBatch, rows: np.ndarray, items: np.ndarray, lengths: np.ndarray, *, bundle: Bundle, graphs: Graphs
) -> None:
    """Encodes (R, S) left-aligned new items in R rows of `states` and appends what they leave behind."""
    counts = states.counts[rows]
    context = _right_aligned_context(states, rows, counts, bundle)
    visible = counts if states.shape.recurrent else states.event_counts[rows] % states.shape.segment_length
    embeddings, hidden = graphs.encode(
        bundle.item_embeddings[items], lengths, context, visible, states.memory[rows].astype(np.float32, copy=False)
    )
    new = np.arange(items.shape[1])
    i, j = np.nonzero(new < lengths[:, None])  # the real new positions
    target = counts[i] + j
    states.recent[rows[i], target] = items[i, j]
    states.hidden[rows[i], :, target] = hidden[i, 1:, j]
    states.user_embeddings[rows] = embeddings
    states.counts[rows] += lengths
    states.event_counts[rows] += lengths


def _right_aligned_context(states: StateBatch, rows: np.ndarray, counts: np.ndarray, bundle: Bundle) -> np.ndarray:
    """(R, L, C, D) float32, C = the longest context; rows with less have leading padding, which length masks."""
    longest, shape = int(counts.max()), states.shape
    context = np.empty((len(rows), shape.layers, longest, shape.width), np.float32)
    if (counts == longest).all():
        context[:, 0] = bundle.item_embeddings[states.recent[rows, :longest]]
        context[:, 1:] = states.hidden[rows, :, :longest]
        return context
    source = np.maximum(np.arange(longest) - (longest - counts[:, None]), 0)  # (R, C); padding repeats position 0
    context[:, 0] = bundle.item_embeddings[states.recent[rows[:, None], source]]
    context[:, 1:] = states.hidden[rows[:, None], :, source].swapaxes(1, 2)
    return context


def _close_segments(states: StateBatch, rows: np.ndarray, *, bundle: Bundle, graphs: Graphs) -> None:
    """Where the open segment is full: absorb the one before it (eq. 4) and keep the full one as context."""
    segment = states.shape.segment_length
    full = rows[states.counts[rows] == states.shape.context_limit]
    if not full.size:
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
