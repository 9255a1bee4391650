"""Where a server may listen in plain text, and which options of TLS belong together."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from dman_runtime.access.listening import check_listening, check_tls_options, is_loopback
from dman_runtime.errors import UsageError

CERT, KEY, CA = Path("server.pem"), Path("server.key"), Path("clients.pem")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.8.9.10", "127.1", "::1", "[::1]", "::ffff:127.0.0.1", "localhost", "unix:/run/dman.sock",
     "unix:///run/dman.sock", "unix-abstract:dman"],
)  # fmt: skip
def test_loopback_needs_no_tls(host: str) -> None:
    assert is_loopback(host)
    check_listening(host, tls_cert=None, insecure=False)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "[::]", "", "*", "0", "10.0.0.1", "192.168.1.5", "169.254.1.1", "2001:db8::1", "fe80::1",
     "::ffff:10.0.0.1", "128.0.0.1"],
)  # fmt: skip
def test_beyond_loopback_plain_text_must_be_meant(host: str) -> None:
    with pytest.raises(UsageError, match="without TLS: anybody on the way can read and change") as caught:
        check_listening(host, tls_cert=None, insecure=False)
    assert caught.value.parameter == "insecure"
    check_listening(host, tls_cert=None, insecure=True)
    check_listening(host, tls_cert=CERT, insecure=False)


@pytest.mark.parametrize(
    ("addresses", "loopback"),
    [(["127.0.0.1", "::1"], True), (["127.0.1.1"], True), (["127.0.0.1", "10.0.0.1"], False), (["fe80::1%2"], False)],
)
def test_name_is_loopback_if_all_its_addresses_are(
    addresses: list[str], loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert is_loopback("server.example") == loopback


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70, "..", "localhost.127.0.0.1.x y"])
def test_name_without_address_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match="has no address; check the name") as caught:
        check_listening(host, tls_cert=None, insecure=False)
    assert caught.value.parameter == "host"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"insecure": True},
        {"tls_cert": CERT, "tls_key": KEY},
        {"tls_cert": CERT, "tls_key": KEY, "tls_client_ca": CA},
    ],
)
def test_complete_options_pass(options: dict[str, Any]) -> None:
    check_tls_options(**{"tls_cert": None, "tls_key": None, "tls_client_ca": None} | options)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"tls_cert": CERT}, "tls_key"),
        ({"tls_key": KEY}, "tls_cert"),
        ({"tls_client_ca": CA}, "tls_cert"),
        ({"tls_cert": CERT, "tls_client_ca": CA}, "tls_key"),
        ({"tls_cert": CERT, "tls_key": KEY, "insecure": True}, "insecure"),
    ],
)
def test_incomplete_options_name_what_is_missing(options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_tls_options(**{"tls_cert": None, "tls_key": None, "tls_client_ca": None} | options)
    assert caught.value.parameter == parameter
