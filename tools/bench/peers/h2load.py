"""Closed loops on peers by h2load: each client is a process with a request of its own, and all run together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dman_runtime.errors import UsageError
from tools.bench import h2load as client
from tools.bench.blocks import WRONG_REPLY, Block
from tools.bench.h2load import Request

MIN_REPLY = 0.8  # of the bytes of a right reply; a call that gRPC fails has none, and is status 200 all the same
SETTLE_SECONDS = 0.2  # at the start, not counted
ATTEMPTS = 4  # each twice as long as the one before
_GRACE_SECONDS = 30.0
_DATA = re.compile(r"\((\d+)\) data")


@dataclass(frozen=True)
class Load:
    """What clients measured."""

    block: Block  # of the time in which all of them ran
    calls: int  # in all, also before and after that


def version() -> str:
    """Raises UsageError where it is not installed."""
    if not client.is_here():
        raise UsageError(f"{client.COMMAND} is not installed", "apt-get install nghttp2-client")
    return client.version()


def block(
    address: str, requests: Sequence[Request], *, http1: bool, seconds: float, reply_bytes: int, scratch: Path
) -> Load:
    """So many seconds of closed-loop load: each client sends its request again when the last one is answered.

    Only the time in which all clients ran counts, without its start. `reply_bytes`: of a right reply. Raises UsageError
    where a client got no answer, or where the clients did not run together.
    """
    wanted = seconds
    for _ in range(ATTEMPTS):
        logs, received = _run(address, requests, http1=http1, seconds=seconds + SETTLE_SECONDS, scratch=scratch)
        begin, end = _common(logs, seconds + SETTLE_SECONDS)
        if end - begin >= wanted / 2:
            calls = sum(map(len, logs))
            short = received < MIN_REPLY * reply_bytes * calls
            return Load(_answered(logs, begin, end, short=short), calls)
        seconds *= 2  # the clients of a busy machine start one after the other
    raise UsageError(f"{len(logs)} clients did not run together", "measure on a machine that is not busy")


def _run(
    address: str, requests: Sequence[Request], *, http1: bool, seconds: float, scratch: Path
) -> tuple[list[np.ndarray], int]:
    """What each client logged, and how many bytes all of them received."""
    with ExitStack() as stack:
        processes = [
            client.start(stack, address, request, scratch / str(number), seconds=seconds, http1=http1)
            for number, request in enumerate(requests)
        ]
        printed = [client.what_it_said(process, seconds=seconds + _GRACE_SECONDS) for process in processes]
    logs = [client.read_log(scratch / str(number)) for number in range(len(requests))]
    if not all(map(len, logs)):
        said = next(text for text, log in zip(printed, logs, strict=True) if not len(log))
        raise UsageError(f"{client.COMMAND} got no answer from {address}: {' '.join(said.split())[-200:]}")
    return logs, sum(int(found[1]) for text in printed if (found := _DATA.search(text)))


def _common(logs: Sequence[np.ndarray], seconds: float) -> tuple[float, float]:
    """Begin and end of the time in which all clients ran, without its start, if each ran for so many seconds.

    In seconds since the epoch.
    """
    first = [log[0, 0] / 1e6 for log in logs]
    return max(first) + SETTLE_SECONDS, min(first) + seconds


def _answered(logs: Sequence[np.ndarray], begin: float, end: float, *, short: bool) -> Block:
    """What was answered between two moments. `short`: replies had too few bytes, so none counts as right."""
    rows = np.concatenate(logs)
    answered = (rows[:, 0] + rows[:, 2]) / 1e6
    rows = rows[(answered >= begin) & (answered <= end)]
    good = rows[:, 1] == 200
    errors = Counter(f"status {status}" for status in rows[~good, 1].tolist())
    milliseconds = rows[good, 2] / 1e3
    if short:
        errors[WRONG_REPLY] += len(milliseconds)
        milliseconds = milliseconds[:0]
    return Block(begin, end, milliseconds, errors)
