"""Times in every form become whole seconds, or errors that say how to give them."""

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.dman.v1 import dman_pb2 as pb
from sdk import Event, InvalidArgumentError
from sdk._times import whole_seconds

from .awaited import Awaited
from .fake_server import Recorder

pytestmark = pytest.mark.timeout(30)
NOON = 1_700_049_600  # 2023-11-15 12:00 UTC
ZONES = [UTC, timezone(timedelta(hours=-3, minutes=-30)), ZoneInfo("Asia/Tokyo")]
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class PandasTimestamp(datetime):
    """Like pandas.Timestamp: a datetime of another class."""


class NoTime(datetime):
    """Like pandas.NaT: a datetime that equals nothing."""

    def __ne__(self, other: object) -> bool:
        return True

    __hash__ = datetime.__hash__

    def __str__(self) -> str:
        return "NaT"


@pytest.mark.parametrize(
    ("time", "unit", "expected"),
    [
        (NOON, "s", NOON),
        (0, "ms", 0),
        (7, "s", 7),
        (-86_400, "s", -86_400),
        (NOON + 0.999, "s", NOON),
        (-0.5, "s", -1),
        (Decimal("1700049600.9"), "s", NOON),
        (np.int64(NOON), "s", NOON),
        (np.float32(1.5), "s", 1),
        (np.float64(NOON + 0.5), "s", NOON),
        (NOON * 1000 + 999, "ms", NOON),
        (NOON * 1000 + 999.9, "ms", NOON),
        (-1, "ms", -1),
        (1000, "ms", 1),
        (NOON * 10**6 + 999_999, "us", NOON),
        (NOON * 10**9 + 999_999_999, "ns", NOON),
        (np.int64(NOON * 10**9), "ns", NOON),
        (datetime(2023, 11, 15, 12, tzinfo=UTC), "s", NOON),
        (datetime(2023, 11, 15, 12, tzinfo=UTC), "ns", NOON),  # has its own unit
        (datetime(2023, 11, 15, 21, tzinfo=ZoneInfo("Asia/Tokyo")), "s", NOON),
        (datetime(2023, 11, 15, 8, 30, tzinfo=ZONES[1]), "s", NOON),
        (datetime(2023, 11, 15, 12, 0, 0, 999_999, tzinfo=UTC), "s", NOON),
        (datetime(1969, 12, 31, 23, 59, 59, 1, tzinfo=UTC), "s", -1),
        (PandasTimestamp(2023, 11, 15, 12, tzinfo=UTC), "ms", NOON),
    ],
)
async def test_times_are_stored_in_whole_seconds_rounded_down(
    client: Awaited, recorder: Recorder, *, time: Any, unit: Any, expected: int
) -> None:
    await client.update("anna", ["a", "b"], timestamps=[time, time], unit=unit)
    await client.update("anna", Event("a", time), unit=unit)
    await client.update_many({"anna": [Event("a", time)]}, unit=unit)
    one, other, many = (seen.request for seen in recorder.seen)
    sent = [*one.events, *other.events, *many.updates[0].events]
    assert [event.timestamp for event in sent] == [expected] * 4


@given(st.datetimes(datetime(1900, 1, 1), datetime(2099, 12, 31)), st.sampled_from(ZONES))
def test_every_datetime_is_the_second_it_lies_in(naive: datetime, zone: Any) -> None:
    time = naive.replace(tzinfo=zone)
    seconds = whole_seconds(time, "time", "s")
    assert datetime.fromtimestamp(seconds, UTC) <= time < datetime.fromtimestamp(seconds + 1, UTC)


@given(st.integers(946_684_800, 4_102_444_799), st.sampled_from([*UNITS]), st.integers(0, 999_999_999))
def test_every_time_of_this_century_is_refused_in_all_units_but_its_own(seconds: int, unit: Any, rest: int) -> None:
    number = seconds * UNITS[unit] + rest % UNITS[unit]
    for declared in UNITS:
        if declared == unit:
            assert whole_seconds(number, "time", unit) == seconds
        else:
            with pytest.raises(InvalidArgumentError, match=f"pass unit='{unit}'"):
                whole_seconds(number, "time", declared)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("time", "unit", "complaint"),
    [
        (NOON * 1000, "s", r"\[0\] is 1700049600000, which is after the year 2100 if it is in 's'; pass unit='ms'"),
        (NOON * 1000.0, "s", "pass unit='ms'"),
        (NOON, "ms", "is in the year 1970 if it is in 'ms'; pass unit='s'"),
        (2**63, "s", "after the year 2100 .*pass its unit with unit="),
        (-(2**63), "s", "before the year 1840"),
        (float("nan"), "s", "must be a finite number, not nan"),
        (float("inf"), "s", "must be a finite number, not inf"),
        (datetime(2023, 11, 15, 12), "s", "is 2023-11-15T12:00:00 without a time zone.*tzinfo="),
        (NoTime(2023, 11, 15, tzinfo=UTC), "s", "is NaT, which is no time"),
        (date(2023, 11, 15), "s", "must be a number or a datetime with a time zone, not date"),
        (np.datetime64("2023-11-15"), "s", "not datetime64"),
        ("2023-11-15", "s", "not str"),
        (True, "s", "not bool"),
        (None, "s", "not NoneType"),
        (NOON, "seconds", "unit must be one of 's', 'ms', 'us', 'ns', not 'seconds'"),
        (NOON, None, "unit must be one of"),
    ],
)  # fmt: skip
async def test_times_that_can_hardly_be_meant_are_refused(
    client: Awaited, recorder: Recorder, *, time: Any, unit: Any, complaint: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint):
        await client.update("anna", [Event("a", time)], unit=unit)
    with pytest.raises(InvalidArgumentError):
        await client.update_many({"anna": [Event("a", time)]}, unit=unit)
    assert not recorder.seen


async def test_times_of_what_if_events_are_seconds(client: Awaited, recorder: Recorder) -> None:
    noon = datetime(2023, 11, 15, 12, tzinfo=UTC)
    await client.recommend("anna", what_if=[Event("a", noon), Event("b", NOON + 0.5)])
    times = [pb.Event(item_id="a", timestamp=NOON), pb.Event(item_id="b", timestamp=NOON)]
    assert [*recorder.request.what_if_events] == times
    with pytest.raises(InvalidArgumentError, match="give seconds, or a datetime"):
        await client.recommend("anna", what_if=Event("a", NOON * 1000))
