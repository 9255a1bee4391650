"""When a call is tried again, and how long each attempt may take. Nothing here waits or uses the network.

Why not gRPC's own `retryPolicy`? It was tried with grpcio 1.85.1, for both clients, and breaks three promises:

- A call whose connection breaks is retried. gRPC does not retry once the headers of the reply are there: with a
  proxy that cut the connection after 200 bytes of a 50 kB reply, it gave up with UNAVAILABLE after one attempt.
- No server means UnavailableError. gRPC forgets the cause while it waits for its next attempt: with timeouts of
  0.05 to 0.2 s and no server, all of 72 calls took the whole timeout and ended with DEADLINE_EXCEEDED.
- `retries` is any number. gRPC never makes more than five attempts, and no channel option changes that.

`tests/sdk/test_retry.py` holds the three.
"""

import random
import time
from collections.abc import Callable

import grpc

FIRST_DELAY = 0.1  # seconds; the channel waits as long before it reconnects, so a shorter delay gains nothing
MAX_DELAY = 1.0  # seconds
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
SHORTEST_ATTEMPT = 0.01  # seconds; a shorter one would hide the cause behind DEADLINE_EXCEEDED


class Attempts:
    """The attempts of one call, which share one deadline. Delays grow exponentially, with full jitter.

    Only UNAVAILABLE and CANCELLED are retried. A stopping server ends calls with either. After DEADLINE_EXCEEDED no
    time is left, RESOURCE_EXHAUSTED must not lead to more load, and after ABORTED the server has itself tried again
    for as long as the deadline allowed.
    """

    __slots__ = ("_clock", "_deadline", "_jitter", "_longest_delay", "_retries", "count")

    def __init__(
        self,
        retries: int,
        timeout: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`timeout` (s) is for all attempts together; `jitter` draws from [0, 1)."""
        self._retries = retries
        self._clock = clock
        self._jitter = jitter
        self._deadline = clock() + timeout
        self._longest_delay = FIRST_DELAY
        self.count = 0

    def start(self) -> float:
        """Counts one more attempt. Returns the seconds it may take: all that are left."""
        self.count += 1
        return self.seconds_left()

    def delay_after(self, code: grpc.StatusCode) -> float | None:
        """Seconds to wait before the next attempt, or None to give up."""
        if code not in RETRIED or self.count > self._retries:
            return None
        delay = self._jitter() * self._longest_delay
        self._longest_delay = min(MAX_DELAY, 2 * self._longest_delay)
        return delay if delay + SHORTEST_ATTEMPT <= self.seconds_left() else None

    def seconds_left(self) -> float:
        return max(0.0, self._deadline - self._clock())
