"""The certificate, key and client CA of a server: read from PEM files and tried out with the standard library's TLS.

gRPC reports a bad file at the first handshake, in its own log; here it is one clear line at the start. Loads no gRPC.
"""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from dman_runtime.access.files import read_file, reason
from dman_runtime.errors import UsageError

_VERDICTS = {  # OpenSSL's X509_V_ERR_*
    9: "is not valid yet",
    10: "has expired",
    26: "is not for servers",
}
# How a certificate names its kind of key (DER). gRPC's TLS fails every handshake with other kinds, such as Ed25519.
_USABLE_KEYS = tuple(
    bytes.fromhex(kind)
    for kind in (
        "300d06092a864886f70d0101010500",  # RSA
        "301306072a8648ce3d020106082a8648ce3d030107",  # P-256
        "301006072a8648ce3d020106052b81040022",  # P-384
    )
)


@dataclass(frozen=True)
class CertificateFiles:
    """Where a server's PEM files are. With `client_ca`, clients must show a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.cert, self.key, self.client_ca) if path is not None]


@dataclass(frozen=True)
class Certificates:
    """PEM that a server can use."""

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None
    valid_until: str  # of the server's certificate, as OpenSSL writes it: `Nov 26 11:00:00 2027 GMT`


def read_certificates(files: CertificateFiles) -> Certificates:
    """Reads the files and tries them. Never asks for a password. Takes a few milliseconds.

    Raises UsageError where a file is missing, is not PEM or is being written, the key is encrypted or another
    certificate's, or the certificate is out of its time, not for servers or of a kind that gRPC cannot use.
    """
    contents = _contents(files)
    valid_until = _try_out(_server_context(files, contents[0]), files.cert, contents[0])
    if files.client_ca is not None:
        _check_client_ca(files.client_ca)
    if _contents(files) != contents:  # OpenSSL reads files by name: what it tried must be what is returned
        raise UsageError(f"{files.cert} or a file beside it is being written", "try again", parameter="tls_cert")
    return Certificates(contents[0], contents[1], contents[2] if files.client_ca else None, valid_until)


def _contents(files: CertificateFiles) -> list[bytes]:
    contents = []
    for path, parameter in zip(files.paths, ("tls_cert", "tls_key", "tls_client_ca"), strict=False):
        try:
            contents.append(read_file(path))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}: {reason(error)}", "give a PEM file", parameter=parameter) from None
    return contents


def _server_context(files: CertificateFiles, pem: bytes) -> ssl.SSLContext:
    """A context with the certificate and its key."""
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise UsageError(f"{files.cert} holds no certificate in PEM form", "give a PEM file", parameter="tls_cert")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password=lambda: _refuse_password(files.key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(
                f"the key {files.key} does not match the certificate {files.cert}", "give its key", parameter="tls_key"
            ) from None
        raise _unusable(files, error) from None
    return context


def _refuse_password(key: Path) -> str:
    raise UsageError(
        f"the key {key} is encrypted", "write it without a password, in a file that only the server can read",
        parameter="tls_key",
    )  # fmt: skip


def _unusable(files: CertificateFiles, error: ssl.SSLError) -> UsageError:
    """OpenSSL does not say which of the two files it means. So the certificate is tried alone."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(files.cert)
    except ssl.SSLError:
        return UsageError(f"{files.cert} cannot be read as PEM", "give a PEM file", parameter="tls_cert")
    if (error.reason or "").endswith(("TOO_SMALL", "TOO_WEAK")):
        return UsageError(f"{files.cert} is too weak", "make one with a key of 2048 bits or more", parameter="tls_cert")
    return UsageError(f"{files.key} holds no private key in PEM form", "give a PEM file", parameter="tls_key")


def _check_client_ca(path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        raise UsageError(
            f"{path} holds no certificate in PEM form", "give a PEM file", parameter="tls_client_ca"
        ) from None


def _try_out(server_context: ssl.SSLContext, cert: Path, pem: bytes) -> str:
    """Until when the certificate is valid, from a handshake in memory with a client that trusts just this one.

    It is the one way in which the standard library tells the dates, and it checks what a client would check.
    """
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate is its own root
    client_context.load_verify_locations(cadata=pem.decode("ascii", "replace"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    try:
        for _ in range(4):  # flights of a handshake
            for side in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        shown = client.getpeercert(binary_form=True) or b""
        valid_until = str((client.getpeercert() or {})["notAfter"])
    except ssl.SSLCertVerificationError as error:
        verdict = _VERDICTS.get(error.verify_code, f"cannot be used: {error.verify_message}")
        raise UsageError(f"the certificate {cert} {verdict}", "get a new one", parameter="tls_cert") from None
    except ssl.SSLError as error:
        raise UsageError(
            f"the certificate {cert} cannot be used: {error.reason}", "get a new one", parameter="tls_cert"
        ) from None
    if not any(kind in shown for kind in _USABLE_KEYS):
        raise UsageError(
            f"the certificate {cert} has a kind of key that gRPC cannot use",
            "get one with a key of RSA, P-256 or P-384", parameter="tls_cert",
        )  # fmt: skip
    return valid_until
