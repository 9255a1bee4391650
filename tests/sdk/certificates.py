"""Certificates made for a test, and servers that use them."""

from collections.abc import Iterator
from types import SimpleNamespace

import grpc
import trustme

from .fake_server import Recorder, serve_recorder


class Pki:
    """An authority with certificates for a server and a client, and another authority with a client of its own."""

    def __init__(self) -> None:
        ours, strangers = trustme.CA(), trustme.CA()
        self.authority = ours.cert_pem.bytes()
        self.other_authority = strangers.cert_pem.bytes()
        self.server = ours.issue_cert("localhost")
        self.client = ours.issue_cert("client.example")
        self.stranger = strangers.issue_cert("client.example")


def certificate(leaf: trustme.LeafCert) -> bytes:
    return b"".join(blob.bytes() for blob in leaf.cert_chain_pems)


def key(leaf: trustme.LeafCert) -> bytes:
    return leaf.private_key_pem.bytes()


def run_tls_server(pki: Pki, *, asks_for_certificate: bool) -> Iterator[SimpleNamespace]:
    """Yields a running server: its `recorder`, its `target` by name, and its `address` by number."""
    credentials = grpc.ssl_server_credentials(
        [(key(pki.server), certificate(pki.server))],
        pki.authority if asks_for_certificate else None,
        asks_for_certificate,
    )
    server, address = serve_recorder(recorder := Recorder(), credentials=credentials)
    yield SimpleNamespace(recorder=recorder, target=f"localhost:{address.rpartition(':')[2]}", address=address)
    server.stop(None).wait()
