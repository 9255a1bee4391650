"""Certificate files: each way in which they cannot be used is one clear line, and nothing asks for a password."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from access_files import write_certificate
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dman_runtime.access import certificates
from dman_runtime.access.certificates import CertificateFiles, read_certificates
from dman_runtime.errors import UsageError

BROKEN_PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def refusal(files: CertificateFiles, parameter: str) -> str:
    with pytest.raises(UsageError) as caught:
        read_certificates(files)
    assert caught.value.parameter == parameter and caught.value.remedy
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def issued(ca: trustme.CA, files: CertificateFiles, **dates: datetime) -> CertificateFiles:
    write_certificate(ca.issue_cert("localhost", **dates), files.cert.parent, files.cert.stem)
    return files


def test_files_that_fit_are_read(files: CertificateFiles) -> None:
    found = read_certificates(files)
    assert files.client_ca is not None
    assert (found.cert, found.key) == (files.cert.read_bytes(), files.key.read_bytes())
    assert found.client_ca == files.client_ca.read_bytes()
    assert ssl.cert_time_to_seconds(found.valid_until) > datetime.now(UTC).timestamp()
    assert read_certificates(replace(files, client_ca=None)).client_ca is None
    assert "PRIVATE" not in repr(found)


def test_chain_with_an_intermediate_ca_is_read(ca: trustme.CA, files: CertificateFiles) -> None:
    write_certificate(ca.create_child_ca().issue_cert("localhost"), files.cert.parent, "server")
    assert read_certificates(files).cert.count(b"BEGIN CERTIFICATE") == 2


@pytest.mark.parametrize(
    ("name", "parameter"), [("cert", "tls_cert"), ("key", "tls_key"), ("client_ca", "tls_client_ca")]
)
def test_missing_file_pipe_and_directory_are_named(name: str, parameter: str, files: CertificateFiles) -> None:
    path: Path = getattr(files, name)
    path.unlink()
    assert refusal(files, parameter) == f"cannot read {path}: no such file or directory; give a PEM file"
    os.mkfifo(path)
    assert refusal(files, parameter) == f"cannot read {path}: not a regular file; give a PEM file"
    path.unlink()
    path.mkdir()
    assert refusal(files, parameter) == f"cannot read {path}: not a regular file; give a PEM file"


@pytest.mark.parametrize(
    ("name", "parameter"), [("cert", "tls_cert"), ("key", "tls_key"), ("client_ca", "tls_client_ca")]
)
@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x30\x82\x01\x00", BROKEN_PEM])
def test_file_that_is_not_pem_is_named(name: str, parameter: str, content: bytes, files: CertificateFiles) -> None:
    path: Path = getattr(files, name)
    path.write_bytes(content)
    message = refusal(files, parameter)
    assert str(path) in message and "PEM" in message


def test_key_and_certificate_in_each_others_place_are_refused(files: CertificateFiles) -> None:
    assert "holds no certificate" in refusal(CertificateFiles(files.key, files.cert), "tls_cert")


def test_key_of_another_certificate_is_refused(ca: trustme.CA, files: CertificateFiles) -> None:
    files.key.write_bytes(ca.issue_cert("localhost").private_key_pem.bytes())
    assert f"the key {files.key} does not match the certificate {files.cert}" in refusal(files, "tls_key")


def test_encrypted_key_is_refused_without_asking_for_its_password(files: CertificateFiles) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    encrypted = serialization.BestAvailableEncryption(b"password")
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files.key.write_bytes(key.private_bytes(pem, form, encrypted))
    assert f"the key {files.key} is encrypted" in refusal(files, "tls_key")


def test_certificate_out_of_its_time_is_refused(ca: trustme.CA, files: CertificateFiles) -> None:
    expired = issued(ca, files, not_after=datetime(2020, 1, 1, tzinfo=UTC))
    assert refusal(expired, "tls_cert") == f"the certificate {files.cert} has expired; get a new one"
    early = issued(ca, files, not_before=datetime(2200, 1, 1, tzinfo=UTC))
    assert refusal(early, "tls_cert") == f"the certificate {files.cert} is not valid yet; get a new one"


Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def self_signed(files: CertificateFiles, key: Key, usage: x509.ObjectIdentifier) -> None:
    """Writes a certificate of one day that is its own issuer."""
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    made = builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    pem = serialization.Encoding.PEM
    files.cert.write_bytes(made.public_bytes(pem))
    form, encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files.key.write_bytes(key.private_bytes(pem, form, encryption))


@pytest.mark.parametrize(
    "make",
    [lambda: rsa.generate_private_key(65537, 2048), lambda: ec.generate_private_key(ec.SECP256R1()),
     lambda: ec.generate_private_key(ec.SECP384R1())],
    ids=["RSA", "P-256", "P-384"],
)  # fmt: skip
def test_usual_kinds_of_keys_are_read(make: Callable[[], Key], files: CertificateFiles) -> None:
    self_signed(files, make(), ExtendedKeyUsageOID.SERVER_AUTH)
    assert read_certificates(files).cert == files.cert.read_bytes()


@pytest.mark.parametrize(
    "make",
    [ed25519.Ed25519PrivateKey.generate, lambda: ec.generate_private_key(ec.SECP521R1())],
    ids=["Ed25519", "P-521"],
)
def test_kinds_of_keys_that_grpc_cannot_use_are_refused(make: Callable[[], Key], files: CertificateFiles) -> None:
    self_signed(files, make(), ExtendedKeyUsageOID.SERVER_AUTH)
    assert "a kind of key that gRPC cannot use; get one with a key of RSA" in refusal(files, "tls_cert")


def test_weak_key_and_certificate_of_a_client_are_refused(files: CertificateFiles) -> None:
    self_signed(files, rsa.generate_private_key(65537, 1024), ExtendedKeyUsageOID.SERVER_AUTH)
    assert "is too weak; make one with a key of 2048 bits or more" in refusal(files, "tls_cert")
    self_signed(files, ec.generate_private_key(ec.SECP256R1()), ExtendedKeyUsageOID.CLIENT_AUTH)
    assert "is not for servers" in refusal(files, "tls_cert")


def test_file_that_changes_while_it_is_tried_is_refused(
    ca: trustme.CA, files: CertificateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_out: Callable[..., str] = certificates._try_out

    def and_change(*arguments: object) -> str:
        issued(ca, files)
        return try_out(*arguments)

    monkeypatch.setattr(certificates, "_try_out", and_change)
    assert "is being written; try again" in refusal(files, "tls_cert")
