"""Clients in processes that fork, and clients that go to other processes.

Each case forks in a process of its own, so that the server of the tests is not forked with it.
"""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from sdk import AsyncClient, Client, ClientClosedError, ForkError, InvalidArgumentError
from sdk._fork import Forks

from .certificates import Pki, certificate, key
from .fake_server import Recorder, hold

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]
PRELUDE = """
import asyncio, collections, gc, json, os, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
import sdk
from sdk import AsyncClient, Client, ForkError
import sdk._fork

TARGET = sys.argv[1]

def child(work):
    '''Forks. The outcome of work() in the child, and its seconds. It is ended after 10.'''
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        signal.alarm(10)
        began = time.monotonic()
        try:
            outcome = work()
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps([outcome, time.monotonic() - began]).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(process, 0)
    with os.fdopen(reading, "rb") as pipe:
        return json.loads(pipe.read()) if status == 0 else [f"ended by signal {status}", 10]

def used_async():
    '''An AsyncClient after its first call, on a loop that runs on a thread.'''
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    client = AsyncClient(TARGET, timeout=5)
    asyncio.run_coroutine_threadsafe(client.recommend("anna"), loop).result()
    return client, loop

def report(result):
    print(json.dumps(result), flush=True)
    os._exit(0)
"""


def run(server: SimpleNamespace, script: str, **variables: str) -> Any:
    """What a script reports that runs in a process of its own."""
    command = [sys.executable, "-c", PRELUDE + script, server.target]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"} | variables
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


BUSY = """
client = Client(TARGET, timeout=5)
client.recommend("anna")
outcomes, stop = collections.Counter(), False

def call():
    while not stop:
        try:
            client.recommend("anna")
            outcomes["ok"] += 1
        except Exception as error:
            outcomes[str(error)] += 1

threads = [threading.Thread(target=call) for _ in range(THREADS)]
for thread in threads:
    thread.start()
def work():
    len(client.recommend("anna"))
    client.close()
    with Client(TARGET, timeout=5) as other:
        return len(other.recommend("anna"))
children = [child(work) for _ in range(CHILDREN)]
stop = True
for thread in threads:
    thread.join()
report([[outcome for outcome, _ in children], [*outcomes]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("support", ["", "1"])
@pytest.mark.parametrize("threads", [0, 1, 6])
def test_children_of_a_busy_client_have_channels_of_their_own(
    server: SimpleNamespace, threads: int, support: str
) -> None:
    variables = {"GRPC_ENABLE_FORK_SUPPORT": support} if support else {}
    script = BUSY.replace("THREADS", str(threads)).replace("CHILDREN", "12")
    children, parent = run(server, script, **variables)
    assert children == [2] * 12
    assert parent == (["ok"] if threads else [])


@pytest.mark.slow
def test_a_pool_of_forked_processes_shares_a_client_that_threads_use(server: SimpleNamespace) -> None:
    script = """
client = Client(TARGET)
client.recommend("anna")
stop = False
def call():
    while not stop:
        client.recommend("anna")
def work(_):
    return len(client.recommend("anna"))
thread = threading.Thread(target=call)
thread.start()
with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
    found = [*pool.map(work, range(8))]
stop = True
thread.join()
report([found, len(client.recommend("anna"))])
"""
    for _ in range(3):
        assert run(server, script) == [[2] * 8, 2]


def test_a_child_leaves_the_channel_of_its_parent_alone(server: SimpleNamespace, recorder: Recorder) -> None:
    script = """
client = Client(TARGET, timeout=5)
client.recommend("before")
def close():
    client.close()
def forget():
    global client
    del client
    gc.collect()
def call():
    client.recommend("child")
found = [child(work)[0] for work in (close, forget, call)]
client.recommend("after")
report(found)
"""
    assert run(server, script) == [None, None, None]
    peers = {seen.request.user_id: seen.peer for seen in recorder.seen}
    assert peers["before"] == peers["after"] != peers["child"]


def test_a_client_that_was_closed_before_the_fork_is_closed_in_the_child(server: SimpleNamespace) -> None:
    script = """
client = Client(TARGET)
client.recommend("anna")
client.close()
report(child(lambda: client.recommend("anna")))
"""
    outcome, seconds = run(server, script)
    assert outcome.startswith("ClientClosedError") and seconds < 1


ASYNC = """
def coroutine(client):
    async def main():
        async with client:
            return len(await client.recommend("anna"))
    return asyncio.run(main())
"""


def test_an_async_client_works_in_a_child_whose_parent_used_none(server: SimpleNamespace) -> None:
    script = """
async_client, client = AsyncClient(TARGET, timeout=5), Client(TARGET)
client.recommend("anna")
report([child(lambda: coroutine(async_client)), child(lambda: coroutine(AsyncClient(TARGET, timeout=5)))])
"""
    assert [outcome for outcome, _ in run(server, ASYNC + script)] == [2, 2]


def test_an_async_client_refuses_at_once_in_a_child_whose_parent_used_one(server: SimpleNamespace) -> None:
    script = """
client, loop = used_async()
def forget():
    global client
    asyncio.run(client.close())
    del client
    gc.collect()
found = [child(lambda: coroutine(client)), child(lambda: coroutine(AsyncClient(TARGET))), child(forget)]
found.append(child(lambda: len(Client(TARGET, timeout=5).recommend("anna"))))
parent = asyncio.run_coroutine_threadsafe(client.recommend("anna"), loop).result()
report([found, len(parent)])
"""
    (old, new, forgotten, sync), parent = run(server, ASYNC + script)
    for outcome, seconds in (old, new):
        assert outcome.startswith("ForkError: This process was forked from one that had used an AsyncClient.")
        assert '"spawn" or "forkserver"' in outcome and seconds < 1
    assert forgotten[0] is None
    assert (sync[0], parent) == (2, 2)


WARNED = """
import logging
warnings = []
class Keep(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
logging.getLogger("sdk").addHandler(Keep())
def finish():
    began = time.monotonic()
    found = child(lambda: Client(TARGET).recommend("anna"))
    report([*found, time.monotonic() - began, warnings])
"""


def test_a_child_that_was_forked_in_the_middle_of_a_call_refuses_at_once(
    server: SimpleNamespace, recorder: Recorder
) -> None:
    release, arrived = threading.Event(), threading.Event()
    recorder.script.append(lambda: hold(arrived, release))
    script = """
sdk._fork.WAIT_SECONDS = 0.3
client = Client(TARGET, timeout=8)
threading.Thread(target=client.recommend, args=("anna",), daemon=True).start()
time.sleep(0.5)
finish()
"""
    try:
        outcome, seconds, in_all, warnings = run(server, WARNED + script)
    finally:
        release.set()
    assert arrived.is_set()
    assert outcome.startswith("ForkError: This process was forked while calls were under way.")
    assert 0.3 <= in_all < 3 and seconds < 1
    assert len(warnings) == 1 and "forking while calls are under way" in warnings[0] and '"spawn"' in warnings[0]


def test_an_event_loop_that_forks_in_the_middle_of_its_own_call_does_not_wait_and_warns(
    server: SimpleNamespace, recorder: Recorder
) -> None:
    """Its thread cannot end any call while it forks. gRPC crashes one child in four then, whatever that does."""
    release, arrived = threading.Event(), threading.Event()
    recorder.script.append(lambda: hold(arrived, release))
    script = """
client = AsyncClient(TARGET, timeout=8)
async def main():
    task = asyncio.ensure_future(client.recommend("anna"))
    await asyncio.sleep(0.5)
    finish()
asyncio.run(main())
"""
    try:
        outcome, _, in_all, warnings = run(server, WARNED + script)
    finally:
        release.set()
    assert arrived.is_set()
    refused = outcome.startswith("ForkError: This process was forked while calls were under way.")
    assert refused or outcome == f"ended by signal {signal.SIGSEGV}"
    assert in_all < 1.5 and len(warnings) == 1


@pytest.mark.slow
def test_a_fork_waits_for_a_call_that_ends_soon(server: SimpleNamespace, recorder: Recorder) -> None:
    recorder.script.extend([lambda: time.sleep(0.7)])
    script = """
client = Client(TARGET, timeout=8)
threading.Thread(target=client.recommend, args=("anna",)).start()
time.sleep(0.3)
report(child(lambda: len(client.recommend("anna"))))
"""
    assert run(server, script)[0] == 2


def test_a_child_refuses_at_once_where_fork_support_is_switched_off(server: SimpleNamespace) -> None:
    script = """
client = Client(TARGET)
client.recommend("anna")
report(child(lambda: client.recommend("anna")))
"""
    outcome, seconds = run(server, script, GRPC_ENABLE_FORK_SUPPORT="false")
    assert outcome.startswith("ForkError: This process was forked, and GRPC_ENABLE_FORK_SUPPORT") and seconds < 0.5


@pytest.mark.slow
def test_a_first_call_that_grpc_never_ends_is_given_up_shortly_after_its_timeout(server: SimpleNamespace) -> None:
    """The real thing: without its support for forks, every call in a child hangs."""
    script = """
sdk._fork._OFF = ()  # as if nobody knew
client = Client(TARGET)
client.recommend("anna")
def work():
    found = []
    for timeout in (0.5, 5):
        began = time.monotonic()
        try:
            client.update("anna", 1, timeout=timeout, request_id="mine")
        except ForkError as error:
            found.append([str(error), error.request_id, time.monotonic() - began])
    return found
report(child(work))
"""
    (first, second), _ = run(server, script, GRPC_ENABLE_FORK_SUPPORT="0")
    assert first[0] == second[0] and first[0].startswith("gRPC does not work in this process")
    assert first[1] == second[1] == "mine"
    assert 0.9 < first[2] < 3 and second[2] < 0.5


def test_a_client_that_made_no_call_is_free_to_be_forked(server: SimpleNamespace) -> None:
    """gRPC has not started then: nothing can go wrong, whatever its settings are."""
    script = """
client, async_client = Client(TARGET, timeout=5), AsyncClient(TARGET, timeout=5)
report([child(lambda: len(client.recommend("anna"))), child(lambda: coroutine(async_client))])
"""
    found = run(server, ASYNC + script, GRPC_ENABLE_FORK_SUPPORT="0")
    assert [outcome for outcome, _ in found] == [2, 2]


def test_a_grandchild_has_a_channel_of_its_own_too(server: SimpleNamespace) -> None:
    script = """
client = Client(TARGET, timeout=5)
client.recommend("anna")
def work():
    return [len(client.recommend("anna")), child(lambda: len(client.recommend("anna")))[0]]
report(child(work))
"""
    assert run(server, script)[0] == [2, 2]


def test_a_fork_without_hooks_is_noticed_by_the_process_id() -> None:
    forks = Forks()
    with forks.running():
        forks._pid -= 1
        with pytest.raises(ForkError, match="while calls were under way"):
            forks.check()
    assert forks._pid == os.getpid()


# -- pickling --------------------------------------------------------------------------------------------------------


def recommended(client: Client) -> int:
    return len(client.recommend("anna"))


@pytest.mark.slow
def test_a_client_goes_to_a_spawned_process(server: SimpleNamespace, recorder: Recorder) -> None:
    with (
        Client(server.target, token="t0ken", timeout=10) as client,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        client.recommend("anna")
        assert pool.submit(recommended, client).result(60) == 2
        client.recommend("anna")
    peers = [seen.peer for seen in recorder.seen]
    assert peers[0] == peers[2] != peers[1]
    assert {seen.metadata["authorization"] for seen in recorder.seen} == {"Bearer t0ken"}


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_pickled_client_has_the_same_settings_and_shows_no_secret(kind: Any, pki: Pki) -> None:
    client = kind(
        "recommender.example:1", token="t0ken", timeout=3, retries=7, ca_certificate=pki.authority,
        client_certificate=certificate(pki.client), client_key=key(pki.client), options=[("grpc.lb_policy_name", "x")],
    )  # fmt: skip
    again = pickle.loads(pickle.dumps(client))
    assert type(again) is kind and again._settings == client._settings and again._metadata == client._metadata
    assert again._settings.access.tls == client._settings.access.tls is not None
    shown = repr(again) + repr(again._settings) + repr(again._settings.access.tls)
    assert "t0ken" not in shown and "KEY" not in shown


async def test_a_closed_client_stays_closed_when_pickled() -> None:
    client = Client()
    client.close()
    with pytest.raises(ClientClosedError):
        pickle.loads(pickle.dumps(client)).recommend("anna")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_with_credentials_of_grpc_says_why_it_cannot_be_pickled(kind: Any) -> None:
    client = kind("recommender.example:1", channel_credentials=grpc.ssl_channel_credentials())
    with pytest.raises(InvalidArgumentError, match=f"a {kind.__name__} with channel_credentials= cannot be pickled"):
        pickle.dumps(client)
