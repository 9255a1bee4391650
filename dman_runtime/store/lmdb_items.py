"""The item table of an LMDB store: a number for each external id, in both directions.

Both entries of an item carry the CRC-32 of its id, started with its number. Those that format 3 wrote carry none, and
are compared with each other instead.

A compaction *frees* the numbers of items that no history has: such a number has an empty id, and an entry under byte 0
and the number instead of an id. New items take these numbers first.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import takewhile
from zlib import crc32

import lmdb

from dman_runtime.data.ids import MAX_ID_BYTES
from dman_runtime.store.history import Bytes, DamagedError
from dman_runtime.store.lmdb_absence import check_neighbours
from dman_runtime.store.lmdb_layout import NUMBER, Databases, decoded, pack_text, unpack_text

_U32, _ENTRY = struct.Struct("<I"), struct.Struct("<II")
_ENTRY_BYTES = _ENTRY.size
_WHAT = "an entry of the item table"
_DAMAGED = f"{_WHAT} is damaged"
_FREE = b"\0"  # no id begins like that


def find_numbers(txn: lmdb.Transaction, databases: Databases, items: Sequence[bytes]) -> list[int]:
    """The numbers (N) of items, -1 where unknown. Raises DamagedError."""
    numbers, get, database, unpack = [], txn.get, databases.item_numbers, _ENTRY.unpack
    for item in items:
        value = get(item, db=database)
        if value is None:
            _check_unknown(txn, databases, item)
            numbers.append(-1)
        elif len(value) == _ENTRY_BYTES and (entry := unpack(value))[1] == crc32(item, entry[0]):
            numbers.append(entry[0])
        else:
            numbers.append(checked_number(txn, databases, item, value))
    return numbers


def _check_unknown(txn: lmdb.Transaction, databases: Databases, item: bytes) -> None:
    def check(key: bytes, value: Bytes) -> None:
        checked_number(txn, databases, key, value)

    check_neighbours(txn, databases.item_numbers, item, check)


def checked_number(txn: lmdb.Transaction, databases: Databases, item: bytes, value: Bytes) -> int:
    """The number in an entry of `item_numbers`. Raises DamagedError."""
    if len(value) == _ENTRY.size:
        number, check = _ENTRY.unpack(value)
        if crc32(item, number) == check:
            return int(number)
    elif len(value) == _U32.size and databases.legacy:
        (number,) = _U32.unpack(value)
        other = txn.get(NUMBER.pack(number), db=databases.items)
        if other is not None and bytes(other[: len(item) + 1]).partition(b"\0")[0] == item:
            return int(number)
    raise DamagedError(_DAMAGED)


def item_count(txn: lmdb.Transaction, databases: Databases) -> int:
    return int(txn.stat(databases.items)["entries"])


def find_ids(txn: lmdb.Transaction, databases: Databases, numbers: Sequence[int]) -> list[str]:
    """The ids (N) of items that have been given numbers. Raises DamagedError."""
    found, get, database, pack = [], txn.get, databases.items, NUMBER.pack
    for number in numbers:
        value = get(pack(number), db=database)
        if value is None:
            raise DamagedError("an item is missing from the item table")
        size = len(value) - 5
        if (
            0 < size <= MAX_ID_BYTES
            and value[size] == 0
            and _U32.unpack_from(value, size + 1)[0] == crc32(value[:size], number)
        ):
            found.append(str(value[:size], "utf-8"))
        else:
            found.append(checked_item(txn, databases, number, value))
    return found


def checked_item(txn: lmdb.Transaction, databases: Databases, number: int, value: Bytes) -> str:
    """The id in an entry of `items`. Raises DamagedError, also where the number is free."""
    if len(value) > MAX_ID_BYTES + 5:
        raise DamagedError(_DAMAGED)
    item, legacy = unpack_text(bytes(value), number, _WHAT)
    if not item:
        raise DamagedError("an item without an id is in use")
    if legacy:
        other = txn.get(item, db=databases.item_numbers) if databases.legacy else None
        if other is None or len(other) < _U32.size or _U32.unpack_from(other)[0] != number:
            raise DamagedError(_DAMAGED)
    return decoded(item)


def append_items(txn: lmdb.Transaction, databases: Databases, items: Sequence[bytes]) -> tuple[list[int], int]:
    """The numbers (N) of items, and how many of these were unknown, and get free numbers, then the next ones.

    Raises DamagedError.
    """
    first = next_number = item_count(txn, databases)
    with txn.cursor(db=databases.items) as cursor:
        if first and not (cursor.last() and bytes(cursor.key()) == NUMBER.pack(first - 1)):
            raise DamagedError("the item table does not hold the items it counts")
    numbers, added = [], 0
    for item in items:
        (number,) = find_numbers(txn, databases, [item])  # another process may have been first
        if number < 0:
            free = _take_free(txn, databases)
            number, next_number = (next_number, next_number + 1) if free is None else (free, next_number)
            put_item(txn, databases, number, item)
            added += 1
        numbers.append(number)
    return numbers, added


def put_item(txn: lmdb.Transaction, databases: Databases, number: int, item: bytes) -> None:
    txn.put(NUMBER.pack(number), pack_text(item, number), db=databases.items)
    txn.put(item, _ENTRY.pack(number, crc32(item, number)), db=databases.item_numbers)


def put_free(txn: lmdb.Transaction, databases: Databases, number: int) -> None:
    key = _free_key(number)
    txn.put(NUMBER.pack(number), pack_text(b"", number), db=databases.items)
    txn.put(key, _ENTRY.pack(number, crc32(key, number)), db=databases.item_numbers)


def key_of(txn: lmdb.Transaction, databases: Databases, number: int, value: Bytes) -> bytes:
    """The key in `item_numbers` of an entry of `items`, free or not. Raises DamagedError."""
    if is_free(number, value):
        return _free_key(number)
    return checked_item(txn, databases, number, value).encode()


def is_free(number: int, value: Bytes) -> bool:
    """Whether an entry of `items` is that of a free number."""
    return value == pack_text(b"", number)


def free_numbers(txn: lmdb.Transaction, databases: Databases) -> list[int]:
    """In order. Raises DamagedError."""
    with txn.cursor(db=databases.item_numbers) as cursor:
        found = cursor.set_range(_FREE)
        entries = takewhile(lambda entry: entry[0][:1] == _FREE, cursor if found else ())
        return [checked_number(txn, databases, bytes(key), value) for key, value in entries]


def _take_free(txn: lmdb.Transaction, databases: Databases) -> int | None:
    with txn.cursor(db=databases.item_numbers) as cursor:
        if not cursor.set_range(_FREE) or cursor.key()[:1] != _FREE:
            return None
        number = checked_number(txn, databases, bytes(cursor.key()), cursor.value())
        cursor.delete()
    return number


def _free_key(number: int) -> bytes:
    return _FREE + NUMBER.pack(number)
