"""The servers of a Redis-protocol store: brings commands to where their keys are, and again until they are done.

Every command here may be sent again: see `redis_functions`. So a connection that breaks, a primary that dies or a slot
that moves costs time, and nothing else, as long as the servers come back within PATIENCE_SECONDS.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from redis import Redis, RedisCluster
from redis import exceptions as raised
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.retry import Retry

from dman_runtime.errors import StoreError, StoreUnavailableError
from dman_runtime.store import redis_functions
from dman_runtime.store.place import Durability, ServerAddress
from dman_runtime.store.redis_errors import AWAY, confirmed, lacks_functions, passes, store_errors

logger = logging.getLogger(__name__)
PATIENCE_SECONDS = 15.0  # that a command is tried for; a cluster takes some seconds to replace a primary
CONNECT_SECONDS, ANSWER_SECONDS = 2.0, 5.0
REPLICA_SECONDS = 1.0  # that a try waits for replicas
_REFRESH_SECONDS = 0.1  # between two looks at who holds what
_LONGEST_PAUSE = 0.25
_COMMANDS_PER_PIPELINE = 500
SCAN_KEYS = 1000  # that one step of a scan looks at


class Command(NamedTuple):
    """A command and a key of it, which says where it goes."""

    key: bytes
    arguments: tuple[Any, ...]


class Servers:
    """Use from any thread. Opened in the process that uses it, after any fork."""

    def __init__(self, address: ServerAddress, durability: Durability) -> None:
        """Raises StoreError."""
        self.address, self.durability = address, durability
        self._options: dict[str, Any] = {
            "username": address.username or None,
            "password": address.password or None,
            "ssl": address.tls,
            "socket_timeout": ANSWER_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "health_check_interval": 0,
        }
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="redis")  # idle unless a call goes to several nodes
        self._refreshing, self._refreshed = threading.Lock(), 0.0
        self._closed = False
        self._cluster: RedisCluster | None = None
        self._single: Redis | None = None
        self._waits: tuple[Any, ...] = ()
        with self.errors():
            self._open()

    # -- who is there ----------------------------------------------------------------------------------------------

    def _node_client(self, host: str, port: int) -> Redis:
        return Redis(host=host, port=port, retry=Retry(NoBackoff(), 0), **self._options)

    def _open(self) -> None:
        """Tries again where a server is there, and another one, or what it holds, is not: it may be in the midst of a
        failover."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            first = self._who_answers()
            try:
                self._cluster = self._connect(first)
                self._single = None if self._cluster else self._node_client(*first)
                self._waits = self._replica_wait()
                self._load_functions()
            except (raised.RedisError, raised.RedisClusterException, OSError) as error:
                if not passes(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_LONGEST_PAUSE)
            else:
                return

    def _who_answers(self) -> tuple[str, int]:
        """One of the hosts of the address. Raises what the last one did where none answers."""
        problem: Exception = raised.ConnectionError("no host is named")
        for host in self.address.hosts:
            try:
                with contextlib.closing(self._node_client(*host)) as client:
                    client.ping()
            except AWAY as error:
                problem = error
            else:
                return host
        raise problem

    def _connect(self, first: tuple[str, int]) -> RedisCluster | None:
        """The cluster, or None for a server by itself."""
        with contextlib.closing(self._node_client(*first)) as client:
            if not int(client.info("cluster").get("cluster_enabled", 0)):
                return None
        return RedisCluster(
            startup_nodes=[ClusterNode(*one) for one in (first, *self.address.hosts)],
            require_full_coverage=False,
            retry=Retry(NoBackoff(), 0),
            **self._options,
        )

    def primaries(self) -> list[Redis]:
        """A client of each server that holds a part of the keys."""
        if self._cluster is None:
            assert self._single is not None
            return [self._single]
        return [self._cluster.get_redis_connection(node) for node in self._cluster.get_primaries()]

    def _client_of(self, key: bytes) -> Redis:
        if self._cluster is None:
            assert self._single is not None
            return self._single
        nodes = self._cluster.nodes_manager
        return self._cluster.get_redis_connection(nodes.get_node_from_slot(self._cluster.keyslot(key)))

    def _only(self, commands: Sequence[Command]) -> Redis | None:
        """Who holds all the keys, where that is quickly told: the shortest way for one user."""
        if self._cluster is None:
            return self._single
        tags = {command.key[: command.key.find(b"}")] for command in commands}
        with contextlib.suppress(raised.RedisClusterException):
            return self._client_of(commands[0].key) if len(tags) == 1 else None
        return None

    def _look_again(self) -> None:
        """Who holds which keys may have changed."""
        with self._refreshing:
            if self._cluster is not None and time.monotonic() - self._refreshed > _REFRESH_SECONDS:
                with contextlib.suppress(raised.RedisError, raised.RedisClusterException, OSError):
                    self._cluster.nodes_manager.initialize()
                self._refreshed = time.monotonic()

    def _replica_wait(self) -> tuple[Any, ...]:
        """The command that waits until a write is as safe as it was asked to be; empty where there is none to wait
        for. A majority is one of the copies that are there now. Raises StoreUnavailableError where there can be none.
        """
        if self.durability == "local":
            return ()
        replicas = [int(client.info("replication").get("connected_slaves", 0)) for client in self.primaries()]
        if not min(replicas):  # it may come back
            logger.warning(
                "%s has a primary without a replica: its users take no writes until it has one", self.address
            )
        milliseconds = int(1000 * REPLICA_SECONDS)
        if self.durability == "replica":
            return ("WAIT", 1, milliseconds)
        self._check_log()
        return ("WAITAOF", 1, max(1, (max(replicas) + 1) // 2), milliseconds)

    def _check_log(self) -> None:
        for client in self.primaries():
            if not int(client.info("persistence").get("aof_enabled", 0)):
                raise StoreUnavailableError(
                    f"the state {self.address} keeps no log on disk (appendonly), and durability quorum needs one",
                    "set `appendonly yes` on all servers (Redis 7.2 or Valkey), or choose another durability",
                    parameter="durability",
                )
            client.execute_command("WAITAOF", 0, 0, 1)  # an error where the server is too old

    def _load_functions(self) -> None:
        for client in self.primaries():
            try:
                client.execute_command("FUNCTION LOAD", redis_functions.CODE)
            except raised.ResponseError as error:
                if "register" in str(error):
                    client.execute_command("FUNCTION LOAD", redis_functions.PLAIN_CODE)
                elif "already exists" not in str(error):
                    raise

    # -- commands --------------------------------------------------------------------------------------------------

    def read(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands, those of one server in one round trip. Raises StoreError."""
        with self.errors():
            if (client := self._only(commands)) is not None:
                answers = self._on(client, commands, ())
                if not any(isinstance(answer, Exception) for answer in answers):
                    return answers
            return self._run(commands, ())

    def one(self, key: bytes, *arguments: Any) -> Any:
        """The answer to one command that only reads."""
        return self.read([Command(key, arguments)])[0]

    def write(self, commands: Sequence[Command]) -> list[Any]:
        """As `read`, and what the commands write is as safe on return as `durability` says."""
        with self.errors():
            return self._run(commands, self._waits)

    def write_each(self, commands: Sequence[Command]) -> list[Any]:
        """As `write`, but with the error of each command that could not be done in place of its answer."""
        with self.errors():
            return self._tried(commands, self._waits)

    def write_one(self, key: bytes, *arguments: Any) -> Any:
        """The answer to one command that writes."""
        return self.write([Command(key, arguments)])[0]

    def scan(self, pattern: bytes) -> Iterator[list[bytes]]:
        """The keys of a pattern, on all servers, about SCAN_KEYS at a time. A key may come twice: also since a server
        that fails on the way is begun again."""
        began = time.monotonic()
        done: set[str] = set()
        while True:
            with self.errors():
                names = {_name(client): client for client in self.primaries()}
            left = [name for name in names if name not in done]
            if not left:
                return
            try:
                yield from self._scan_one(names[left[0]], pattern)
                done.add(left[0])
            except (*AWAY, raised.RedisError) as error:
                with self.errors():
                    if not passes(error) or time.monotonic() - began > PATIENCE_SECONDS:
                        raise
                self._look_again()
                time.sleep(_LONGEST_PAUSE)

    def _scan_one(self, client: Redis, pattern: bytes) -> Iterator[list[bytes]]:
        cursor = 0
        while True:
            cursor, keys = client.execute_command("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_KEYS)
            yield keys
            if not cursor:
                return

    def _run(self, commands: Sequence[Command], wait: tuple[Any, ...]) -> list[Any]:
        answers = self._tried(commands, wait)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _tried(self, commands: Sequence[Command], wait: tuple[Any, ...]) -> list[Any]:
        """Answers, and errors where nothing more is tried."""
        answers: list[Any] = [None] * len(commands)
        left, deadline, attempt = list(range(len(commands))), time.monotonic() + PATIENCE_SECONDS, 0
        while left:
            failed: dict[int, Exception] = {}
            groups: dict[int, tuple[Redis, list[int]]] = {}
            for position in left:
                try:
                    client = self._client_of(commands[position].key)
                except raised.RedisClusterException as error:  # nobody holds the slot, for now
                    failed[position] = answers[position] = error
                    continue
                groups.setdefault(id(client), (client, []))[1].append(position)
            parts = [(client, [commands[one] for one in positions]) for client, positions in groups.values()]
            for (_, positions), found in zip(groups.values(), self._each(parts, wait), strict=True):
                for position, answer in zip(positions, found, strict=True):
                    answers[position] = answer
                    if isinstance(answer, Exception):
                        failed[position] = answer
            if not self._goes_on(list(failed.values()), attempt, deadline):
                break
            left, attempt = sorted(failed), attempt + 1
        return answers

    def _each(self, parts: Sequence[tuple[Redis, list[Command]]], wait: tuple[Any, ...]) -> list[list[Any]]:
        if len(parts) < 2:
            return [self._on(client, commands, wait) for client, commands in parts]
        return list(self._threads.map(lambda part: self._on(part[0], part[1], wait), parts))

    @staticmethod
    def _on(client: Redis, commands: Sequence[Command], wait: tuple[Any, ...]) -> list[Any]:
        """Answers or errors, one for each command, from one server."""
        answers: list[Any] = []
        for start in range(0, len(commands), _COMMANDS_PER_PIPELINE):
            part = commands[start : start + _COMMANDS_PER_PIPELINE]
            try:
                pipeline = client.pipeline(transaction=False)
                for command in part:
                    pipeline.execute_command(*command.arguments)
                if wait:
                    pipeline.execute_command(*wait)
                found = pipeline.execute(raise_on_error=False)
            except (raised.RedisError, raised.RedisClusterException, OSError) as error:
                return answers + [error] * (len(commands) - len(answers))
            answers += confirmed(found, wait)
        return answers

    def _goes_on(self, errors: Sequence[Exception], attempt: int, deadline: float) -> bool:
        """Whether to try again, once what can be mended was. Not where all that failed would fail again."""
        if not any(map(passes, errors)) or self._closed or time.monotonic() > deadline:
            return False
        if any(map(lacks_functions, errors)):
            self._load_functions()
        self._look_again()
        if attempt:
            time.sleep(min(_LONGEST_PAUSE, 0.01 * 2.0**attempt))
        return True

    # -- the rest --------------------------------------------------------------------------------------------------

    def errors(self) -> AbstractContextManager[None]:
        """Turns what the client and the codec raise into StoreErrors. Raises one itself once this is closed."""
        if self._closed:
            raise StoreError(f"the state store {self.address} is closed", "open it again")
        return store_errors(f"the state store {self.address}")

    def close(self) -> None:
        """A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=False)
        for client in (self._cluster, self._single):
            if client is not None:
                with contextlib.suppress(Exception):
                    client.close()


def _name(client: Redis) -> str:
    options = client.get_connection_kwargs()
    return f"{options.get('host')}:{options.get('port')}"
