"""Tokens, and what may be sent where. No certificate is needed here; `test_tls` has those."""

import logging
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from sdk import AsyncClient, Client, InvalidArgumentError, PermissionDeniedError, UnauthenticatedError
from sdk._access import is_local

from .awaited import Connect
from .fake_server import Recorder

pytestmark = pytest.mark.timeout(30)
REMOTE = "recommender.example:50051"
TOKEN = "s3cret-t0ken"


async def test_token_goes_with_every_call(server: SimpleNamespace, connect: Connect, recorder: Recorder) -> None:
    client = connect(server.target, token=TOKEN, metadata=[("trace", "t1")])
    await client.update("anna", 1)
    await client.status()
    for seen in recorder.seen:
        assert seen.metadata["authorization"] == f"Bearer {TOKEN}" and seen.metadata["trace"] == "t1"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError),
        (grpc.StatusCode.UNAVAILABLE, Exception),
    ],
)
async def test_token_is_never_shown(
    server: SimpleNamespace,
    connect: Connect,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
    code: grpc.StatusCode,
    kind: type[Exception],
) -> None:
    caplog.set_level(logging.DEBUG)
    client = connect(server.target, token=TOKEN, retries=1)
    recorder.script.extend([code] * 2)
    with pytest.raises(kind) as caught:
        await client.update("anna", 1)
    error = caught.value
    shown = [repr(client.client), repr(client.client._settings), repr(vars(error)), str(error), caplog.text]
    assert TOKEN not in "".join([*shown, repr(error.__cause__)])


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    "settings",
    [{"token": TOKEN}, {"token": TOKEN, "tls": False}, {"metadata": [("authorization", f"Basic {TOKEN}")]}],
)
def test_token_is_refused_in_plain_text_beyond_this_machine(client: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=f"a token would go to {REMOTE} in plain text") as caught:
        client(REMOTE, **settings)
    assert "tls=True" in str(caught.value) and "insecure=True" in str(caught.value) and TOKEN not in str(caught.value)
    client(REMOTE, insecure=True, **settings)
    client(REMOTE, metadata=[("trace", "t1")])  # without a token there is nothing to protect


def test_token_may_go_to_other_machines_over_tls() -> None:
    assert Client(REMOTE, token=TOKEN, tls=True)._settings.access.credentials is not None
    Client(REMOTE, token=TOKEN, channel_credentials=grpc.ssl_channel_credentials())


LOCAL = [
    "localhost:50051", "LOCALHOST", "127.0.0.1:50051", "127.8.9.1", "[::1]:50051", "dns:///localhost:1",
    "dns:127.0.0.1", "ipv4:127.0.0.1:1,127.0.0.2:1", "ipv6:[::1]:1", "unix:/run/dman.sock", "unix:///run/dman.sock",
    "unix-abstract:dman",
]  # fmt: skip
NOT_LOCAL = [
    REMOTE, "10.0.0.1:50051", "0.0.0.0:50051", "[::]:50051", "[2001:db8::1]:1", "localhost.example:1",
    "127.0.0.1.example", "ipv4:127.0.0.1:1,10.0.0.1:1", "dns://10.0.0.1/localhost:1", "dns:///%6cocalhost",
    "localhost:1,evil.example:1", "localhost@evil.example:1", "evil.example/localhost", "xds:///localhost",
    "localhost\n", "",
]  # fmt: skip


@pytest.mark.parametrize("target", LOCAL + NOT_LOCAL)
def test_target_counts_as_local_only_where_that_is_certain(target: str) -> None:
    assert is_local(target) is (target in LOCAL)


async def test_calls_of_this_machine_ignore_the_proxy_of_the_environment(
    server: SimpleNamespace, connect: Connect, no_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would read the token, and its localhost is another machine."""
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", f"http://{no_server}")
    await connect(server.target, token=TOKEN, retries=0).recommend("anna")


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"token": ""}, "token must be printable ASCII"),
        ({"token": f"{TOKEN}\n"}, "without spaces or line breaks"),
        ({"token": f"Bearer {TOKEN}"}, "without the word Bearer"),
        ({"token": f"{TOKEN}ü"}, "token must be printable ASCII"),
        ({"token": TOKEN.encode()}, "token must be text, not bytes"),
        ({"token": TOKEN, "metadata": [("authorization", "x")]}, "token= and metadata 'authorization' exclude each"),
        ({"tls": "false"}, "tls must be True, False or None, not str"),
        ({"tls": 1}, "tls must be True, False or None, not int"),
        ({"insecure": "no"}, "insecure must be True or False, not str"),
        ({"insecure": True, "tls": True}, "insecure=True means plain text; with TLS leave it out"),
        ({"tls": False, "ca_certificate": b"x"}, "ca_certificate= needs TLS; leave tls=False out"),
        ({"tls": False, "client_key": b"x"}, "client_key= needs TLS; leave tls=False out"),
        ({"client_certificate": b"x"}, "client_certificate= and client_key= go together; give both or neither"),
        ({"client_key": b"x"}, "client_certificate= and client_key= go together; give both or neither"),
        ({"channel_credentials": grpc.ssl_channel_credentials(), "tls": True}, "channel_credentials= takes the place"),
        (
            {"channel_credentials": grpc.ssl_channel_credentials(), "ca_certificate": b"x"},
            "channel_credentials= takes the place of tls= and certificates",
        ),
    ],
)
def test_access_that_cannot_work_is_refused_at_once(client: Any, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint) as caught:
        client(**settings)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_variables_of_the_environment_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMAN_TOKEN", TOKEN)
    monkeypatch.setenv("DMAN_TLS_CERT", "cert.pem")
    access = Client()._settings.access
    assert access.metadata == () and access.credentials is None
