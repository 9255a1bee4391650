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

from dman_runtime.store.base import Head
from dman_runtime.store.history import (
    CHUNK_BYTES,
    CHUNK_EVENTS,
    MAX_HEAD_BYTES,
    RECENT_IDS,
    DamagedError,
    Spilled,
    StoredHead,
    add_seen,
    count_of,
    events_of,
    pack_chunk,
    pack_head,
    pack_record,
    pack_shown,
    read_head_only,
    read_ids,
    read_tail,
    record_start,
    seed_of,
    split_events,
    unpack_chunk,
    unpack_head,
    unpack_seen,
    unpack_shown,
    version_of,
)

u64, u32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
times = st.integers(-(2**63), 2**63 - 1)
heads = st.builds(Head, u64, u64, u32)
SEED = seed_of(b"user-1")
SMALL_HEAD = Head(7, 2 * CHUNK_EVENTS + 2, 3)
RECENT, SPILLED = (2**64 - 1, 5), Spilled(80_000, 48)


def events(count: int, first: int = 0) -> NDArray[np.void]:
    numbers = np.arange(first, first + count)
    return events_of(numbers, 1000 + numbers)


def with_checksum(body: bytes, seed: int = 0) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body, seed))


def packed_seen(*items: int) -> bytes:
    value = add_seen(None, np.array(items, np.uint32), SEED, False)
    assert value is not None
    return value


# -- layouts ---------------------------------------------------------------------------------------------------------

CHUNK_TAG, SEEN_TAG, RECORD_TAG = (int.from_bytes(name, "little") for name in (b"chun", b"seen", b"recd"))


def test_layouts_are_the_documented_ones() -> None:
    event = struct.pack("<Iq", 2**32 - 1, -(2**63))
    one = events_of(np.array([2**32 - 1]), np.array([-(2**63)]))
    assert zlib.crc32(b"user-1") == SEED
    assert pack_head(StoredHead(Head(1, 33, 4), one, (2, 3), Spilled(5, 6)), SEED) == with_checksum(
        struct.pack("<QQIHHII", 1, 33, 4, 2, 1, 5, 6) + struct.pack("<QQ", 2, 3) + event, SEED
    )
    chunk = with_checksum(b"\1" + event * CHUNK_EVENTS, SEED ^ CHUNK_TAG ^ 7)
    assert pack_chunk(np.repeat(one, CHUNK_EVENTS), SEED, 7) == chunk
    seen = SEED ^ SEEN_TAG
    assert packed_seen(1000, 3, 3) == with_checksum(b"\2" + struct.pack("<III", 8, 3, 1000), seen)
    assert packed_seen(0, 1, 8) == with_checksum(b"\3" + struct.pack("<I", 2) + bytes([0b11, 0b1]), seen)
    assert pack_record(b"abc", SEED, 9) == struct.pack("<I", SEED ^ RECORD_TAG ^ 9 ^ 3 << 8) + b"abc"
    assert CHUNK_BYTES == 12 * CHUNK_EVENTS


@pytest.mark.slow
@given(heads, st.lists(u64, max_size=RECENT_IDS), st.builds(Spilled, u32, u32), st.data())
def test_head_comes_back_with_its_tail_and_ids(
    head: Head, ids: list[int], spilled: Spilled, data: st.DataObject
) -> None:
    count = head.history_count % CHUNK_EVENTS
    pairs = data.draw(st.lists(st.tuples(u32, times), min_size=count, max_size=count))
    tail = events_of(np.array([i for i, _ in pairs], np.uint32), np.array([t for _, t in pairs], np.int64))
    value = pack_head(StoredHead(head, tail, tuple(ids), spilled), SEED)
    for stored in (value, memoryview(value)):
        found = unpack_head(stored, SEED, False)
        assert (found.head, found.recent_ids, found.spilled) == (head, tuple(ids), spilled)
        assert found.tail.tolist() == pairs
        assert read_ids(stored, SEED, False) == (tuple(ids), spilled.period)
        assert read_head_only(stored, SEED, False) == head
        history_count, items = read_tail(stored, SEED, False)
        assert (history_count, items.tolist()) == (head.history_count, [item for item, _ in pairs])
        assert (count_of(stored), version_of(stored)) == (head.history_count, head.version)
    assert len(value) <= MAX_HEAD_BYTES


def test_longest_head_has_max_head_bytes() -> None:
    longest = Head(2**64 - 1, CHUNK_EVENTS - 1, 2**32 - 1)
    stored = StoredHead(longest, events(CHUNK_EVENTS - 1), tuple(range(RECENT_IDS)), SPILLED)
    assert len(pack_head(stored, SEED)) == MAX_HEAD_BYTES


@pytest.mark.slow
@given(st.lists(st.tuples(u32, times), min_size=CHUNK_EVENTS, max_size=CHUNK_EVENTS))
def test_chunk_comes_back(pairs: list[tuple[int, int]]) -> None:
    value = pack_chunk(events_of(np.array([i for i, _ in pairs], np.uint32), np.array([t for _, t in pairs])), SEED, 3)
    for stored in (value, memoryview(value)):
        assert unpack_chunk(stored, SEED, 3, False).tolist() == pairs


@pytest.mark.parametrize("record", [b"", b"x", bytes(20_000)])
def test_record_starts_behind_its_check(record: bytes) -> None:
    value = pack_record(record, SEED, 2**32 - 1)
    assert value[record_start(value, SEED, 2**32 - 1, False) :] == record


# -- what format 3 wrote -----------------------------------------------------------------------------------------------

OLD_EVENTS = events(CHUNK_EVENTS).tobytes()
OLD_HEAD = with_checksum(struct.pack("<QQIHH", 7, 34, 3, 2, 0) + struct.pack("<QQ", 8, 9) + OLD_EVENTS[:24])
OLD_CHUNK = with_checksum(OLD_EVENTS)
OLD_NUMBERS = with_checksum(b"\0" + struct.pack("<II", 3, 1000))
OLD_BITMAP = with_checksum(b"\1\3\1")
READ_OLD: list[tuple[bytes, Callable[[bytes, bool], Any]]] = [
    (OLD_HEAD, lambda value, legacy: unpack_head(value, SEED, legacy)),
    (OLD_HEAD, lambda value, legacy: read_tail(value, SEED, legacy)),
    (OLD_CHUNK, lambda value, legacy: unpack_chunk(value, SEED, 0, legacy)),
    (OLD_NUMBERS, lambda value, legacy: unpack_seen(value, SEED, legacy)),
    (OLD_BITMAP, lambda value, legacy: unpack_seen(value, SEED, legacy)),
    (OLD_BITMAP, lambda value, legacy: add_seen(value, np.array([1000], np.uint32), SEED, legacy)),
    (b"a record", lambda value, legacy: record_start(value, SEED, 1, legacy)),
]


def test_values_of_format_3_are_read_where_that_is_allowed() -> None:
    found = unpack_head(OLD_HEAD, SEED, True)
    assert (found.head, found.recent_ids, found.spilled) == (Head(7, 34, 3), (8, 9), Spilled(0, 0))
    assert found.tail.tolist() == events(2).tolist()
    assert read_ids(OLD_HEAD, SEED, True) == ((8, 9), 0) and read_head_only(OLD_HEAD, SEED, True) == Head(7, 34, 3)
    assert read_tail(OLD_HEAD, SEED, True)[1].tolist() == [0, 1]
    assert unpack_chunk(OLD_CHUNK, SEED, 5, True).tolist() == events(CHUNK_EVENTS).tolist()
    assert unpack_seen(OLD_NUMBERS, SEED, True).tolist() == [3, 1000]
    assert unpack_seen(OLD_BITMAP, SEED, True).tolist() == [0, 1, 8]
    assert record_start(b"a record", SEED, 1, True) == 0
    for old in (OLD_NUMBERS, OLD_BITMAP):
        more = add_seen(old, np.array([2], np.uint32), SEED, True)
        assert more is not None  # in the new layout
        assert unpack_seen(more, SEED, False).tolist() == sorted([*unpack_seen(old, SEED, True).tolist(), 2])


@pytest.mark.parametrize(("value", "read"), READ_OLD)
def test_values_of_format_3_are_damage_elsewhere(value: bytes, read: Callable[[bytes, bool], Any]) -> None:
    read(value, True)
    with pytest.raises(DamagedError):
        read(value, False)


# -- damage ----------------------------------------------------------------------------------------------------------

STORED_HEAD = StoredHead(SMALL_HEAD, events(2), RECENT, SPILLED)
Unpack = Callable[[bytes, int, bool], Any]
VALUES: dict[str, tuple[bytes, Unpack]] = {
    "head": (pack_head(STORED_HEAD, SEED), unpack_head),
    "tail": (pack_head(STORED_HEAD, SEED), read_tail),
    "ids": (pack_head(STORED_HEAD, SEED), read_ids),
    "head only": (pack_head(STORED_HEAD, SEED), read_head_only),
    "chunk": (pack_chunk(events(CHUNK_EVENTS), SEED, 3), lambda value, seed, old: unpack_chunk(value, seed, 3, old)),
    "numbers": (packed_seen(1, 100, 3000), unpack_seen),
    "bitmap": (packed_seen(*range(30)), unpack_seen),
    "numbers with more": (
        packed_seen(1, 100, 3000),
        lambda value, seed, old: add_seen(value, np.array([7], np.uint32), seed, old),
    ),
    "bitmap with more": (
        packed_seen(*range(30)),
        lambda value, seed, old: add_seen(value, np.array([37], np.uint32), seed, old),
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_flipped_bit_is_damage(name: str) -> None:
    value, unpack = VALUES[name]
    unpack(value, SEED, False)
    for bit in range(8 * len(value)):
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        for stored, legacy in ((bytes(flipped), False), (memoryview(flipped), True)):
            with pytest.raises(DamagedError):
                unpack(stored, SEED, legacy)


@pytest.mark.parametrize("name", VALUES)
def test_every_missing_or_additional_byte_is_damage(name: str) -> None:
    value, unpack = VALUES[name]
    for damaged in [*(value[:length] for length in range(len(value))), value + b"\0", bytes(4), bytes(len(value) + 1)]:
        with pytest.raises(DamagedError):
            unpack(damaged, SEED, False)


@pytest.mark.parametrize("name", VALUES)
def test_value_of_another_user_is_damage(name: str) -> None:
    value, unpack = VALUES[name]
    for user in (b"user-0", b"user-11", b"user-", b"User-1"):
        for legacy in (False, True):
            with pytest.raises(DamagedError):
                unpack(value, seed_of(user), legacy)


def test_piece_of_a_history_under_another_number_is_damage() -> None:
    value = pack_chunk(events(CHUNK_EVENTS), SEED, 3)
    for number in (0, 2, 4, 3 + 2**16):
        with pytest.raises(DamagedError):
            unpack_chunk(value, SEED, number, True)


def test_record_under_another_key_or_of_another_length_is_damage() -> None:
    value = pack_record(b"record", SEED, 3)
    for seed, generation in [(seed_of(b"user-0"), 3), (SEED, 2), (SEED, 3 + 2**31)]:
        with pytest.raises(DamagedError):
            record_start(value, seed, generation, False)
    for damaged in (b"", value[:3], value[:-1], value + b"\0", b"\0" + value[1:]):
        with pytest.raises(DamagedError):
            record_start(damaged, SEED, 3, False)


class Untouchable(bytes):
    """Bytes that may not be read: those of a value whose length says that they cannot be right."""

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise AssertionError("read beyond the header")
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "unpack",
    [
        unpack_head,
        read_tail,
        lambda value, seed, old: unpack_chunk(value, seed, 0, old),
        lambda value, seed, old: record_start(value, seed, 1, old),
    ],
)
def test_length_is_looked_at_before_the_bytes(unpack: Unpack) -> None:
    with pytest.raises(DamagedError):
        unpack(Untouchable(64), SEED, False)
    with pytest.raises(DamagedError):
        unpack_seen(Untouchable(packed_seen(1, 3000)), SEED, False)


@pytest.mark.parametrize(
    ("unpack", "body", "problem"),
    [
        (unpack_head, b"", "wrong length"),
        (read_tail, bytes(23), "wrong length"),
        (unpack_head, bytes(MAX_HEAD_BYTES), "wrong length"),
        (unpack_head, struct.pack("<QQIHHII", 1, 0, 0, 0, 2, 0, 0), "unknown layout"),
        (unpack_head, struct.pack("<QQIHH", 1, 0, 0, 0, 0), "unknown layout"),
        (unpack_head, struct.pack("<QQIHHII", 1, 1, 0, 0, 1, 0, 0), "events it counts"),
        (read_tail, struct.pack("<QQIHHII", 1, 1, 0, 0, 1, 0, 0), "events it counts"),
        (unpack_head, struct.pack("<QQIHHII", 1, 0, 0, 1, 1, 0, 0), "events it counts"),
        (unpack_head, struct.pack("<QQIHHII", 1, 0, 0, 65535, 1, 0, 0), "events it counts"),
        (read_tail, struct.pack("<QQIHHII", 1, 0, 0, 65535, 1, 0, 0), "events it counts"),
        (unpack_head, struct.pack("<QQIHHII", 1, 32, 0, 0, 1, 0, 0) + bytes(12), "events it counts"),
        (lambda value, seed, old: unpack_chunk(value, seed, 0, old), b"", "wrong layout"),
        (lambda value, seed, old: unpack_chunk(value, seed, 0, old), bytes(CHUNK_BYTES), "wrong layout"),
        (lambda value, seed, old: unpack_chunk(value, seed, 0, old), bytes(1 + CHUNK_BYTES), "wrong layout"),
        (unpack_seen, b"", "unreadable"),
        (unpack_seen, b"\4\0\0\0\0", "unreadable"),
        (unpack_seen, b"\0\1\0\0", "unreadable"),
    ],
)
def test_value_with_the_right_checksum_and_a_wrong_content_is_damage(unpack: Unpack, body: bytes, problem: str) -> None:
    with pytest.raises(DamagedError, match=problem):
        unpack(with_checksum(body, SEED), SEED, False)


def test_numbers_that_are_not_whole_are_damage() -> None:
    odd = with_checksum(b"\2" + struct.pack("<I", 3) + b"abc", SEED ^ SEEN_TAG)
    with pytest.raises(DamagedError, match="unreadable"):
        unpack_seen(odd, SEED, False)


def test_damaged_head_still_says_what_it_may_have_counted() -> None:
    value = pack_head(STORED_HEAD, SEED)
    assert count_of(value[:-1]) == SMALL_HEAD.history_count and version_of(value[:-1]) == SMALL_HEAD.version
    for short in (b"", value[:23]):
        assert count_of(short) == version_of(short) == 0


# -- seen sets -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 3000), max_size=40), max_size=6))
def test_seen_set_is_the_union_of_what_was_added(batches: list[list[int]]) -> None:
    value, known = None, set[int]()
    for batch in batches:
        more = add_seen(value, np.array(batch, np.uint32), SEED, False)
        assert (more is None) == (set(batch) <= known)
        value, known = more or value, known | set(batch)
        if value is not None:
            found = unpack_seen(value, SEED, False)
            assert found.dtype == np.uint32 and found.tolist() == sorted(known)
            assert unpack_seen(memoryview(value), SEED, False).tolist() == sorted(known)


def test_seen_set_is_a_bitmap_if_that_is_less_than_half_as_long() -> None:
    assert packed_seen(15)[0] == 2 and packed_seen(7)[0] == 3  # 4 bytes of numbers; bitmaps of 2 and of 1
    assert packed_seen(0, 31)[0] == 2 and packed_seen(0, 23)[0] == 3
    for items in ([5, 2**32 - 1], [*range(0, 3200, 17)], [*range(0, 3200, 15)]):
        numbers_bytes, bitmap_bytes = 4 * len(items), items[-1] // 8 + 1
        expected = numbers_bytes if numbers_bytes <= 2 * bitmap_bytes else bitmap_bytes
        assert len(packed_seen(*items)) == 5 + expected + 4


def test_numbers_become_a_bitmap_and_a_bitmap_grows_and_stays_one() -> None:
    numbers = packed_seen(100, 200)
    assert numbers[0] == 2
    bitmap = add_seen(numbers, np.arange(0, 80, dtype=np.uint32), SEED, False)
    assert bitmap is not None and bitmap[0] == 3 and len(bitmap) == 5 + 26 + 4
    within = add_seen(bitmap, np.array([207, 207], np.uint32), SEED, False)
    assert within is not None and len(within) == len(bitmap)
    beyond = add_seen(within, np.array([208, 100_000], np.uint32), SEED, False)
    assert beyond is not None and beyond[0] == 3 and len(beyond) == 5 + 12_501 + 4
    assert unpack_seen(beyond, SEED, False).tolist() == [*range(80), 100, 200, 207, 208, 100_000]
    assert add_seen(beyond, np.array([100_000, 0], np.uint32), SEED, False) is None


def test_adding_nothing_changes_no_seen_set() -> None:
    nothing = np.zeros(0, np.uint32)
    assert add_seen(None, nothing, SEED, False) is None
    assert add_seen(packed_seen(1, 3000), nothing, SEED, False) is None
    assert add_seen(packed_seen(0, 1, 2), nothing, SEED, False) is None


# -- chunks and tail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0, 1, CHUNK_EVENTS - 1])
@pytest.mark.parametrize("new", [n + d for n in (0, CHUNK_EVENTS, 3 * CHUNK_EVENTS) for d in (-1, 0, 1) if n + d >= 0])
def test_events_fill_chunks_in_order_and_the_rest_is_the_tail(tail: int, new: int) -> None:
    full, rest = split_events(events(tail), events(new, first=tail))
    assert len(full) == (tail + new) // CHUNK_EVENTS * CHUNK_EVENTS and len(rest) == (tail + new) % CHUNK_EVENTS
    assert [*full.tolist(), *rest.tolist()] == events(tail + new).tolist()


# -- shown items -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_shown_items_come_back_and_every_damaged_byte_is_found(count: int) -> None:
    events = events_of(np.arange(count), np.arange(count) + 1_700_000_000)
    seed = seed_of(b"anna")
    value = pack_shown(events, seed)
    assert len(value) == 1 + 12 * count + 4
    assert unpack_shown(memoryview(value), seed).tolist() == events.tolist()
    damaged = [value[:size] for size in {0, 1, 4, len(value) - 1, len(value) - 12} if 0 <= size < len(value)]
    for position in {0, 1, len(value) // 2, len(value) - 1}:
        flipped = bytearray(value)
        flipped[position] ^= 4
        damaged.append(bytes(flipped))
    for one in (*damaged, value + b"\0"):
        with pytest.raises(DamagedError, match="what a user was shown is damaged"):
            unpack_shown(one, seed)
    with pytest.raises(DamagedError):
        unpack_shown(value, seed_of(b"bob"))
