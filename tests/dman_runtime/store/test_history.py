"""The bytes of heads, chunks and seen sets: exact layouts, round trips, and damage that never passes for data."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dman_runtime.store.base import REQUEST_IDS, Head
from dman_runtime.store.history import (
    CHUNK_BYTES,
    CHUNK_EVENTS,
    MAX_HEAD_BYTES,
    DamagedError,
    add_seen,
    count_of,
    events_of,
    pack_chunk,
    pack_head,
    read_tail,
    split_events,
    unpack_chunk,
    unpack_head,
    unpack_seen,
    version_of,
)

u64, u32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
times = st.integers(-(2**63), 2**63 - 1)
heads = st.builds(Head, u64, u64, st.lists(u64, max_size=2 * REQUEST_IDS).map(tuple), u32)
SMALL_HEAD = Head(7, 2 * CHUNK_EVENTS + 2, (2**64 - 1, 5), 3)


def events(count: int, first: int = 0) -> NDArray[np.void]:
    numbers = np.arange(first, first + count)
    return events_of(numbers, 1000 + numbers)


def with_checksum(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def packed_seen(*items: int) -> bytes:
    value = add_seen(None, np.array(items, np.uint32))
    assert value is not None
    return value


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_layouts_are_the_documented_ones() -> None:
    event = struct.pack("<Iq", 2**32 - 1, -(2**63))
    one = events_of(np.array([2**32 - 1]), np.array([-(2**63)]))
    assert pack_head(Head(1, 33, (2, 3), 4), one) == with_checksum(
        struct.pack("<QQIHH", 1, 33, 4, 2, 0) + struct.pack("<QQ", 2, 3) + event
    )
    assert pack_chunk(np.repeat(one, CHUNK_EVENTS)) == with_checksum(event * CHUNK_EVENTS)
    assert packed_seen(1000, 3, 3) == with_checksum(b"\0" + struct.pack("<II", 3, 1000))
    assert packed_seen(0, 1, 8) == with_checksum(b"\1" + bytes([0b11, 0b1]))
    assert CHUNK_BYTES == 12 * CHUNK_EVENTS


@pytest.mark.slow
@given(heads, st.data())
def test_head_comes_back_with_its_tail_and_last_request_ids(head: Head, data: st.DataObject) -> None:
    count = head.history_count % CHUNK_EVENTS
    pairs = data.draw(st.lists(st.tuples(u32, times), min_size=count, max_size=count))
    tail = events_of(np.array([i for i, _ in pairs], np.uint32), np.array([t for _, t in pairs], np.int64))
    value = pack_head(head, tail)
    for stored in (value, memoryview(value)):
        found = unpack_head(stored)
        assert found.head == head._replace(request_ids=head.request_ids[-REQUEST_IDS:])
        assert found.tail.tolist() == pairs
        history_count, items = read_tail(stored)
        assert (history_count, items.tolist()) == (head.history_count, [item for item, _ in pairs])
        assert (count_of(stored), version_of(stored)) == (head.history_count, head.version)
    assert len(value) <= MAX_HEAD_BYTES


def test_longest_head_has_max_head_bytes() -> None:
    longest = Head(2**64 - 1, CHUNK_EVENTS - 1, tuple(range(2 * REQUEST_IDS)), 2**32 - 1)
    assert len(pack_head(longest, events(CHUNK_EVENTS - 1))) == MAX_HEAD_BYTES


@pytest.mark.slow
@given(st.lists(st.tuples(u32, times), min_size=CHUNK_EVENTS, max_size=CHUNK_EVENTS))
def test_chunk_comes_back(pairs: list[tuple[int, int]]) -> None:
    value = pack_chunk(events_of(np.array([i for i, _ in pairs], np.uint32), np.array([t for _, t in pairs])))
    assert unpack_chunk(value).tolist() == unpack_chunk(memoryview(value)).tolist() == pairs


# -- damage ----------------------------------------------------------------------------------------------------------

VALUES: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "head": (pack_head(SMALL_HEAD, events(2)), unpack_head),
    "tail": (pack_head(SMALL_HEAD, events(2)), read_tail),
    "chunk": (pack_chunk(events(CHUNK_EVENTS)), unpack_chunk),
    "numbers": (packed_seen(1, 100, 3000), unpack_seen),
    "bitmap": (packed_seen(*range(30)), unpack_seen),
    "numbers with more": (packed_seen(1, 100, 3000), lambda value: add_seen(value, np.array([7], np.uint32))),
    "bitmap with more": (packed_seen(*range(30)), lambda value: add_seen(value, np.array([37], np.uint32))),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_flipped_bit_is_damage(name: str) -> None:
    value, unpack = VALUES[name]
    unpack(value)
    for bit in range(8 * len(value)):
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        for stored in (bytes(flipped), memoryview(flipped)):
            with pytest.raises(DamagedError):
                unpack(stored)


@pytest.mark.parametrize("name", VALUES)
def test_every_missing_or_additional_byte_is_damage(name: str) -> None:
    value, unpack = VALUES[name]
    for damaged in [*(value[:length] for length in range(len(value))), value + b"\0", bytes(4), bytes(len(value) + 1)]:
        with pytest.raises(DamagedError):
            unpack(damaged)


@pytest.mark.parametrize(
    ("unpack", "body", "problem"),
    [
        (unpack_head, b"", "too short"),
        (read_tail, b"", "too short"),
        (unpack_head, bytes(23), "too short"),
        (read_tail, bytes(23), "too short"),
        (unpack_head, struct.pack("<QQIHH", 1, 1, 0, 0, 0), "events it counts"),
        (read_tail, struct.pack("<QQIHH", 1, 1, 0, 0, 0), "events it counts"),
        (unpack_head, struct.pack("<QQIHH", 1, 0, 0, 1, 0), "events it counts"),
        (unpack_head, struct.pack("<QQIHH", 1, 0, 0, 65535, 0), "events it counts"),
        (read_tail, struct.pack("<QQIHH", 1, 0, 0, 65535, 0), "events it counts"),
        (unpack_head, struct.pack("<QQIHH", 1, 32, 0, 0, 0) + bytes(12), "events it counts"),
        (unpack_chunk, b"", "wrong length"),
        (unpack_chunk, bytes(CHUNK_BYTES - 12), "wrong length"),
        (unpack_seen, b"", "unreadable"),
        (unpack_seen, b"\2", "unreadable"),
        (unpack_seen, b"\0\1\0\0", "unreadable"),
    ],
)
def test_value_with_the_right_checksum_and_a_wrong_content_is_damage(
    unpack: Callable[[bytes], Any], body: bytes, problem: str
) -> None:
    with pytest.raises(DamagedError, match=problem):
        unpack(with_checksum(body))


def test_damaged_head_still_says_what_it_may_have_counted() -> None:
    value = pack_head(SMALL_HEAD, events(2))
    assert count_of(value[:-1]) == SMALL_HEAD.history_count and version_of(value[:-1]) == SMALL_HEAD.version
    for short in (b"", value[:23]):
        assert count_of(short) == version_of(short) == 0


# -- seen sets -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 3000), max_size=40), max_size=6))
def test_seen_set_is_the_union_of_what_was_added(batches: list[list[int]]) -> None:
    value, known = None, set[int]()
    for batch in batches:
        more = add_seen(value, np.array(batch, np.uint32))
        assert (more is None) == (set(batch) <= known)
        value, known = more or value, known | set(batch)
        if value is not None:
            found = unpack_seen(value)
            assert found.dtype == np.uint32 and found.tolist() == sorted(known)
            assert unpack_seen(memoryview(value)).tolist() == sorted(known)


def test_seen_set_is_a_bitmap_if_that_is_less_than_half_as_long() -> None:
    assert packed_seen(15)[0] == 0 and packed_seen(7)[0] == 1  # 4 bytes of numbers; bitmaps of 2 and of 1
    assert packed_seen(0, 31)[0] == 0 and packed_seen(0, 23)[0] == 1
    for items in ([5, 2**32 - 1], [*range(0, 3200, 17)], [*range(0, 3200, 15)]):
        numbers_bytes, bitmap_bytes = 4 * len(items), items[-1] // 8 + 1
        expected = numbers_bytes if numbers_bytes <= 2 * bitmap_bytes else bitmap_bytes
        assert len(packed_seen(*items)) == 1 + expected + 4


def test_numbers_become_a_bitmap_and_a_bitmap_grows_and_stays_one() -> None:
    numbers = packed_seen(100, 200)
    assert numbers[0] == 0
    bitmap = add_seen(numbers, np.arange(0, 80, dtype=np.uint32))
    assert bitmap is not None and bitmap[0] == 1 and len(bitmap) == 1 + 26 + 4
    within = add_seen(bitmap, np.array([207, 207], np.uint32))
    assert within is not None and len(within) == len(bitmap)
    beyond = add_seen(within, np.array([208, 100_000], np.uint32))
    assert beyond is not None and beyond[0] == 1 and len(beyond) == 1 + 12_501 + 4
    assert unpack_seen(beyond).tolist() == [*range(80), 100, 200, 207, 208, 100_000]
    assert add_seen(beyond, np.array([100_000, 0], np.uint32)) is None


def test_adding_nothing_changes_no_seen_set() -> None:
    nothing = np.zeros(0, np.uint32)
    assert add_seen(None, nothing) is None
    assert add_seen(packed_seen(1, 3000), nothing) is None
    assert add_seen(packed_seen(0, 1, 2), nothing) is None


# -- chunks and tail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0, 1, CHUNK_EVENTS - 1])
@pytest.mark.parametrize("new", [n + d for n in (0, CHUNK_EVENTS, 3 * CHUNK_EVENTS) for d in (-1, 0, 1) if n + d >= 0])
def test_events_fill_chunks_in_order_and_the_rest_is_the_tail(tail: int, new: int) -> None:
    full, rest = split_events(events(tail), events(new, first=tail))
    assert len(full) == (tail + new) // CHUNK_EVENTS * CHUNK_EVENTS and len(rest) == (tail + new) % CHUNK_EVENTS
    assert [*full.tolist(), *rest.tolist()] == events(tail + new).tolist()
