"""The store of several servers: user state behind the Redis protocol, on one server or a cluster of them.

`redis_layout` has the keys, `redis_functions` what the servers do in one step. What differs from the store in a
directory:

- A commit is atomic for each of its users, and not over them: `commits_together` is false. A snapshot shows each user
  at one moment, and several users at several. A call that finds a user changed in its midst raises ConflictError.
- What is acknowledged is as safe as the servers keep it: see `Durability` in `place`, and docs/cluster.md.
- The roll-out, and what was changed of the catalogue by others, is known within STANDING_SECONDS.
- Versions are drawn at random, of 63 bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import NoReturn, Self
from uuid import uuid4
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from dman_runtime.errors import StoreError, StoreMismatchError
from dman_runtime.store.base import StoredRecord, StoreStats, Write
from dman_runtime.store.by_snapshot import ReadsBySnapshot
from dman_runtime.store.checks import checked_id, checked_writes
from dman_runtime.store.history import DamagedError, count_of, read_head_only, record_start, seed_of, version_of
from dman_runtime.store.place import Durability, ServerAddress
from dman_runtime.store.redis_functions import call
from dman_runtime.store.redis_layout import (
    FORMAT,
    WORD,
    Keys,
    back,
    digest_of,
    front,
)
from dman_runtime.store.redis_reads import Heads, RedisSnapshot
from dman_runtime.store.redis_servers import SCAN_KEYS, Command, Servers
from dman_runtime.store.redis_shared import Shared
from dman_runtime.store.redis_users import Change


class RedisStore(Shared, ReadsBySnapshot):
    """A `StateStore` on servers. Make one with `RedisStore.open`, after any fork."""

    commits_together, waits, format_version = False, True, FORMAT

    def __init__(self, servers: Servers, keys: Keys, *, clock: Callable[[], float]) -> None:
        super().__init__(servers, keys)
        self._clock, self._heads = clock, Heads()

    @classmethod
    def open(
        cls,
        address: ServerAddress,
        *,
        durability: Durability = "local",
        readonly: bool = False,
        must_exist: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> RedisStore:
        """Opens the store under a namespace, and creates it where there is none (not if `readonly` or `must_exist`).

        `clock` gives seconds since 1970. Raises StoreMismatchError, StoreUnavailableError.
        """
        servers, keys = Servers(address, durability), Keys(address.namespace)
        try:
            stored = servers.one(keys.meta, "HMGET", keys.meta, b"format", b"store_id")
            if stored[1] is None:
                if readonly or must_exist:
                    raise StoreMismatchError(
                        f"there is no state store {address}", "check the address and the name at its end"
                    )
                servers.write_one(keys.meta, "HSETNX", keys.meta, b"format", FORMAT)
                servers.write_one(keys.meta, "HSETNX", keys.meta, b"store_id", str(uuid4()))  # the last: it is there
                stored = servers.one(keys.meta, "HMGET", keys.meta, b"format", b"store_id")
            if stored[0] != b"%d" % FORMAT:
                raise StoreMismatchError(
                    f"the state store {address} has format {(stored[0] or b'?').decode(errors='replace')}, this "
                    f"release knows {FORMAT}",
                    "use the release that wrote it",
                )
            return cls(servers, keys.of_store(stored[1]), clock=clock)
        except BaseException:
            servers.close()
            raise

    def __str__(self) -> str:
        return str(self._servers.address)

    # -- items and generations -------------------------------------------------------------------------------------

    def add_items(self, item_ids: Sequence[str]) -> NDArray[np.uint32]:
        return self._items.add([checked_id(item_id) for item_id in item_ids])

    def drop_records(self, generation: int) -> int:
        if generation < 1:
            raise ValueError(f"generations are numbered from 1, not {generation}")
        dropped, users = 0, self.scan()
        while user_ids := list(islice(users, SCAN_KEYS)):
            keys = [self._keys.of_user(user_id.encode()).user for user_id in user_ids]
            fields = front(generation), back(generation)
            removed = self._servers.write([Command(key, ("HDEL", key, *fields)) for key in keys])
            dropped += sum(map(bool, removed))
        return dropped

    # -- reading users ---------------------------------------------------------------------------------------------

    def snapshot(self) -> RedisSnapshot:
        return RedisSnapshot(self._servers, self._keys, self._items, self._heads, self._clock)

    def scan(self, partition: int = 0, partitions: int = 1) -> Iterator[str]:
        """As in `StateStore`. Servers may show a key twice while their tables grow, so the users of the partition are
        remembered meanwhile: about 60 bytes each."""
        if not 0 <= partition < partitions:
            raise ValueError(f"partition {partition} of {partitions} does not exist")
        named = set[int]()
        for found in self._servers.scan(self._keys.users):
            keys = {digest: key for key in found if (digest := digest_of(key)) not in named}
            users = self._servers.read([Command(key, ("HGET", key, b"i")) for key in keys.values()])
            for digest, user in zip(keys, users, strict=True):
                if user is not None and crc32(user) % partitions == partition:
                    named.add(digest)
                    yield self._user_id(user)

    def _user_id(self, user: bytes) -> str:
        with self._servers.errors():
            try:
                return user.decode()
            except UnicodeDecodeError as error:
                raise DamagedError("a stored id is not text") from error

    def records(self, record_bytes: int) -> Iterator[StoredRecord]:
        users = self.scan()
        while user_ids := list(islice(users, SCAN_KEYS // 10)):
            keys = [self._keys.of_user(user_id.encode()).user for user_id in user_ids]
            fields = self._servers.read([Command(key, ("HGETALL", key)) for key in keys])
            for user_id, of_user in zip(user_ids, fields, strict=True):
                with self._servers.errors():
                    found = _records(user_id, of_user, record_bytes)
                yield from found

    # -- writing users ---------------------------------------------------------------------------------------------

    def commit(self, writes: Sequence[Write]) -> list[str]:
        """As in `StateStore`, for each user: those without a conflict are stored."""
        with self._servers.errors():
            items = self._items.count(_items_named(writes))
        checked_writes(writes, items)
        heads, now = self._expected_heads(writes), self._clock()
        changes = [
            Change(self._servers, self._keys, write, head, now)
            for write, head in zip(writes, heads, strict=True)
            if head is not None
        ]
        answers = self._servers.write_each([change.command for change in changes])
        stored, problems = set[str](), list[Exception]()
        for change, answer in zip(changes, answers, strict=True):
            problem = answer if isinstance(answer, Exception) else change.problem(int(answer))
            if problem is not None:
                problems.append(problem)
            elif answer == 1:
                stored.add(change.write.user_id)
                if change.head:
                    self._heads.put(change.write.user_id.encode(), change.head)
        if problems:
            self._fail(problems[0], stored)
        return [write.user_id for write in writes if write.user_id not in stored]

    def _fail(self, problem: Exception, stored: Collection[str]) -> NoReturn:
        """Raises a problem of a commit as a StoreError that names those who were stored."""
        try:
            with self._servers.errors():
                raise problem
        except StoreError as error:
            error.stored = stored
            raise

    def _expected_heads(self, writes: Sequence[Write]) -> list[bytes | None]:
        """The stored head of each user, empty for new ones; None where the version is not the expected one, nor that of
        this write, which then was stored before."""
        heads: list[bytes | None] = []
        for write in writes:
            expected = write.expected_version
            known = self._heads.of_version(write.user_id.encode(), expected) if expected else b""
            # What a replacement replaces must be known here, though the servers check the version again.
            heads.append(None if not expected and write.replace_from else known)
        missing = [position for position, head in enumerate(heads) if head is None]
        keys = [self._keys.of_user(writes[position].user_id.encode()).user for position in missing]
        found = self._servers.read([Command(key, ("HGET", key, b"h")) for key in keys]) if keys else []
        for position, head in zip(missing, found, strict=True):
            stored, write = head or b"", writes[position]
            heads[position] = stored if version_of(stored) in (write.expected_version, write.token) else None
        return heads

    def delete(self, user_id: str, *, expected_version: int | None = None) -> int | None:
        keys = self._keys.of_user(checked_id(user_id).encode())
        expected = b"" if expected_version is None else WORD.pack(expected_version)
        head = self._servers.write_one(keys.user, *call("delete", [keys.user, keys.chunks, keys.shown], expected))
        return None if head is None else count_of(head)

    # -- the store itself ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """StoreUnavailableError where the servers have not answered for STALE_SECONDS. Does not wait for them."""
        self.standing()

    def sizes(self) -> tuple[int, int, int]:
        """Bytes that the servers use, the same again, and the most that they take; 0 where that is not set."""
        with self._servers.errors():
            found = [client.info("memory") for client in self._servers.primaries()]
        used, most = sum(one.get("used_memory", 0) for one in found), [one.get("maxmemory", 0) for one in found]
        return used, used, sum(most) if all(most) else 0

    def maintain(self) -> int:
        """Nothing: what expires is removed by the servers."""
        with self._servers.errors():
            return 0

    def stats(self) -> StoreStats:
        """As in `StateStore`; users are counted one by one."""
        users = sum(1 for _ in self.scan())
        producers = {key for keys in self._servers.scan(self._keys.producers) for key in keys}
        used, file, most = self.sizes()
        items = int(self._servers.one(self._keys.ids, "HLEN", self._keys.ids))
        return StoreStats(users, items, len(producers), used, file, most)

    def flush(self) -> None:
        with self._servers.errors():
            pass

    def close(self) -> None:
        self._closed.set()
        self._servers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _items_named(writes: Sequence[Write]) -> int:
    """So many items there must be at least, as far as the numbers of writes are any."""
    numbers = [np.asarray(part) for one in writes for part in (one.items, one.shown[0])]
    return max((int(one.max()) + 1 for one in numbers if one.size and one.dtype.kind in "iu"), default=0)


def _records(user_id: str, fields: Mapping[bytes, bytes], record_bytes: int) -> list[StoredRecord]:
    """The records of a user, damaged ones left out; none for a user who has gone. Raises DamagedError."""
    if not (head := fields.get(b"h")):
        return []
    seed, found = seed_of(user_id.encode()), []
    count = read_head_only(head, seed, False).history_count
    for generation in sorted(int(name[1:]) for name in fields if name[:1] == b"f"):
        value = fields[front(generation)] + fields.get(back(generation), b"")
        with suppress(DamagedError):
            record = value[record_start(value, seed, generation, False) :]
            found.append(StoredRecord(user_id, generation, count, len(record), record[:record_bytes]))
    return found
