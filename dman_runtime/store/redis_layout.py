"""The keys of a Redis-protocol store. Values are laid out in `history`.

`<n>` is the namespace; what stands in braces says in which hash slot a key is. A user's keys name the user by a hash
under the id of the store, so that what outlives a deletion tells nobody's id.

| key | kind | holds |
|---|---|---|
| `<n>:{meta}` | hash | `format`; `store_id`; `id_types`, `rollout`: JSON; `rollout_revision` |
| `<n>:{meta}:generations` | list | bundle ids, the first is generation 1 |
| `<n>:{meta}:process:<id>` | string | what a process that serves says of itself, for LEASE_SECONDS |
| `<n>:{items}:numbers`, `<n>:{items}:ids` | hashes | item number by external id, and the other way round |
| `<n>:{catalogue}:revision` | string | of the catalogue |
| `<n>:{catalogue}:off` | set | numbers of items that are switched off |
| `<n>:{catalogue}:added` | list | by slot: item number u32, JSON of the `AddedItem` |
| `<n>:{<user>}:u` | hash | `i` the user id; `h` the head; `e` the epoch, which changes when the history is replaced; \
`s` the set of seen items; `f<g>`, `b<g>` the first FRONT_BYTES of the record of generation g with its check, and the \
rest |
| `<n>:{<user>}:c` | hash | chunks of events by number |
| `<n>:{<user>}:w` | string | what the user was shown; expires |
| `<n>:{<user>}:r` | sorted set | request ids (8 bytes) by the time they were applied; expires |
| `<n>:{<user>}:p` | hash | last sequence (u64) by hash of the producer (u64) |

Numbers of values are little-endian. The head holds no request ids here: those have a key of their own.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import NamedTuple, Self

from dman_runtime.data.added_items import AddedItem
from dman_runtime.data.untrusted import parse_json
from dman_runtime.store.base import REMEMBER_SECONDS
from dman_runtime.store.catalogue import Addition
from dman_runtime.store.history import DamagedError

FORMAT = 1
FRONT_BYTES = 4096  # of a record, with its check: enough for a recommendation
LEASE_SECONDS = 10
IDS_EXPIRE_SECONDS = REMEMBER_SECONDS + 3600
NUMBER, WORD = struct.Struct("<I"), struct.Struct("<Q")


class UserKeys(NamedTuple):
    user: bytes
    chunks: bytes
    sequences: bytes
    requests: bytes
    shown: bytes


class Keys:
    """The keys of one store."""

    def __init__(self, namespace: str) -> None:
        self._prefix = namespace.encode() + b":"
        self._hash_key = b""
        self.meta, self.generations = self._named("meta"), self._named("meta", "generations")
        self.numbers, self.ids = self._named("items", "numbers"), self._named("items", "ids")
        self.revision, self.off = self._named("catalogue", "revision"), self._named("catalogue", "off")
        self.added = self._named("catalogue", "added")

    def of_store(self, store_id: bytes) -> Self:
        """Once the id of the store is known."""
        self._hash_key = store_id[:64]
        return self

    def _named(self, slot: str, name: str = "") -> bytes:
        return self._prefix + f"{{{slot}}}{':' if name else ''}{name}".encode()

    def process(self, name: str) -> bytes:
        return self._named("meta", f"process:{name}")

    def of_user(self, user: bytes) -> UserKeys:
        digest = hashlib.blake2b(user, digest_size=16, key=self._hash_key).hexdigest()
        stem = self._prefix + f"{{{digest}}}:".encode()
        return UserKeys(stem + b"u", stem + b"c", stem + b"p", stem + b"r", stem + b"w")

    @property
    def users(self) -> bytes:
        """The pattern of the keys of all users."""
        return self._prefix + b"{*}:u"

    @property
    def producers(self) -> bytes:
        return self._prefix + b"{*}:p"


def digest_of(key: bytes) -> int:
    """64 bits of the hash in the key of a user."""
    return int(key[-35:-19], 16)


def front(generation: int) -> bytes:
    return b"f%d" % generation


def back(generation: int) -> bytes:
    return b"b%d" % generation


def record_fields(generation: int, value: bytes) -> dict[bytes, bytes]:
    """A packed record in its two parts."""
    return {front(generation): value[:FRONT_BYTES], back(generation): value[FRONT_BYTES:]}


def pack_addition(addition: Addition) -> bytes:
    return NUMBER.pack(addition.number) + json.dumps(addition.item.as_json(), ensure_ascii=False).encode()


def unpack_addition(value: bytes) -> Addition:
    """Raises DamagedError."""
    try:
        return Addition(NUMBER.unpack_from(value)[0], AddedItem.from_json(parse_json(value[NUMBER.size :])))
    except (ValueError, struct.error) as error:
        raise DamagedError("an entry of the catalogue is damaged") from error


def pack_json(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
