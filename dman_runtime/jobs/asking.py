"""Asks a running server for its status, as any client would."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sdk
from dman_runtime.data.untrusted import open_regular
from dman_runtime.errors import UsageError

MAX_TOKEN_BYTES = 4096


def ask_status(
    target: str,
    *,
    token_file: Path | None = None,
    ca: Path | None = None,
    client_cert: Path | None = None,
    client_key: Path | None = None,
    timeout: float,
) -> dict[str, Any]:
    """The fields of `sdk.Status`. `timeout` is in seconds. Raises UsageError where no status can be had."""
    try:
        with sdk.Client(
            target,
            timeout=timeout,
            token=_token(token_file),
            ca_certificate=ca,
            client_certificate=client_cert,
            client_key=client_key,
        ) as client:
            return asdict(client.status())
    except sdk.DmanError as error:
        raise UsageError(str(error).rstrip("."), parameter="target") from None


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
