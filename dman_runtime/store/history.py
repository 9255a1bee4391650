"""Heads, events and seen sets as bytes, for stores that keep bytes. Numbers are little-endian; nothing here does I/O.

| value | layout |
|---|---|
| head | version u64, history count u64, generation u32, request ids r u16, zero u16, r x u64, *tail*, CRC-32 u32 |
| chunk | CHUNK_EVENTS events, CRC-32 u32 |
| seen | byte 0 and the sorted u32 item numbers, or byte 1 and a bitmap, if that is less than half as long; CRC-32 u32 |

An event is (u32 item number, i64 timestamp). The tail holds the events that do not fill a chunk yet, so that most
updates write the head only. `seen` covers the chunks; the items of the tail are seen as well.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.base import REQUEST_IDS, Head

CHUNK_EVENTS = 32
EVENT = np.dtype([("item", "<u4"), ("timestamp", "<i8")])
CHUNK_BYTES = CHUNK_EVENTS * EVENT.itemsize
_HEAD, _CHECKSUM = struct.Struct("<QQIHH"), struct.Struct("<I")
_NUMBERS, _BITMAP = 0, 1  # first byte of a seen set
MAX_HEAD_BYTES = _HEAD.size + 8 * REQUEST_IDS + (CHUNK_EVENTS - 1) * EVENT.itemsize + _CHECKSUM.size
Bytes = bytes | memoryview


class DamagedError(Exception):
    """Stored bytes that are not what was written; says what they were meant to be."""


class StoredHead(NamedTuple):
    """A head and the events that its user's chunks do not hold."""

    head: Head
    tail: NDArray[np.void]  # (history_count % CHUNK_EVENTS) EVENT


def events_of(items: NDArray[Any], timestamps: NDArray[Any]) -> NDArray[np.void]:
    """(N) item numbers and timestamps as (N) EVENT."""
    events = np.empty(len(items), EVENT)
    events["item"], events["timestamp"] = items, timestamps
    return events


def pack_head(head: Head, tail: NDArray[np.void]) -> bytes:
    request_ids = head.request_ids[-REQUEST_IDS:]
    count = len(request_ids)
    body = b"".join(
        (
            _HEAD.pack(head.version, head.history_count, head.generation, count, 0),
            struct.pack(f"<{count}Q", *request_ids),
            tail.tobytes(),
        )
    )
    return _with_checksum(body)


def unpack_head(value: Bytes) -> StoredHead:
    """Raises DamagedError."""
    body, (version, history_count, generation, count, _), tail_at = _checked_head(value)
    request_ids = struct.unpack_from(f"<{count}Q", body, _HEAD.size)
    return StoredHead(Head(version, history_count, request_ids, generation), np.frombuffer(body, EVENT, offset=tail_at))


def read_tail(value: Bytes) -> tuple[int, NDArray[np.uint32]]:
    """History count and the item numbers of the tail, a view: all that a recommendation needs. Raises DamagedError."""
    body, fields, tail_at = _checked_head(value)
    return fields[1], np.frombuffer(body, EVENT, offset=tail_at)["item"]


def _checked_head(value: Bytes) -> tuple[Bytes, tuple[int, ...], int]:
    """A head without its checksum, the fields of `_HEAD`, and the position of the tail. Raises DamagedError."""
    body = _checked(value, "a user's head")
    if len(body) < _HEAD.size:
        raise DamagedError("a user's head is too short")
    fields = _HEAD.unpack_from(body)
    tail_at = _HEAD.size + 8 * fields[3]
    if len(body) - tail_at != fields[1] % CHUNK_EVENTS * EVENT.itemsize:
        raise DamagedError("a user's head does not hold the events it counts")
    return body, fields, tail_at


def count_of(value: Bytes) -> int:
    """The history count of a head that may be damaged: what there is to delete, as far as can be told."""
    return _HEAD.unpack_from(value)[1] if len(value) >= _HEAD.size else 0


def version_of(value: Bytes) -> int:
    """The version of a head that is not looked at otherwise."""
    return _HEAD.unpack_from(value)[0] if len(value) >= _HEAD.size else 0


def pack_chunk(events: NDArray[np.void]) -> bytes:
    return _with_checksum(events.tobytes())


def unpack_chunk(value: Bytes) -> NDArray[np.void]:
    """(CHUNK_EVENTS) EVENT. Raises DamagedError."""
    body = _checked(value, "a piece of a history")
    if len(body) != CHUNK_BYTES:
        raise DamagedError("a piece of a history has the wrong length")
    return np.frombuffer(body, EVENT)


def unpack_seen(value: Bytes) -> NDArray[np.uint32]:
    """Ascending item numbers (N). Raises DamagedError."""
    body = _checked(value, "a set of seen items")
    kind = body[0] if len(body) else -1
    if kind == _NUMBERS and len(body) % 4 == 1:
        return np.frombuffer(body, "<u4", offset=1)
    if kind == _BITMAP:
        return np.flatnonzero(np.unpackbits(np.frombuffer(body, np.uint8, offset=1), bitorder="little")).astype("u4")
    raise DamagedError("a set of seen items is unreadable")


def add_seen(value: Bytes | None, items: NDArray[np.uint32]) -> bytes | None:
    """The set with more items (N), or None where it holds them all. A bitmap is extended and stays a bitmap."""
    bitmap_before = value is not None and len(value) > 0 and value[0] == _BITMAP
    if value is None or not bitmap_before:
        before = unpack_seen(value) if value is not None else np.zeros(0, np.uint32)
        numbers = np.union1d(before, items).astype("<u4")
        if len(numbers) == len(before):
            return None
        bitmap_bytes = int(numbers[-1]) // 8 + 1
        if 4 * len(numbers) <= 2 * bitmap_bytes:  # numbers are faster to read
            return _with_checksum(bytes([_NUMBERS]) + numbers.tobytes())
        bitmap = np.zeros(bitmap_bytes, np.uint8)
        items = numbers
    else:
        old = np.frombuffer(_checked(value, "a set of seen items"), np.uint8, offset=1)
        bitmap = np.zeros(max(len(old), int(items.max(initial=0)) // 8 + 1), np.uint8)
        bitmap[: len(old)] = old
        if (bitmap[items >> 3] >> (items & 7) & 1).all():
            return None
    np.bitwise_or.at(bitmap, items >> 3, (1 << (items & 7)).astype(np.uint8))
    return _with_checksum(bytes([_BITMAP]) + bitmap.tobytes())


def split_events(tail: NDArray[np.void], new: NDArray[np.void]) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """The `tail` and `new` events: those that fill chunks, and those that are left over."""
    # NumPy takes far longer to join two arrays of events.
    events = np.frombuffer(tail.tobytes() + new.tobytes(), EVENT) if len(tail) else new
    full = len(events) // CHUNK_EVENTS * CHUNK_EVENTS
    return events[:full], events[full:]


def _with_checksum(body: bytes) -> bytes:
    return body + _CHECKSUM.pack(zlib.crc32(body))


def _checked(value: Bytes, what: str) -> Bytes:
    """The value without its checksum. Raises DamagedError."""
    body = value[: -_CHECKSUM.size]
    if len(value) < _CHECKSUM.size or zlib.crc32(body) != _CHECKSUM.unpack_from(value, len(body))[0]:
        raise DamagedError(f"{what} is damaged")
    return body
