"""Turns times into whole seconds since 1970. Errors say what is wrong and how to give the time instead."""

import datetime
import math
import operator
from typing import Literal, SupportsFloat, SupportsIndex, TypeAlias

from sdk._exceptions import InvalidArgumentError

Time: TypeAlias = SupportsIndex | SupportsFloat | datetime.datetime
"""A number in some unit since 1970 (NumPy's too), or a `datetime` with a time zone (a `pandas.Timestamp` too)."""

Unit: TypeAlias = Literal["s", "ms", "us", "ns"]
"""What a number counts: seconds, milliseconds, microseconds or nanoseconds."""

_PER_SECOND: dict[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_SECOND = datetime.timedelta(seconds=1)
_YEAR_1971, _YEAR_2000, _YEAR_2100 = 31_536_000, 946_684_800, 4_102_444_800  # seconds


def checked_unit(unit: object) -> Unit:
    """The unit itself. Raises InvalidArgumentError."""
    if not isinstance(unit, str) or unit not in _PER_SECOND:
        raise InvalidArgumentError(f"unit must be one of {', '.join(map(repr, _PER_SECOND))}, not {unit!r}.")
    return unit  # type: ignore[return-value]  # it is one of them


def whole_seconds(value: object, name: str, unit: Unit | None) -> int:
    """The time in whole seconds since 1970, rounded down. A datetime needs no unit. None: seconds, and no choice.

    Raises InvalidArgumentError, also for a number that can hardly be meant: beyond the year 2100, or in 1970 where
    another unit would make it a time of this century.
    """
    if isinstance(value, datetime.datetime):
        return _of_datetime(value, name)
    number = _floor(value, name)
    seconds = number // _PER_SECOND[unit or "s"]
    likely = _likely_unit(number)
    if abs(seconds) < _YEAR_2100 and not (likely and 0 <= seconds < _YEAR_1971):
        return seconds
    when = (
        "before the year 1840" if seconds < 0 else "in the year 1970" if seconds < _YEAR_1971 else "after the year 2100"
    )
    remedy = f"pass unit={likely!r}" if likely else "pass its unit with unit=, or a datetime with a time zone"
    raise InvalidArgumentError(
        f"{name} is {value}, which is {when} if it is in {unit or 's'!r}; "
        f"{remedy if unit else 'give seconds, or a datetime with a time zone'}."
    )


def _of_datetime(value: datetime.datetime, name: str) -> int:
    if operator.ne(value, value):  # pandas.NaT is a datetime, and unequal to itself
        raise InvalidArgumentError(f"{name} is {value}, which is no time; leave it out or give 0 where it is unknown.")
    if value.utcoffset() is None:
        raise InvalidArgumentError(
            f"{name} is {value.isoformat()} without a time zone. Give it one, such as tzinfo=datetime.UTC."
        )
    return int((value - _EPOCH) // _SECOND)


def _floor(value: object, name: str) -> int:
    """The number, rounded down, without a loss of digits."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]  # the TypeError is caught
        except TypeError:
            pass
        if hasattr(value, "__float__"):
            try:
                return math.floor(value)
            except (ValueError, OverflowError):
                raise InvalidArgumentError(f"{name} must be a finite number, not {value}.") from None
            except TypeError:
                pass
    raise InvalidArgumentError(f"{name} must be a number or a datetime with a time zone, not {type(value).__name__}.")


def _likely_unit(number: int) -> str | None:
    """The unit that makes the number a time of this century."""
    likely = (unit for unit, count in _PER_SECOND.items() if _YEAR_2000 <= number // count < _YEAR_2100)
    return next(likely, None)
