"""The settings of a client, checked once and then passed on whole."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

from sdk._exceptions import InvalidArgumentError
from sdk._wire import integer

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

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
_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked arguments of a client, made by `settings`."""

    target: str
    timeout: float
    retries: int
    wait_for_ready: bool
    credentials: grpc.ChannelCredentials | None = field(repr=False)
    metadata: Metadata = field(repr=False)
    options: tuple[tuple[str, Any], ...]


def settings(
    target: str,
    *,
    timeout: float,
    retries: int,
    wait_for_ready: bool,
    credentials: grpc.ChannelCredentials | None,
    metadata: Iterable[tuple[str, str | bytes]],
    options: Iterable[tuple[str, Any]],
) -> Settings:
    """Checks the arguments of a client. `options` override this module's. Raises InvalidArgumentError."""
    if not isinstance(target, str) or not target:
        raise InvalidArgumentError(f"target must be an address such as {DEFAULT_TARGET!r}, not {target!r}.")
    if integer(retries, "retries") < 0:
        raise InvalidArgumentError(f"retries must not be negative: {retries}.")
    return Settings(
        target=target,
        timeout=positive_seconds(timeout, "timeout"),
        retries=retries,
        wait_for_ready=wait_for_ready,
        credentials=credentials,
        metadata=_checked_metadata(metadata),
        options=tuple({**_CHANNEL_OPTIONS, **dict(_pairs(options, "options"))}.items()),
    )


def positive_seconds(value: float, name: str) -> float:
    """The value as a positive, finite float. Every call has a deadline, so infinity is refused."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InvalidArgumentError(f"{name} must be a number of seconds, not {type(value).__name__}.")
    seconds = float(value)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InvalidArgumentError(f"{name} must be a positive number of seconds: {value}.")
    return seconds


def _checked_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> Metadata:
    """Refuses, with a reason, what gRPC would refuse at every call. Messages show no value: it may be a secret."""
    pairs = _pairs(metadata, "metadata")
    for key, value in pairs:
        if not isinstance(key, str) or not _METADATA_KEY.fullmatch(key):
            raise InvalidArgumentError(f"metadata keys are lower-case text of a-z, 0-9, '_', '-' and '.': {key!r}.")
        if key.endswith("-bin"):
            if not isinstance(value, bytes):
                raise InvalidArgumentError(f"metadata {key!r} must be bytes, as its name ends in '-bin'.")
        elif not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise InvalidArgumentError(f"metadata {key!r} must be printable ASCII text.")
    return pairs


def _pairs(values: Iterable[tuple[str, Any]], name: str) -> tuple[tuple[str, Any], ...]:
    try:
        return tuple((key, value) for key, value in values)
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"{name} must be pairs of a key and a value.") from None
