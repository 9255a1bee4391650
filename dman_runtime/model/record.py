"""The bytes that a store keeps of a state. Pure: nothing here does I/O.

Record, little-endian (sizes at T=20, m=9, L=3, D=128, float16, closed segments in steps, a model that sees requests,
with the most context there is: 40 positions, before the event that closes a segment):

    header            32 B    format u8, dtype u8, context positions c u16, item vocabulary u32 (that of the bundle and
                              the items added to it by then), bundle id 8 B,
                              event count u64, history count u64
    header checksum    4 B    CRC-32 u32 of the header, the user embedding and the tail checksum. All up to there is the
                              *head*, which is what `recommend` reads
    user embedding   512 B    float32 [D]
    tail checksum      4 B    CRC-32 u32 of all that follows
    recent items     160 B    u32 [c] item indices
    closed hidden   5200 B    only if closed segments are kept in steps (`rounding`), and one is in the context: dtype
                              [L-1, T] largest values, i8 [L-1, T, D] steps
    hidden         10240 B    dtype [L-1, c, D], without those in steps
    memory          6912 B    dtype [L, m, D]; absent until the first absorption
    times            369 B    only if the model sees times: i64 seconds where the last event stands and, [c], those of
                              the context; i8 [c] buckets of the times between; u8 whether the last time is known
    sketch          1796 B    only if the model counts returns: u32 r, u32 [r] item indices, float32 [r, H] counts,
                              u32 [r] events since the last one of the item
    last times       512 B    if it does both: i64 [r] seconds of the last one of the item
    lacking            4 B    only in format 3: u32 events that came after their segment was closed, and are left out

A model that neither sees requests nor counts returns closes a segment one event earlier: 39 positions.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np

from dman_runtime.errors import StateError
from dman_runtime.model.bundle import Bundle, StateShape
from dman_runtime.model.rounding import from_steps, to_steps
from dman_runtime.model.sketch import EMPTY, HALF_LIVES, Sketch
from dman_runtime.model.state import State, absorbed_segments, context_length

RECORD_FORMAT, LACKING_FORMAT = 2, 3  # of records that lack nothing, and of those that lack events
_HEADER, _CHECKSUM = struct.Struct("<BBHI8sQQ"), struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_DTYPE_CODES = {"float16": 1, "float32": 2}
_COUNTS = 4 * len(HALF_LIVES)  # bytes of an item of the sketch
_MAX_AGE = _MAX_LACKING = (1 << 32) - 1
_LACKING = struct.Struct("<I")
LACKING_BYTES = _LACKING.size
_REMEDY = "make it anew from the history"


class RecordHead(NamedTuple):
    """What the head of a record says."""

    event_count: int  # events that the model has seen
    history_count: int  # events of the history that the state covers, those of unknown items included
    vocabulary: int  # items that the model knew when it was made: no later one is in it
    user_embedding: np.ndarray  # (D) float32, a view
    context_length: int
    dtype_code: int
    lacks: bool  # events of the history, until it is made anew


def head_bytes(shape: StateShape) -> int:
    """Bytes at the start of a record that `read_head` needs."""
    return HEADER_BYTES + 4 * shape.width + _CHECKSUM.size


def max_record_bytes(shape: StateShape) -> int:
    """Bytes of the largest record that lacks nothing: before a segment closes, with a memory."""
    positions = shape.context_limit - (not shape.answers_read_states)
    return _record_bytes(shape, positions, shape.sketch_items, memory=True)


def record_bytes(event_count: int, shape: StateShape) -> int:
    """Bytes that the record of a user with so many known events takes, or less where it has a sketch."""
    memory = absorbed_segments(event_count, shape) > 0
    return _record_bytes(shape, context_length(event_count, shape), min(event_count, shape.sketch_items), memory=memory)


def _record_bytes(shape: StateShape, positions: int, sketch_items: int, *, memory: bool) -> int:
    slots = memory * shape.layers * shape.memory_slots * shape.width
    times = 9 + 9 * positions if shape.sees_times else 0
    sketch = 4 + sketch_items * _sketch_row(shape) if shape.sketch_items else 0
    hidden = sum(_hidden_bytes(shape, positions))
    return head_bytes(shape) + 4 * positions + hidden + np.dtype(shape.dtype).itemsize * slots + times + sketch


def _closed_positions(shape: StateShape, positions: int) -> int:
    """How many of the positions of a context are of a closed segment that is kept in steps."""
    if shape.closed == "full" or not shape.recurrent:
        return 0
    return shape.segment_length if positions >= shape.segment_length + shape.answers_read_states else 0


def _hidden_bytes(shape: StateShape, positions: int) -> tuple[int, int]:
    """Bytes of the hidden states of a closed segment that are kept in steps, and of the others."""
    vectors, size = shape.layers - 1, np.dtype(shape.dtype).itemsize
    closed = _closed_positions(shape, positions)
    return vectors * closed * (size + shape.width), vectors * (positions - closed) * size * shape.width


def read_head(record: bytes, bundle: Bundle) -> RecordHead:
    """The head of a record, from its first `head_bytes`. Raises StateError."""
    width, end = bundle.manifest.state.width, head_bytes(bundle.manifest.state)
    if len(record) < end:
        raise StateError("a state record is truncated", _REMEDY)
    version, dtype, context, vocabulary, bundle_id, events, history = _HEADER.unpack_from(record)
    if version not in (RECORD_FORMAT, LACKING_FORMAT):
        raise StateError(f"a state record has format {version}, this runtime reads {RECORD_FORMAT}", _REMEDY)
    if bundle_id.hex() != bundle.bundle_id or vocabulary < bundle.manifest.vocabulary - bundle.added:
        raise StateError(f"a state record was written by bundle {bundle_id.hex()}, not {bundle.bundle_id}", _REMEDY)
    if vocabulary > bundle.manifest.vocabulary:
        raise StateError("a state record was written with items that were added since", _REMEDY)
    (expected,) = _CHECKSUM.unpack_from(record, _HEADER.size)
    if zlib.crc32(record[HEADER_BYTES:end], zlib.crc32(record[: _HEADER.size])) != expected:
        raise StateError("a state record is damaged", _REMEDY)
    embedding = np.frombuffer(record, "<f4", width, HEADER_BYTES)
    return RecordHead(events, history, vocabulary, embedding, context, dtype, version == LACKING_FORMAT)


def covered_events(record: bytes) -> int | None:
    """Events of the history that a record covers, from its first HEADER_BYTES, whichever bundle wrote it; or None.

    None of what it says is checked.
    """
    if len(record) < HEADER_BYTES or record[0] not in (RECORD_FORMAT, LACKING_FORMAT):
        return None
    return int(_HEADER.unpack_from(record)[-1])


def lacks_events(start: bytes) -> bool:
    """Whether a record, from its first byte on, lacks events of the history that it covers."""
    return start[:1] == bytes([LACKING_FORMAT])


def lacking_events(record: bytes) -> int:
    """How many those are. Nothing of the record is checked."""
    return _LACKING.unpack(record[-_LACKING.size :])[0] if lacks_events(record) and len(record) > 4 else 0


class _Layout(NamedTuple):
    """Where the parts of a record begin."""

    positions: int  # of the context
    hidden: int
    memory: int
    times: int
    sketch: int
    rows: int  # of the sketch


def unpack(record: bytes, bundle: Bundle) -> State:
    """The state in a record, to be advanced. Raises StateError."""
    shape, (head, at) = bundle.manifest.state, _checked(record, bundle)
    limit, count = shape.context_limit, at.positions
    hidden = np.empty((shape.layers - 1, limit, shape.width), shape.dtype)
    if closed := _closed_positions(shape, count):
        hidden[:, :closed] = _closed_hidden(record, at.hidden, closed, shape, slice(None))
    hidden[:, closed:count] = _open_hidden(record, at.hidden, count, closed, shape)
    recent, (times, gaps) = np.empty(limit, np.int64), np.zeros((2, limit), np.int64)
    recent[:count], times[:count], gaps[:count] = _events(record, at, shape)
    state = _state(record, bundle, head, at, hidden=hidden, recent=recent, times=times, gaps=gaps)
    state.closed = record[at.hidden : at.hidden + _hidden_bytes(shape, count)[0]]
    return state


def view(record: bytes, bundle: Bundle) -> State:
    """The state in a record, for an answer: its arrays lie in the record and end with the context.

    Of hidden states that are kept in steps, it has the last layer only.

    It cannot be advanced, and takes half the time of `unpack`. Raises StateError.
    """
    shape, (head, at) = bundle.manifest.state, _checked(record, bundle)
    recent, times, gaps = _events(record, at, shape)
    hidden = _unpack_hidden(record, at.hidden, at.positions, shape)
    arrays = {"recent": recent.astype(np.int64), "times": times, "gaps": gaps.astype(np.int64)}
    state = _state(record, bundle, head, at, hidden=hidden, **arrays)
    state.stored = record[: head_bytes(shape)]
    return state


def _checked(record: bytes, bundle: Bundle) -> tuple[RecordHead, _Layout]:
    """What a record holds, and where. Raises StateError where it is not what was written."""
    shape, head = bundle.manifest.state, read_head(record, bundle)
    count, has_memory = head.context_length, absorbed_segments(head.event_count, shape) > 0
    recent_at = head_bytes(shape)
    hidden_at = recent_at + 4 * count
    memory_at = hidden_at + sum(_hidden_bytes(shape, count))
    times_at = memory_at + (np.dtype(shape.dtype).itemsize * bundle.initial_memory.size if has_memory else 0)
    sketch_at = times_at + (9 + 9 * count if shape.sees_times else 0)
    rows = _sketch_rows(record, sketch_at, shape)
    end = sketch_at + (4 + rows * _sketch_row(shape) if shape.sketch_items else 0)
    end += _LACKING.size if head.lacks else 0
    (checksum,) = _CHECKSUM.unpack_from(record, recent_at - _CHECKSUM.size)
    intact = end == len(record) and zlib.crc32(memoryview(record)[recent_at:]) == checksum
    if not intact or head.dtype_code != _DTYPE_CODES[shape.dtype] or count != context_length(head.event_count, shape):
        raise StateError("a state record is damaged", _REMEDY)
    return head, _Layout(count, hidden_at, memory_at, times_at, sketch_at, rows)


def _events(record: bytes, at: _Layout, shape: StateShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, seconds and buckets of the gaps of the context (c), views where the record holds them."""
    count = at.positions
    recent = np.frombuffer(record, "<u4", count, head_bytes(shape))
    if not shape.sees_times:
        times, gaps = np.zeros((2, count), np.int64)
        return recent, times, gaps
    gaps_at = at.times + 8 * (1 + count)
    return recent, np.frombuffer(record, "<i8", count, at.times + 8), np.frombuffer(record, "i1", count, gaps_at)


def _state(
    record: bytes,
    bundle: Bundle,
    head: RecordHead,
    at: _Layout,
    *,
    hidden: np.ndarray,
    recent: np.ndarray,
    times: np.ndarray,
    gaps: np.ndarray,
) -> State:
    """With these arrays of the context, and what else the record holds."""
    shape, memory = bundle.manifest.state, bundle.initial_memory
    if at.times > at.memory:
        memory = np.frombuffer(record, shape.dtype, memory.size, at.memory).reshape(memory.shape)
    return State(
        shape=shape,
        event_count=head.event_count,
        history_count=head.history_count,
        vocabulary=head.vocabulary,
        recent=recent,
        hidden=hidden,
        memory=memory.astype(shape.dtype, copy=False),
        user_embedding=head.user_embedding,
        times=times,
        gaps=gaps,
        last_time=int.from_bytes(record[at.times : at.times + 8], "little", signed=True) if shape.sees_times else 0,
        last_is_known=shape.sees_times and record[at.sketch - 1] == 1,
        sketch=_unpack_sketch(record, at.sketch + 4, at.rows, shape) if at.rows else EMPTY,
        lacking=lacking_events(record) if head.lacks else 0,
    )


def _unpack_hidden(record: bytes, start: int, positions: int, shape: StateShape) -> np.ndarray:
    """(1, c, D): the last of the L - 1, for an answer, which reads no other; or all of them, where none is in steps."""
    closed = _closed_positions(shape, positions)
    opened = _open_hidden(record, start, positions, closed, shape)
    if not closed:
        return opened
    last = slice(shape.layers - 2, None)
    return np.concatenate([_closed_hidden(record, start, closed, shape, last), opened[last]], axis=1)


def _open_hidden(record: bytes, start: int, positions: int, closed: int, shape: StateShape) -> np.ndarray:
    """(L-1, c - closed, D), a view."""
    depth, width = shape.layers - 1, shape.width
    begin = start + _hidden_bytes(shape, positions)[0]
    values = np.frombuffer(record, shape.dtype, depth * (positions - closed) * width, begin)
    return values.reshape(depth, positions - closed, width)


def _closed_hidden(record: bytes, start: int, closed: int, shape: StateShape, layers: slice) -> np.ndarray:
    """(layers, closed, D) float32."""
    depth, width = shape.layers - 1, shape.width
    largest = np.frombuffer(record, shape.dtype, depth * closed, start)
    steps = np.frombuffer(record, np.int8, depth * closed * width, start + largest.nbytes)
    return from_steps(steps.reshape(depth, closed, width)[layers], largest.reshape(depth, closed)[layers])


def _sketch_row(shape: StateShape) -> int:
    """Bytes of an item of the sketch."""
    return 4 + _COUNTS + 4 + (8 if shape.sees_times else 0)


def _unpack_sketch(record: bytes, start: int, rows: int, shape: StateShape) -> Sketch:
    items, ages = (np.frombuffer(record, "<u4", rows, at) for at in (start, start + rows * (4 + _COUNTS)))
    counts = np.frombuffer(record, "<f4", rows * len(HALF_LIVES), start + 4 * rows).reshape(rows, -1)
    times = np.zeros(rows, np.int64)
    if shape.sees_times:
        times = np.frombuffer(record, "<i8", rows, start + rows * (8 + _COUNTS)).astype(np.int64)
    return Sketch(items.astype(np.int64), counts, ages.astype(np.int64), times)


def _sketch_rows(record: bytes, start: int, shape: StateShape) -> int:
    """How many items the sketch at `start` has; 0 for none, or for a record that is too short to say."""
    if not shape.sketch_items or len(record) < start + 4:
        return 0
    return min(int.from_bytes(record[start : start + 4], "little"), shape.sketch_items)


def pack(state: State, bundle: Bundle) -> bytes:
    """The record of a state."""
    count = state.context_length
    header = _HEADER.pack(
        LACKING_FORMAT if state.lacking else RECORD_FORMAT,
        _DTYPE_CODES[state.shape.dtype],
        count,
        bundle.manifest.vocabulary,
        bytes.fromhex(bundle.bundle_id),
        state.event_count,
        state.history_count,
    )
    closed = _closed_positions(state.shape, count)
    if closed and not state.closed:
        steps, largest = to_steps(state.hidden[:, :closed])
        state.closed = largest.tobytes() + steps.tobytes()
    parts = [state.recent[:count].astype("<u4").tobytes(), state.closed if closed else b""]
    parts.append(state.hidden[:, closed:count].tobytes())
    if absorbed_segments(state.event_count, state.shape):
        parts.append(state.memory.tobytes())
    if state.shape.sees_times:
        parts += [np.array([state.last_time], "<i8").tobytes(), state.times[:count].astype("<i8").tobytes()]
        parts += [state.gaps[:count].astype("i1").tobytes(), bytes([state.last_is_known])]
    if state.shape.sketch_items:
        items, counts, ages, times = state.sketch
        parts += [len(items).to_bytes(4, "little"), items.astype("<u4").tobytes(), counts.astype("<f4").tobytes()]
        parts.append(ages.clip(max=_MAX_AGE).astype("<u4").tobytes())
        parts.append(times.astype("<i8").tobytes() if state.shape.sees_times else b"")
    if state.lacking:
        parts.append(_LACKING.pack(min(state.lacking, _MAX_LACKING)))
    tail = b"".join(parts)
    embedding = state.user_embedding.astype("<f4").tobytes() + _CHECKSUM.pack(zlib.crc32(tail))
    return header + _CHECKSUM.pack(zlib.crc32(embedding, zlib.crc32(header))) + embedding + tail
