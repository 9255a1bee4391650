"""Rows of a log into histories: codes for users and items, and a stable order by time without a general sort.

Ten million rows are grouped in about a second: integer ids are counted in a table of their range instead of being
hashed, and a stable sort of numbers is a plain sort of (number, row) packed into 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dman_runtime.data.interactions import Interactions
from dman_runtime.data.times import Times

if TYPE_CHECKING:
    import pyarrow as pa

_TABLE_PER_ROW = 4  # a range of ids this many times the rows is still counted in a table


def in_order_of_appearance(ids: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Distinct ids (U) as they appear first, and the code (N) of each row."""
    numbers = _as_numbers(ids)
    if numbers is None or not _fits_table(numbers):
        return _encoded(ids)
    import pyarrow as pa

    low = numbers.min()
    shifted = numbers - low
    rows = np.arange(len(numbers), dtype=np.int32 if len(numbers) < 1 << 31 else np.int64)
    first = np.full(int(shifted.max()) + 1, len(numbers), dtype=rows.dtype)
    first[shifted[::-1]] = rows[::-1]  # the last assignment to a place is its first row
    present = np.flatnonzero(first != len(numbers))
    by_appearance = present[np.argsort(first[present])]
    codes = first  # reused: id -> code
    codes[by_appearance] = np.arange(len(by_appearance), dtype=codes.dtype)
    return pa.array(by_appearance + low), codes[shifted]


def in_order_of_value(ids: pa.ChunkedArray, *, integers: bool) -> tuple[list[str], np.ndarray]:
    """Distinct ids (V) as text, in numeric order if they are integers, else as text; codes (N,) int32 of the rows."""
    numbers = _as_numbers(ids)
    if integers and numbers is not None and _fits_table(numbers):
        low = numbers.min()
        shifted = numbers - low
        present = np.zeros(int(shifted.max()) + 1, dtype=bool)
        present[shifted] = True
        index = np.cumsum(present, dtype=np.int32) - np.int32(1)
        return list(map(str, (np.flatnonzero(present) + low).tolist())), index[shifted]
    distinct, codes = _encoded(ids)
    texts = [str(value) for value in distinct.to_pylist()]
    key = [int(text) for text in texts] if integers else texts
    order = sorted(range(len(texts)), key=key.__getitem__)
    index = np.empty(len(texts), dtype=np.int32)
    index[order] = np.arange(len(texts), dtype=np.int32)
    return [texts[code] for code in order], index[codes]


def _as_numbers(ids: pa.ChunkedArray) -> np.ndarray | None:
    import pyarrow as pa

    return ids.to_numpy() if pa.types.is_integer(ids.type) and len(ids) else None


def _fits_table(numbers: np.ndarray) -> bool:
    return int(numbers.max()) - int(numbers.min()) < max(1 << 20, _TABLE_PER_ROW * len(numbers))


def _encoded(ids: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    encoded = ids.dictionary_encode().unify_dictionaries().combine_chunks()
    if hasattr(encoded, "chunks"):
        (encoded,) = encoded.chunks
    return encoded.dictionary, encoded.indices.to_numpy()


def stable_order(keys: list[np.ndarray], users: np.ndarray) -> np.ndarray | None:
    """Rows (N) by user, then by the keys (each (N,) int64; the first counts most); equal ones keep their order.

    None if the rows are in this order already.
    """
    rows: np.ndarray | None = None
    for key in (*reversed(keys), users):
        sorted_so_far = _taken(key, rows)
        if (sorted_so_far[1:] < sorted_so_far[:-1]).any():
            order = _stable_argsort(sorted_so_far)
            rows = order if rows is None else rows[order]
    return rows


def _taken(values: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    return values if rows is None else values[rows]


def _stable_argsort(numbers: np.ndarray) -> np.ndarray:
    low, high = int(numbers.min()), int(numbers.max())
    row_bits = max(1, (len(numbers) - 1).bit_length())
    if (high - low).bit_length() + row_bits > 63:
        return np.argsort(numbers, kind="stable")
    packed = numbers.astype(np.int64)
    packed -= low
    packed <<= row_bits
    packed |= np.arange(len(numbers))
    packed.sort()
    packed &= (1 << row_bits) - 1
    return packed


def longest_first(lengths: np.ndarray, user_ids: Sequence[str]) -> np.ndarray:
    """Rows (U,) int64 of users by the lengths (U,) of their histories, equal ones by id."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = pa.table({"length": lengths, "user_id": pa.array(user_ids, pa.string())})
    rows: np.ndarray = pc.sort_indices(table, sort_keys=[("length", "descending"), ("user_id", "ascending")]).to_numpy()
    return rows.astype(np.int64)


def exact_repeats(offsets: np.ndarray, items: np.ndarray, times: list[np.ndarray]) -> np.ndarray | None:
    """Which events (N) of ordered histories have the item and the times of an earlier one of their user, (N,) bool.

    None if no event has. The events of user u are [offsets[u], offsets[u+1]).
    """
    tied = np.ones(max(0, len(items) - 1), dtype=bool)  # event i+1 with event i
    for time in times:
        tied &= time[1:] == time[:-1]
    tied[offsets[1:-1] - 1] = False
    if not tied.any():
        return None
    member = np.zeros(len(items), dtype=bool)
    member[1:] |= tied
    member[:-1] |= tied
    rows = np.flatnonzero(member)
    groups = np.cumsum(~tied[rows[1:] - 1]) if len(rows) > 1 else np.zeros(0, np.int64)
    groups = np.concatenate([[0], groups])
    order = np.lexsort((items[rows], groups))  # stable: the first of equal ones stays first
    same = (groups[order][1:] == groups[order][:-1]) & (items[rows][order][1:] == items[rows][order][:-1])
    repeated = np.zeros(len(items), dtype=bool)
    repeated[rows[order[1:][same]]] = True
    return repeated if same.any() else None


def grouped(
    users: pa.ChunkedArray,
    items: pa.ChunkedArray,
    times: Times | None,
    keys: list[np.ndarray],
    *,
    integer_user_ids: bool,
    integer_item_ids: bool,
    positions: np.ndarray | None,
    drop_repeats: bool,
) -> tuple[Interactions, int]:
    """The histories of rows (N), and how many exact repeats were dropped.

    `keys` order the events of a user. Events of one user and item with equal times, and equal positions where there are
    any, are exact repeats.
    """
    user_ids, user_codes = in_order_of_appearance(users)
    item_ids, item_codes = in_order_of_value(items, integers=integer_item_ids)
    rows = stable_order(keys, user_codes)
    lengths = np.bincount(user_codes, minlength=len(user_ids))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    events = _taken(item_codes, rows)
    times = None if times is None else times.taken(rows)
    seconds = np.zeros(len(events), np.int64) if times is None else times.seconds
    repeated = None
    if drop_repeats and times is not None:
        places = [] if positions is None else [_taken(positions, rows)]
        repeated = exact_repeats(offsets, events, times.keys + places)
    if repeated is not None:
        kept = ~repeated
        offsets = offsets - np.searchsorted(np.flatnonzero(repeated), offsets)
        events, seconds = events[kept], seconds[kept]
    interactions = Interactions(
        user_ids=list(map(str, user_ids.to_pylist())),
        item_ids=item_ids,
        offsets=offsets,
        items=events,
        timestamps=seconds,
        integer_user_ids=integer_user_ids,
        integer_item_ids=integer_item_ids,
    )
    return interactions, len(user_codes) - len(events)
