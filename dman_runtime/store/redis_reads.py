"""The readings of a Redis-protocol store: one moment for each user. `redis_layout` has the keys."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dman_runtime.errors import ConflictError
from dman_runtime.store.base import NO_EVENTS, NOTHING_SHOWN, Events, Expected, RankingView, StoredUser
from dman_runtime.store.checks import check_positions, checked_id
from dman_runtime.store.history import (
    CHUNK_EVENTS,
    DamagedError,
    read_head_only,
    read_tail,
    record_start,
    seed_of,
    stored_events,
    unpack_chunk,
    unpack_head,
    unpack_seen,
    version_of,
)
from dman_runtime.store.redis_functions import call
from dman_runtime.store.redis_items import ItemTable
from dman_runtime.store.redis_known import Known, lacks, reading
from dman_runtime.store.redis_layout import FRONT_BYTES, Keys
from dman_runtime.store.redis_servers import Command, Servers
from dman_runtime.store.shown import still_shown, unpacked_shown

logger = logging.getLogger(__name__)
CHUNKS_PER_CALL = 1000
_NO_ITEMS = np.zeros(0, np.uint32)


class Heads:
    """The heads that were read or written last, so that a commit need not read them again."""

    def __init__(self, most: int = 10_000) -> None:
        self._most, self._lock = most, threading.Lock()
        self._heads: OrderedDict[bytes, bytes] = OrderedDict()

    def put(self, user: bytes, head: bytes) -> None:
        with self._lock:
            self._heads[user] = head
            self._heads.move_to_end(user)
            if len(self._heads) > self._most:
                self._heads.popitem(last=False)

    def of_version(self, user: bytes, version: int) -> bytes | None:
        head = self._heads.get(user)
        return head if head is not None and version_of(head) == version else None


class RedisSnapshot:
    """A `Snapshot`, to be used by one thread: what it has read of a user stays as it was; another user is read at
    another moment."""

    def __init__(
        self, servers: Servers, keys: Keys, items: ItemTable, heads: Heads, clock: Callable[[], float]
    ) -> None:
        self._servers, self._keys, self._items, self._heads, self._clock = servers, keys, items, heads, clock
        self._known: dict[str, Known] = {}

    def __enter__(self) -> Self:
        with self._servers.errors():  # closed?
            return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._known.clear()

    # -- items -----------------------------------------------------------------------------------------------------

    def find_items(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        return self._items.find([checked_id(item_id) for item_id in item_ids])

    def item_ids(self, numbers: Sequence[int] | NDArray[np.integer]) -> list[str]:
        return self._items.ids(np.asarray(numbers).tolist())

    # -- reading users ---------------------------------------------------------------------------------------------

    def expect(self, users: Mapping[str, Expected]) -> None:
        """Reads all that is asked for in one round trip to each server."""
        self._read({user_id: one for user_id, one in users.items() if user_id not in self._known})

    def _read(self, users: Mapping[str, Expected]) -> None:
        commands: list[Command] = []
        takers: list[Callable[[object], None]] = []
        for user_id, wanted in users.items():
            keys = self._keys.of_user(checked_id(user_id).encode())
            known = self._known.get(user_id)
            for command, taker in reading(keys, user_id, known, wanted, self._known):
                commands.append(command)
                takers.append(taker)
        for answer, take in zip(self._servers.read(commands) if commands else (), takers, strict=True):
            take(answer)
        for user_id in users:
            known = self._known[user_id]
            if known.head:
                self._heads.put(user_id.encode(), known.head)
            if known.applied:  # whoever hears of it takes it for stored as safely as was asked
                self._confirm(user_id)

    def _confirm(self, user_id: str) -> None:
        if self._servers.durability != "local":
            key = self._keys.of_user(user_id.encode()).user
            self._servers.write([Command(key, call("touch", [key]))])

    def _of(self, user_id: str, wanted: Expected) -> Known:
        known = self._known.get(user_id)
        if known is None or lacks(known, wanted):
            self._read({user_id: wanted})
            known = self._known[user_id]
        return known

    # -- users -----------------------------------------------------------------------------------------------------

    def get_many(
        self, user_ids: Sequence[str], generation: int, record_bytes: int | None = None
    ) -> list[StoredUser | None]:
        wanted = Expected(generation, whole=_needs_back(record_bytes))
        ids = [checked_id(user_id) for user_id in user_ids]
        missing = {one: wanted for one in ids if (known := self._known.get(one)) is None or lacks(known, wanted)}
        with self._servers.errors():
            if missing:
                self._read(missing)
            return [self._stored(user_id, generation, record_bytes) for user_id in ids]

    def _stored(self, user_id: str, generation: int, record_bytes: int | None) -> StoredUser | None:
        known = self._known[user_id]
        if not known.head:
            return None
        seed = seed_of(user_id.encode())
        head = read_head_only(known.head, seed, False)
        return StoredUser(head, self._record(user_id, known, generation, record_bytes))

    def _record(self, user_id: str, known: Known, generation: int, most: int | None) -> bytes | None:
        """The first bytes of a record. One that is not the right one counts as missing: the history makes it anew."""
        first = known.fronts.get(generation) if generation > 0 else None
        if not first:
            return None
        value = first + known.backs[generation] if _needs_back(most) else first
        try:
            start = _record_start(value, seed_of(user_id.encode()), generation, whole=_needs_back(most))
        except DamagedError:
            logger.warning("the record of user %r is damaged; it counts as missing", user_id)
            return None
        return value[start:] if most is None else value[start : start + most]

    def ranking_view(self, user_id: str, generation: int, record_bytes: int) -> RankingView | None:
        wanted = Expected(generation, whole=_needs_back(record_bytes), ranking=True)
        with self._servers.errors():
            known = self._of(checked_id(user_id), wanted)
            if not known.head:
                return None
            seed = seed_of(user_id.encode())
            history_count, seen = read_tail(known.head, seed, False)
            if history_count >= CHUNK_EVENTS:
                seen = np.concatenate([unpack_seen(_present(known.seen), seed, False), seen])
            if known.shown:
                seen = np.concatenate(
                    [seen, still_shown(unpacked_shown(user_id.encode(), known.shown), self._clock())[0]]
                )
            return RankingView(history_count, self._record(user_id, known, generation, record_bytes), seen)

    def history(self, user_id: str, start: int = 0, stop: int | None = None) -> Events:
        check_positions(start, stop)
        user = checked_id(user_id).encode()
        with self._servers.errors():
            known = self._of(user_id, Expected())
            if not known.head:
                return NO_EVENTS
            chunks = partial(read_chunks, self._servers, self._keys, user, known.epoch)
            return stored_events(unpack_head(known.head, seed_of(user), False), start, stop, chunks)

    def seen(self, user_id: str) -> NDArray[np.uint32]:
        with self._servers.errors():
            known = self._of(checked_id(user_id), Expected(ranking=True))
            if not known.head:
                return _NO_ITEMS
            seed = seed_of(user_id.encode())
            stored = unpack_head(known.head, seed, False)
            chunks = (
                unpack_seen(_present(known.seen), seed, False)
                if stored.head.history_count >= CHUNK_EVENTS
                else _NO_ITEMS
            )
            return np.union1d(chunks, stored.tail["item"]).astype(np.uint32)

    def shown(self, user_id: str) -> Events:
        with self._servers.errors():
            known = self._of(checked_id(user_id), Expected(ranking=True))
            return (
                still_shown(unpacked_shown(user_id.encode(), known.shown), self._clock())
                if known.shown
                else NOTHING_SHOWN
            )

    def applied(self, user_id: str, request_ids: Collection[int]) -> set[int]:
        asked = set(request_ids)
        if not asked:
            return set()
        with self._servers.errors():
            known = self._known.get(checked_id(user_id))
            if known is None or not asked <= known.asked:
                self._read({user_id: Expected(request_ids=tuple(asked))})
            return self._known[user_id].applied & asked

    def sequences(self, user_id: str, producers: Collection[int]) -> dict[int, int]:
        if not producers:
            return {}
        with self._servers.errors():
            known = self._known.get(checked_id(user_id))
            if known is None or not set(producers) <= known.sequences.keys():
                self._read({user_id: Expected(producers=tuple(producers))})
            found = self._known[user_id].sequences
            return {producer: last for producer in producers if (last := found[producer]) is not None}


def _needs_back(record_bytes: int | None) -> bool:
    return record_bytes is None or record_bytes > FRONT_BYTES - 4


def _record_start(value: bytes, seed: int, generation: int, *, whole: bool) -> int:
    """As `history.record_start`, which needs the length of all of it; a front alone is checked when it is used."""
    return record_start(value, seed, generation, False) if whole or len(value) < FRONT_BYTES else 4


def _present(seen: bytes | None) -> bytes:
    if not seen:
        raise DamagedError("a set of seen items is missing")
    return seen


def read_chunks(
    servers: Servers, keys: Keys, user: bytes, epoch: bytes, first: int, last: int
) -> list[NDArray[np.void]]:
    """Pieces of a history that its head counts. Raises DamagedError, and ConflictError where the history was replaced
    since the head was read."""
    found: list[NDArray[np.void]] = []
    of_user, seed = keys.of_user(user), seed_of(user)
    for start in range(first, last, CHUNKS_PER_CALL):
        numbers = range(start, min(last, start + CHUNKS_PER_CALL))
        values = servers.one(
            of_user.user, *call("chunks", [of_user.user, of_user.chunks], epoch, *[b"%d" % one for one in numbers])
        )
        if values is None:
            raise ConflictError("the user was changed while it was read", "try again")
        for number, value in zip(numbers, values, strict=True):
            if value is None:
                raise DamagedError("a history is shorter than its head says")
            found.append(unpack_chunk(value, seed, number, False))
    return found
