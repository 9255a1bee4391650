"""The last sequence of each producer that was applied to a user, for ever: 16 bytes a producer.

    key of the user, 16 bytes  ->  n x (hash of the producer u64, last sequence u64), CRC-32 of that u32

All numbers are little-endian. The key is a BLAKE2b hash of the user id under the id of the store, and the checksum
starts from the CRC-32 of the key. An entry stays when its user is deleted, so that a log that is read again brings
nobody back. The id of the user cannot be found in it; but whoever has the file can tell whether a guess is right.

Only updates that name a producer touch this database.
"""

from __future__ import annotations

import struct
import zlib

import lmdb

from dman_runtime.store.base import Write
from dman_runtime.store.checks import check_producers
from dman_runtime.store.history import Bytes, DamagedError
from dman_runtime.store.lmdb_absence import check_neighbours
from dman_runtime.store.lmdb_layout import USER_HASH_BYTES, user_hash

_PAIR, _CHECKSUM = struct.Struct("<QQ"), struct.Struct("<I")


def find_sequences(
    txn: lmdb.Transaction, producers: lmdb._Database | None, user: bytes, store_id: str
) -> dict[int, int]:
    """The last sequences by the hash of their producer. Raises DamagedError."""
    if producers is None:
        return {}
    key = user_hash(user, store_id)
    if (value := txn.get(key, db=producers)) is not None:
        return unpack_sequences(key, value)
    check_neighbours(txn, producers, key, unpack_sequences)
    return {}


def put_sequences(txn: lmdb.Transaction, producers: lmdb._Database | None, write: Write, store_id: str) -> int:
    """Takes the steps of a write; returns the bytes put. Raises DamagedError, TooManyProducersError."""
    assert producers is not None  # of a store that is only read
    user = write.user_id.encode()
    before, key = find_sequences(txn, producers, user, store_id), user_hash(user, store_id)
    after = before | {producer: step.last for producer, step in write.sequences.items()}
    check_producers(write.user_id, after)
    body = b"".join([_PAIR.pack(*pair) for pair in after.items()])
    txn.put(key, body + _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(key))), db=producers)
    return len(body)


def unpack_sequences(key: bytes, value: Bytes) -> dict[int, int]:
    """Raises DamagedError for what was not stored under this key."""
    end = len(value) - _CHECKSUM.size
    if len(key) != USER_HASH_BYTES or end < 0 or end % _PAIR.size:
        raise DamagedError("the sequences of a user's producers have the wrong length")
    if zlib.crc32(value[:end], zlib.crc32(key)) != _CHECKSUM.unpack_from(value, end)[0]:
        raise DamagedError("the sequences of a user's producers are damaged")
    return dict(_PAIR.iter_unpack(value[:end]))
