"""TLS of real servers: who gets in, whose name arrives, and that new files are used without a restart."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from access_files import chain, write_certificate, write_lines

from dman_runtime.access.callers import Access
from dman_runtime.access.certificates import CertificateFiles
from dman_runtime.access.tls import CertificateSource, server_credentials
from dman_runtime.access.tokens import new_token
from dman_runtime.errors import DmanError, UsageError

OPEN = Access.open(None)
METHOD = "/test.Test/Who"


@asynccontextmanager
async def serving(files: CertificateFiles, access: Access = OPEN) -> AsyncIterator[str]:
    """A server that answers with the caller's name. Gives its address."""

    async def who(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            caller = access.identify(context.invocation_metadata() or (), context.auth_context(), context.peer())
        except DmanError as error:
            await context.abort(grpc.StatusCode[error.status], str(error))
        return caller.name.encode()

    server = grpc.aio.server()
    handlers = {"Who": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(files.cert, files.key, files.client_ca))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def trusting(ca: trustme.CA, leaf: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    """What a client needs that trusts a CA and shows a certificate."""
    if leaf is None:
        return grpc.ssl_channel_credentials(ca.cert_pem.bytes())
    return grpc.ssl_channel_credentials(ca.cert_pem.bytes(), leaf.private_key_pem.bytes(), chain(leaf))


async def ask(address: str, credentials: grpc.ChannelCredentials | None, token: str | None = None) -> str:
    """The name that the server answers, or the status, over a connection of its own."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, own)
    else:
        channel = grpc.aio.secure_channel(address, credentials, own)
    async with channel:
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        try:
            reply: bytes = await channel.unary_unary(METHOD)(b"", timeout=10, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return reply.decode()


def seen_certificate(address: str) -> bytes:
    """The certificate that the server shows to a new connection, DER."""
    host, port = address.split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain) as secure:
        return secure.getpeercert(binary_form=True) or b""


def der(leaf: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


def without_client_ca(files: CertificateFiles) -> CertificateFiles:
    return CertificateFiles(files.cert, files.key)


async def test_right_ca_is_accepted_and_plain_text_and_other_cas_are_not(
    ca: trustme.CA, files: CertificateFiles
) -> None:
    async with serving(without_client_ca(files)) as address:
        assert (await ask(address, trusting(ca))).startswith("ipv4:127.0.0.1:")
        assert await ask(address, None) == "UNAVAILABLE"
        assert await ask(address, trusting(trustme.CA())) == "UNAVAILABLE"


async def test_client_certificate_is_asked_for_and_its_common_name_is_the_caller(
    ca: trustme.CA, client_leaf: trustme.LeafCert, files: CertificateFiles
) -> None:
    async with serving(files) as address:
        assert await ask(address, trusting(ca, client_leaf)) == "Ingest Service"
        assert await ask(address, trusting(ca)) == "UNAVAILABLE"
        stranger = trustme.CA().issue_cert("ingest@example.org", common_name="Ingest Service")
        assert await ask(address, trusting(ca, stranger)) == "UNAVAILABLE"


async def test_certificate_that_nobody_verified_gives_no_name(
    ca: trustme.CA, client_leaf: trustme.LeafCert, files: CertificateFiles
) -> None:
    async with serving(without_client_ca(files)) as address:
        assert (await ask(address, trusting(ca, client_leaf))).startswith("ipv4:127.0.0.1:")


async def test_token_file_names_callers_by_token_and_by_certificate(
    ca: trustme.CA, client_leaf: trustme.LeafCert, files: CertificateFiles, tmp_path: Path
) -> None:
    token, line = new_token("shop", ["read"])
    access = Access.open(write_lines(tmp_path / "tokens", line, "ingest write cn:Ingest Service"))
    async with serving(files, access) as address:
        assert await ask(address, trusting(ca, client_leaf)) == "ingest"
        assert await ask(address, trusting(ca, client_leaf), token) == "shop"
        assert await ask(address, trusting(ca, client_leaf), "wrong") == "UNAUTHENTICATED"
        other = ca.issue_cert("other@example.org", common_name="Other")
        assert await ask(address, trusting(ca, other)) == "UNAUTHENTICATED"


# -- change without a restart ----------------------------------------------------------------------------------------


async def test_new_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    ca: trustme.CA, server_leaf: trustme.LeafCert, files: CertificateFiles
) -> None:
    files, renewed = without_client_ca(files), ca.issue_cert("localhost", "127.0.0.1")
    async with serving(files) as address, grpc.aio.secure_channel(address, trusting(ca)) as channel:
        who = channel.unary_unary(METHOD)
        before = await who(b"", timeout=10)
        assert seen_certificate(address) == der(server_leaf)
        write_certificate(renewed, files.cert.parent, "server")
        assert seen_certificate(address) == der(renewed)
        assert await who(b"", timeout=10) == before
        assert (await ask(address, trusting(ca))).startswith("ipv4:")


async def test_new_client_ca_shuts_out_the_clients_of_the_old_one(
    ca: trustme.CA, client_leaf: trustme.LeafCert, files: CertificateFiles
) -> None:
    other = trustme.CA()
    async with serving(files) as address:
        assert await ask(address, trusting(ca, client_leaf)) == "Ingest Service"
        assert files.client_ca is not None
        files.client_ca.write_bytes(other.cert_pem.bytes())
        assert await ask(address, trusting(ca, client_leaf)) == "UNAVAILABLE"
        assert await ask(address, trusting(ca, other.issue_cert("a@b.org", common_name="New"))) == "New"


async def test_unusable_new_files_keep_the_old_certificate_and_are_logged_once(
    ca: trustme.CA, server_leaf: trustme.LeafCert, files: CertificateFiles, caplog: pytest.LogCaptureFixture
) -> None:
    files, renewed = without_client_ca(files), ca.issue_cert("localhost", "127.0.0.1")
    async with serving(files) as address:
        files.cert.write_bytes(chain(renewed))  # the key is not there yet
        for _ in range(3):
            assert seen_certificate(address) == der(server_leaf)
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1 and "kept the TLS certificate known before: the key" in errors[0]
        files.key.write_bytes(renewed.private_key_pem.bytes())
        assert seen_certificate(address) == der(renewed)
        files.cert.unlink()
        assert seen_certificate(address) == der(renewed)
        assert (await ask(address, trusting(ca))).startswith("ipv4:")


def test_unusable_files_stop_the_start(files: CertificateFiles) -> None:
    files.key.write_bytes(b"")
    with pytest.raises(UsageError, match="holds no private key in PEM form"):
        server_credentials(files.cert, files.key, files.client_ca)


def test_files_that_stay_are_not_tried_again(files: CertificateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tries = CertificateSource(files), []
    monkeypatch.setattr("dman_runtime.access.files._SETTLED_NS", 0)
    assert source.fetch() is None  # settles
    monkeypatch.setattr("dman_runtime.access.tls.read_certificates", tries.append)
    assert source.fetch() is None and source.fetch() is None
    assert tries == []
