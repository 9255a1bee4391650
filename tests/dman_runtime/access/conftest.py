"""Certificates for the tests of who may call."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme
from access_files import write_certificate

from dman_runtime.access.certificates import CertificateFiles


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def server_leaf(ca: trustme.CA) -> trustme.LeafCert:
    return ca.issue_cert("localhost", "127.0.0.1")


@pytest.fixture(scope="session")
def client_leaf(ca: trustme.CA) -> trustme.LeafCert:
    return ca.issue_cert("ingest@example.org", common_name="Ingest Service")


@pytest.fixture
def files(ca: trustme.CA, server_leaf: trustme.LeafCert, tmp_path: Path) -> CertificateFiles:
    """The files of a server that asks clients for certificates."""
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(ca.cert_pem.bytes())
    return CertificateFiles(*write_certificate(server_leaf, tmp_path, "server"), client_ca)
