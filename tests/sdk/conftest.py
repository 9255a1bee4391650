"""Fixtures of the SDK's tests. Every test of a call runs for Client and for AsyncClient."""

from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sdk import AsyncClient, Client

from .awaited import Awaited, Connect
from .certificates import Pki, run_tls_server
from .fake_server import Recorder, serve, serve_recorder


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    recorder = Recorder()
    grpc_server, target = serve_recorder(recorder)
    yield SimpleNamespace(recorder=recorder, target=target)
    grpc_server.stop(None).wait()


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki()


@pytest.fixture
def tls_server(pki: Pki) -> Iterator[SimpleNamespace]:
    yield from run_tls_server(pki, asks_for_certificate=False)


@pytest.fixture
def mtls_server(pki: Pki) -> Iterator[SimpleNamespace]:
    yield from run_tls_server(pki, asks_for_certificate=True)


@pytest.fixture
def no_server() -> str:
    """A local address where nothing listens."""
    gone, address = serve(lambda _: None)
    gone.stop(None).wait()
    return address


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Makes clients of one kind and closes them at the end. The long timeout is for a busy machine."""
    made: list[Awaited] = []

    def make(target: str, **settings: Any) -> Awaited:
        made.append(Awaited(request.param(target, **{"timeout": 10, **settings})))
        return made[-1]

    yield make
    for client in made:
        await client.close()


@pytest.fixture
def recorder(server: SimpleNamespace) -> Recorder:
    return server.recorder


@pytest.fixture
def client(server: SimpleNamespace, connect: Connect) -> Awaited:
    return connect(server.target)
