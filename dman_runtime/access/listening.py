"""Whether a server may listen as asked: plain text stays on this machine unless that is meant. Loads no gRPC."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from dman_runtime.errors import UsageError


def check_listening(host: str, *, tls_cert: Path | None, insecure: bool) -> None:
    """Raises UsageError where a server without TLS would listen beyond loopback, unless `insecure` says it may.

    host: an address, a name (all its addresses count) or `unix:` with a path.
    """
    if tls_cert is None and not insecure and not is_loopback(host):
        raise UsageError(
            f"listening on {host or 'every address'} without TLS: anybody on the way can read and change what is sent",
            "give a certificate and its key, listen on 127.0.0.1, or say that this is meant",
            parameter="insecure",
        )


def check_tls_options(
    *, tls_cert: Path | None, tls_key: Path | None, tls_client_ca: Path | None, insecure: bool = False
) -> None:
    """Raises UsageError where the options of TLS are incomplete or contradict each other."""
    if tls_cert is not None and tls_key is None:
        raise UsageError("there is a certificate and no private key", "give its key", parameter="tls_key")
    if tls_key is not None and tls_cert is None:
        raise UsageError("there is a private key and no certificate", "give its certificate", parameter="tls_cert")
    if tls_client_ca is not None and tls_cert is None:
        raise UsageError(
            "certificates of clients can be checked with TLS only", "give the server's own", parameter="tls_cert"
        )
    if tls_cert is not None and insecure:
        raise UsageError("TLS and plain text are both asked for", "leave out one of them", parameter="insecure")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it. Raises UsageError for a name that has no address."""
    if host.startswith(("unix:", "unix-abstract:")):
        return True
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or bare == "*":
        return False
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UsageError(f"{host} has no address", "check the name", parameter="host") from None
    return all(_is_loopback_address(str(address[0])) for *_, address in found)


def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])  # without the zone of IPv6
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
