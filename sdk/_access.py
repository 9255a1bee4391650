"""What a client shows to a server, and how it knows the server: TLS, certificates and the token.

No message here holds a token, a key or the content of a file.
"""

import contextlib
import ipaddress
import os
import re
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from sdk._exceptions import InvalidArgumentError

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
Pem: TypeAlias = str | os.PathLike[str] | bytes
"""A PEM file: its path, or its content as bytes."""

_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_PRIVATE_KEY = re.compile(r"-----BEGIN (\w+ )?PRIVATE KEY-----.*?-----END (\w+ )?PRIVATE KEY-----", re.DOTALL)
_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/%,\s]+)):([0-9]{1,5})")
_HOST = re.compile(r"(?:dns:(?:///)?)?(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/%]+))(?::\d+)?")


@dataclass(frozen=True, slots=True, repr=False)  # no repr: it would show the key
class Tls:
    """PEM content; None: the public authorities, or no certificate of the client's own."""

    authorities: bytes | None
    certificate: bytes | None
    key: bytes | None


@dataclass(frozen=True, slots=True, repr=False)  # no repr: it would show the token
class Access:
    """How a client gets in, made by `access`. Without `credentials` the connection is plain text."""

    tls: Tls | None
    given: grpc.ChannelCredentials | None  # `channel_credentials`, in place of `tls`
    metadata: Metadata

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """For a new channel. Made when one is opened: gRPC starts with them, and a fork before that is harmless."""
        if self.tls is None:
            return self.given
        return grpc.ssl_channel_credentials(self.tls.authorities, self.tls.key, self.tls.certificate)


def access(
    target: str,
    *,
    local: bool,
    token: str | None,
    tls: bool | None,
    ca_certificate: Pem | None,
    client_certificate: Pem | None,
    client_key: Pem | None,
    insecure: bool,
    channel_credentials: grpc.ChannelCredentials | None,
    metadata: Iterable[tuple[str, str | bytes]],
) -> Access:
    """Checks the arguments of a client that have to do with access. `local`: the target is certainly this machine.

    Raises InvalidArgumentError.
    """
    _check_flags(tls, insecure)
    files = _TlsFiles(ca_certificate, client_certificate, client_key)
    encryption = None
    if channel_credentials is not None:
        if tls is not None or files.given:
            raise InvalidArgumentError(
                "channel_credentials= takes the place of tls= and certificates; give one of them."
            )
    elif tls is False:
        if files.given:
            raise InvalidArgumentError(f"{files.given}= needs TLS; leave tls=False out.")
    elif tls or files.given:
        encryption = files.content()
    sent = _checked_metadata(metadata)
    if token is not None:
        if _authorizes(sent):
            raise InvalidArgumentError("token= and metadata 'authorization' exclude each other.")
        sent = (*sent, ("authorization", f"Bearer {_checked_token(token)}"))
    encrypted = encryption is not None or channel_credentials is not None
    _check_secrecy(target, sent, encrypted=encrypted, insecure=insecure, local=local)
    return Access(encryption, channel_credentials, sent)


def is_local(target: str) -> bool:
    """Whether gRPC certainly connects to this machine: a Unix socket, or a loopback address or name."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    if target.startswith(("ipv4:", "ipv6:")):
        addresses = target.partition(":")[2].removeprefix("///").split(",")
    else:
        addresses = [target]
    return all(_is_loopback(address) for address in addresses)


def _is_loopback(address: str) -> bool:
    match = _HOST.fullmatch(address)
    if match is None:
        return False
    host = match[1] or match[2]
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_and_port(address: str) -> tuple[str, int] | None:
    """Host, without brackets, and port of a plain address; None for what is none."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not 1 <= (port := int(match[3])) <= 65_535:
        return None
    return match[1] or match[2], port


def _check_flags(tls: bool | None, insecure: bool) -> None:
    """Texts such as "false" would count as true."""
    if tls is not None and not isinstance(tls, bool):
        raise InvalidArgumentError(f"tls must be True, False or None, not {type(tls).__name__}.")
    if not isinstance(insecure, bool):
        raise InvalidArgumentError(f"insecure must be True or False, not {type(insecure).__name__}.")


def _check_secrecy(target: str, metadata: Metadata, *, encrypted: bool, insecure: bool, local: bool) -> None:
    """Refuses to send a token in plain text beyond this machine."""
    if encrypted and insecure:
        raise InvalidArgumentError("insecure=True means plain text; with TLS leave it out.")
    if _authorizes(metadata) and not (encrypted or insecure or local):
        raise InvalidArgumentError(
            f"a token would go to {target} in plain text, where others can read it. "
            "Pass tls=True or ca_certificate=, or insecure=True if nobody else is on this network."
        )


def _authorizes(metadata: Metadata) -> bool:
    return any(key == "authorization" for key, _ in metadata)


def _checked_token(token: object) -> str:
    if not isinstance(token, str):
        raise InvalidArgumentError(f"token must be text, not {type(token).__name__}.")
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise InvalidArgumentError(
            "token must be printable ASCII text without spaces or line breaks, and without the word Bearer."
        )
    return token


# -- certificates ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class _TlsFiles:
    ca_certificate: Pem | None
    client_certificate: Pem | None
    client_key: Pem | None

    @property
    def given(self) -> str:
        """The name of the first that is given, or empty text."""
        names = ("ca_certificate", "client_certificate", "client_key")
        return next((name for name in names if getattr(self, name) is not None), "")

    def content(self) -> Tls:
        if (self.client_certificate is None) != (self.client_key is None):
            raise InvalidArgumentError("client_certificate= and client_key= go together; give both or neither.")
        authorities = certificate = key = None
        if self.ca_certificate is not None:
            authorities = _certificates(self.ca_certificate, "ca_certificate")
        if self.client_certificate is not None and self.client_key is not None:
            certificate = _certificates(self.client_certificate, "client_certificate")
            key = _private_key(self.client_key)
            _check_pair(certificate, key)
        return Tls(authorities, certificate, key)


def _certificates(pem: Pem, name: str) -> bytes:
    """The content, which holds at least one certificate, and none that is damaged."""
    content = _content(pem, name)
    blocks = _CERTIFICATE.findall(content.decode("latin-1"))  # comments may be in any encoding
    if not blocks:  # gRPC would take an empty file for "all public authorities"
        raise InvalidArgumentError(f"{name} holds no certificate in PEM format.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata="\n".join(blocks))
    except (ssl.SSLError, ValueError):
        raise InvalidArgumentError(f"{name} holds a damaged certificate.") from None
    return content


def _private_key(pem: Pem) -> bytes:
    content = _content(pem, "client_key")
    if b"ENCRYPTED" in content:
        raise InvalidArgumentError("client_key is encrypted. gRPC needs it without a passphrase.")
    if not _PRIVATE_KEY.search(content.decode("latin-1")):
        raise InvalidArgumentError("client_key holds no private key in PEM format.")
    return content


def _check_pair(certificate: bytes, key: bytes) -> None:
    """Finds a damaged key and one of another certificate. gRPC would only say so at the first call."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # how strong a key has to be is up to gRPC and the server
    try:
        with _in_memory(certificate) as certificate_file, _in_memory(key) as key_file:
            context.load_cert_chain(certificate_file, key_file)
    except ssl.SSLError:
        raise InvalidArgumentError("client_key is damaged, or is not the key of client_certificate.") from None
    except (AttributeError, OSError):  # a system without memfd_create or /proc: the first call finds it
        return


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A file name of the content, which load_cert_chain wants. Keys must not be written to a disk."""
    descriptor = os.memfd_create("pem")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{descriptor}"


def _content(pem: Pem, name: str) -> bytes:
    if isinstance(pem, bytes):
        return pem
    if not isinstance(pem, (str, os.PathLike)):
        raise InvalidArgumentError(f"{name} must be a path or bytes, not {type(pem).__name__}.")
    if "-----BEGIN" in str(pem):
        raise InvalidArgumentError(f"{name} must be a path or bytes; pass the text of a PEM file as bytes.")
    try:
        return Path(pem).read_bytes()
    except (OSError, TypeError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or "not a path"
        path = "" if name == "client_key" else f" {str(pem)!r}"  # it may be the key itself, by mistake
        raise InvalidArgumentError(f"{name}{path} cannot be read: {reason}.") from None


# -- metadata --------------------------------------------------------------------------------------------------------


def _checked_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> Metadata:
    """Refuses, with a reason, what gRPC would refuse at every call."""
    checked = pairs(metadata, "metadata")
    for key, value in checked:
        if not isinstance(key, str) or not _METADATA_KEY.fullmatch(key):
            raise InvalidArgumentError(f"metadata keys are lower-case text of a-z, 0-9, '_', '-' and '.': {key!r}.")
        if key.endswith("-bin"):
            if not isinstance(value, bytes):
                raise InvalidArgumentError(f"metadata {key!r} must be bytes, as its name ends in '-bin'.")
        elif not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise InvalidArgumentError(f"metadata {key!r} must be printable ASCII text.")
    return checked


def pairs(values: Iterable[tuple[str, Any]], name: str) -> tuple[tuple[str, Any], ...]:
    """The pairs as a tuple. Raises InvalidArgumentError."""
    try:
        return tuple((key, value) for key, value in values)
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"{name} must be pairs of a key and a value.") from None
