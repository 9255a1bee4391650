"""Turns Python values into protobuf fields. Errors name the argument.

Only values that a message cannot hold are refused here. The server checks its own limits, which may change.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from protos.dman.v1 import dman_pb2 as pb
from sdk._exceptions import InvalidArgumentError
from sdk._times import Unit, whole_seconds
from sdk._types import Event, Ids, Items

_INT32 = 1 << 31


def id_text(value: object, name: str, *, kinds: str = "str or int") -> str:
    """The id as text. Raises InvalidArgumentError unless it is non-empty text or an integer."""
    if isinstance(value, str):
        if not value:
            raise InvalidArgumentError(f"{name} must not be empty.")
        if not value.isascii():
            _check_encodable(value, name)
        return value
    if not isinstance(value, bool):
        try:
            return str(operator.index(value))  # type: ignore[arg-type]  # the TypeError is caught
        except TypeError:
            pass
    raise InvalidArgumentError(f"{name} must be {kinds}, not {type(value).__name__}.")


def integer(value: object, name: str, *, limit: int = _INT32) -> int:
    """The value as an int in [-limit, limit), the range of its field. Raises InvalidArgumentError."""
    if isinstance(value, bool):
        raise InvalidArgumentError(f"{name} must be an integer, not bool.")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidArgumentError(f"{name} must be an integer, not {type(value).__name__}.") from None
    if not -limit <= number < limit:
        raise InvalidArgumentError(f"{name} is out of range: {number}.")
    return number


def natural(value: object, name: str) -> int:
    """The value as an int of 64 bits without a sign. Raises InvalidArgumentError."""
    number = integer(value, name, limit=1 << 64)
    if number < 0:
        raise InvalidArgumentError(f"{name} is out of range: {number}.")
    return number


def id_texts(ids: Ids, name: str) -> list[str]:
    """One id or several, as texts, in the order given."""
    values = _as_list(ids, name)
    return [id_text(value, f"{name}[{position}]") for position, value in enumerate(values)]


def events(items: Items, timestamps: object = None, *, name: str = "items", unit: Unit | None = None) -> list[pb.Event]:
    """One item or several, each an id or an Event, oldest first; `timestamps` are for ids only.

    `unit` is what times count that are numbers; None: seconds.
    """
    if isinstance(items, (set, frozenset, Mapping)):
        raise InvalidArgumentError(f"{name} must be in order, oldest first; {type(items).__name__} has no order.")
    values = _as_list(items, name)
    if timestamps is not None:
        values = _with_timestamps(values, _as_list(timestamps, "timestamps"), name)
    return [_event(value, f"{name}[{position}]", unit) for position, value in enumerate(values)]


def _with_timestamps(ids: list[Any], timestamps: list[Any], name: str) -> list[Event]:
    if len(timestamps) != len(ids):
        raise InvalidArgumentError(
            f"timestamps must have one value for each of {name}: {len(timestamps)} given for {len(ids)}."
        )
    if any(isinstance(value, Event) for value in ids):
        raise InvalidArgumentError(f"timestamps go with ids; an Event in {name} has its own.")
    return [Event(item_id, timestamp) for item_id, timestamp in zip(ids, timestamps, strict=True)]


def _event(value: object, name: str, unit: Unit | None) -> pb.Event:
    if not isinstance(value, Event):
        return pb.Event(item_id=id_text(value, name, kinds="str, int or Event"))
    return pb.Event(
        item_id=id_text(value.item_id, name),
        timestamp=whole_seconds(value.timestamp, f"timestamp of {name}", unit),
    )


def _as_list(values: object, name: str) -> list[Any]:
    """`values` as a list: one value becomes a list of one. NumPy arrays and other iterables work."""
    if isinstance(values, (list, tuple)):
        return list(values)
    if values is None or isinstance(values, (bytes, bytearray)):
        raise InvalidArgumentError(f"{name} must be one value or several, not {type(values).__name__}.")
    if isinstance(values, (str, int, Event)) or not isinstance(values, Iterable):
        return [values]
    try:
        iterator = iter(values)
    except TypeError:  # a NumPy array without dimensions has __iter__ but is one value
        return [values]
    return list(iterator)


def _check_encodable(value: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"{name} is not valid Unicode text: {value!r}.") from None
