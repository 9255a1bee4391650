"""The catalogue of an LMDB store: what was changed of its items at run time. `lmdb` has the table of databases.

| key | value |
|---|---|
| `r` | revision u64, number of `o` entries u32, number of `a` entries u32, CRC-32 of the three u32 |
| `o`, item number u32 big-endian | CRC-32 of the key u32: the item is switched off |
| `a`, slot u32 big-endian | item number u32, JSON of the `AddedItem`, CRC-32 of key and both u32: the item was added |

Numbers of values are little-endian. The revision counts the entries, so that one that is lost is noticed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple
from zlib import crc32

import lmdb
import numpy as np

from dman_runtime.data.added_items import AddedItem
from dman_runtime.data.untrusted import parse_json
from dman_runtime.store.catalogue import Addition, Catalogue
from dman_runtime.store.history import Bytes, DamagedError
from dman_runtime.store.lmdb_layout import NUMBER, Databases

_REVISION_KEY, _OFF, _ADDED = b"r", b"o", b"a"
_REVISION, _CHECK = struct.Struct("<QII"), struct.Struct("<I")
_MAX_ADDED_BYTES = 1 << 20  # of a value
_DAMAGED = "an entry of the catalogue is damaged"
_KEY_BYTES = len(_OFF) + NUMBER.size


class Revision(NamedTuple):
    """What the entry of the revision says."""

    revision: int = 0
    off: int = 0  # items that are switched off
    added: int = 0  # slots


def read_revision(txn: lmdb.Transaction, databases: Databases) -> Revision:
    """Raises DamagedError."""
    value = None if databases.catalogue is None else txn.get(_REVISION_KEY, db=databases.catalogue)
    if value is None:
        return Revision()
    size = _REVISION.size
    if len(value) != size + _CHECK.size or _CHECK.unpack_from(value, size)[0] != crc32(value[:size]):
        raise DamagedError("the revision of the catalogue is damaged")
    return Revision(*_REVISION.unpack_from(value))


def read_catalogue(txn: lmdb.Transaction, databases: Databases) -> Catalogue:
    """All of it. Raises DamagedError."""
    found = read_revision(txn, databases)
    off = [switched_off(key, value) for key, value in _entries(txn, databases, _OFF)]
    added = list(_entries(txn, databases, _ADDED))
    slots = [int(NUMBER.unpack_from(key, 1)[0]) for key, _ in added if len(key) == _KEY_BYTES]
    if len(off) != found.off or slots != list(range(found.added)) or len(added) != found.added:
        raise DamagedError("the catalogue does not hold the items it counts")
    return Catalogue(found.revision, np.array(off, np.uint32), [addition(key, value) for key, value in added])


def _entries(txn: lmdb.Transaction, databases: Databases, kind: bytes) -> Iterator[tuple[bytes, bytes]]:
    if databases.catalogue is None:
        return
    with txn.cursor(db=databases.catalogue) as cursor:
        if cursor.set_range(kind):
            for key, value in takewhile(lambda entry: entry[0][:1] == kind, cursor.iternext()):
                yield bytes(key), bytes(value)


def switched_off(key: Bytes, value: Bytes) -> int:
    """The item number of an entry that switches an item off. Raises DamagedError."""
    if len(key) != _KEY_BYTES or bytes(value) != _CHECK.pack(crc32(key)):
        raise DamagedError(_DAMAGED)
    return int(NUMBER.unpack_from(key, len(_OFF))[0])


def addition(key: Bytes, value: Bytes) -> Addition:
    """What an entry says that adds an item. Raises DamagedError."""
    end = len(value) - _CHECK.size
    if len(key) != _KEY_BYTES or not NUMBER.size <= end <= _MAX_ADDED_BYTES:
        raise DamagedError(_DAMAGED)
    if _CHECK.unpack_from(value, end)[0] != crc32(value[:end], crc32(key)):
        raise DamagedError(_DAMAGED)
    try:
        item = AddedItem.from_json(parse_json(bytes(value[NUMBER.size : end])))
    except ValueError as error:
        raise DamagedError(_DAMAGED) from error
    return Addition(_CHECK.unpack_from(value)[0], item)


def check_entry(key: Bytes, value: Bytes, item_count: int) -> None:
    """DamagedError where an entry is damaged by itself; the revision is checked when it is read."""
    if key[:1] == _OFF and switched_off(key, value) >= item_count:
        raise DamagedError("an item without an id is switched off")
    if key[:1] == _ADDED and addition(key, value).number >= item_count:
        raise DamagedError("an item without an id was added")
    if key != _REVISION_KEY and key[:1] not in (_OFF, _ADDED):
        raise DamagedError(_DAMAGED)


def put_switches(txn: lmdb.Transaction, databases: Databases, numbers: Sequence[int], *, off: bool) -> int:
    """Switches distinct items off or on; how many were not so already. Raises DamagedError."""
    assert databases.catalogue is not None
    before, changed = read_revision(txn, databases), 0
    for number in numbers:
        key = _OFF + NUMBER.pack(number)
        if off:
            changed += txn.put(key, _CHECK.pack(crc32(key)), db=databases.catalogue, overwrite=False)
        else:
            changed += txn.delete(key, db=databases.catalogue)
    if changed:
        _put_revision(txn, databases, before._replace(off=before.off + (changed if off else -changed)))
    return changed


def put_additions(txn: lmdb.Transaction, databases: Databases, additions: Sequence[Addition]) -> None:
    """Adds items in the next slots. Raises DamagedError."""
    assert databases.catalogue is not None
    before = read_revision(txn, databases)
    for slot, (number, item) in enumerate(additions, before.added):
        key = _ADDED + NUMBER.pack(slot)
        entry = _CHECK.pack(number) + json.dumps(item.as_json(), ensure_ascii=False).encode()
        txn.put(key, entry + _CHECK.pack(crc32(entry, crc32(key))), db=databases.catalogue)
    _put_revision(txn, databases, before._replace(added=before.added + len(additions)))


def _put_revision(txn: lmdb.Transaction, databases: Databases, now: Revision) -> None:
    """One more than it was."""
    assert databases.catalogue is not None
    entry = _REVISION.pack(now.revision + 1, now.off, now.added)
    txn.put(_REVISION_KEY, entry + _CHECK.pack(crc32(entry)), db=databases.catalogue)
