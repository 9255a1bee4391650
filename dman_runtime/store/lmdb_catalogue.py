"""The catalogue of an LMDB store: what was changed of its items at run time. `lmdb` has the table of databases.

| key | value |
|---|---|
| `r` | revision u64, number of `o` entries u32, CRC-32 of both u32 |
| `o`, item number u32 big-endian | CRC-32 of the key u32: the item is switched off |

Numbers of values are little-endian. The revision counts the entries, so that one that is lost is noticed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import takewhile
from zlib import crc32

import lmdb
import numpy as np

from dman_runtime.store.catalogue import Catalogue
from dman_runtime.store.history import Bytes, DamagedError
from dman_runtime.store.lmdb_layout import NUMBER, Databases

_REVISION_KEY, _OFF = b"r", b"o"
_REVISION, _CHECK = struct.Struct("<QI"), struct.Struct("<I")
_KEY_BYTES = len(_OFF) + NUMBER.size


def read_revision(txn: lmdb.Transaction, databases: Databases) -> tuple[int, int]:
    """The revision, and how many items are switched off. Raises DamagedError."""
    if databases.catalogue is None:
        return 0, 0
    value = txn.get(_REVISION_KEY, db=databases.catalogue)
    if value is None:
        return 0, 0
    size = _REVISION.size
    if len(value) != size + _CHECK.size or _CHECK.unpack_from(value, size)[0] != crc32(value[:size]):
        raise DamagedError("the revision of the catalogue is damaged")
    revision, off = _REVISION.unpack_from(value)
    return revision, off


def read_catalogue(txn: lmdb.Transaction, databases: Databases) -> Catalogue:
    """All of it. Raises DamagedError."""
    revision, count = read_revision(txn, databases)
    numbers: list[int] = []
    if databases.catalogue is not None:
        with txn.cursor(db=databases.catalogue) as cursor:
            entries = cursor.iternext() if cursor.set_range(_OFF) else iter(())
            numbers += [
                switched_off(key, value) for key, value in takewhile(lambda entry: entry[0][:1] == _OFF, entries)
            ]
    if len(numbers) != count:
        raise DamagedError("the catalogue does not hold the items it counts")
    return Catalogue(revision, np.array(numbers, np.uint32))


def switched_off(key: Bytes, value: Bytes) -> int:
    """The item number of an entry that switches an item off. Raises DamagedError."""
    if len(key) != _KEY_BYTES or bytes(value) != _CHECK.pack(crc32(key)):
        raise DamagedError("an entry of the catalogue is damaged")
    return int(NUMBER.unpack_from(key, len(_OFF))[0])


def check_entry(key: Bytes, value: Bytes, item_count: int) -> None:
    """DamagedError where an entry is damaged by itself; the revision is checked when it is read."""
    if key[:1] == _OFF and switched_off(key, value) >= item_count:
        raise DamagedError("an item without an id is switched off")
    if key != _REVISION_KEY and key[:1] != _OFF:
        raise DamagedError("an entry of the catalogue is damaged")


def put_switches(txn: lmdb.Transaction, databases: Databases, numbers: Sequence[int], *, off: bool) -> int:
    """Switches distinct items off or on; how many were not so already. Raises DamagedError."""
    assert databases.catalogue is not None
    revision, count = read_revision(txn, databases)
    changed = 0
    for number in numbers:
        key = _OFF + NUMBER.pack(number)
        if off:
            changed += txn.put(key, _CHECK.pack(crc32(key)), db=databases.catalogue, overwrite=False)
        else:
            changed += txn.delete(key, db=databases.catalogue)
    if changed:
        entry = _REVISION.pack(revision + 1, count + (changed if off else -changed))
        txn.put(_REVISION_KEY, entry + _CHECK.pack(crc32(entry)), db=databases.catalogue)
    return changed
