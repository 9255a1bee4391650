"""A user's state: what a history leaves behind under one model. numpy only.

Symbols: T segment length, m memory slots, L layers, D width, C the most context (2T, or T without recurrence).
A history is cut into segments of T events from its head.
The state holds the hidden states of the open segment and, with recurrence, of the closed one before it (the *context*);
the memory, which stands for everything older; and the user embedding. Its size does not depend on the length of the
history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dman_runtime.model.bundle import Bundle, StateShape
from dman_runtime.model.events import NO_EVENTS, KnownEvents
from dman_runtime.model.sketch import EMPTY, Sketch, counted


def absorbed_segments(event_count: int, shape: StateShape) -> int:
    """Segments in the memory: all closed ones, except those in the context."""
    return max(0, _closed_segments(event_count, shape) - shape.closed_segments)


def context_length(event_count: int, shape: StateShape) -> int:
    """Positions with hidden states in the context: the open segment and, with recurrence, the closed one before it."""
    return event_count - shape.segment_length * absorbed_segments(event_count, shape)


def segment_fill(event_count: int, shape: StateShape) -> int:
    """Events in the open segment: 0 to T - 1; 1 to T after the first if segments close late."""
    return event_count - shape.segment_length * _closed_segments(event_count, shape)


def _closed_segments(event_count: int, shape: StateShape) -> int:
    return max(0, event_count - shape.answers_read_states) // shape.segment_length


@dataclass(slots=True, eq=False)
class State:
    """Rows of `recent` and `hidden` behind the context are undefined. Values keep the precision of the store."""

    shape: StateShape
    event_count: int  # events that the model has seen
    history_count: int  # events of the history that this covers, those of items unknown to the model included
    vocabulary: int  # items that the model knew when this was made, also those added at run time: it holds no later one
    recent: np.ndarray  # (C) int64 item indices of the context, left-aligned; layer 0 is their row of the item table
    hidden: np.ndarray  # (L-1, C, D) shape.dtype, inputs of layers 1..L-1, left-aligned
    memory: np.ndarray  # (L, m, D) shape.dtype; replaced, never written to
    user_embedding: np.ndarray  # (D) float32; zero for an empty history; of a request at an unknown time
    times: np.ndarray  # (C) int64 seconds of the events of the context, left-aligned
    gaps: np.ndarray  # (C) int64 buckets of the times between each event of the context and the one before; or NO_GAP
    last_time: int  # seconds where the last event stands; 0 before the first that is known
    last_is_known: bool  # whether that is its own time, and not that of an event before
    sketch: Sketch  # of the closed segments
    closed: bytes = (
        b""  # the hidden states of the closed segment in steps, as in a record; empty: to be made from `hidden`
    )
    stored: bytes = b""  # head of the record that this is a view of, which no other state has; empty if it may change
    lacking: int = 0  # events that the model knows and has not seen: their segments were closed when they came
    cut: bool = False  # has no event of the open segment, which began, and before which all is closed

    @classmethod
    def empty(cls, bundle: Bundle) -> State:
        """The state of a user without history."""
        shape = bundle.manifest.state
        return cls(
            shape=shape,
            event_count=0,
            history_count=0,
            vocabulary=bundle.manifest.vocabulary,
            recent=np.zeros(shape.context_limit, np.int64),
            hidden=np.empty((shape.layers - 1, shape.context_limit, shape.width), shape.dtype),
            memory=bundle.initial_memory.astype(shape.dtype),
            user_embedding=np.zeros(shape.width, np.float32),
            times=np.zeros(shape.context_limit, np.int64),
            gaps=np.zeros(shape.context_limit, np.int64),
            last_time=0,
            last_is_known=False,
            sketch=EMPTY,
        )

    @property
    def context_length(self) -> int:
        return context_length(self.event_count, self.shape)

    @property
    def open_events(self) -> KnownEvents:
        """Those of the open segment; at unknown times for a model that sees none."""
        if self.cut:
            return NO_EVENTS
        part = slice(self.context_length - self.segment_fill, self.context_length)
        return KnownEvents(self.recent[part], self.times[part])

    @property
    def closed_events(self) -> int:
        """Those before the open segment."""
        return self.event_count if self.cut else self.event_count - self.segment_fill

    @property
    def can_be_cut(self) -> bool:
        """Not where the time of the last closed event is needed, and no longer here."""
        return self.shape.recurrent or not self.shape.sees_times or not self.closed_events

    def cut_back(self) -> None:
        """Takes out the events of the open segment, for others to be encoded: memory, sketch and the closed segment of
        the context have not seen them, and stay."""
        begin, closed = self.context_length - self.segment_fill, self.closed_events
        if self.shape.sees_times:
            self.last_time = int(self.times[begin - 1]) if begin else 0
        self.event_count, self.stored = closed, b""
        self.cut = self.shape.answers_read_states and closed > 0

    def counts(self) -> Sketch:
        """What the user may come back to, as it is now."""
        return counted(self.sketch, self.open_events)

    @property
    def segment_fill(self) -> int:
        return segment_fill(self.event_count, self.shape)
