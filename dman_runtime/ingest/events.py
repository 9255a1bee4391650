"""From the bytes of a message to an event that can be stored, with the checks of a log that is imported."""

from __future__ import annotations

import csv
import datetime
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dman_runtime.data.files.json_rows import json_object
from dman_runtime.data.ids import BLANKS, INTEGER, id_problem, is_integer_id
from dman_runtime.data.log_options import AUTO, NONE
from dman_runtime.data.tables import quoted
from dman_runtime.data.times import FIRST, ISO_FIXES, UNITS, end_of_next_year
from dman_runtime.ingest.base import Message
from dman_runtime.ingest.options import MAX_EVENT_BYTES, IngestOptions

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_EARLIEST = -(1 << 63)
Fields = Callable[[bytes], Mapping[str, Any]]  # what a message holds, by the names of the options


class Event(NamedTuple):
    user_id: str
    item_id: str
    timestamp: int  # seconds since 1970; 0 where unknown


class UnusableError(Exception):
    """A message that is no event; the text says why."""


class EventReader:
    """Reads messages of one format. `user_ids` and `item_ids` say what ids are, where the options leave it open:
    INTEGER, TEXT or "" for both.
    """

    def __init__(self, options: IngestOptions, fields: Fields, *, user_ids: str, item_ids: str) -> None:
        self._options, self._fields = options, fields
        self._users = user_ids if options.user_ids == AUTO else options.user_ids
        self._items = item_ids if options.item_ids == AUTO else options.item_ids

    def read(self, message: Message) -> Event:
        """Raises UnusableError."""
        value, options = message.value, self._options
        if not value:
            raise UnusableError("the message has no value")
        if len(value) > MAX_EVENT_BYTES:
            raise UnusableError(f"the message has more than {MAX_EVENT_BYTES} bytes")
        fields = self._fields(value)
        user_id = _id("user", options.user_column, fields.get(options.user_column), self._users)
        item_id = _id("item", options.item_column, fields.get(options.item_column), self._items)
        timestamp = 0
        if options.time_column != NONE:
            timestamp = seconds_of(options.time_column, fields.get(options.time_column), options.time_unit)
        if message.key and options.keys == "user" and message.key != user_id.encode():
            raise UnusableError(f"the key {quoted(message.key.decode(errors='replace'))} is not the user id")
        return Event(user_id, item_id, timestamp)


# -- formats -----------------------------------------------------------------------------------------------------------


def json_fields(value: bytes) -> Mapping[str, Any]:
    found = json_object(value)
    if isinstance(found, str):
        raise UnusableError(f"the message {found}")
    return found


def csv_row(line: bytes) -> list[str]:
    """The values of a line, which stands alone: a value has no line breaks."""
    try:
        rows = list(csv.reader([line.decode().rstrip("\r\n")], strict=True))
    except (csv.Error, UnicodeDecodeError):
        raise UnusableError("the line is no line of CSV in UTF-8") from None
    return rows[0] if rows else []


def csv_fields(options: IngestOptions, header: Callable[[], list[str]]) -> Fields:
    """`header` gives the names of the columns, once a line was read."""
    wanted = [name for name in (options.user_column, options.item_column, options.time_column) if name != NONE]

    def fields(line: bytes) -> Mapping[str, Any]:
        row, names = csv_row(line), header()
        if missing := [name for name in wanted if name not in names]:
            raise UnusableError(f"the header has no column {quoted(missing[0])}")
        if len(row) != len(names):
            raise UnusableError(f"the line has {len(row)} values, the header {len(names)}")
        return dict(zip(names, row, strict=True))

    return fields


def protobuf_fields(options: IngestOptions) -> Fields:
    """Of `dman.v1.InteractionEvent`. A time of 0 is unknown."""
    from google.protobuf.message import DecodeError

    from protos.dman.v1.dman_pb2 import InteractionEvent

    def fields(value: bytes) -> Mapping[str, Any]:
        try:
            event = InteractionEvent.FromString(value)
        except DecodeError:
            raise UnusableError("the message is no InteractionEvent") from None
        found = {options.user_column: event.user_id, options.item_column: event.item_id}
        return {**found, options.time_column: event.timestamp}

    return fields


# -- values ------------------------------------------------------------------------------------------------------------


def _id(role: str, name: str, value: object, kind: str) -> str:
    if value is None or value == "":
        raise UnusableError(f"{name} has no value")
    if type(value) is int:
        text = str(value)
    elif isinstance(value, str):
        text = value.strip(BLANKS)
    else:
        raise UnusableError(f"{name} {quoted(value)} is neither text nor an integer")
    if (problem := id_problem(text)) is not None:
        raise UnusableError(f"{name} {quoted(text)} {problem}")
    if kind == INTEGER and not is_integer_id(text):
        raise UnusableError(f"{name} {quoted(text)} is no integer of 64 bits, and {role} ids are integers")
    return text


def seconds_of(name: str, value: object, unit: str) -> int:
    """Seconds since 1970, rounded down, of a number in a unit or of a time in words. Raises UnusableError."""
    if value is None or value == "":
        raise UnusableError(f"{name} has no value")
    number: float | None = None
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            return _in_range(name, value, _words(text), 1)
        number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else float(text)
    elif type(value) in (int, float):
        number = value  # type: ignore[assignment]
    if number is None or (isinstance(number, float) and not math.isfinite(number)):
        raise UnusableError(f"{name} {quoted(value)} is not a time")
    return _in_range(name, value, number, UNITS[unit] if unit != AUTO else _per_second(number))


def _in_range(name: str, value: object, number: float | None, per_second: int) -> int:
    if number is None or number < _EARLIEST:
        raise UnusableError(f"{name} {quoted(value)} is not a time")
    seconds = math.floor(number // per_second)
    if seconds >= end_of_next_year():
        raise UnusableError(f"{name} {quoted(value)} is a time beyond the next year")
    return seconds


def _per_second(number: float) -> int:
    """Of the unit in which a time is plausible, as in a log; else of seconds."""
    late = end_of_next_year()
    return next((one for one in UNITS.values() if FIRST * one <= number < late * one), 1)


def _words(text: str) -> float | None:
    """A time in words, as a log may have it, in UTC where it names no zone; None for another text."""
    for pattern, replacement in ISO_FIXES:
        text = re.sub(pattern, replacement, text)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
