"""Calls that arrive at a rate of their own, whatever has become of those before, from a process of its own.

A client that waits for an answer before it sends again slows down with the server, and so never shows a queue. Here
each call has a moment when it is due, and its time counts from then on. Like any gRPC client, this one gives a call up
at its deadline: it cancels it, or never sends it where the server takes no more.

It speaks HTTP/2 itself, with requests that were encoded before: a call costs it some 20 microseconds of one core, which
leaves the cores to the server. `Outcome` says what it took, and how late it was.
"""

from __future__ import annotations

import gc
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection as Pipe
from time import perf_counter

import hpack
import numpy as np

from dman_runtime.errors import UsageError
from protos.dman.v1 import dman_pb2 as pb
from tools.bench.blocks import beside
from tools.bench.h2load import Call
from tools.faults.http2 import framed

OK, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE = 0, 4, 8, 14  # statuses of gRPC
START_SECONDS, END_SECONDS = 60.0, 60.0
CONNECTIONS = 64
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_CANCEL = (8).to_bytes(4, "big")
_MOST = 2**31 - 1
_FIRST_WINDOW = 65_535  # bytes that either side may send before it is told more


@dataclass(frozen=True)
class Arrivals:
    """What is sent where, and when; picklable."""

    address: str
    calls: Sequence[Call]  # they take turns; each update gets a request id of its own
    seconds: float
    per_second: float | None  # None: a closed loop, one call on each connection at a time
    connections: int = CONNECTIONS
    deadline: float = 1.0  # seconds from when it was due


@dataclass
class Outcome:
    """What became of (n) calls; times in seconds from the begin."""

    due: np.ndarray
    sent: np.ndarray  # NaN where it was not
    ended: np.ndarray
    status: np.ndarray  # of gRPC
    call: np.ndarray  # its place in `Arrivals.calls`
    seconds: float
    cpu_seconds: float  # that the client took
    began: float = 0.0  # time.time()

    @property
    def milliseconds(self) -> np.ndarray:
        """From when each call was due to its end."""
        return 1000 * (self.ended - self.due)

    @property
    def good(self) -> np.ndarray:
        """Which calls were answered with OK before their deadline."""
        return self.status == OK

    @property
    def accepted(self) -> np.ndarray:
        """Which calls the server was sent and did not refuse, answered in time or not."""
        return ~np.isnan(self.sent) & ((self.status == OK) | (self.status == DEADLINE_EXCEEDED))

    @property
    def late_ms(self) -> float:
        """p99 of how late the client itself was."""
        waited = self.sent - self.due
        return float(1000 * np.nanpercentile(waited, 99)) if np.isfinite(waited).any() else float("nan")


class Client:
    """The process that sends."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def run(self, arrivals: Arrivals) -> Outcome:
        """Raises UsageError where the process or the server has gone."""
        self._pipe.send(arrivals)
        most = arrivals.seconds + arrivals.deadline + END_SECONDS
        found = self._pipe.recv() if self._pipe.poll(most) else "no answer"
        if isinstance(found, str):
            raise UsageError(f"the client of the open loop failed: {found}")
        return found


@contextmanager
def arrivals_client() -> Iterator[Client]:
    with beside(_serve) as pipe:
        if not pipe.poll(START_SECONDS) or pipe.recv() != "ready":
            raise UsageError("the client of the open loop did not start")
        yield Client(pipe)


def _serve(pipe: Pipe) -> None:
    gc.disable()  # it would stop all calls, again and again
    pipe.send("ready")
    with suppress(EOFError, BrokenPipeError):
        while True:
            arrivals = pipe.recv()
            try:
                pipe.send(_Run(arrivals).result())
            except OSError as error:
                pipe.send(str(error))


# -- one run ---------------------------------------------------------------------------------------------------------


@dataclass
class _Calls:
    """All calls of a run, by their numbers."""

    due: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)

    def add(self, due: float) -> int:
        self.due.append(due)
        self.sent.append(float("nan"))
        self.ended.append(float("nan"))
        self.status.append(-1)
        return len(self.due) - 1

    def end(self, number: int, status: int) -> None:
        self.ended[number], self.status[number] = perf_counter(), status


class _Run:
    """Sends what is due, reads what comes, gives up what is late; one thread."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._of, self._calls = arrivals, _Calls()
        self._run_id = f"{time.time_ns():x}"
        self._waiting: deque[tuple[float, int, _Connection]] = deque()  # deadline, call, connection; oldest first
        self._connections = [_Connection(self, arrivals.address, self._calls) for _ in range(arrivals.connections)]

    def result(self) -> Outcome:
        of, calls, cpu, wall = self._of, self._calls, time.process_time(), time.time()
        by_socket = {one.socket: one for one in self._connections}
        began = perf_counter()
        end, last = began + of.seconds, began + of.seconds + of.deadline
        self._send_first(began)
        while True:
            now = perf_counter()
            self._send_due(now, began, end)
            self._give_up(now)
            if now >= last or (now >= end and not any(one.streams or one.held for one in self._connections)):
                break
            readable, _, _ = select.select(list(by_socket), (), (), self._pause(now, began, end))
            for sock in readable:
                by_socket[sock].receive()
        for one in self._connections:
            one.close()
        due, sent, ended = (np.array(times) - began for times in (calls.due, calls.sent, calls.ended))
        status, numbers = np.array(calls.status), np.arange(len(calls.due))
        ended[np.isnan(ended)] = of.seconds + of.deadline
        status[(status < 0) | ((status == OK) & (ended - due > of.deadline))] = DEADLINE_EXCEEDED
        taken = perf_counter() - began
        return Outcome(due, sent, ended, status, numbers % len(of.calls), taken, time.process_time() - cpu, wall)

    def _send_first(self, now: float) -> None:
        if self._of.per_second is None:
            for one in self._connections:
                self._start(now, one)

    def _send_due(self, now: float, began: float, end: float) -> None:
        if (rate := self._of.per_second) is None:
            return
        count, due = len(self._calls.due), self._calls.due
        while (at := began + count / rate) <= now and at < end:
            self._start(at, self._connections[count % len(self._connections)])
            count = len(due)

    def _start(self, due: float, connection: _Connection) -> None:
        number = self._calls.add(due)
        self._waiting.append((due + self._of.deadline, number, connection))
        connection.submit(number)

    def _give_up(self, now: float) -> None:
        while self._waiting and (self._waiting[0][0] <= now or self._calls.status[self._waiting[0][1]] >= 0):
            _, number, connection = self._waiting.popleft()
            if self._calls.status[number] < 0:
                connection.cancel(number)
                self._calls.end(number, DEADLINE_EXCEEDED)
                self.ended(connection)

    def _pause(self, now: float, began: float, end: float) -> float:
        """Seconds until there is something to do, if nothing comes."""
        times = [end] if now < end else [now + 0.05]
        if self._of.per_second is not None and now < end:
            times.append(began + len(self._calls.due) / self._of.per_second)
        if self._waiting:
            times.append(self._waiting[0][0])
        return max(0.0, min(times) - now)

    def ended(self, connection: _Connection) -> None:
        """A call on a connection has ended."""
        now = perf_counter()
        if self._of.per_second is None and self._calls.due and now < self._calls.due[0] + self._of.seconds:
            self._start(now, connection)

    def frames(self, number: int) -> tuple[bytes, bytes]:
        """The header block of a call, and its message."""
        call = self._of.calls[number % len(self._of.calls)]
        message = call.message
        if call.path.endswith("/Update"):
            message += pb.UpdateRequest(request_id=f"{self._run_id}-{number}").SerializeToString()
        return _header_block(self._of.address, call.path, round(self._of.deadline * 1000)), framed(message)


@lru_cache
def _header_block(authority: str, path: str, milliseconds: int) -> bytes:
    """Headers that change nothing in the tables of the server, so that each call may have the same bytes."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
        "grpc-timeout": f"{milliseconds}m",
    }
    return hpack.Encoder().encode([(name, value, True) for name, value in headers.items()])


@lru_cache
def _status(block: bytes) -> int:
    """The status in the trailers of a call."""
    headers = dict(hpack.Decoder().decode(block, raw=True))
    return int(headers.get(b"grpc-status", UNAVAILABLE))


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


class _Connection:
    """One HTTP/2 connection with the calls on it."""

    def __init__(self, run: _Run, address: str, calls: _Calls) -> None:
        self._run, self._calls = run, calls
        self.streams: dict[int, int] = {}  # the call of each open stream
        self.held: deque[int] = deque()  # calls for which the server has no room yet
        self._of_call: dict[int, int] = {}  # the stream of each call that was sent
        self._next, self._most, self._window, self._unread = 1, 100, _FIRST_WINDOW, b""
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # No table for headers: then equal trailers are equal bytes. And windows that never fill.
        settings = b"\0\1" + bytes(4) + b"\0\4" + _MOST.to_bytes(4, "big")
        opening = _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, (_MOST - _FIRST_WINDOW).to_bytes(4, "big"))
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + opening)

    def submit(self, number: int) -> None:
        """Sends a call, or holds it until there is room."""
        self.held.append(number)
        self._send_held()

    def cancel(self, number: int) -> None:
        stream = self._of_call.pop(number, None)
        if stream is None:
            with suppress(ValueError):
                self.held.remove(number)
        elif self.streams.pop(stream, None) is not None:
            self.socket.sendall(_frame(_RESET, 0, stream, _CANCEL))
            self._send_held()

    def close(self) -> None:
        self.socket.close()

    def _send_held(self) -> None:
        while self.held and len(self.streams) < self._most:
            block, message = self._run.frames(self.held[0])
            if len(message) > self._window:
                return
            number, stream = self.held.popleft(), self._next
            self._next, self._window = stream + 2, self._window - len(message)
            self.streams[stream], self._of_call[number] = number, stream
            self._calls.sent[number] = perf_counter()
            self.socket.sendall(
                _frame(_HEADERS, _END_HEADERS, stream, block) + _frame(_DATA, _END_STREAM, stream, message)
            )

    def receive(self) -> None:
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server has closed a connection")
        data, at = self._unread + data, 0
        while len(data) - at >= 9:
            end = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if end > len(data):
                break
            self._take(data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : end])
            at = end
        self._unread = data[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _HEADERS and flags & _END_STREAM:
            self._end(stream, _status(payload))
        elif kind == _RESET:
            self._end(stream, UNAVAILABLE)
        elif kind == _SETTINGS and not flags & _ACK:
            self._learn(payload)
            self.socket.sendall(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self.socket.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW and stream == 0:
            self._window += int.from_bytes(payload, "big")
            self._send_held()
        elif kind == _GOAWAY:
            raise ConnectionError("the server takes no more calls on a connection")

    def _learn(self, settings: bytes) -> None:
        for at in range(0, len(settings), 6):
            if int.from_bytes(settings[at : at + 2], "big") == 3:  # SETTINGS_MAX_CONCURRENT_STREAMS
                self._most = int.from_bytes(settings[at + 2 : at + 6], "big")
        self._send_held()

    def _end(self, stream: int, status: int) -> None:
        number = self.streams.pop(stream, None)
        if number is None:  # it was given up
            return
        self._of_call.pop(number, None)
        self._calls.end(number, status)
        self._send_held()
        self._run.ended(self)
