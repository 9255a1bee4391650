"""Opens a store wherever it is."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from dman_runtime.errors import UsageError
from dman_runtime.store.lmdb import DEFAULT_MAP_SIZE, LmdbStore
from dman_runtime.store.place import Durability, Place, ServerAddress

if TYPE_CHECKING:
    from dman_runtime.store.redis import RedisStore

    AnyStore = LmdbStore | RedisStore
USERNAME, PASSWORD = "DMAN_STATE_USERNAME", "DMAN_STATE_PASSWORD"  # of servers, where the address has none


def open_store(
    place: Place,
    *,
    map_size: int = DEFAULT_MAP_SIZE,
    readonly: bool = False,
    must_exist: bool = False,
    durability: Durability = "local",
) -> AnyStore:
    """The store in a directory or on servers; `map_size` is of the former, `durability` of the latter.

    Raises UsageError where the durability does not fit the place, or the library for servers is missing; StoreError.
    """
    if not isinstance(place, ServerAddress):
        if durability != "local":
            raise UsageError(
                f"a state directory has no replicas, and durability {durability} needs some",
                "choose local, which syncs every commit to the disk",
                parameter="durability",
            )
        return LmdbStore.open(place, map_size=map_size, readonly=readonly, must_exist=must_exist)
    try:
        from dman_runtime.store.redis import RedisStore
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise UsageError(
            "the library for a state store on servers is not installed", "install dman[cluster]", parameter="state"
        ) from None
    return RedisStore.open(_with_credentials(place), durability=durability, readonly=readonly, must_exist=must_exist)


def _with_credentials(address: ServerAddress) -> ServerAddress:
    if address.username or address.password:
        return address
    return replace(address, username=os.environ.get(USERNAME, ""), password=os.environ.get(PASSWORD, ""))
