"""The settings of a client, checked once and then passed on whole."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sdk._access import Access, pairs
from sdk._exceptions import InvalidArgumentError
from sdk._servers import Servers
from sdk._wire import integer

DEFAULT_TARGET = "localhost:50051"
DEFAULT_TIMEOUT = 1.0  # seconds
DEFAULT_RETRIES = 2
MAX_MESSAGE_BYTES = 16 << 20  # both ways; 1000 recommendations with titles take about 0.1 MB

_CHANNEL_OPTIONS: dict[str, Any] = {
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    "grpc.enable_retries": 0,  # `_retry` decides about retries
    "grpc.use_local_subchannel_pool": 1,  # a client has its own connection, and close() closes it
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2000,  # gRPC's 2 minutes are far longer than a restart of the server
}

ARGUMENTS = """Connects at the first call, not here.

Args:
    target: The server's address: `host:port`, or any other gRPC name such as `unix:/run/dman.sock`. A list of
        `host:port` for several servers over one state: each user stays with one of them, and goes to another if that
        is gone. A list of one is a DNS name that has the addresses of all.
    timeout: Seconds that a call may take as a whole, retries included. Each method can override it.
    retries: How often a call that is safe to repeat is tried again while the server is unavailable. 0: never.
    wait_for_ready: Whether a call waits, within its timeout, for a server that is not up yet, instead of failing at
        once.
    token: Says who you are, where the server asks for it. Sent with every call.
    tls: True for an encrypted connection. By default TLS is on where a certificate is given, and off otherwise.
    ca_certificate: Who signed the server's certificate; by default the public authorities that gRPC knows. This and
        the next two are PEM files: a path, or their content as bytes.
    client_certificate: For a server that asks for one. It needs `client_key`.
    client_key: The private key of `client_certificate`, without a passphrase.
    insecure: Allows a token in plain text beyond this machine, where others can read it.
    channel_credentials: gRPC credentials in place of `tls` and the certificates, for special cases.
    metadata: More pairs to send with every call. An "authorization" here is treated as a token.
    options: More gRPC channel options. They override those of this client.

Raises:
    InvalidArgumentError: An argument cannot work, a file cannot be read, or a token would go out in plain text.
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked arguments of a client, made by `settings`."""

    servers: Servers
    timeout: float
    retries: int
    wait_for_ready: bool
    access: Access
    options: tuple[tuple[str, Any], ...]


def settings(
    servers: Servers,
    *,
    timeout: float,
    retries: int,
    wait_for_ready: bool,
    access: Access,
    options: Iterable[tuple[str, Any]],
) -> Settings:
    """Checks the arguments of a client. `options` override this module's. Raises InvalidArgumentError."""
    if integer(retries, "retries") < 0:
        raise InvalidArgumentError(f"retries must not be negative: {retries}.")
    return Settings(
        servers=servers,
        timeout=positive_seconds(timeout, "timeout"),
        retries=retries,
        wait_for_ready=wait_for_ready,
        access=access,
        options=tuple(
            {
                **_CHANNEL_OPTIONS,
                **servers.options(),
                **dict(pairs(options, "options")),
            }.items()
        ),
    )


def positive_seconds(value: float, name: str) -> float:
    """The value as a positive, finite float. Every call has a deadline, so infinity is refused."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InvalidArgumentError(f"{name} must be a number of seconds, not {type(value).__name__}.")
    seconds = float(value)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InvalidArgumentError(f"{name} must be a positive number of seconds: {value}.")
    return seconds
