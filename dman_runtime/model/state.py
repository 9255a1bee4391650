"""User states: dense batches to compute with, and the record that the store keeps. numpy only.

A state is what a history leaves behind: the recent items, the hidden states of the last one to two segments
(layers 1..L-1; layer 0 is a row of the item table), the memory, the user embedding, and the ids of recent updates.

Record, little-endian (sizes at the defaults T=20, m=20, L=2, D=128, float16, worst case 39 positions):

    header            32 B    format u8, dtype u8, request ids u16, context positions u16, zero u16, bundle id 8 B,
                              event count u64, item vocabulary u32, CRC-32 u32 of the header before it, the user
                              embedding and the next CRC-32: the *head*, which is all that `recommend` reads
    user embedding   512 B    float32 [D]
    tail checksum      4 B    CRC-32 u32 of all that follows
    recent items     156 B    u32 [c]
    request ids      128 B    u64 [r], oldest first
    hidden          9984 B    dtype [L-1, c, D]
    memory         10240 B    dtype [L, m, D]; absent until the first absorption
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dman_runtime.errors import StateError
from dman_runtime.model.bundle import Bundle, StateShape

RECORD_FORMAT = 1
REQUEST_IDS = 16  # recent update ids kept per user
_HEADER, _CHECKSUM = struct.Struct("<BBHHH8sQI"), struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_DTYPE_CODES = {"float16": 1, "float32": 2}
_DAMAGED = "a state record is damaged; restore the state directory from a backup"


def request_hash(request_id: str) -> int:
    """The 64 bits that a state remembers of an update's request id."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def absorbed_segments(event_count: int, shape: StateShape) -> int:
    """Segments in the memory: all closed ones but the last."""
    return max(0, event_count // shape.segment_length - 1)


def context_positions(event_count: int, shape: StateShape) -> int:
    """Positions that a state keeps hidden states of: the open segment and the closed one before it."""
    closed, fill = divmod(event_count, shape.segment_length)
    return fill + (shape.segment_length if closed else 0)


@dataclass
class StateBatch:
    """B states side by side. Rows beyond `counts` are undefined; hidden states keep the precision of the store."""

    shape: StateShape
    event_counts: np.ndarray  # (B) int64
    counts: np.ndarray  # (B) int64 context positions c
    recent: np.ndarray  # (B, 2T) int64 item indices, left-aligned
    hidden: np.ndarray  # (B, L-1, 2T, D) shape.dtype, layers 1..L-1, left-aligned
    memory: np.ndarray  # (B, L, m, D) shape.dtype
    user_embeddings: np.ndarray  # (B, D) float32; zero for an empty history
    request_ids: list[list[int]]  # per row, oldest first

    def __len__(self) -> int:
        return len(self.event_counts)

    @classmethod
    def empty(cls, bundle: Bundle, size: int) -> StateBatch:
        """States of `size` users without history."""
        batch = cls._blank(bundle, size)
        batch.memory[:] = bundle.initial_memory
        return batch

    @classmethod
    def _blank(cls, bundle: Bundle, size: int) -> StateBatch:
        """`empty` with undefined memory."""
        shape = bundle.manifest.state
        limit = shape.context_limit
        return cls(
            shape=shape,
            event_counts=np.zeros(size, np.int64),
            counts=np.zeros(size, np.int64),
            recent=np.zeros((size, limit), np.int64),
            hidden=np.empty((size, shape.layers - 1, limit, shape.width), shape.dtype),
            memory=np.empty((size, *bundle.initial_memory.shape), shape.dtype),
            user_embeddings=np.zeros((size, shape.width), np.float32),
            request_ids=[[] for _ in range(size)],
        )

    @classmethod
    def from_records(cls, bundle: Bundle, records: Sequence[bytes | None]) -> StateBatch:
        """Unpacks records; None is an empty history. Raises StateError."""
        batch = cls._blank(bundle, len(records))
        for row, record in enumerate(records):
            if record is None:
                batch.memory[row] = bundle.initial_memory
            else:
                batch._unpack(row, record, bundle)
        return batch

    def _unpack(self, row: int, record: bytes, bundle: Bundle) -> None:
        layout = RecordLayout.of(record, bundle)
        depth, width, count = self.shape.layers - 1, self.shape.width, layout.positions
        self.event_counts[row], self.counts[row] = layout.event_count, count
        self.user_embeddings[row] = np.frombuffer(record, "<f4", width, layout.embedding_at)
        self.recent[row, :count] = np.frombuffer(record, "<u4", count, layout.recent_at)
        self.request_ids[row] = np.frombuffer(record, "<u8", layout.request_ids, layout.request_ids_at).tolist()
        hidden = np.frombuffer(record, self.shape.dtype, depth * count * width, layout.hidden_at)
        self.hidden[row, :, :count] = hidden.reshape(depth, count, width)
        if layout.has_memory:
            memory = np.frombuffer(record, self.shape.dtype, self.memory[row].size, layout.memory_at)
            self.memory[row] = memory.reshape(self.memory[row].shape)
        else:
            self.memory[row] = bundle.initial_memory

    def to_record(self, row: int, bundle: Bundle) -> bytes:
        """Packs one row."""
        count, ids = int(self.counts[row]), self.request_ids[row][-REQUEST_IDS:]
        events = int(self.event_counts[row])
        header = _HEADER.pack(
            RECORD_FORMAT,
            _DTYPE_CODES[self.shape.dtype],
            len(ids),
            count,
            0,
            bytes.fromhex(bundle.bundle_id),
            events,
            bundle.manifest.vocabulary,
        )
        embedding = self.user_embeddings[row].astype("<f4").tobytes()
        parts = [
            self.recent[row, :count].astype("<u4").tobytes(),
            np.array(ids, "<u8").tobytes(),
            self.hidden[row, :, :count].tobytes(),
        ]
        if absorbed_segments(events, self.shape):
            parts.append(self.memory[row].tobytes())
        tail = b"".join(parts)
        embedding += _CHECKSUM.pack(zlib.crc32(tail))
        return header + _CHECKSUM.pack(zlib.crc32(embedding, zlib.crc32(header))) + embedding + tail


def head_bytes(shape: StateShape) -> int:
    """Bytes at the start of a record that `read_user_embedding` needs."""
    return _HEADER_BYTES + 4 * shape.width + _CHECKSUM.size


def max_record_bytes(shape: StateShape) -> int:
    """Bytes of the largest record: one event before a segment closes, with a memory and all request ids."""
    positions, value_bytes = 2 * shape.segment_length - 1, np.dtype(shape.dtype).itemsize
    hidden, memory = (shape.layers - 1) * positions, shape.layers * shape.memory_slots
    return head_bytes(shape) + 4 * positions + 8 * REQUEST_IDS + value_bytes * (hidden + memory) * shape.width


def _read_header(record: bytes, bundle: Bundle) -> tuple[int, int, int, int]:
    """Dtype code, request ids, positions and event count of a record whose head is intact. Raises StateError."""
    end = head_bytes(bundle.manifest.state)
    if len(record) < end:
        raise StateError("a state record is truncated; restore the state directory from a backup")
    version, dtype, ids, positions, _, bundle_id, events, vocabulary = _HEADER.unpack_from(record)
    if version != RECORD_FORMAT:
        raise StateError(f"a state record has format {version}, this runtime reads {RECORD_FORMAT}; import again")
    if bundle_id.hex() != bundle.bundle_id or vocabulary != bundle.manifest.vocabulary:
        raise StateError(
            f"a state record was written by bundle {bundle_id.hex()}, not {bundle.bundle_id}; "
            "serve that bundle, or import the histories into a new --state directory"
        )
    (expected,) = _CHECKSUM.unpack_from(record, _HEADER.size)
    if zlib.crc32(record[_HEADER_BYTES:end], zlib.crc32(record[: _HEADER.size])) != expected:
        raise StateError(_DAMAGED)
    return dtype, ids, positions, events


class RecordLayout(NamedTuple):
    """Where the parts of a record are. Byte offsets."""

    event_count: int
    positions: int
    request_ids: int
    has_memory: bool
    embedding_at: int
    recent_at: int
    request_ids_at: int
    hidden_at: int
    memory_at: int
    end: int

    @classmethod
    def of(cls, record: bytes, bundle: Bundle) -> RecordLayout:
        """Reads and checks a whole record. Raises StateError."""
        shape = bundle.manifest.state
        dtype, ids, positions, events = _read_header(record, bundle)
        size = np.dtype(shape.dtype).itemsize
        has_memory = absorbed_segments(events, shape) > 0
        recent_at = head_bytes(shape)
        request_ids_at = recent_at + 4 * positions
        hidden_at = request_ids_at + 8 * ids
        memory_at = hidden_at + size * (shape.layers - 1) * positions * shape.width
        end = memory_at + (size * shape.layers * shape.memory_slots * shape.width if has_memory else 0)
        (checksum,) = _CHECKSUM.unpack_from(record, recent_at - _CHECKSUM.size)
        intact = end == len(record) and zlib.crc32(record[recent_at:]) == checksum
        if not intact or dtype != _DTYPE_CODES[shape.dtype] or positions != context_positions(events, shape):
            raise StateError(_DAMAGED)
        return cls(
            events, positions, ids, has_memory, _HEADER_BYTES, recent_at, request_ids_at, hidden_at, memory_at, end
        )


def read_user_embedding(head: bytes, bundle: Bundle) -> tuple[np.ndarray, int]:
    """User embedding (D) and event count of a record, from its first `head_bytes`. Raises StateError."""
    events = _read_header(head, bundle)[3]
    return np.frombuffer(head, "<f4", bundle.manifest.state.width, _HEADER_BYTES), events
