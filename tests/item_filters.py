"""What a filter leaves, in plain Python over a list of items: what the product is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from dman_runtime.diversity import Rule
from dman_runtime.item_filters import AllOf, AnyOf, Filter, In, Not, Range

FIELDS = ("genre", "year", "maker")
VALUES = ("a", "b", "c d", "", "1999", "2001", "2001.5", "-3e2", "1_0", "nan", "inf", "ü")


def parts(item: Mapping[str, str], field: str) -> list[str]:
    return item[field].split("|") if field in item else []


def number(text: str) -> float | None:
    if "_" in text:
        return None
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def matches(item: Mapping[str, str], wanted: Filter) -> bool:
    if isinstance(wanted, In):
        return any(part in wanted.values for part in parts(item, wanted.field))
    if isinstance(wanted, Range):
        found = [number(part) for part in parts(item, wanted.field)]
        low = -math.inf if wanted.minimum is None else wanted.minimum
        high = math.inf if wanted.maximum is None else wanted.maximum
        return any(one is not None and low <= one <= high for one in found)
    if isinstance(wanted, Not):
        return not matches(item, wanted.part)
    together = all if isinstance(wanted, AllOf) else any
    return together(matches(item, part) for part in wanted.parts)


def diverse(ranked: Sequence[int], items: Sequence[Mapping[str, str]], k: int, rules: Sequence[Rule]) -> list[int]:
    """The k best of ranked items that break no rule, place by place."""
    chosen: list[int] = []
    while len(chosen) < k:
        active = [rule for rule in rules if len(chosen) < rule.first]
        for item in ranked:
            if item in chosen:
                continue
            for rule in active:
                counts = [
                    sum(value in parts(items[one], rule.field) for one in chosen)
                    for value in parts(items[item], rule.field)
                ]
                if any(count >= rule.at_most for count in counts):
                    break
            else:
                chosen.append(item)
                break
        else:
            return chosen
    return chosen


def item_lists(size: int = 40) -> st.SearchStrategy[list[dict[str, str]]]:
    """Attributes of items; the first item has all fields, and a number in each."""
    texts = st.lists(st.sampled_from(VALUES), min_size=1, max_size=3).map("|".join)
    item = st.dictionaries(st.sampled_from(FIELDS), texts)
    return st.lists(item, max_size=size).map(lambda items: [dict.fromkeys(FIELDS, "7"), *items])


def filters(levels: int = 3) -> st.SearchStrategy[Filter]:
    field, end = st.sampled_from(FIELDS), st.none() | st.sampled_from([-300.0, 0.0, 1999.0, 2001.0, 2001.25, math.inf])
    values = st.lists(st.sampled_from([*VALUES, "none has it"]), max_size=4).map(tuple)
    ends = st.tuples(end, end).filter(lambda pair: None in pair or pair[0] <= pair[1])
    leaf = st.builds(In, field, values) | st.builds(lambda name, pair: Range(name, *pair), field, ends)
    found: st.SearchStrategy[Filter] = leaf
    for _ in range(levels):
        inner = st.lists(found, max_size=3).map(tuple)
        found = leaf | st.builds(AllOf, inner) | st.builds(AnyOf, inner) | st.builds(Not, found)
    return found
