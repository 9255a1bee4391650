"""When to try again and how long one attempt may take: arithmetic only, no waiting and no network."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

RETRYABLE_CODES = frozenset({grpc.StatusCode.UNAVAILABLE})
"""DEADLINE_EXCEEDED has used up the time and RESOURCE_EXHAUSTED must not be answered with more load."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter. Delays are in seconds."""

    retries: int = 2  # attempts after the first
    first_delay: float = 0.1  # as long as the channel waits before it connects again: sooner would be in vain
    max_delay: float = 1.0

    def delay(self, code: grpc.StatusCode, *, attempts: int, remaining: float, jitter: float) -> float | None:
        """Seconds to wait after failed attempt number `attempts`, or None to give up.

        `remaining` is the time (s) left of the call's deadline and `jitter` a random number in [0, 1).
        """
        if code not in RETRYABLE_CODES or attempts > self.retries:
            return None
        longest = min(self.max_delay, self.first_delay * 2 ** min(attempts - 1, 30))
        delay = jitter * longest
        return delay if delay < remaining else None


NO_RETRY = RetryPolicy(retries=0)


class Attempts:
    """The attempts of one call, which share one deadline."""

    __slots__ = ("_clock", "_deadline", "_policy", "count")

    def __init__(self, policy: RetryPolicy, timeout: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._deadline = clock() + timeout
        self.count = 0

    def start(self) -> float:
        """Counts one more attempt. Returns the seconds that it may take: all that is left."""
        self.count += 1
        return self._remaining()

    def delay_after(self, code: grpc.StatusCode) -> float | None:
        """Seconds to wait before the next attempt, or None when there is to be none."""
        return self._policy.delay(code, attempts=self.count, remaining=self._remaining(), jitter=random.random())

    def _remaining(self) -> float:
        return max(0.0, self._deadline - self._clock())
