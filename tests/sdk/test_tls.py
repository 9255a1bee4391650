"""Real TLS servers, with certificates made for the test."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from sdk import AsyncClient, Client, InvalidArgumentError, UnavailableError

from .awaited import Connect
from .certificates import Pki, certificate, key
from .fake_server import serve

pytestmark = pytest.mark.timeout(30)


async def test_client_trusts_the_given_authority(
    tls_server: SimpleNamespace, connect: Connect, pki: Pki, tmp_path: Path
) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(b"Our authority, \xfc\n" + pki.authority)
    for given in (pki.authority, path, str(path)):
        client = connect(tls_server.target, ca_certificate=given, token="t0ken")
        assert len(await client.recommend("anna")) == 2
    client = connect(tls_server.target, channel_credentials=grpc.ssl_channel_credentials(pki.authority))
    assert len(await client.recommend("anna")) == 2
    assert tls_server.recorder.seen[0].metadata["authorization"] == "Bearer t0ken"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (lambda pki: {"ca_certificate": pki.other_authority}, "CERTIFICATE_VERIFY_FAILED.*TLS failed. Check that ca_c"),
        (lambda pki: {"tls": True}, "CERTIFICATE_VERIFY_FAILED.*TLS failed. Check that ca_certificate="),
        (lambda pki: {}, "TLS is on at both ends or at neither"),
    ],
    ids=["wrong authority", "public authorities", "plain text"],
)
async def test_server_that_is_not_trusted_is_unavailable(
    tls_server: SimpleNamespace, connect: Connect, pki: Pki, settings: Any, complaint: str
) -> None:
    with pytest.raises(UnavailableError, match=complaint):
        await connect(tls_server.target, retries=0, **settings(pki)).recommend("anna")
    assert not tls_server.recorder.seen


async def test_server_whose_certificate_names_another_host_is_unavailable(
    tls_server: SimpleNamespace, connect: Connect, pki: Pki
) -> None:
    with pytest.raises(UnavailableError, match=r"Hostname Verification.*TLS failed.*names the host of the target"):
        await connect(tls_server.address, retries=0, ca_certificate=pki.authority).recommend("anna")


async def test_tls_to_a_server_without_it_says_that_tls_failed(connect: Connect, pki: Pki) -> None:
    plain, target = serve(lambda _: None)
    with pytest.raises(UnavailableError, match="TLS failed"):
        await connect(target, retries=0, ca_certificate=pki.authority).recommend("anna")
    plain.stop(None).wait()


async def test_client_shows_its_certificate(
    mtls_server: SimpleNamespace, connect: Connect, pki: Pki, tmp_path: Path
) -> None:
    (tmp_path / "cert.pem").write_bytes(certificate(pki.client))
    (tmp_path / "key.pem").write_bytes(key(pki.client))
    for shown, secret in (
        (certificate(pki.client), key(pki.client)),
        (tmp_path / "cert.pem", tmp_path / "key.pem"),
    ):
        client = connect(mtls_server.target, ca_certificate=pki.authority, client_certificate=shown, client_key=secret)
        assert len(await client.recommend("anna")) == 2


@pytest.mark.parametrize("who", ["nobody", "stranger"])
async def test_server_that_asks_for_a_certificate_is_unavailable_without_the_right_one(
    mtls_server: SimpleNamespace, connect: Connect, pki: Pki, who: str
) -> None:
    shown = {"client_certificate": certificate(pki.stranger), "client_key": key(pki.stranger)}
    client = connect(
        mtls_server.target, retries=0, ca_certificate=pki.authority, **(shown if who == "stranger" else {})
    )
    with pytest.raises(UnavailableError, match=r"client has a certificate if the server wants|TLS failed"):
        await client.recommend("anna")
    assert not mtls_server.recorder.seen


# -- files that cannot work ------------------------------------------------------------------------------------------


def encrypted(pem: bytes) -> bytes:
    return pem.replace(b"PRIVATE", b"ENCRYPTED PRIVATE")


def damaged(pem: bytes) -> bytes:
    lines = pem.splitlines(keepends=True)
    return b"".join([lines[0], *lines[2:]])


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (lambda pki: {"ca_certificate": b""}, "ca_certificate holds no certificate in PEM format"),
        (lambda pki: {"ca_certificate": key(pki.client)}, "ca_certificate holds no certificate in PEM format"),
        (lambda pki: {"ca_certificate": damaged(pki.authority)}, "ca_certificate holds a damaged certificate"),
        (lambda pki: {"ca_certificate": pki.authority[:-40]}, "ca_certificate holds no certificate in PEM format"),
        (lambda pki: {"ca_certificate": "gone.pem"}, "ca_certificate 'gone.pem' cannot be read: No such file"),
        (lambda pki: {"ca_certificate": Path()}, "ca_certificate '.' cannot be read: Is a directory"),
        (lambda pki: {"ca_certificate": "a\0b"}, "ca_certificate .* cannot be read: not a path"),
        (lambda pki: {"ca_certificate": pki.authority.decode()}, "pass the text of a PEM file as bytes"),
        (lambda pki: {"ca_certificate": 7}, "ca_certificate must be a path or bytes, not int"),
        (lambda pki: {"client_certificate": b"x", "client_key": key(pki.client)}, "client_certificate holds no cert"),
        (lambda pki: {"client_key": b"x"}, "client_key holds no private key in PEM format"),
        (lambda pki: {"client_key": key(pki.client).decode()}, "pass the text of a PEM file as bytes"),
        (
            lambda pki: {"client_key": key(pki.client).decode().split("\n")[1]},
            "client_key cannot be read: No such file",
        ),
        (lambda pki: {"client_key": encrypted(key(pki.client))}, "client_key is encrypted"),
        (lambda pki: {"client_key": key(pki.stranger)}, "client_key is damaged, or is not the key of client_certif"),
        (lambda pki: {"client_key": damaged(key(pki.client))}, "client_key is damaged, or is not the key of client_"),
    ],
)
def test_files_that_cannot_work_are_refused_at_once(pki: Pki, client: Any, settings: Any, complaint: str) -> None:
    given = settings(pki)
    if "client_key" in given:
        given.setdefault("client_certificate", certificate(pki.client))
    with pytest.raises(InvalidArgumentError, match=complaint) as caught:
        client(**given)
    assert "\n" not in str(caught.value) and key(pki.client).decode().split("\n")[1] not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_wrong_key_is_found_at_the_first_call_where_the_system_has_no_memory_files(
    tls_server: SimpleNamespace, connect: Connect, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.memfd_create")
    given = {"client_certificate": certificate(pki.client), "client_key": key(pki.stranger)}
    client = connect(tls_server.target, ca_certificate=pki.authority, retries=0, **given)
    with pytest.raises(UnavailableError, match=r"TLS failed.*are a pair"):
        await client.recommend("anna")
