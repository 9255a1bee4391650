"""Added items as a store keeps them: everything comes back, and nothing else is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dman_runtime.data.added_items import MAX_LIKE, AddedItem

BUNDLE = "0123456789abcdef"


@pytest.mark.parametrize(
    "item",
    [
        AddedItem(),
        AddedItem("Ü", {"a": "b|c", "": ""}),
        AddedItem(like=("1", "ü")),
        AddedItem("x", {}, ("1",), np.array([1.5, -0.25], np.float32), BUNDLE),
    ],
)
def test_item_comes_back_from_its_json(item: AddedItem) -> None:
    again = AddedItem.from_json(item.as_json())
    assert again == item
    if item.embedding is not None:
        assert again.embedding is not None and again.embedding.dtype == np.float32
        np.testing.assert_array_equal(again.embedding, item.embedding)


def test_json_holds_only_what_says_something() -> None:
    assert AddedItem().as_json() == {}
    assert AddedItem("a", like=("1",)).as_json() == {"title": "a", "like": ["1"]}


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"other": 1},
        {"title": 1},
        {"title": "\ud800"},
        {"attributes": []},
        {"attributes": {"a": 1}},
        {"like": "1"},
        {"like": [1]},
        {"like": [""]},
        {"like": ["1"] * (MAX_LIKE + 1)},
        {"embedding": "AACAPw=="},
        {"bundle_id": BUNDLE},
        {"embedding": "AACAPw==", "bundle_id": "x"},
        {"embedding": "AACAPw==", "bundle_id": 1},
        {"embedding": "", "bundle_id": BUNDLE},
        {"embedding": "AAA=", "bundle_id": BUNDLE},
        {"embedding": "!", "bundle_id": BUNDLE},
        {"embedding": 1, "bundle_id": BUNDLE},
        {"embedding": "AACAfw==", "bundle_id": BUNDLE},  # infinity
    ],
)
def test_other_json_is_refused(content: Any) -> None:
    with pytest.raises(ValueError):
        AddedItem.from_json(content)
