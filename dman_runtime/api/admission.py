"""What one worker holds at a time, bounded by count and by bytes, and shared fairly between callers.

Receiving, running and answering are limited separately:

- A message that arrives within FAST_SECONDS is not limited at all. Those that take longer are few (MAX_SLOW), as gRPC
  may buffer MAX_MESSAGE_BYTES for each; one more drops the oldest of the connection that has the most of them.
- Requests that have arrived are counted, and their bytes; beyond either limit they are refused. While one runs, what it
  was parsed to is counted as well: of short item ids, that is many times the message.
- A reply stays counted until the client has read it. Small ones have a reserve of their own, so that clients that do
  not read large replies harm nobody's small ones.
- Long requests wait in a queue per caller, MAX_LONG of which run at a time.

All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from time import monotonic
from typing import Any, TypeAlias

import grpc

from dman_runtime.errors import RefusedError

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
FAST_SECONDS = 0.1
SLOW_SECONDS = 10.0  # for a message to arrive
MAX_SLOW = 8  # messages
MAX_RECEIVING = 4096  # calls whose message has not arrived, the fast ones included
SMALL_BYTES = 64 << 10
EVENT_BYTES = 100  # that an event takes once it is parsed and converted, measured
SMALL_RESERVE = 64 << 20  # bytes that only messages and replies of SMALL_BYTES may use
MAX_LONG = 2  # long requests of one caller that run at a time
_SWEEP_SECONDS = 0.05


@dataclass(slots=True, eq=False)
class _Arriving:
    """A call whose message has not arrived."""

    peer: str
    task: asyncio.Task[object] | None
    since: float = field(default_factory=monotonic)
    dropped: bool = False

    def drop(self) -> None:
        self.dropped = True
        if self.task is not None:
            self.task.cancel()


class Receiver:
    """Receives the one message of each call."""

    def __init__(self) -> None:
        self._arriving: dict[_Arriving, None] = {}  # oldest first
        self._sweeper: asyncio.TimerHandle | None = None

    async def receive(self, context: Context) -> bytes | None:
        """The message of a call; None if the client sent none. Raises RefusedError where it takes too long."""
        arriving = _Arriving(context.peer(), asyncio.current_task())
        self._arriving[arriving] = None
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)
        try:
            message = await context.read()
        except asyncio.CancelledError:
            if not arriving.dropped:
                raise
            raise RefusedError("the message took too long to arrive", "send it at once, or fewer at a time") from None
        finally:
            del self._arriving[arriving]
        return message if isinstance(message, bytes) else None

    def _sweep(self) -> None:
        """Drops calls whose message takes too long or holds up others; runs as long as any is awaited."""
        self._sweeper = None
        if not self._arriving:
            return
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)
        now = monotonic()
        for arriving in list(self._arriving)[: max(0, len(self._arriving) - MAX_RECEIVING)]:
            arriving.drop()
        for arriving in self._arriving:
            if now - arriving.since > SLOW_SECONDS and not arriving.dropped:
                arriving.drop()
        slow = [one for one in self._arriving if now - one.since > FAST_SECONDS and not one.dropped]
        for arriving in _of_the_greediest(slow, max(0, len(slow) - MAX_SLOW)):
            arriving.drop()


def _of_the_greediest(slow: Sequence[_Arriving], count: int) -> list[_Arriving]:
    """So many of them, one after the other: each time the oldest of the peer that has the most left."""
    by_peer: dict[str, deque[_Arriving]] = {}
    for one in slow:  # oldest first
        by_peer.setdefault(one.peer, deque()).append(one)
    greediest = [(-len(ones), order, ones) for order, ones in enumerate(by_peer.values())]
    heapify(greediest)
    found = []
    for _ in range(count):
        _, order, ones = greediest[0]
        found.append(ones.popleft())
        heapreplace(greediest, (-len(ones), order, ones))
    return found


class Admission:
    """Counts the requests and bytes that a worker holds."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self.requests = self.bytes = 0
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._held: Counter[str] = Counter()  # bytes by caller; none that is 0
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # long requests that wait, by caller
        self._running: Counter[str] = Counter()  # long requests, by caller

    def enter(self) -> None:
        """Counts one more request; `leave` ends it. Raises RefusedError."""
        if self.requests >= self._max_requests:
            raise RefusedError(f"the server holds {self.requests} requests", "send fewer at a time, or try again later")
        self.requests += 1

    def leave(self) -> None:
        self.requests -= 1

    def hold(self, caller: str, size: int, *, beside: int = 0, always: bool = False) -> None:
        """Counts the bytes of a message or a reply; `release` ends it. Raises RefusedError, unless `always`.

        No caller gets more than half of all there is, unless for a single call, which may hold bytes `beside` already.
        """
        limit = self._max_bytes + (SMALL_RESERVE if size <= SMALL_BYTES else 0)
        full = self.bytes + size > limit or self._held[caller] + size > max(limit // 2, size + beside)
        if full and not always:
            raise RefusedError(
                f"the server holds {self.bytes >> 20} MiB of messages and replies",
                "read replies at once, send less at a time, or try again later",
            )
        self.bytes += size
        self._held[caller] += size

    def release(self, caller: str, size: int) -> None:
        self.bytes -= size
        self._held[caller] -= size
        if not self._held[caller]:
            del self._held[caller]

    @asynccontextmanager
    async def long(self, caller: str) -> AsyncIterator[None]:
        """Waits until fewer than MAX_LONG long requests of the caller run, and is one of them."""
        if self._running[caller] >= MAX_LONG:
            turn = asyncio.get_running_loop().create_future()
            queue = self._queues.setdefault(caller, deque())
            queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._next(caller)  # the turn came together with the cancellation: pass it on
                else:
                    with suppress(ValueError):
                        queue.remove(turn)
                raise
        else:
            self._running[caller] += 1
        try:
            yield
        finally:
            self._next(caller)

    def _next(self, caller: str) -> None:
        """Gives the place of a long request that has ended to the next one that waits."""
        queue = self._queues.get(caller, deque())
        while queue:
            turn = queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._queues.pop(caller, None)
        self._running[caller] -= 1
        if not self._running[caller]:
            del self._running[caller]


class Held:
    """The bytes that one call holds: its message, what is made of it, and at last its reply."""

    __slots__ = ("_admission", "_caller", "size")

    def __init__(self, admission: Admission, caller: str) -> None:
        self._admission, self._caller, self.size = admission, caller, 0

    def add(self, size: int) -> None:
        """Raises RefusedError."""
        self._admission.hold(self._caller, size, beside=self.size)
        self.size += size

    def become(self, size: int, *, always: bool) -> None:
        """From now on this is all that is held. Raises RefusedError, unless `always`; then nothing is held."""
        self.release()
        self._admission.hold(self._caller, size, always=always)
        self.size = size

    def release(self) -> None:
        self._admission.release(self._caller, self.size)
        self.size = 0
