"""How a log is read: its dialect, its columns, what orders it, and what its ids and times are."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dman_runtime.errors import InputError

AUTO, NONE = "auto", "none"


def option(default: Any, help: str) -> Any:
    """A dataclass field; `help` becomes the help text of its option on the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LogOptions:
    """What is known about a log before it is read. "auto" is found out, and the input report says what was found.

    Raises InputError, whose parameter is the field, for a value that cannot be meant.
    """

    user_column: str = option(AUTO, "column with the user ids: its name, or without a header its number from 1")
    item_column: str = option(AUTO, "column with the item ids")
    time_column: str = option(AUTO, "column with the times; none: do not read any")
    position_column: str = option(
        AUTO, "column with the position of an event in its user's history; none: do not read any"
    )
    order_by: Literal["auto", "time", "position", "file"] = option(
        AUTO, "what orders the events of a user; auto: the time, then the position, as far as the log has them"
    )
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = option(AUTO, "unit of times that are numbers")
    user_ids: Literal["auto", "text", "integer"] = option(AUTO, "what user ids are")
    item_ids: Literal["auto", "text", "integer"] = option(AUTO, "what item ids are")
    exact_repeats: Literal["auto", "keep", "drop"] = option(
        AUTO, "rows with the same user, item and time as another; auto: drop, but keep them if times are only dates"
    )
    format: Literal["auto", "text", "jsonl", "parquet"] = option(AUTO, "format of the files")
    separator: str = option(AUTO, "what separates the values of a line: , ; | :: tab blank")
    quote: Literal["auto", "none", "double", "backslash"] = option(
        AUTO, "how values are quoted: not at all; in double quotes, and a quote inside is doubled or has a backslash"
    )
    header: bool = option(True, "text files begin with the names of their columns")
    encoding: str = option(AUTO, "encoding of text files, such as utf-16 or latin-1")
    bad_rows: Literal["fail", "skip"] = option("fail", "rows that cannot be read: stop at the first, or leave them out")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in fields(LogOptions):
            value, kind = getattr(self, one.name), hints[one.name]
            allowed = get_args(kind) if get_origin(kind) is Literal else None
            if allowed and value not in allowed:
                raise InputError(
                    f"{one.name} is {value!r:.60}", f"choose one of {', '.join(allowed)}", parameter=one.name
                )
            if not isinstance(value, bool if kind is bool else str) or value == "":
                raise InputError(f"{one.name} is {value!r:.60}", "give a text", parameter=one.name)


ANY_LOG = LogOptions()


def options_of_training(data: dict[str, Any]) -> LogOptions:
    """The options that a bundle or a run recorded of its training log; of older ones, what they recorded.

    What belongs to a file and not to the events (dialect, encoding, bad rows) is not taken over.
    """
    names = {"user_column", "item_column", "time_column", "position_column", "order_by", "user_ids", "item_ids"}
    names |= {"exact_repeats"}  # not the unit of times: each file shows its own
    known = {name: data[name] for name in names if isinstance(data.get(name), str)}
    if "order_by" not in known:  # written before columns were recorded as they were found: their defaults mean nothing
        defaults = {"user_column": "user_id", "item_column": "item_id"}
        defaults |= {"time_column": "timestamp", "position_column": "position"}
        known = {name: value for name, value in known.items() if defaults.get(name) != value}
    try:
        return LogOptions(**known)
    except InputError:  # of a later version
        return ANY_LOG
