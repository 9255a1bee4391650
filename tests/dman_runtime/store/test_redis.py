"""What the store of the Redis protocol does with servers that are full, refuse, forget or are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from dman_runtime.errors import StoreFullError, StoreMismatchError, StoreUnavailableError
from dman_runtime.store import redis_functions, redis_servers
from dman_runtime.store.base import StateStore, Write
from dman_runtime.store.place import ServerAddress, parse_place
from dman_runtime.store.redis import RedisStore
from tools.faults.redis_servers import RedisServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "server") as running:
        yield running


def address_of(server: RedisServer, **fields: Any) -> ServerAddress:
    place = parse_place(f"redis://{server.address}/shop")
    assert isinstance(place, ServerAddress)
    return replace(place, **fields)


def add(store: StateStore, user_id: str, *, expected: int = 0) -> list[str]:
    store.add_items(["a", "b"])
    return store.commit([Write(user_id, expected, {1: bytes(9000)}, np.array([0, 1]), np.array([5, 6]), [7])])


def test_full_server_refuses_commits_and_goes_on_reading_and_deleting(server: RedisServer) -> None:
    with RedisStore.open(address_of(server)) as store, server.client() as client:
        assert add(store, "anna") == []
        client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreFullError, match=r"takes no writes \(.*; give the servers more memory"):
            add(store, "bob")
        assert store.history("anna")[0].tolist() == [0, 1] and store.get_many(["bob"], 1) == [None]
        assert store.delete("anna") == 2 and list(store.scan()) == []
        assert store.sizes()[2] == 1 << 20
        client.config_set("maxmemory", "0")
        assert add(store, "bob") == []


def test_user_and_password_are_needed_and_keys_of_others_are_out_of_reach(server: RedisServer) -> None:
    with server.client() as client:
        client.execute_command("ACL SETUSER dman on >secret ~shop:* +@all -@dangerous +info +function|load")
        client.set("other", "value")
        client.execute_command("ACL SETUSER default -@all +ping +info +acl|setuser")
    with pytest.raises(StoreUnavailableError, match=r"refuses this process .*; check the user, the password"):
        RedisStore.open(address_of(server))
    with pytest.raises(StoreUnavailableError, match="refuses this process") as caught:
        RedisStore.open(address_of(server, username="dman", password="not the secret"))
    assert "not the secret" not in str(caught.value)
    with RedisStore.open(address_of(server, username="dman", password="secret")) as store:
        assert add(store, "anna") == [] and list(store.scan()) == ["anna"] and store.stats().users == 1
        assert store.delete("anna") == 2


def test_server_that_forgets_the_functions_gets_them_again(server: RedisServer) -> None:
    with RedisStore.open(address_of(server)) as store, server.client() as client:
        assert add(store, "anna") == []
        client.execute_command("FUNCTION FLUSH")
        assert add(store, "bob") == [] and sorted(store.scan()) == ["anna", "bob"]


def test_server_without_flags_of_functions_gets_plain_ones(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kvrocks is."""
    flagged = redis_functions.CODE.replace("flags =", "unknown =")
    monkeypatch.setattr(redis_functions, "CODE", flagged)
    with server.client() as client, pytest.raises(redis.ResponseError, match="register"):
        client.execute_command("FUNCTION LOAD", flagged)
    with RedisStore.open(address_of(server)) as store:
        assert add(store, "anna") == [] and store.history("anna")[0].tolist() == [0, 1]
        assert store.delete("anna") == 2


def test_restart_of_the_server_in_between_is_waited_for(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path / "server", "--appendonly", "yes", "--appendfsync", "always") as server,
        RedisStore.open(address_of(server)) as store,
    ):
        assert add(store, "anna") == []
        server.kill()
        server.start()
        assert store.history("anna")[0].tolist() == [0, 1] and add(store, "bob") == []
        assert store.standing().catalogue_revision == 0


def test_server_that_does_not_come_back_is_named_once_patience_ends(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_servers, "PATIENCE_SECONDS", 0.3)
    with RedisStore.open(address_of(server)) as store:
        server.kill()
        with pytest.raises(StoreUnavailableError, match=rf"redis://{server.address}/shop is unavailable .*; check"):
            store.history("anna")
    with pytest.raises(StoreUnavailableError, match="is unavailable"):
        RedisStore.open(address_of(server))


def test_quorum_needs_a_log_on_disk_and_copies(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreUnavailableError, match=r"keeps no log on disk .*; set `appendonly yes`"):
        RedisStore.open(address_of(server), durability="quorum")
    log = "--appendonly", "yes", "--repl-diskless-sync-delay", "0"
    with RedisServer(tmp_path / "one", *log) as one, RedisServer(tmp_path / "two", *log) as two:
        with two.client() as client:
            client.replicaof(one.host, one.port)
        with RedisStore.open(address_of(one), durability="quorum") as store:
            assert add(store, "anna") == []
            two.kill()
            monkeypatch.setattr(redis_servers, "PATIENCE_SECONDS", 0.3)
            with pytest.raises(StoreUnavailableError, match="0 of 1 replicas have a write; see that each primary"):
                add(store, "bob")


def test_store_of_another_format_is_refused(server: RedisServer) -> None:
    with RedisStore.open(address_of(server)) as store:
        key = store._keys.meta
    with server.client() as client:
        client.hset(key, "format", 99)
    with pytest.raises(StoreMismatchError, match="has format 99, this release knows 1; use the release that wrote it"):
        RedisStore.open(address_of(server))


def test_stores_of_two_names_share_a_server_and_nothing_else(server: RedisServer) -> None:
    with RedisStore.open(address_of(server)) as one, RedisStore.open(address_of(server, namespace="sho")) as other:
        assert add(one, "anna") == []
        assert list(other.scan()) == [] and other.stats().items == 0
        assert add(other, "bob") == [] and list(one.scan()) == ["anna"]


def test_leases_end_with_their_process_and_others_see_them(server: RedisServer) -> None:
    with RedisStore.open(address_of(server)) as one, RedisStore.open(address_of(server)) as other:
        one.put_lease("one", b"here")
        other.put_lease("two", b"there")
        assert sorted(one.leases()) == [b"here", b"there"]
        with server.client() as client:
            key = one._keys.process("one")
            assert 0 < client.ttl(key) <= 10
        one.end_lease("one")
        assert other.leases() == [b"there"]
