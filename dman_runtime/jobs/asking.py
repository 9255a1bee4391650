"""Asks a running server, as any client would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

import sdk
from dman_runtime.data.untrusted import open_regular
from dman_runtime.errors import UsageError

MAX_TOKEN_BYTES = 4096
ClientT = TypeVar("ClientT", sdk.Client, sdk.AdminClient)
# Of jobs that failed, as the command itself would have.
_SAID_WHY = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INTERNAL)


@dataclass(frozen=True)
class Server:
    """Where a server is, and how to get in."""

    target: str
    timeout: float  # seconds for a call
    token_file: Path | None = None
    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    @contextmanager
    def client(self, kind: type[ClientT]) -> Iterator[ClientT]:
        """A client of this server. Its errors become UsageErrors, of the server's own words where it said why."""
        try:
            with kind(
                self.target,
                timeout=self.timeout,
                token=_token(self.token_file),
                ca_certificate=self.ca,
                client_certificate=self.client_cert,
                client_key=self.client_key,
            ) as client:
                yield client
        except sdk.DmanError as error:
            if error.code in _SAID_WHY and error.details:
                raise UsageError(error.details) from None
            raise UsageError(str(error).rstrip("."), parameter="target") from None


def ask_status(server: Server) -> dict[str, Any]:
    """The fields of `sdk.Status`. Raises UsageError where no status can be had."""
    with server.client(sdk.Client) as client:
        return asdict(client.status())


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        with open_regular(file) as opened:
            content = opened.read(MAX_TOKEN_BYTES + 1)
    except (OSError, ValueError):
        content = b""
    token = content.decode("ascii", "replace").strip()
    if len(content) > MAX_TOKEN_BYTES or not re.fullmatch(r"[!-~]+", token):
        raise UsageError(f"{file} holds no token", "name a readable file with one", parameter="token_file")
    return token


def format_status(status: dict[str, Any]) -> str:
    """For people: one line, and one for each problem."""
    state = "ready" if status["ready"] else "NOT READY"
    first = (
        f"{state}: bundle {status['bundle_id']}, {status['workers_ready']} of {status['workers']} workers, "
        f"{status['restarts']} restarts, {status['requests']} requests, {status['bytes_in_flight']} bytes in flight, "
        f"up {status['uptime_seconds']:.0f} s, version {status['version']}"
    )
    return "\n".join([first, *map(_problem, status["problems"])])


def _problem(problem: dict[str, Any]) -> str:
    blocking = ", blocking" if problem["blocking"] else ""
    return f"{problem['name']} for {problem['seconds']:.0f} s{blocking}: {problem['detail']}"
