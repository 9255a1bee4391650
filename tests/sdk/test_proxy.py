"""Proxies: this machine is never reached through one, and an error on the way through one names it."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdk import UnavailableError
from sdk._proxy import proxy_remedy

from .awaited import Connect
from .fake_server import Recorder, serve_recorder

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]
VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "no_proxy", "no_grpc_proxy")
ALL = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
REMOTE = "recommender.example:50051"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Proxy:
    """A proxy that refuses everything, and records for which host it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            with contextlib.closing(self._socket.accept()[0]) as connection:
                asked = connection.recv(1 << 16).decode("latin-1").split()
                if not asked or asked[0] != "CONNECT":
                    return
                self.asked.append(asked[1])
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    def stop(self) -> None:
        with socket.create_connection(self._socket.getsockname()):  # asks for nothing
            pass
        self._thread.join()
        self._socket.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    running = Proxy()
    yield running
    running.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "unix"])
@pytest.mark.parametrize("variable", ALL)
async def test_calls_of_this_machine_use_no_proxy(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxy: Proxy, *, variable: str, host: str
) -> None:
    monkeypatch.setenv(variable, f"http://{proxy.address}")
    path = f"unix:{tmp_path}/socket"
    server, target = serve_recorder(Recorder(), path if host == "unix" else "127.0.0.1:0")
    try:
        await connect(path if host == "unix" else target.replace("127.0.0.1", host), retries=0).recommend("anna")
    finally:
        server.stop(None).wait()
    assert proxy.asked == []


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
async def test_an_error_behind_a_proxy_names_its_variable_without_credentials(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, proxy: Proxy, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://me:s3cret@{proxy.address}")
    with pytest.raises(UnavailableError) as caught:
        await connect(REMOTE, retries=0).recommend("anna")
    message = str(caught.value)
    assert f"through the proxy http://{proxy.address} of the variable {variable}" in message
    assert "add recommender.example to the variable no_proxy" in message
    assert "s3cret" not in message and "me:" not in message
    assert proxy.asked[0] == REMOTE


CASES: dict[str, tuple[str, dict[str, str], dict[str, Any], bool]] = {  # target, variables, options: by the proxy?
    "plain": (REMOTE, {"http_proxy": "P"}, {}, True),
    "scheme": (f"dns:///{REMOTE}", {"http_proxy": "P"}, {}, True),
    "address": ("10.255.0.1:1", {"http_proxy": "P"}, {}, True),
    "the first is empty": (REMOTE, {"grpc_proxy": "", "http_proxy": "P"}, {}, False),
    "capitals": (REMOTE, {"HTTP_PROXY": "P", "ALL_PROXY": "P"}, {}, False),
    "all_proxy": (REMOTE, {"all_proxy": "P"}, {}, False),
    "https as scheme": (REMOTE, {"https_proxy": "S"}, {}, False),
    "no scheme": (REMOTE, {"https_proxy": "A"}, {}, False),
    "option": (REMOTE, {}, {"grpc.http_proxy": "P"}, True),
    "option over variable": (REMOTE, {"http_proxy": "P"}, {"grpc.http_proxy": ""}, False),
    "switched off": (REMOTE, {"http_proxy": "P"}, {"grpc.enable_http_proxy": 0}, False),
    "excepted": (REMOTE, {"http_proxy": "P", "no_proxy": "a.example, Recommender.Example"}, {}, False),
    "excepted by its domain": (REMOTE, {"http_proxy": "P", "no_proxy": ".example"}, {}, False),
    "another is excepted": (REMOTE, {"http_proxy": "P", "no_proxy": "other.example,x.recommender.example"}, {}, True),
    "no_grpc_proxy wins": (REMOTE, {"http_proxy": "P", "no_proxy": ".example", "no_grpc_proxy": "x"}, {}, True),
    "excepted network": ("10.255.0.1:1", {"http_proxy": "P", "no_proxy": "10.255.0.0/16"}, {}, False),
    "other network": ("10.255.0.1:1", {"http_proxy": "P", "no_proxy": "10.0.0.0/16"}, {}, True),
    "star": (REMOTE, {"http_proxy": "P", "no_proxy": "*"}, {}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_proxy_of_an_error_is_the_one_that_grpc_uses(name: str, proxy: Proxy) -> None:
    """gRPC itself is asked, in a process of its own: it reads variables with getenv."""
    target, variables, options, expected = CASES[name]
    values = {"P": f"http://{proxy.address}", "S": f"https://{proxy.address}", "A": proxy.address}
    variables = {name: values.get(value, value) for name, value in variables.items()}
    options = {name: values.get(value, value) for name, value in options.items()}
    script = (
        "import sys, grpc\n"
        f"channel = grpc.insecure_channel({target!r}, {list(options.items())!r})\n"
        "try: channel.unary_unary('/a/b')(b'', timeout=1)\n"
        "except grpc.RpcError: pass\n"
    )
    kept = {name: value for name, value in os.environ.items() if name.lower() not in VARIABLES}
    subprocess.run([sys.executable, "-c", script], env=kept | variables, cwd=ROOT, timeout=30, check=True)
    assert bool(proxy.asked) is expected
    assert bool(proxy_remedy(target, options, variables)) is expected


def test_a_proxy_that_cannot_be_parsed_is_none() -> None:
    for value in ("http://[", "http://", "://", "socks5://a:1"):
        assert proxy_remedy(REMOTE, {}, {"http_proxy": value}) == ""
