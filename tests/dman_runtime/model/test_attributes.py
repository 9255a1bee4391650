"""The index of an attribute: which items have which values, in both directions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given, settings
from item_filters import FIELDS, item_lists, number, parts

from dman_runtime.model.attributes import Attributes


@settings(deadline=None, max_examples=100)
@given(items=item_lists())
def test_index_holds_every_value_of_every_item_in_both_directions(items: list[dict[str, str]]) -> None:
    attributes = Attributes(items)
    assert list(attributes.names) == sorted(FIELDS) and attributes.vocabulary == len(items)
    for name in FIELDS:
        field = attributes.field(name)
        assert field is not None
        values = list(field.values)
        for row, item in enumerate(items):
            assert sorted(values[code] for code in field.codes_of(row)) == sorted(set(parts(item, name)))
        for value, code in field.values.items():
            mask = field.mask(np.array([code]))
            assert mask.tolist() == [value in parts(item, name) for item in items]
            found = field.numbers[code]
            assert (None if np.isnan(found) else found) == number(value)
        chosen = np.array([len(items) - 1, 0, len(items) - 1])
        positions, codes = field.pairs_of(chosen)
        expected = [(place, code) for place, row in enumerate(chosen) for code in field.codes_of(row)]
        assert list(zip(positions.tolist(), codes.tolist(), strict=True)) == expected


def test_unknown_attribute_has_no_index() -> None:
    attributes = Attributes([{"a": "x"}, {}])
    assert attributes.field("b") is None and attributes.field("") is None
    assert attributes.field("a") is attributes.field("a")


def test_index_is_made_once_for_all_threads() -> None:
    attributes = Attributes([{"a": str(row)} for row in range(20_000)])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: attributes.field("a"), range(16)))
    assert all(one is found[0] for one in found)
