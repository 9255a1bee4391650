"""Clients in the real world: inherited by a forked child, and beside proxies that others have set."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, running_server

from sdk import Client, UnavailableError

REFUSES = "http://127.0.0.1:9"  # the port "discard": nobody listens
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy")
TIMEOUT = 10.0  # seconds that a call of these tests may take; on a busy machine the usual second is short


@pytest.fixture(scope="module")
def address(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that knows the user `u0001`."""
    with running_server(tiny_bundle, tmp_path_factory.mktemp("server") / "state") as (address, _):
        with Client(address, timeout=30) as client:
            client.update("u0001", [1, 2, 3])
        yield address


# -- fork --------------------------------------------------------------------------------------------------------------

SCRIPT = """
import multiprocessing as mp, os, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
from sdk import Client, DmanError

CLIENT = Client(sys.argv[1], timeout=float(sys.argv[2]))


def ask(_=None):
    start = time.monotonic()
    try:
        told = f"{len(CLIENT.recommend('u0001', k=2))} items"
    except DmanError as error:
        told = f"error {error}"
    return told, time.monotonic() - start


def ask_forever(stop):
    while not stop.is_set():
        ask()


def in_pool():
    with ProcessPoolExecutor(4, mp_context=mp.get_context("fork")) as pool:
        return list(pool.map(ask, range(8)))


def in_fork():
    found = []
    for _ in range(3):
        read, write = os.pipe()
        if not (child := os.fork()):
            os.write(write, repr(ask()).encode())
            os._exit(0)
        os.waitpid(child, 0)
        found.append(eval(os.read(read, 10_000)))
    return found


def in_grandchild():
    with mp.get_context("fork").Pool(1) as pool:
        return pool.map(ask, range(2)) + [ask()] + pool.map(ask, range(2))


mode, busy, warm = sys.argv[3:]
if warm == "warm":
    assert ask()[0] == "2 items"
stop = threading.Event()
threads = [threading.Thread(target=ask_forever, args=(stop,)) for _ in range(int(busy))]
for thread in threads:
    thread.start()
found = globals()[mode]()
stop.set()
for thread in threads:
    thread.join()
found.append(ask())
print(repr(found))
"""


def forked(address: str, *arguments: object) -> list[tuple[str, float]]:
    """What the calls of a script that forks gave, and their seconds; the last one is by the parent."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, address, str(TIMEOUT), *map(str, arguments)],
        capture_output=True, text=True, timeout=90, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[tuple[str, float]] = eval(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["in_pool", "in_fork", "in_grandchild"])
@pytest.mark.parametrize(("busy", "warm"), [(0, "warm"), (1, "warm"), (3, "warm"), (0, "cold")])
def test_a_client_works_in_a_forked_child_or_says_no_in_time(address: str, mode: str, busy: int, warm: str) -> None:
    found = forked(address, mode, busy, warm)
    assert found[-1][0] == "2 items"  # the parent goes on
    for told, seconds in found:
        assert told == "2 items" or "fork" in told
        assert seconds < TIMEOUT + 5


# -- proxies -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variable", PROXIES)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_goes_through_no_proxy(
    address: str, monkeypatch: pytest.MonkeyPatch, variable: str, host: str
) -> None:
    monkeypatch.setenv(variable, REFUSES)
    target = f"{host}:{address.rpartition(':')[2]}"
    with Client(target, timeout=TIMEOUT) as client:
        assert len(client.recommend("u0001", k=1)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_an_error_behind_a_proxy_names_the_variable(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, REFUSES)
    start = time.monotonic()
    with Client("dman.example:50051", timeout=3) as client, pytest.raises(UnavailableError, match=variable):
        client.recommend("u0001", k=1)
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_a_proxy_that_no_proxy_excludes_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", REFUSES)
    monkeypatch.setenv("no_proxy", "127.0.0.2")
    with Client("127.0.0.2:9", timeout=3) as client, pytest.raises(UnavailableError) as raised:
        client.recommend("u0001", k=1)
    assert "http_proxy" not in str(raised.value)
