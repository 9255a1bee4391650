"""A filter leaves exactly the items that a plain reading of it would leave, and hostile ones are refused early."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from item_filters import filters, item_lists, matches

from dman_runtime.errors import RequestError
from dman_runtime.item_filters import (
    MAX_DEPTH,
    MAX_PARTS,
    MAX_VALUES,
    AllOf,
    AnyOf,
    Filter,
    In,
    Not,
    Range,
    bytes_of,
    check_filter,
    count_parts,
    mask_of,
)
from dman_runtime.model.attributes import Attributes

ITEMS = [
    {"genre": "comedy|drama", "year": "1999", "maker": "A"},
    {"genre": "drama", "year": "2001"},
    {"genre": "comedy", "year": "unknown", "maker": "B"},
    {},
    {"year": "1e3|2001.5"},
]
DRAMA, COMEDY = In("genre", ("drama",)), In("genre", ("comedy",))


def left(wanted: Filter, items: list[dict[str, str]] = ITEMS) -> list[int]:
    check_filter(wanted)
    mask = mask_of(wanted, Attributes(items))
    assert mask.dtype == bool and mask.shape == (len(items),)
    return np.flatnonzero(mask).tolist()


@pytest.mark.parametrize(
    ("wanted", "items"),
    [
        (DRAMA, [0, 1]),
        (In("genre", ("drama", "comedy", "none")), [0, 1, 2]),
        (In("genre", ()), []),
        (In("genre", ("Drama", "dram", " drama")), []),
        (Range("year", 1999, 2001), [0, 1]),
        (Range("year", 2001), [1, 4]),
        (Range("year", None, 1999), [0, 4]),
        (Range("year"), [0, 1, 4]),
        (Range("year", 3000), []),
        (Range("year", -math.inf, math.inf), [0, 1, 4]),
        (AllOf((DRAMA, COMEDY)), [0]),
        (AnyOf((DRAMA, COMEDY)), [0, 1, 2]),
        (AllOf(()), [0, 1, 2, 3, 4]),
        (AnyOf(()), []),
        (Not(DRAMA), [2, 3, 4]),
        (Not(Not(DRAMA)), [0, 1]),
        (AllOf((Not(In("maker", ("A",))), AnyOf((DRAMA, Range("year", 2001.5))))), [1, 4]),
    ],
)
def test_filter_leaves(wanted: Filter, items: list[int]) -> None:
    assert left(wanted) == items


@settings(deadline=None, max_examples=300)
@given(items=item_lists(), wanted=filters())
def test_filter_leaves_what_plain_python_leaves(items: list[dict[str, str]], wanted: Filter) -> None:
    assert left(wanted, items) == [row for row, item in enumerate(items) if matches(item, wanted)]


def test_attribute_that_no_item_has_is_named_with_those_that_there_are() -> None:
    for wanted in (In("gendre", ("drama",)), Range("gendre", 1), Not(AllOf((DRAMA, In("gendre", ()))))):
        with pytest.raises(RequestError) as raised:
            left(wanted)
        assert str(raised.value) == "no item has an attribute 'gendre'; use one of 'genre', 'maker', 'year'"
    with pytest.raises(RequestError, match="the bundle was made without attributes of items"):
        left(DRAMA, [{}, {}])


def test_list_of_attributes_in_an_error_is_short() -> None:
    items = [{f"{number:03}" * 100: "x" for number in range(1000)}]
    with pytest.raises(RequestError, match=r"use one of '0000.*\.\.\.$") as raised:
        left(In("other" * 100, ("x",)), items)
    assert len(str(raised.value)) < 300


def test_range_over_an_attribute_without_numbers_says_so() -> None:
    with pytest.raises(RequestError, match="no item has a number as 'genre'; ask for its values with `in`"):
        left(Range("genre", 1, 2))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Range("year", 2, 1), "from 2 to 1; give numbers"),
        (Range("year", math.nan), "give numbers"),
        (Range("year", None, math.nan), "give numbers"),
        (In("genre", ("comedy", "comedy|drama")), r"'comedy\|drama'; '\|' separates the values of a list"),
        (AnyOf((DRAMA,) * MAX_PARTS), f"more than {MAX_PARTS} parts"),
        (AllOf((AnyOf((DRAMA,) * 32), AnyOf((DRAMA,) * 32))), f"more than {MAX_PARTS} parts"),
        (AllOf((In("genre", ("a",) * MAX_VALUES), In("genre", ("b",)))), f"more than {MAX_VALUES} values"),
    ],
)
def test_filter_that_cannot_be_meant_is_refused(wanted: Filter, message: str) -> None:
    for filter_ in (wanted, Not(wanted)):
        with pytest.raises(RequestError, match=message):
            check_filter(filter_)


def test_filter_of_the_largest_size_is_answered() -> None:
    assert left(AnyOf((DRAMA,) * (MAX_PARTS - 1))) == [0, 1]
    assert left(In("genre", (*map(str, range(MAX_VALUES - 1)), "drama"))) == [0, 1]
    deep: Filter = DRAMA
    for _ in range(MAX_DEPTH - 1):
        deep = Not(deep)
    assert left(deep) == [2, 3, 4]
    with pytest.raises(RequestError, match=f"more than {MAX_DEPTH} levels deep"):
        check_filter(Not(deep))


def test_parts_and_bytes_are_counted() -> None:
    wanted = AllOf((Not(DRAMA), AnyOf((COMEDY, Range("year")))))
    assert count_parts(wanted) == 6 and count_parts(DRAMA) == 1
    assert bytes_of(In("f", ("x" * 1000,) * 10)) > 10_000 > bytes_of(wanted)
