"""Filters over the attributes of items, as a request states them, and the items that they leave. Pure.

Values are compared as texts; where an attribute is a list, it is enough that one of its values matches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dman_runtime.data.interactions import LIST_SEPARATOR
from dman_runtime.errors import RequestError
from dman_runtime.model.attributes import Attributes, Field

MAX_DEPTH = 8  # of filters in filters
MAX_PARTS = 64  # filters in one, itself included: each is a pass over all items
MAX_VALUES = 10_000  # in all parts together
_NAMED_CHARACTERS = 150  # of the attributes that an error lists


@dataclass(frozen=True, slots=True)
class In:
    """The attribute has one of these values."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """The attribute is a number in this range, ends included; None: no end."""

    field: str
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class AllOf:
    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """All other items, also those without the attribute."""

    part: Filter


Filter: TypeAlias = In | Range | AllOf | AnyOf | Not


def check_filter(found: Filter) -> None:
    """Raises RequestError for a filter that is too large, or that can never be meant."""
    parts = values = 0
    level: list[Filter] = [found]
    for _ in range(MAX_DEPTH):
        parts += len(level)
        if parts > MAX_PARTS:
            raise RequestError(f"a filter has more than {MAX_PARTS} parts", "list more values in one `in`")
        values += sum(len(one.values) for one in level if isinstance(one, In))
        if values > MAX_VALUES:
            raise RequestError(f"a filter has more than {MAX_VALUES} values", "send fewer, or candidates")
        for one in level:
            _check_alone(one)
        level = [part for one in level for part in parts_of(one)]
        if not level:
            return
    raise RequestError(f"a filter is more than {MAX_DEPTH} levels deep", "write it flatter")


def _check_alone(one: Filter) -> None:
    if isinstance(one, In):
        for value in one.values:
            if LIST_SEPARATOR in value:
                asked = f"a filter asks for {one.field!r:.80} {value!r:.80}"
                raise RequestError(f"{asked}; {LIST_SEPARATOR!r} separates the values of a list", "ask for one of them")
    elif isinstance(one, Range):
        ends = [end for end in (one.minimum, one.maximum) if end is not None]
        if any(math.isnan(end) for end in ends) or (len(ends) == 2 and ends[0] > ends[1]):
            raise RequestError(
                f"a filter asks for {one.field!r:.80} from {one.minimum} to {one.maximum}",
                "give numbers, the smaller one first",
            )


def parts_of(one: Filter) -> Sequence[Filter]:
    """The filters that a filter is made of."""
    if isinstance(one, Not):
        return (one.part,)
    return one.parts if isinstance(one, AllOf | AnyOf) else ()


def count_parts(one: Filter) -> int:
    """Filters in a filter, itself included."""
    return 1 + sum(map(count_parts, parts_of(one)))


def bytes_of(one: Filter) -> int:
    """About what a filter takes in memory."""
    texts = [one.field, *(one.values if isinstance(one, In) else ())] if isinstance(one, In | Range) else []
    return 100 + sum(60 + len(text) for text in texts) + sum(map(bytes_of, parts_of(one)))


def mask_of(one: Filter, attributes: Attributes) -> np.ndarray:
    """(V) bool: the items that a checked filter leaves. Raises RequestError for an attribute that no item has."""
    if isinstance(one, In):
        field = known_field(attributes, one.field)
        codes = [field.values[value] for value in one.values if value in field.values]
        return field.mask(np.array(codes, np.int64))
    if isinstance(one, Range):
        return _in_range(known_field(attributes, one.field), one)
    if isinstance(one, Not):
        return ~mask_of(one.part, attributes)
    every = isinstance(one, AllOf)
    mask = np.full(attributes.vocabulary, every)
    for part in one.parts:
        mask = mask & mask_of(part, attributes) if every else mask | mask_of(part, attributes)
    return mask


def _in_range(field: Field, one: Range) -> np.ndarray:
    numbers = field.numbers
    if np.isnan(numbers).all():
        raise RequestError(f"no item has a number as {one.field!r:.80}", "ask for its values with `in`")
    low = -math.inf if one.minimum is None else one.minimum
    high = math.inf if one.maximum is None else one.maximum
    return field.mask((numbers >= low) & (numbers <= high))  # False for NaN


def known_field(attributes: Attributes, name: str) -> Field:
    """Raises RequestError, which lists the attributes that there are, for one that no item has."""
    if (field := attributes.field(name)) is not None:
        return field
    if not attributes.names:
        raise RequestError(f"no item has an attribute {name!r:.80}", "the bundle was made without attributes of items")
    listed = ", ".join(map(repr, attributes.names))
    if len(listed) > _NAMED_CHARACTERS:
        listed = f"{listed[:_NAMED_CHARACTERS]}..."
    raise RequestError(f"no item has an attribute {name!r:.80}", f"use one of {listed}")
