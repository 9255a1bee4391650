"""How much one caller may ask for: requests per second, and events to encode per second, as token buckets."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from dman_runtime.errors import LimitError, UsageError

MAX_CALLERS = 10_000


class _Bucket:
    """Fills at `rate` per second up to `burst`, and may go into debt."""

    __slots__ = ("burst", "filled_at", "left", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate, self.burst, self.left, self.filled_at = rate, burst, burst, now

    def wait_for(self, amount: float, now: float) -> float:
        """Seconds until this amount, or a full bucket if that is less, is there; 0: now."""
        if not amount:
            return 0.0
        self.left = min(self.burst, self.left + (now - self.filled_at) * self.rate)
        self.filled_at = now
        missing = min(amount, self.burst) - self.left
        return missing / self.rate if missing > 1e-9 * self.burst else 0.0  # less is rounding

    def full(self, now: float) -> bool:
        return self.left + (now - self.filled_at) * self.rate >= self.burst


class Limits:
    """The limits of one worker process, for its event loop only: not thread-safe.

    Each caller may do at once what the limits allow in a second, and at least one request. A request with more events
    than that is admitted when the caller has used nothing lately; the caller then waits until its events are paid for.
    A caller that has not used anything lately is forgotten. Of more than 10,000 busy ones the oldest is forgotten too.
    """

    def __init__(
        self, requests_per_second: float, events_per_second: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """0: no limit. Raises UsageError for what is not a number from 0 (caller_requests, caller_events)."""
        for name, rate in (("caller_requests", requests_per_second), ("caller_events", events_per_second)):
            if not 0 <= rate < math.inf:  # nor NaN
                raise UsageError(f"{name} is {rate}", "choose 0 (no limit) or more", parameter=name)
        self._requests, self._events, self._clock = requests_per_second, events_per_second, clock
        self._unlimited = not requests_per_second and not events_per_second
        self._buckets: OrderedDict[str, tuple[_Bucket | None, _Bucket | None]] = OrderedDict()

    def __len__(self) -> int:
        """How many callers are remembered."""
        return len(self._buckets)

    def admit(self, caller_name: str, events: int) -> None:
        """Counts one request that encodes this many events. Raises LimitError, and then counts nothing."""
        if self._unlimited:
            return
        now = self._clock()
        requests, work = self._of(caller_name, now)
        if requests and (wait := requests.wait_for(1, now)) > 0:
            raise _over(f"the limit of {self._requests:g} requests per second is reached", wait)
        if work and (wait := work.wait_for(events, now)) > 0:
            raise _over(f"the limit of {self._events:g} events per second is reached", wait)
        if requests:
            requests.left -= 1
        if work:
            work.left -= events

    def _of(self, name: str, now: float) -> tuple[_Bucket | None, _Bucket | None]:
        pair = self._buckets.get(name)
        if pair is not None:
            self._buckets.move_to_end(name)
            return pair
        self._forget(now)
        pair = (
            _Bucket(self._requests, max(1.0, self._requests), now) if self._requests else None,
            _Bucket(self._events, self._events, now) if self._events else None,
        )
        self._buckets[name] = pair
        return pair

    def _forget(self, now: float) -> None:
        """Makes room for one caller. Looks at two only, so that nobody waits for it; in time it comes to all."""
        for _ in range(min(2, len(self._buckets))):
            name, pair = self._buckets.popitem(last=False)
            if not all(bucket is None or bucket.full(now) for bucket in pair):
                self._buckets[name] = pair  # at the end: looked at again later
        if len(self._buckets) >= MAX_CALLERS:
            self._buckets.popitem(last=False)


def _over(cause: str, seconds: float) -> LimitError:
    shown = f"{math.ceil(seconds * 1000 - 5e-7) / 1000:.3f}".rstrip("0").rstrip(".")  # never less than it takes
    return LimitError(cause, f"try again in {shown} seconds")
