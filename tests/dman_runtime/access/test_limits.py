"""What one caller may ask for, on a clock that the tests turn."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dman_runtime.access.limits import MAX_CALLERS, Limits
from dman_runtime.errors import LimitError, UsageError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusal(limits: Limits, caller: str = "shop", events: int = 0) -> str:
    with pytest.raises(LimitError) as caught:
        limits.admit(caller, events)
    assert caught.value.status == "RESOURCE_EXHAUSTED" and caught.value.public is None
    return str(caught.value)


def admitted(limits: Limits, caller: str = "shop", events: int = 0, *, tries: int = 1000) -> int:
    """How many requests in a row are admitted."""

    def one() -> bool:
        try:
            limits.admit(caller, events)
        except LimitError:
            return False
        return True

    return sum(itertools.takewhile(bool, (one() for _ in range(tries))))


def test_one_seconds_worth_of_requests_is_admitted_at_once_and_then_the_rate(clock: Clock) -> None:
    limits = Limits(10, 0, clock)
    assert admitted(limits) == 10
    assert refusal(limits) == "the limit of 10 requests per second is reached; try again in 0.1 seconds"
    clock.now += 0.5
    assert admitted(limits) == 5
    clock.now += 3600
    assert admitted(limits) == 10


def test_below_one_request_per_second_one_is_admitted(clock: Clock) -> None:
    limits = Limits(0.1, 0, clock)
    assert admitted(limits) == 1
    assert refusal(limits).endswith("try again in 10 seconds")
    clock.now += 10
    assert admitted(limits) == 1


def test_callers_do_not_share(clock: Clock) -> None:
    limits = Limits(3, 0, clock)
    assert admitted(limits, "shop") == 3
    assert admitted(limits, "ingest") == 3


def test_events_are_counted_and_requests_without_any_are_free(clock: Clock) -> None:
    limits = Limits(0, 100, clock)
    limits.admit("shop", 60)
    assert refusal(limits, events=60) == "the limit of 100 events per second is reached; try again in 0.2 seconds"
    limits.admit("shop", 40)
    assert admitted(limits, events=0, tries=50) == 50


def test_request_above_the_burst_is_admitted_when_the_bucket_is_full_and_paid_afterwards(clock: Clock) -> None:
    limits = Limits(0, 100, clock)
    limits.admit("shop", 1000)
    assert refusal(limits, events=1).endswith("try again in 9.01 seconds")
    clock.now += 9.01
    limits.admit("shop", 1)
    assert refusal(limits, events=1000).endswith("try again in 1 seconds")
    clock.now += 1
    limits.admit("shop", 1000)
    limits.admit("shop", 0)  # a debt of events does not stop what needs none


def test_fewer_than_one_event_per_second_lets_one_through_in_time(clock: Clock) -> None:
    limits = Limits(0, 0.5, clock)
    limits.admit("shop", 1)
    assert refusal(limits, events=1).endswith("try again in 2 seconds")
    clock.now += 2
    limits.admit("shop", 1)


def test_refused_request_counts_for_nothing(clock: Clock) -> None:
    limits = Limits(2, 10, clock)
    limits.admit("shop", 10)
    for _ in range(5):
        assert "events" in refusal(limits, events=10)
    limits.admit("shop", 0)
    assert "requests" in refusal(limits, events=0)


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 40)), max_size=60), st.floats(0.1, 20), st.floats(0.1, 50))
def test_no_order_of_requests_gets_more_than_the_limits(
    steps: list[tuple[float, int]], requests_per_second: float, events_per_second: float
) -> None:
    clock = Clock()
    limits, started, done, paid = Limits(requests_per_second, events_per_second, clock), clock.now, 0, 0
    for pause, events in steps:
        clock.now += pause
        try:
            limits.admit("shop", events)
        except LimitError as error:
            wait = float(re.findall(r"in ([\d.e+]+) seconds", str(error))[0])
            assert wait > 0
            continue
        elapsed = clock.now - started
        if events:  # all events before this one are paid for, up to one burst
            assert paid <= events_per_second * (1 + elapsed) + 1e-6
        done, paid = done + 1, paid + events
        assert done <= max(1.0, requests_per_second) + requests_per_second * elapsed + 1e-6


@given(st.integers(1, 200), st.floats(0.01, 1000), st.floats(0, 0.9))
def test_waiting_as_long_as_told_is_enough(events: int, rate: float, pause: float) -> None:
    clock = Clock()
    limits = Limits(rate, rate, clock)
    limits.admit("shop", events)
    clock.now += pause
    for _ in range(3):  # at most one wait per limit, and one more
        try:
            limits.admit("shop", events)
            return
        except LimitError as error:
            clock.now += float(re.findall(r"in ([\d.e+]+) seconds", str(error))[0])
    raise AssertionError("refused after every wait")


def test_zero_is_no_limit_and_remembers_nobody() -> None:
    def never() -> float:
        raise AssertionError("read the clock")

    limits = Limits(0, 0, never)
    for number in range(100):
        limits.admit(f"caller {number}", 1_000_000)
    assert len(limits) == 0


def test_callers_not_seen_lately_are_forgotten(clock: Clock) -> None:
    limits = Limits(10, 10, clock)
    for number in range(1000):
        clock.now += 0.2
        limits.admit(f"caller {number}", 1)
    assert len(limits) <= 3


def test_debts_are_remembered_while_quiet_callers_are_forgotten(clock: Clock) -> None:
    limits = Limits(0, 10, clock)
    limits.admit("debtor", 100_000)
    for number in range(1000):
        clock.now += 0.2
        limits.admit(f"caller {number}", 1)
    assert "events" in refusal(limits, "debtor", 1)
    assert len(limits) <= 4


def test_memory_is_bounded_while_everybody_is_busy(clock: Clock) -> None:
    limits = Limits(1, 0, clock)
    for number in range(MAX_CALLERS + 500):
        limits.admit(f"caller {number}", 0)
    assert len(limits) == MAX_CALLERS
    assert "requests" in refusal(limits, f"caller {MAX_CALLERS + 499}")  # those seen last are kept


@pytest.mark.parametrize("rate", [-1, math.nan, math.inf])
@pytest.mark.parametrize("parameter", ["caller_requests", "caller_events"])
def test_rates_that_are_no_limits_are_refused(rate: float, parameter: str) -> None:
    rates = (rate, 1.0) if parameter == "caller_requests" else (1.0, rate)
    with pytest.raises(UsageError, match="choose 0") as caught:
        Limits(*rates)
    assert caught.value.parameter == parameter
