"""Closed loops of a client in C: h2load of nghttp2, which leaves the cores to the server and measures whole requests.

A process of h2load sends one request again and again. So there is one process for each of several requests: a server
that is asked for one user only has all of that user at hand. h2load sees HTTP's status, which is 200 for gRPC's errors
too, so the server's own counts say whether the calls were answered (`Running.answers`).
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dman_runtime.errors import UsageError
from tools.bench.blocks import Block, split
from tools.bench.servers import ECHO_METHOD, ECHO_SERVICE, Running, connect
from tools.faults.http2 import framed

COMMAND = "h2load"
HOW_TO_GET_IT = f"{COMMAND} is missing; it is in nghttp2-client of Debian and Ubuntu: apt-get install nghttp2-client"
_START_SECONDS = 0.02  # for a process to start, while others send already
_ATTEMPTS = (1, 4, 16)  # times as long, where a machine is busy or a server takes seconds to answer
_EXTRA_SECONDS = 60.0  # for processes to end
_COUNTED_SECONDS = 5.0  # until a server has counted what it answered
GRPC_HEADERS = ("te: trailers", "content-type: application/grpc")


def is_here() -> bool:
    return shutil.which(COMMAND) is not None


def version() -> str:
    """Of the client."""
    if not is_here():
        return "none"
    return subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


class Call(NamedTuple):
    """A request to a gRPC method."""

    path: str  # "/package.Service/Method"
    message: bytes


ECHO = Call(f"/{ECHO_SERVICE}/{ECHO_METHOD}", b"")


class Request(NamedTuple):
    """What a process sends again and again."""

    path: str
    body: bytes
    headers: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Clients that each wait for an answer before they send again."""

    calls: Sequence[Call]  # all of one method; the clients are shared out over them
    clients: int

    @property
    def shares(self) -> list[tuple[Call, int]]:
        """Each call that is sent, with its clients."""
        calls = self.calls[: self.clients]
        return list(zip(calls, split(self.clients, [1.0] * len(calls)), strict=True))


@dataclass(frozen=True)
class Load:
    """Groups that send at the same time to one server."""

    server: Running
    groups: Mapping[str, Group]  # by the name of their blocks


def echo_load(server: Running, clients: int, processes: int, name: str = "echo") -> Load:
    """As many clients and processes as what it is compared with: the floor has the same client."""
    return Load(server, {name: Group([ECHO] * processes, clients)})


def in_turns(loads: Sequence[Load], *, rounds: int, seconds: float) -> dict[str, list[Block]]:
    """A block of each load a round, by the names of the groups; rounds differ in which load comes first."""
    blocks: dict[str, list[Block]] = {name: [] for load in loads for name in load.groups}
    for turn in range(rounds):
        first = turn % len(loads)
        for load in [*loads[first:], *loads[:first]]:
            for name, block in run(load, seconds=seconds).items():
                blocks[name].append(block)
    return blocks


def run(load: Load, *, seconds: float) -> dict[str, Block]:
    """One block of each group. Raises UsageError where a call failed, by h2load or by the server's own counts."""
    before = load.server.answers() if load.server.metrics_port else None
    sent = 0
    for longer in _ATTEMPTS:
        if load.server.metrics_port:
            _wait_for_turn(load.server.address)
        logs = send(load, seconds=longer * seconds, start_seconds=longer * _START_SECONDS)
        sent += sum(len(rows) for group in logs.values() for rows in group)
        if (blocks := _blocks(logs, warm_up=seconds / 5, least=seconds / 3)) is not None:
            break
    else:
        raise UsageError(f"processes of {COMMAND} got no answers at the same time, in {longer * seconds:g} s")
    if before is not None:
        _check_counts(load, before, sent)
    return blocks


def _wait_for_turn(address: str) -> None:
    """Returns when the server has taken all calls that were waiting for it: those of clients that have left, too."""
    request = health_pb2.HealthCheckRequest()
    with connect(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        deadline = time.monotonic() + _EXTRA_SECONDS
        while True:
            try:
                check(request, timeout=_EXTRA_SECONDS)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.CANCELLED or time.monotonic() > deadline:
                    raise UsageError(f"the server does not answer: {error.details()}") from None
                time.sleep(0.05)  # as many wait as may
            else:
                return


def send(load: Load, *, seconds: float, start_seconds: float = _START_SECONDS) -> dict[str, list[np.ndarray]]:
    """For each group and process the requests (n, 3): began and took, in microseconds, between them HTTP's status.

    Sends for so long once all processes have started, which takes each of them `start_seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="h2load-") as directory:
        return _logs(load, seconds, start_seconds, Path(directory))


def _logs(load: Load, seconds: float, start_seconds: float, directory: Path) -> dict[str, list[np.ndarray]]:
    files: dict[str, list[Path]] = {name: [] for name in load.groups}
    count = sum(len(group.shares) for group in load.groups.values())
    end = time.monotonic() + seconds + start_seconds * count
    with ExitStack() as stack:
        processes = list[subprocess.Popen[str]]()
        for name, group in load.groups.items():
            for call, clients in group.shares:
                file = directory / str(len(processes))
                files[name].append(file)
                request, left = Request(call.path, framed(call.message), GRPC_HEADERS), end - time.monotonic()
                processes.append(start(stack, load.server.address, request, file, clients=clients, seconds=left))
        by = end + _EXTRA_SECONDS
        for process in processes:
            said = what_it_said(process, seconds=max(0.0, by - time.monotonic()))
            if process.returncode:
                raise UsageError(f"{COMMAND} failed: {(said.strip().splitlines() or ['no message'])[-1]}")
    return {name: [read_log(file) for file in of_group] for name, of_group in files.items()}


def start(
    stack: ExitStack,
    address: str,
    request: Request,
    file: Path,
    *,
    clients: int = 1,
    seconds: float,
    http1: bool = False,
) -> subprocess.Popen[str]:
    """A process of h2load, which `stack` ends. Its log is that of `file`: see `read_log`."""
    body = file.with_suffix(".body")
    body.write_bytes(request.body)
    file.with_suffix(".log").unlink(missing_ok=True)
    command = [
        COMMAND,
        *(["--h1"] if http1 else []),
        f"--clients={clients}",
        f"--duration={max(1, round(seconds * 1000))}ms",
        *(f"--header={header}" for header in request.headers),
        f"--data={body}",
        f"--log-file={file.with_suffix('.log')}",
        f"http://{address}{request.path}",
    ]
    process = stack.enter_context(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    )
    stack.callback(process.kill)  # runs before the process is waited for
    return process


def what_it_said(process: subprocess.Popen[str], *, seconds: float) -> str:
    """The output of a process that ends within so many seconds. Raises UsageError."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        raise UsageError(f"{COMMAND} did not end") from None


def read_log(file: Path) -> np.ndarray:
    """(n, 3): when each request began, in microseconds, its HTTP status, and the microseconds that it took."""
    try:
        lines = file.with_suffix(".log").read_text().split("\n")[:-1]  # the last one may be cut
    except FileNotFoundError:
        lines = []
    return np.array([line.split()[:3] for line in lines], np.int64).reshape(-1, 3)


def _blocks(logs: Mapping[str, Sequence[np.ndarray]], *, warm_up: float, least: float) -> dict[str, Block] | None:
    """What ended while all processes were sending, without the first part of it; None if that was too short."""
    everything = [rows for group in logs.values() for rows in group]
    if not all(len(rows) for rows in everything):
        return None
    began = max(int(rows[0, 0]) for rows in everything) + int(warm_up * 1e6)
    ended = min(int((rows[:, 0] + rows[:, 2]).max()) for rows in everything)
    if ended - began < least * 1e6:
        return None
    blocks = {}
    for name, group in logs.items():
        rows = np.concatenate(list(group))
        end = rows[:, 0] + rows[:, 2]
        inside = rows[(end >= began) & (end < ended)]
        answered = inside[:, 1] == 200
        errors = Counter(f"HTTP {status}" for status in inside[~answered, 1].tolist())
        blocks[name] = Block(began / 1e6, ended / 1e6, inside[answered, 2] / 1e3, errors)
    return blocks


def _check_counts(load: Load, before: Counter[tuple[str, str]], sent: int) -> None:
    """The server answered all that was sent, and with OK. What was under way when the clients left is cancelled."""
    methods = {group.calls[0].path.rpartition("/")[2] for group in load.groups.values()}
    deadline = time.monotonic() + _COUNTED_SECONDS
    while True:
        new = load.server.answers() - before
        answered = sum(count for (method, status), count in new.items() if method in methods and status == "OK")
        if answered >= sent or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    failed = {status: count for (_, status), count in new.items() if status not in ("OK", "CANCELLED")}
    if failed or answered < sent:
        raise UsageError(f"of {sent} calls the server answered {answered} with OK, and failed others: {failed}")
