"""Heads, events and seen sets as bytes, for stores that keep bytes. Numbers are little-endian; nothing here does I/O.

| value | layout |
|---|---|
| head | version u64, history count u64, generation u32, recent request ids r u16, layout u16 (1), spilled period u32, \
spilled count u32, r x u64, *tail*, CRC-32 u32 |
| chunk | layout u8 (1), CHUNK_EVENTS events, CRC-32 u32 |
| seen | kind u8 (2 numbers, 3 bitmap), length n u32 of what follows, n bytes, CRC-32 u32 |
| record | check u32, the record as it was given |
| shown | layout u8 (1), events whose timestamps are the seconds until which each item counts, CRC-32 u32 |

An event is (u32 item number, i64 timestamp). The tail holds the events that do not fill a chunk yet, so that most
updates write the head only. `seen` covers the chunks; the items of the tail are seen as well. Its numbers are sorted
u32; a bitmap is taken if that is less than half as long.

Every checksum starts from a *seed*, which is made of the user and the number in the key: a value under another key is
damage. No byte of a value is looked at before its length has been.

Values that format 3 wrote have no seed: heads have layout 0 and no spilled fields, chunks no layout, seen sets the
kinds 0 and 1 and no length, records no check. They are read where `legacy` allows it, and never written.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.base import NO_EVENTS, Events, Head

CHUNK_EVENTS = 32
_ITEM = np.dtype("<u4")
EVENT = np.dtype([("item", "<u4"), ("timestamp", "<i8")])
CHUNK_BYTES = CHUNK_EVENTS * EVENT.itemsize
RECENT_IDS = 16  # request ids that a head keeps
_HEAD, _SPILLED, CHECKSUM, _SEEN = (struct.Struct(f"<{fields}") for fields in ("QQIHH", "II", "I", "BI"))
_LEGACY, _LAYOUT = 0, 1  # of heads and chunks
_LEGACY_NUMBERS, _LEGACY_BITMAP, _NUMBERS, _BITMAP = range(4)  # first byte of a seen set
_TAIL_AT = _HEAD.size + _SPILLED.size  # where a head has no recent ids
_MIN_HEAD_BYTES = _HEAD.size + CHECKSUM.size
MAX_HEAD_BYTES = _TAIL_AT + 8 * RECENT_IDS + (CHUNK_EVENTS - 1) * EVENT.itemsize + CHECKSUM.size
# These keep apart what one user has.
_CHUNK_TAG, _SEEN_TAG, RECORD_TAG, _SHOWN_TAG = 0x6E756863, 0x6E656573, 0x64636572, 0x6E776873
_RESIDUE = 0x2144DF1C  # the CRC-32 of any bytes with their CRC-32 behind them, whatever it started from
_MASK = 0xFFFFFFFF
_EMPTY = np.zeros(0, np.uint8)
Bytes = bytes | memoryview
Chunks = Callable[[int, int], list[NDArray[np.void]]]  # the chunks from a number to before another


class DamagedError(Exception):
    """Stored bytes that are not what was written, or are missing; says what they were meant to be."""


class Spilled(NamedTuple):
    """Where the request ids are that a head no longer keeps."""

    period: int = 0  # the last one that ids of the user were put into; 0: none
    ids: int = 0  # how many of the user are in it


class StoredHead(NamedTuple):
    """A head and what else is stored with it."""

    head: Head
    tail: NDArray[np.void]  # (history_count % CHUNK_EVENTS) EVENT, those that the user's chunks do not hold
    recent_ids: tuple[int, ...] = ()  # 64-bit hashes, oldest first, at most RECENT_IDS
    spilled: Spilled = Spilled()


def seed_of(user: bytes) -> int:
    """The seed of a user's head; those of other values are derived from it."""
    return zlib.crc32(user)


def events_of(items: NDArray[Any], timestamps: NDArray[Any]) -> NDArray[np.void]:
    """(N) item numbers and timestamps as (N) EVENT."""
    events = np.empty(len(items), EVENT)
    events["item"], events["timestamp"] = items, timestamps
    return events


# -- heads -------------------------------------------------------------------------------------------------------------


def pack_head(stored: StoredHead, seed: int) -> bytes:
    (version, history_count, generation), ids = stored.head, stored.recent_ids
    body = b"".join(
        (
            _HEAD.pack(version, history_count, generation, len(ids), _LAYOUT),
            _SPILLED.pack(*stored.spilled),
            struct.pack(f"<{len(ids)}Q", *ids),
            stored.tail.tobytes(),
        )
    )
    return _with_checksum(body, seed)


def unpack_head(value: Bytes, seed: int, legacy: bool) -> StoredHead:
    """Raises DamagedError."""
    (version, history_count, generation, count, layout), tail_at = _checked_head(value, seed, legacy)
    ids = struct.unpack_from(f"<{count}Q", value, tail_at - 8 * count)
    spilled = Spilled() if layout == _LEGACY else Spilled(*_SPILLED.unpack_from(value, _HEAD.size))
    return StoredHead(Head(version, history_count, generation), _tail(value, history_count, tail_at), ids, spilled)


def read_head_only(value: Bytes, seed: int, legacy: bool) -> Head:
    """A head without what is stored with it. Raises DamagedError."""
    (version, history_count, generation, _, _), _ = _checked_head(value, seed, legacy)
    return Head(version, history_count, generation)


def read_ids(value: Bytes, seed: int, legacy: bool) -> tuple[tuple[int, ...], int]:
    """The recent request ids, and the last period that older ones went into. Raises DamagedError."""
    (_, _, _, count, layout), tail_at = _checked_head(value, seed, legacy)
    ids = struct.unpack_from(f"<{count}Q", value, tail_at - 8 * count)
    return ids, 0 if layout == _LEGACY else _SPILLED.unpack_from(value, _HEAD.size)[0]


def read_tail(value: Bytes, seed: int, legacy: bool) -> tuple[int, NDArray[np.uint32]]:
    """History count and the item numbers of the tail, a view: all that a recommendation needs. Raises DamagedError."""
    (_, history_count, _, _, _), tail_at = _checked_head(value, seed, legacy)
    return history_count, _tail(value, history_count, tail_at)["item"]


def _tail(value: Bytes, history_count: int, tail_at: int) -> NDArray[np.void]:
    return np.frombuffer(value, EVENT, history_count % CHUNK_EVENTS, tail_at)


def _checked_head(value: Bytes, seed: int, legacy: bool) -> tuple[tuple[int, ...], int]:
    """The fields of `_HEAD`, and the position of the tail. Raises DamagedError."""
    size = len(value)
    if not _MIN_HEAD_BYTES <= size <= MAX_HEAD_BYTES:
        raise DamagedError("a user's head has the wrong length")
    fields = _HEAD.unpack_from(value)
    _, count, _, ids, layout = fields
    tail_at = _TAIL_AT + 8 * ids
    if layout != _LAYOUT:
        if layout != _LEGACY or not legacy:
            raise DamagedError("a user's head has an unknown layout")
        tail_at, seed = _HEAD.size + 8 * ids, 0
    if zlib.crc32(value, seed) != _RESIDUE:
        raise DamagedError("a user's head is damaged")
    if size - 4 - tail_at != count % CHUNK_EVENTS * EVENT.itemsize:
        raise DamagedError("a user's head does not hold the events it counts")
    return fields, tail_at


def count_of(value: Bytes) -> int:
    """The history count of a head that may be damaged: what there is to delete, as far as can be told."""
    return _HEAD.unpack_from(value)[1] if len(value) >= _HEAD.size else 0


def version_of(value: Bytes) -> int:
    """The version of a head that is not looked at otherwise."""
    return _HEAD.unpack_from(value)[0] if len(value) >= _HEAD.size else 0


# -- chunks ------------------------------------------------------------------------------------------------------------


def pack_chunk(events: NDArray[np.void], seed: int, number: int) -> bytes:
    return _with_checksum(bytes([_LAYOUT]) + events.tobytes(), seed ^ _CHUNK_TAG ^ number)


def unpack_chunk(value: Bytes, seed: int, number: int, legacy: bool) -> NDArray[np.void]:
    """(CHUNK_EVENTS) EVENT. Raises DamagedError."""
    size = len(value) - 4
    if size == 1 + CHUNK_BYTES:
        seed, intact = seed ^ _CHUNK_TAG ^ number, value[0] == _LAYOUT
    else:
        seed, intact = 0, legacy and size == CHUNK_BYTES
    if not intact:
        raise DamagedError("a piece of a history has the wrong layout")
    if zlib.crc32(value, seed) != _RESIDUE:
        raise DamagedError("a piece of a history is damaged")
    return np.frombuffer(value, EVENT, CHUNK_EVENTS, size - CHUNK_BYTES)


# -- seen sets ---------------------------------------------------------------------------------------------------------


def unpack_seen(value: Bytes, seed: int, legacy: bool) -> NDArray[np.uint32]:
    """Ascending item numbers (N). Raises DamagedError."""
    size = len(value) - 4
    if size >= 5:  # the usual case, without a further call: every recommendation passes here
        kind, length = _SEEN.unpack_from(value)
        if kind == _NUMBERS and length == size - 5 and not length & 3:
            if zlib.crc32(value, seed ^ _SEEN_TAG) != _RESIDUE:
                raise DamagedError("a set of seen items is damaged")
            return np.frombuffer(value, _ITEM, length >> 2, 5)
    bitmap, content = _seen_content(value, seed, legacy)
    if bitmap:
        return np.flatnonzero(np.unpackbits(content, bitorder="little")).astype(_ITEM)
    return content.view(_ITEM)


def add_seen(value: Bytes | None, items: NDArray[np.uint32], seed: int, legacy: bool) -> bytes | None:
    """The set with more items (N), or None where it holds them all. A bitmap is extended and stays a bitmap."""
    bitmap_before, content = _seen_content(value, seed, legacy) if value is not None else (False, _EMPTY)
    if not bitmap_before:
        before = content.view(_ITEM)
        numbers = np.union1d(before, items).astype("<u4")
        if len(numbers) == len(before):
            return None
        bitmap_bytes = int(numbers[-1]) // 8 + 1
        if 4 * len(numbers) <= 2 * bitmap_bytes:  # numbers are faster to read
            return _pack_seen(_NUMBERS, numbers.tobytes(), seed)
        bitmap = np.zeros(bitmap_bytes, np.uint8)
        items = numbers
    else:
        bitmap = np.zeros(max(len(content), int(items.max(initial=0)) // 8 + 1), np.uint8)
        bitmap[: len(content)] = content
        if (bitmap[items >> 3] >> (items & 7) & 1).all():
            return None
    np.bitwise_or.at(bitmap, items >> 3, (1 << (items & 7)).astype(np.uint8))
    return _pack_seen(_BITMAP, bitmap.tobytes(), seed)


def _pack_seen(kind: int, content: bytes, seed: int) -> bytes:
    return _with_checksum(_SEEN.pack(kind, len(content)) + content, seed ^ _SEEN_TAG)


def _seen_content(value: Bytes, seed: int, legacy: bool) -> tuple[bool, NDArray[np.uint8]]:
    """Whether a set is a bitmap, and its bytes. Raises DamagedError."""
    kind, size = value[0] if len(value) else -1, len(value) - 4
    if kind in (_NUMBERS, _BITMAP) and size >= _SEEN.size and _SEEN.unpack_from(value)[1] == size - _SEEN.size:
        begin, seed = _SEEN.size, seed ^ _SEEN_TAG
    elif kind in (_LEGACY_NUMBERS, _LEGACY_BITMAP) and legacy and size > 0:
        begin, seed = 1, 0
    else:
        raise DamagedError("a set of seen items is unreadable")
    if zlib.crc32(value, seed) != _RESIDUE:
        raise DamagedError("a set of seen items is damaged")
    bitmap = kind in (_BITMAP, _LEGACY_BITMAP)
    if not bitmap and (size - begin) % 4:
        raise DamagedError("a set of seen items is unreadable")
    return bitmap, np.frombuffer(value, np.uint8, size - begin, begin)


# -- shown items -------------------------------------------------------------------------------------------------------


def pack_shown(events: NDArray[np.void], seed: int) -> bytes:
    return _with_checksum(bytes([_LAYOUT]) + events.tobytes(), seed ^ _SHOWN_TAG)


def unpack_shown(value: Bytes, seed: int) -> NDArray[np.void]:
    """(N) EVENT. Raises DamagedError."""
    size = len(value) - 5
    if size < 0 or size % EVENT.itemsize or value[0] != _LAYOUT or zlib.crc32(value, seed ^ _SHOWN_TAG) != _RESIDUE:
        raise DamagedError("what a user was shown is damaged")
    return np.frombuffer(value, EVENT, size // EVENT.itemsize, 1)


# -- records -----------------------------------------------------------------------------------------------------------


def record_check(seed: int, generation: int, size: int) -> int:
    """What stands before a record: whose it is, and its length. What the record says has a checksum of its own."""
    return seed ^ RECORD_TAG ^ generation ^ (size << 8 & _MASK)


def pack_record(record: bytes, seed: int, generation: int) -> bytes:
    return CHECKSUM.pack(record_check(seed, generation, len(record))) + record


def record_start(value: Bytes, seed: int, generation: int, legacy: bool) -> int:
    """The position of the record in its value; DamagedError for what was not stored under this key."""
    size = len(value) - CHECKSUM.size
    if size >= 0 and CHECKSUM.unpack_from(value)[0] == record_check(seed, generation, size):
        return CHECKSUM.size
    if legacy:
        return 0
    raise DamagedError("a record is not the one of its key")


# -- all ---------------------------------------------------------------------------------------------------------------


def split_events(tail: NDArray[np.void], new: NDArray[np.void]) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """The `tail` and `new` events: those that fill chunks, and those that are left over."""
    # NumPy takes far longer to join two arrays of events.
    events = np.frombuffer(tail.tobytes() + new.tobytes(), EVENT) if len(tail) else new
    full = len(events) // CHUNK_EVENTS * CHUNK_EVENTS
    return events[:full], events[full:]


def stored_events(stored: StoredHead, start: int, stop: int | None, chunks: Chunks) -> Events:
    """The events from position `start` to before `stop`, None: the end, of a history with this head; copies.

    `chunks` reads those that the head counts.
    """
    count = stored.head.history_count
    stop = count if stop is None else min(stop, count)
    if start >= stop:
        return NO_EVENTS
    full = count // CHUNK_EVENTS
    first, last = start // CHUNK_EVENTS, min(-(-stop // CHUNK_EVENTS), full)
    parts = chunks(first, last)
    if stop > full * CHUNK_EVENTS:
        parts.append(stored.tail)
    offset = min(first, full) * CHUNK_EVENTS
    events = np.concatenate(parts)[start - offset : stop - offset]
    return events["item"].astype(np.uint32), events["timestamp"].astype(np.int64)


def _with_checksum(body: bytes, seed: int) -> bytes:
    return body + CHECKSUM.pack(zlib.crc32(body, seed))
