"""What all servers of a Redis-protocol store share: generations, roll-out, catalogue, and who is there."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dman_runtime.errors import ConflictError, StoreError, StoreUnavailableError
from dman_runtime.store.base import UNKNOWN_TYPES, IdTypes
from dman_runtime.store.catalogue import Addition, Catalogue, Standing
from dman_runtime.store.checks import check_additions, checked_numbers, checked_types
from dman_runtime.store.history import DamagedError
from dman_runtime.store.redis_functions import call
from dman_runtime.store.redis_items import ItemTable
from dman_runtime.store.redis_layout import LEASE_SECONDS, Keys, pack_addition, pack_json, unpack_addition
from dman_runtime.store.redis_servers import Command, Servers
from dman_runtime.store.rollout import NO_ROLLOUT, Rollout, checked_rollout

logger = logging.getLogger(__name__)
STANDING_SECONDS, STALE_SECONDS = 0.05, 5.0
_ATTEMPTS = 20
Entry = TypeVar("Entry")


class Shared:
    """This part of a `StateStore`."""

    def __init__(self, servers: Servers, keys: Keys) -> None:
        self._servers, self._keys, self._items = servers, keys, ItemTable(servers, keys)
        self._standing: Standing | None = None
        self._rollout: tuple[bytes, Rollout] = b"", NO_ROLLOUT  # as it was read last
        self._read_at = 0.0
        self._unread: StoreError | None = None
        self._watcher: threading.Thread | None = None
        self._watching, self._closed = threading.Lock(), threading.Event()
        self._leased: dict[str, bytes] = {}  # of this process

    def add_generation(self, bundle_id: str) -> int:
        key = self._keys.generations
        return int(self._servers.write_one(key, *call("generation", [key], bundle_id.encode())))

    def generations(self) -> dict[str, int]:
        found = self._servers.one(self._keys.generations, "LRANGE", self._keys.generations, 0, -1)
        return {bundle_id.decode(): number for number, bundle_id in enumerate(found, start=1)}

    def id_types(self) -> IdTypes:
        value = self._servers.one(self._keys.meta, "HGET", self._keys.meta, b"id_types")
        with self._servers.errors():
            return UNKNOWN_TYPES if value is None else _read_json(value, lambda of: checked_types(IdTypes(**of)))

    def remember_id_types(self, types: IdTypes) -> None:
        value = pack_json(checked_types(types)._asdict())
        self._servers.write_one(self._keys.meta, "HSET", self._keys.meta, b"id_types", value)

    def standing(self) -> Standing:
        """As in `StateStore`; what other processes changed may be STANDING_SECONDS old. Only the first call waits for
        a server. Raises StoreUnavailableError where none has answered for STALE_SECONDS."""
        if self._watcher is None:
            self._watch()
        if self._standing is None or time.monotonic() - self._read_at > STALE_SECONDS:
            raise self._unread or StoreUnavailableError(
                f"the state store {self} does not answer", "look at its servers"
            )
        return self._standing

    def _watch(self) -> None:
        with self._watching:
            if self._watcher is None:
                self._look()
                self._watcher = threading.Thread(target=self._look_often, name="redis-watcher", daemon=True)
                self._watcher.start()

    def _look_often(self) -> None:
        """Keeps what every request asks for at hand, and the leases of this process alive."""
        renewed = time.monotonic()
        while not self._closed.wait(STANDING_SECONDS):
            try:
                self._look()
                if time.monotonic() - renewed > LEASE_SECONDS / 4:
                    renewed = time.monotonic()
                    for name, value in list(self._leased.items()):
                        self._put_lease(name, value)
            except StoreError as error:
                self._unread = error
            except Exception:  # a fault of ours: the next look may do better, and else requests say that this is stale
                logger.exception("looking at the state store failed")

    def _look(self) -> None:
        keys = self._keys
        began = time.monotonic()
        text, revision = self._servers.read(
            [Command(keys.meta, ("HGET", keys.meta, b"rollout")), Command(keys.revision, ("GET", keys.revision))]
        )
        if (text or b"") != self._rollout[0]:
            with self._servers.errors():
                rollout = _read_json(text, lambda of: checked_rollout(Rollout(**of))) if text else NO_ROLLOUT
            self._rollout = text or b"", rollout
        self._standing, self._read_at, self._unread = Standing(self._rollout[1], int(revision or 0)), began, None

    def rollout(self) -> Rollout:
        self._look()
        return self.standing().rollout

    def set_rollout(self, rollout: Rollout) -> bool:
        checked_rollout(rollout)
        key = self._keys.meta
        done = self._servers.write_one(key, *call("rollout", [key], rollout.revision, pack_json(rollout._asdict())))
        self._look()
        return bool(done)

    def catalogue(self) -> Catalogue:
        keys = self._keys
        for _ in range(_ATTEMPTS):
            revision, off, added, after = self._servers.read(
                [
                    Command(keys.revision, command)
                    for command in (
                        ("GET", keys.revision),
                        ("SMEMBERS", keys.off),
                        ("LRANGE", keys.added, 0, -1),
                        ("GET", keys.revision),
                    )
                ]
            )
            if revision == after:
                with self._servers.errors():
                    numbers = np.array(sorted(map(int, off)), np.uint32)
                    return Catalogue(int(revision or 0), numbers, [unpack_addition(value) for value in added])
        raise ConflictError("the catalogue was changed again and again while it was read", "try again")

    def switch_items(self, numbers: Sequence[int] | NDArray[np.integer], *, off: bool) -> int:
        wanted = [int(one) for one in np.asarray(numbers).tolist()]
        distinct = checked_numbers(wanted, self._items.count(max(wanted, default=-1) + 1))
        keys = [self._keys.off, self._keys.revision]
        changed = int(self._servers.write_one(keys[0], *call("switch", keys, int(off), *distinct))) if distinct else 0
        self._look()
        return changed

    def append_additions(self, additions: Sequence[Addition]) -> int:
        key = self._keys.added
        for _ in range(_ATTEMPTS):
            slots = int(self._servers.one(key, "LLEN", key))
            most = max((int(one.number) for one in additions), default=-1)
            check_additions(additions, slots, self._items.count(most + 1))
            if not additions:
                return slots
            values = [pack_addition(one) for one in additions]
            if self._servers.write_one(key, *call("additions", [key, self._keys.revision], slots, *values)):
                self._look()
                return slots + len(additions)
        raise ConflictError("others kept adding items", "try again")

    def put_lease(self, name: str, value: bytes) -> None:
        """Has a value stay as long as this process does, and LEASE_SECONDS at most after it."""
        self._put_lease(name, value)
        self._leased[name] = value
        self.standing()  # somebody has to renew it

    def _put_lease(self, name: str, value: bytes) -> None:
        key = self._keys.process(name)
        self._servers.read([Command(key, ("SET", key, value, "EX", LEASE_SECONDS))])

    def leases(self) -> list[bytes]:
        """The values of the processes that live."""
        pattern = self._keys.process("*")
        keys = {key for found in self._servers.scan(pattern) for key in found}
        values = self._servers.read([Command(key, ("GET", key)) for key in sorted(keys)])
        return [value for value in values if value is not None]

    def end_lease(self, name: str) -> None:
        self._leased.pop(name, None)
        if self._unread is not None:  # it ends by itself, and nobody waits for servers that do not answer
            return
        key = self._keys.process(name)
        self._servers.read([Command(key, ("DEL", key))])


def _read_json(value: bytes, make: Callable[[Any], Entry]) -> Entry:
    """What `make` makes of stored JSON. Raises DamagedError."""
    try:
        return make(json.loads(value))
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedError("an entry of the store's description is damaged") from error
