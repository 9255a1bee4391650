"""The databases of an LMDB store, their keys, and what `meta` says. Values are laid out in `history` and
`request_ids`; `lmdb` has the table.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar
from uuid import uuid4

import lmdb

from dman_runtime.store.base import UNKNOWN_TYPES, IdTypes
from dman_runtime.store.checks import checked_types
from dman_runtime.store.history import Bytes, DamagedError
from dman_runtime.store.rollout import NO_ROLLOUT, Rollout, checked_rollout

Entry = TypeVar("Entry")
FORMAT_VERSION, OLD_FORMAT = 4, 3
NUMBER = struct.Struct(">I")  # in keys, so that they are in order
HEAD_SUFFIX = b"\0" + NUMBER.pack(0)
_CHECK = struct.Struct("<I")
_MAX_META = 1 << 20  # bytes of a value
_MAX_HASH_KEY = 64  # bytes: the most that BLAKE2b takes
_ID_TYPES, _ROLLOUT = "the entry that says what the ids are", "the entry that says which bundles serve"


class Databases(NamedTuple):
    """The handles of the databases, whether values of format 3 may be among what they hold, and how request ids name
    their user."""

    meta: lmdb._Database
    items: lmdb._Database
    item_numbers: lmdb._Database
    users: lmdb._Database
    seen: lmdb._Database
    history: lmdb._Database
    requests: lmdb._Database
    legacy: bool
    hash_key: str
    # None for a store that is only read, if no release that knows them has written it:
    catalogue: lmdb._Database | None = None
    producers: lmdb._Database | None = None
    shown: lmdb._Database | None = None

    @classmethod
    def of(cls, handles: Mapping[str, lmdb._Database], *, legacy: bool, hash_key: str) -> Self:
        return cls(**handles, legacy=legacy, hash_key=hash_key)

    def owner(self, user: bytes) -> bytes:
        """What stands for a user in the key of a request id, which outlives the user: a hash, or in a store of an
        earlier release that was never compacted, the id and byte 0."""
        return user_hash(user, self.hash_key) if self.hash_key else user + b"\0"


LATER_NAMES = ("catalogue", "producers", "shown")  # stores of format 4 may lack them; a writer adds them
NAMES = tuple(name for name in Databases._fields if name not in ("legacy", "hash_key"))
USER_HASH_BYTES = 16


def user_hash(user: bytes, store_id: str) -> bytes:
    """What stands for a user in keys that outlive the user; in each store another one."""
    return hashlib.blake2b(user, digest_size=USER_HASH_BYTES, key=store_id.encode()[:_MAX_HASH_KEY]).digest()


def numbered_key(user: bytes, number: int) -> bytes:
    """Key of a record (its generation), a head (0) or a chunk; ids hold no `\\0`, so that no user's keys lie among
    another's.
    """
    return user + b"\0" + NUMBER.pack(number)


def user_of(key: bytes) -> tuple[bytes, int]:
    """The user and the number in a key. Raises DamagedError."""
    if len(key) <= len(HEAD_SUFFIX) or key[-5] != 0:
        raise DamagedError("a key of a user is damaged")
    return key[:-5], NUMBER.unpack_from(key, len(key) - 4)[0]


def decoded(text: bytes) -> str:
    """Raises DamagedError."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DamagedError("a stored id is not text") from error


# -- texts -------------------------------------------------------------------------------------------------------------


def pack_text(text: bytes, seed: int) -> bytes:
    """A text without byte 0, that byte, and its checksum."""
    return text + b"\0" + _CHECK.pack(zlib.crc32(text, seed))


def unpack_text(value: bytes, seed: int, what: str) -> tuple[bytes, bool]:
    """A text, and whether format 3 wrote it, without a checksum. Raises DamagedError."""
    end = value.find(b"\0")
    if end < 0:
        return value, True
    text = value[:end]
    if len(value) != end + 5 or zlib.crc32(text, seed) != _CHECK.unpack_from(value, end + 1)[0]:
        raise DamagedError(f"{what} is damaged")
    return text, False


# -- meta --------------------------------------------------------------------------------------------------------------


def read_info(txn: lmdb.Transaction, meta: lmdb._Database) -> dict[str, Any]:
    """What the store says of itself; without a format version if it is not ours. Raises DamagedError."""
    value = txn.get(b"info", b"", db=meta)
    try:
        info = json.loads(bytes(value[:_MAX_META]))
    except ValueError:
        return {}
    if not isinstance(info, dict):
        return {}
    checksum = info.pop("checksum", None)
    if info.get("format_version") == FORMAT_VERSION and checksum != _info_checksum(info):
        raise DamagedError("the description of the store is damaged")
    return info if isinstance(info.get("format_version"), int) else {}


def write_info(txn: lmdb.Transaction, meta: lmdb._Database, *, upgraded_from: int | None = None) -> None:
    """Describes a new or an upgraded store, which has no request ids yet, and gives it an id."""
    info: dict[str, Any] = {"format_version": FORMAT_VERSION, "store_id": str(uuid4())}
    if upgraded_from is not None:
        info["upgraded_from"] = upgraded_from
    txn.put(b"info", pack_info(info | HASHED), db=meta)


HASHED = {"hashed_owners": True}  # in the description of a store whose request ids name their users by hashes


def hash_key_of(info: Mapping[str, Any]) -> str:
    """The id of the store if request ids name their users by hashes, else empty."""
    return str(info["store_id"]) if info.get("hashed_owners") else ""


def pack_info(info: Mapping[str, Any]) -> bytes:
    return json.dumps({**info, "checksum": _info_checksum(info)}).encode()


def _info_checksum(info: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(info, sort_keys=True).encode())


def read_generations(txn: lmdb.Transaction, meta: lmdb._Database, *, legacy: bool) -> list[str]:
    """The bundle ids; the first is generation 1. Raises DamagedError."""
    value = txn.get(b"generations", b"[]", db=meta)
    text, old = unpack_text(bytes(value[:_MAX_META]), 0, "the list of generations")
    try:
        bundle_ids = list(json.loads(text))
    except ValueError:
        bundle_ids, old = [], True
    if old and text != b"[]" and not legacy:
        raise DamagedError("the list of generations is damaged")
    return bundle_ids


def write_generations(txn: lmdb.Transaction, meta: lmdb._Database, bundle_ids: Sequence[str]) -> None:
    txn.put(b"generations", pack_text(json.dumps(bundle_ids).encode(), 0), db=meta)


def read_id_types(txn: lmdb.Transaction, meta: lmdb._Database) -> IdTypes:
    """UNKNOWN_TYPES where there is no entry: earlier releases write none. Raises DamagedError."""
    value = txn.get(b"id_types", db=meta)
    return UNKNOWN_TYPES if value is None else _unpack_entry(value, _ID_TYPES, lambda of: checked_types(IdTypes(**of)))


def write_id_types(txn: lmdb.Transaction, meta: lmdb._Database, types: IdTypes) -> None:
    txn.put(b"id_types", _pack_entry(types._asdict()), db=meta)


NOTHING_SET = (b"", NO_ROLLOUT)


def read_rollout(txn: lmdb.Transaction, meta: lmdb._Database, last: tuple[bytes, Rollout]) -> tuple[bytes, Rollout]:
    """The entry and what it says; `last` is what was read before, and comes back if nothing has changed.

    Raises DamagedError.
    """
    value = txn.get(b"rollout", b"", db=meta)
    if value == last[0]:
        return last
    return bytes(value), _unpack_entry(value, _ROLLOUT, lambda of: checked_rollout(Rollout(**of)))


def write_rollout(txn: lmdb.Transaction, meta: lmdb._Database, rollout: Rollout) -> None:
    txn.put(b"rollout", _pack_entry(rollout._asdict()), db=meta)


def _unpack_entry(value: Bytes, what: str, make: Callable[[Any], Entry]) -> Entry:
    """What `make` makes of the JSON in an entry with a checksum. Raises DamagedError."""
    text, without_checksum = unpack_text(bytes(value[:_MAX_META]), 0, what)
    try:
        if without_checksum:
            raise ValueError
        return make(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"{what} is damaged") from error


def _pack_entry(content: Mapping[str, Any]) -> bytes:
    return pack_text(json.dumps(content, sort_keys=True).encode(), 0)
