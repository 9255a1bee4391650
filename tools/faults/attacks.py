"""What hostile, careless or unlucky programs do to a server. The tests of `tests/faults` and `tools.soak` share them.

Each attack is a context manager: it begins at `with` and is over at the end of the block. All are bounded in time and
in count. `did()` says in words what was done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import grpc

from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.servers import connect
from tools.faults import http2
from tools.faults.http2 import RawConnection

MAX_EVENTS = 10_000  # in one request
_JOIN_SECONDS = 60.0


class Attack(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def did(self) -> str: ...


class OpenRequests:
    """Requests whose headers arrive and whose body never does, all on one connection."""

    def __init__(self, address: str, *, requests: int = 16, path: str = http2.RECOMMEND) -> None:
        self._address, self._requests, self._path = address, requests, path

    def __enter__(self) -> Self:
        self._connection = RawConnection(self._address)
        for _ in range(self._requests):
            self._connection.open_request(self._path)
        time.sleep(0.2)  # until the server has begun with them
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def did(self) -> str:
        return f"{self._requests} requests to {self._path.rpartition('/')[2]} without a body on one connection"


class IdleConnections:
    """Connections that ask for nothing and stay. They ignore what the server says."""

    def __init__(self, address: str, *, connections: int = 2000) -> None:
        self._address, self._connections = address, connections
        self._open: list[RawConnection] = []

    def __enter__(self) -> Self:
        for _ in range(self._connections):
            with suppress(OSError):  # the server may take no more
                self._open.append(RawConnection(self._address))
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._open:
            connection.close()

    def did(self) -> str:
        return f"{len(self._open)} idle connections"


class SlowReaders:
    """Callers who ask for a large reply and do not read it."""

    def __init__(self, address: str, message: bytes, *, readers: int = 60, path: str = http2.BATCH_RECOMMEND) -> None:
        self._address, self._message, self._readers, self._path = address, message, readers, path
        self._open: list[RawConnection] = []

    def __enter__(self) -> Self:
        for _ in range(self._readers):
            connection = RawConnection(self._address, receive_bytes=4096)
            self._open.append(connection)
            with suppress(OSError):  # refused
                connection.settle()
                connection.send_message(connection.open_request(self._path), self._message)
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._open:
            connection.close()

    def did(self) -> str:
        return f"{self._readers} callers who do not read their replies"


class WriteLock:
    """Another process that keeps LMDB's one write transaction open."""

    def __init__(self, data_file: Path, *, seconds: float) -> None:
        self._data_file, self._seconds = data_file, seconds

    def __enter__(self) -> Self:
        self._process = _lmdb_process(self._data_file, write=True, seconds=self._seconds)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def wait(self) -> None:
        """Until the lock is given back, after its seconds."""
        self._process.wait(self._seconds + 30)

    def did(self) -> str:
        return f"the write lock of the store held for {self._seconds:g} s"


class KilledReader:
    """A reader of the store that is killed inside a read transaction: its slot stays taken."""

    def __init__(self, data_file: Path) -> None:
        self._data_file = data_file

    def __enter__(self) -> Self:
        process = _lmdb_process(self._data_file, write=False, seconds=60)
        process.kill()
        process.communicate()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def did(self) -> str:
        return "a reader of the store killed by SIGKILL"


class StoppedWorker:
    """A worker that hangs: SIGSTOP, and SIGCONT at the end where it still lives."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __enter__(self) -> Self:
        os.kill(self._pid, signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCONT)

    def did(self) -> str:
        return "one worker stopped by SIGSTOP"


class Caller(NamedTuple):
    """What one thread sends with."""

    channel: grpc.Channel
    stub: RecommenderStub


class Calls:
    """Threads that send calls until the end of the block, or until `most` were sent. Counts what came back."""

    def __init__(
        self,
        address: str,
        send: Callable[[Caller, int], Any],
        *,
        what: str,
        threads: int = 16,
        most: int = 1_000_000,
    ) -> None:
        """`send` gets the thread's connection and the number of the call, counted over all threads."""
        self._address, self._send, self._what, self.most = address, send, what, most
        self._over, self._lock = threading.Event(), threading.Lock()
        self._sent = 0
        self.statuses: Counter[str] = Counter()  # by name of the gRPC status
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.wait()

    def wait(self) -> None:
        """Until every thread has sent its last call and heard of it."""
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def finished(self) -> bool:
        """Whether `most` calls were sent and answered."""
        return not any(thread.is_alive() for thread in self._threads)

    def did(self) -> str:
        return f"{self._sent} {self._what} by {len(self._threads)} callers"

    def _next(self) -> int | None:
        with self._lock:
            if self._over.is_set() or self._sent >= self.most:
                return None
            self._sent += 1
            return self._sent - 1

    def _run(self) -> None:
        with connect(self._address) as channel:
            caller = Caller(channel, RecommenderStub(channel))
            while (number := self._next()) is not None:
                try:
                    self._send(caller, number)
                    status = "OK"
                except grpc.RpcError as error:
                    status = error.code().name
                with self._lock:
                    self.statuses[status] += 1


def what_ifs(address: str, items: Sequence[str], *, callers: int = 16, calls: int = 100, seconds: float = 60) -> Calls:
    """The largest what-ifs, by callers who wait so many seconds for each answer."""
    request = pb.RecommendRequest(what_if_events=many_events(items, MAX_EVENTS))
    return Calls(
        address,
        lambda caller, _: caller.stub.Recommend(request, timeout=seconds),
        what="what-ifs of 10,000 events",
        threads=callers,
        most=calls,
    )


def abandoned_batches(address: str, items: Sequence[str], *, calls: int = 16, leave_after: float = 0.5) -> Calls:
    """Calls of about 1.7 MiB whose callers leave long before the answer."""
    one = pb.RecommendRequest(what_if_events=many_events(items, MAX_EVENTS))
    message = pb.BatchRecommendRequest(requests=[one] * max(1, round(1.7 * 2**20 / one.ByteSize())))
    return Calls(
        address,
        lambda caller, _: caller.stub.BatchRecommend(message, timeout=leave_after),
        what=f"BatchRecommend calls of 1.7 MiB abandoned after {leave_after:g} s",
        threads=calls,
        most=calls,
    )


def large_messages(address: str, *, calls: int = 8, size: int = 15 << 20) -> Calls:
    """Updates of so many bytes, made of the shortest events there can be: nothing takes more memory once parsed."""
    user, event = b"\x0a\x05large", b"\x12\x03\x0a\x011"
    message = user + event * ((size - len(user)) // len(event))
    return Calls(
        address,
        lambda caller, _: _send_bytes(caller, "Update", message, seconds=60),
        what=f"updates of {size >> 20} MiB at once",
        threads=calls,
        most=calls,
    )


def malformed_messages(address: str, *, calls: int, threads: int = 8) -> Calls:
    """Bytes that are no message: a length that runs past the end."""
    methods = ("Update", "Recommend", "GetUser", "BatchUpdate")
    return Calls(
        address,
        lambda caller, number: _send_bytes(
            caller, methods[number % len(methods)], b"\x0a\xff\x01" + b"x" * 20, seconds=10
        ),
        what="malformed messages",
        threads=threads,
        most=calls,
    )


def busy_user(address: str, user: str, items: Sequence[str]) -> Calls:
    """Updates of one user without a pause, each with a request id."""
    run = uuid.uuid4().hex
    return Calls(
        address,
        lambda caller, number: caller.stub.Update(
            update(user, [items[number % len(items)]], f"{run} {number}"), timeout=10
        ),
        what=f"updates of the user {user!r}",
        threads=1,
    )


def update(user: str, items: Sequence[str], request_id: str = "", *, first_time: int = 0) -> pb.UpdateRequest:
    """An update whose events are numbered by their times."""
    events = [pb.Event(item_id=item, timestamp=first_time + n) for n, item in enumerate(items)]
    return pb.UpdateRequest(user_id=user, events=events, request_id=request_id)


def many_events(items: Sequence[str], count: int) -> list[pb.Event]:
    return [pb.Event(item_id=items[n % len(items)]) for n in range(count)]


def large_reply_request(address: str, *, reply_bytes: int = 13 << 20) -> bytes:
    """A BatchRecommend whose reply has about so many bytes; fewer where the bundle has under 600 items."""
    one = pb.RecommendRequest(k=1000, include_seen=True)
    with connect(address) as channel:
        size = RecommenderStub(channel).Recommend(one, timeout=10).ByteSize()
    return pb.BatchRecommendRequest(requests=[one] * min(1000, reply_bytes // size)).SerializeToString()


def _send_bytes(caller: Caller, method: str, message: bytes, *, seconds: float) -> None:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = caller.channel.unary_unary(f"/dman.v1.Recommender/{method}")
    call(message, timeout=seconds)


def _lmdb_process(data_file: Path, *, write: bool, seconds: float) -> subprocess.Popen[str]:
    """A process with a transaction of the store open, which it keeps for so long. It uses LMDB alone."""
    code = (
        "import lmdb, sys, time\n"
        f"env = lmdb.open(sys.argv[1], lib_version=0, max_dbs=64, readonly={not write}, map_size=0)\n"
        f"with env.begin(write={write}):\n"
        "    print('open', flush=True)\n"
        f"    time.sleep({seconds})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(data_file.parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "open\n":
        process.communicate()
        raise RuntimeError(f"cannot open {data_file}")
    return process
