"""h2load, a load generator in C: many clients cost little of the cores that the servers need.

It sends one body over and over, so each client is a process with a request of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dman_runtime.errors import UsageError
from tools.bench.blocks import WRONG_REPLY, Block
from tools.bench.peers.wire import Request

PROGRAM = "h2load"
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
    if shutil.which(PROGRAM) is None:
        raise UsageError(f"{PROGRAM} is not installed", "apt-get install nghttp2-client")
    return subprocess.check_output([PROGRAM, "--version"], text=True).strip()


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
        clients = [
            _start(stack, address, request, scratch / str(number), http1=http1, seconds=seconds)
            for number, request in enumerate(requests)
        ]
        try:
            printed = [client.communicate(timeout=seconds + _GRACE_SECONDS)[0] for client in clients]
        except subprocess.TimeoutExpired:
            raise UsageError(f"{PROGRAM} does not end: {address} hangs") from None
    logs = [_read(scratch / f"{number}.log") for number in range(len(requests))]
    if not all(map(len, logs)):
        said = next(text for text, log in zip(printed, logs, strict=True) if not len(log))
        raise UsageError(f"{PROGRAM} got no answer from {address}: {' '.join(said.split())[-200:]}")
    return logs, sum(int(found[1]) for text in printed if (found := _DATA.search(text)))


def _start(
    stack: ExitStack, address: str, request: Request, files: Path, *, http1: bool, seconds: float
) -> subprocess.Popen[str]:
    body, log = files.with_suffix(".body"), files.with_suffix(".log")
    body.write_bytes(request.body)
    log.unlink(missing_ok=True)
    headers = [word for line in request.headers for word in ("-H", line)]
    command = [PROGRAM, *(["--h1"] if http1 else []), "-t1", "-c1", "-m1", f"--duration={round(1e3 * seconds)}ms"]
    command += [f"--data={body}", f"--log-file={log}", *headers, f"http://{address}{request.path}"]
    client = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    stack.callback(client.kill)  # before it is waited for
    return client


def _read(log: Path) -> np.ndarray:
    """(N, 3): when a request began, in microseconds, its status, and how many microseconds it took."""
    try:
        lines = log.read_text().split("\n")[:-1]  # the last one may be cut
    except FileNotFoundError:
        lines = []
    rows = [tuple(map(int, line.split("\t")[:3])) for line in lines]
    return np.array(rows, np.int64).reshape(-1, 3)


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
