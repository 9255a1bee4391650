"""Lost replies: what is sent again is applied once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from sdk import Client, UnavailableError
from tools.bench.servers import connect
from tools.faults.honest import stored_events
from tools.faults.proxy import LossyProxy, Trap
from tools.faults.servers import FaultServer, python_environment

from .conftest import Start

pytestmark = pytest.mark.slow  # each starts a server

_CLIENT_OF_A_SILENT_SERVER = """
import socket, sys
from sdk import CallError, Client
with socket.create_server(("127.0.0.1", 0)) as silent, Client(f"127.0.0.1:{silent.getsockname()[1]}") as client:
    for call, argument in ((client.update, ["anna", [1]]), (client.update_many, [{"anna": [1], "ben": [2]}])):
        try:
            call(*argument, timeout=0.2)
        except CallError as error:
            first = error.request_id
        try:
            call(*argument, timeout=0.2, request_id=first)
        except CallError as error:
            assert first and error.request_id == first
"""
MAX_MESSAGE_BYTES = 16 << 20
_RESTARTS = 5
_CLIENTS_OF_RESTARTS = """
import asyncio, sys, threading
from collections import Counter
from sdk import AsyncClient, Client, DmanError
errors, calls = Counter(), Counter()
settings = dict(timeout=100, retries=1000)
async def run_async(client, user, over):
    while not over.is_set():
        try:
            await (client.update(user, [1]) if calls["async"] % 4 == 0 else client.recommend(user))
        except DmanError as error:
            errors[f"AsyncClient: {error}"] += 1
        calls["async"] += 1
def run(client, user, over):
    while not over.is_set():
        try:
            client.update(user, [1]) if calls["sync"] % 4 == 0 else client.recommend(user)
        except DmanError as error:
            errors[f"Client: {error}"] += 1
        calls["sync"] += 1
async def main():
    over = threading.Event()
    clients = [AsyncClient(sys.argv[1], **settings) for _ in range(8)]
    tasks = [asyncio.create_task(run_async(clients[n % 8], f"user {n}", over)) for n in range(200)]
    client = Client(sys.argv[1], **settings)
    threads = [threading.Thread(target=run, args=(client, f"other {n}", over)) for n in range(8)]
    for thread in threads:
        thread.start()
    print("running", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    over.set()
    await asyncio.gather(*tasks)
    for thread in threads:
        await asyncio.to_thread(thread.join)
    for client in clients:
        await client.close()
asyncio.run(main())
assert calls["async"] > 1000 and calls["sync"] > 20, calls
print(dict(errors))
"""


@contextmanager
def lost_reply(server: FaultServer, **settings: Any) -> Iterator[tuple[Client, Trap]]:
    """A client whose next reply is lost once the trap is set."""
    trap = Trap()
    with LossyProxy(server.address, trap) as proxy, Client(proxy.address, timeout=10, **settings) as client:
        client.recommend("nobody")  # it is connected
        yield client, trap


def run_client(root: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    """A program that uses the SDK of the checkout under test."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=root,
        env=python_environment(root),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_update_is_applied_once_however_much_others_write_before_the_retry(start: Start) -> None:
    server = start()
    with lost_reply(server, retries=0) as (client, trap), Client(server.address, timeout=10) as other:
        trap.set()
        with pytest.raises(UnavailableError):
            client.update("anna", [1], request_id="first")
        for _ in range(40):
            other.update("anna", [2])
        result = client.update("anna", [1], request_id="first")
    assert result.duplicate
    assert [item for item, _ in stored_events(server.address, "anna")].count("1") == 1


def test_many_updates_of_one_user_are_applied_once_when_their_reply_is_lost(start: Start) -> None:
    server = start()
    with lost_reply(server) as (client, trap):
        trap.set()
        results = client.update_many([("anna", [1 + n]) for n in range(50)])
        assert trap.sprung.is_set()
    assert len(results) == 50
    assert [int(item) for item, _ in stored_events(server.address, "anna")] == [1 + n for n in range(50)]


def test_a_late_retry_does_not_bring_a_deleted_user_back(start: Start) -> None:
    server = start()
    with lost_reply(server, retries=0) as (client, trap):
        trap.set()
        with pytest.raises(UnavailableError):
            client.update("anna", [1], request_id="first")
    with Client(server.address) as client:  # the first connection may still be breaking
        assert client.delete_user("anna").existed
        assert client.update("anna", [1], request_id="first").duplicate
    assert stored_events(server.address, "anna") == []


def test_the_id_that_the_sdk_made_is_on_the_exception_and_can_be_sent_again(root: Path) -> None:
    client = run_client(root, _CLIENT_OF_A_SILENT_SERVER)
    _, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors


def test_a_graceful_restart_shows_nobody_an_error(start: Start, root: Path) -> None:
    server = start()
    client = run_client(root, _CLIENTS_OF_RESTARTS, server.address)
    assert client.stdout is not None and client.stdout.readline() == "running\n"
    try:
        for _ in range(_RESTARTS):
            time.sleep(1)  # under load
            server.stop()
            server.start()
    finally:
        found, errors = client.communicate("enough\n", timeout=150)
    assert found.strip() == "{}", errors


def test_a_batch_whose_reply_is_too_large_is_either_answered_or_not_applied(start: Start) -> None:
    """Ids that the bundle does not know come back in the reply, which has more around each of them than the request."""
    server = start()
    batch = _batch_of_unknown_items(16_700)
    batch = _batch_of_unknown_items(16_700 + (MAX_MESSAGE_BYTES - batch.ByteSize()) // len(batch.updates))
    assert MAX_MESSAGE_BYTES - 1000 <= batch.ByteSize() <= MAX_MESSAGE_BYTES
    with connect(server.address) as channel:
        try:
            RecommenderStub(channel).BatchUpdate(batch, timeout=30)
            applied = True
        except grpc.RpcError:
            applied = False
    assert bool(stored_events(server.address, "0")) == applied


def _batch_of_unknown_items(id_bytes: int) -> pb.BatchUpdateRequest:
    events = [pb.Event(item_id="1"), pb.Event(item_id="x" * id_bytes)]
    return pb.BatchUpdateRequest(updates=[pb.UpdateRequest(user_id=f"{n}", events=events) for n in range(1000)])
