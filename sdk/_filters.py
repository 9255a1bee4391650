"""Which items may be recommended: filters over attributes, and rules of diversity."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, SupportsFloat, SupportsIndex

from protos.dman.v1 import dman_pb2 as pb
from sdk import _wire
from sdk._exceptions import InvalidArgumentError
from sdk._types import Id


class Filter:
    """Which items may be recommended. Made by `has` and `between`, and combined with `&`, `|` and `~`.

        client.recommend("anna", filter=has("genre", "comedy", "drama") & between("year", 1990) & ~has("studio", "A"))

    `a & b` leaves what both leave, `a | b` what at least one leaves, and `~a` all other items, also those that lack the
    attribute. Parentheses matter: `&` binds closer than `|`. The server refuses filters of more than 64 parts, 10000
    values or 8 levels.
    """

    __slots__ = ("_message",)

    def __init__(self, message: pb.Filter) -> None:
        """For `has` and `between`."""
        self._message = message

    def __and__(self, other: "Filter") -> "Filter":
        return _joined("all", self, other) if isinstance(other, Filter) else NotImplemented

    def __or__(self, other: "Filter") -> "Filter":
        return _joined("any", self, other) if isinstance(other, Filter) else NotImplemented

    def __invert__(self) -> "Filter":
        return _of("not", self._message)

    def __bool__(self) -> bool:
        raise TypeError("a filter is neither true nor false: combine filters with &, | and ~, not with and, or and not")

    def __repr__(self) -> str:
        return f"Filter({' '.join(str(self._message).split())})"


def has(field: str, *values: Id) -> Filter:
    """Items whose attribute is one of the values; of an attribute that holds a list, one of its values is enough.

    Values are compared as texts, integers in decimal.

    Raises:
        InvalidArgumentError: There is no value, or one is neither text nor an integer.
    """
    if not values:
        raise InvalidArgumentError(f"has({field!r}) needs at least one value.")
    texts = [_wire.id_text(value, f"values[{position}]") for position, value in enumerate(values)]
    return _of("in", pb.Filter.In(field=_wire.id_text(field, "field", kinds="str"), values=texts))


def between(field: str, min: SupportsFloat | None = None, max: SupportsFloat | None = None) -> Filter:
    """Items whose attribute is a number from `min` to `max`, both included; None: no limit on that side.

    Raises:
        InvalidArgumentError: A limit is not a number, or `min` is above `max`.
    """
    least, most = _number(min, "min"), _number(max, "max")
    if least is not None and most is not None and least > most:
        raise InvalidArgumentError(f"min must not be above max: {least} and {most} given.")
    return _of("range", pb.Filter.Range(field=_wire.id_text(field, "field", kinds="str"), min=least, max=most))


@dataclasses.dataclass(frozen=True, slots=True)
class Diversity:
    """At most `at_most` of the first `first` items have the same value of an attribute; None: of all items asked for.

    An item with several values counts for each, and one without the attribute is not limited. Each place gets the best
    item that breaks no rule there, so the answer is shorter only where no other item is left.
    """

    field: str
    at_most: SupportsIndex
    first: SupportsIndex | None = None


def filter_message(given: object) -> pb.Filter | None:
    """Raises InvalidArgumentError."""
    if given is None:
        return None
    if not isinstance(given, Filter):
        raise InvalidArgumentError(f"filter must be made with has or between, not of {type(given).__name__}.")
    return given._message


def diversity_messages(given: Diversity | Iterable[Diversity]) -> list[pb.Diversity]:
    """Raises InvalidArgumentError."""
    rules = [given] if isinstance(given, Diversity) else list(given)
    messages = []
    for position, rule in enumerate(rules):
        name = f"diversity[{position}]"
        if not isinstance(rule, Diversity):
            raise InvalidArgumentError(f"{name} must be a Diversity, not {type(rule).__name__}.")
        messages.append(
            pb.Diversity(
                field=_wire.id_text(rule.field, f"{name}.field", kinds="str"),
                at_most=_wire.integer(rule.at_most, f"{name}.at_most"),
                first=None if rule.first is None else _wire.integer(rule.first, f"{name}.first"),
            )
        )
    return messages


def _joined(kind: str, *filters: Filter) -> Filter:
    """Filters of the same kind become one, so that long chains are not deep."""
    parts: list[pb.Filter] = []
    for one in filters:
        same = one._message.WhichOneof("kind") == kind
        parts += getattr(one._message, kind).filters if same else [one._message]
    return _of(kind, pb.Filter.Parts(filters=parts))


def _of(kind: str, message: Any) -> Filter:
    """`in` and `not` are keywords of Python, and can be named only like this."""
    return Filter(pb.Filter(**{kind: message}))


def _number(value: SupportsFloat | None, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, (bool, str)) or math.isnan(number):
        raise InvalidArgumentError(f"{name} must be a number, not {value!r:.40}.")
    return number
