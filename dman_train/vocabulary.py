"""The items of a run, and vocabulary.json, which holds them in index order."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

import numpy as np

from dman_runtime.data.ids import id_problem
from dman_runtime.data.interactions import ItemInfo
from dman_runtime.data.untrusted import is_whole_number, parse_json

LARGEST_COUNT = (1 << 63) - 1


@dataclass(frozen=True)
class Vocabulary:
    """The items of a run, in index order."""

    item_ids: list[str]
    integer_item_ids: bool
    counts: np.ndarray  # (V) int64 training events
    items: dict[str, ItemInfo]  # by item id; may lack some

    def to_json(self) -> str:
        info = {i: {"title": x.title, "attributes": x.attributes} for i, x in self.items.items()}
        return json.dumps(
            {
                "item_ids": self.item_ids,
                "integer_item_ids": self.integer_item_ids,
                "counts": self.counts.tolist(),
                "items": info,
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, content: bytes) -> Vocabulary:
        """Raises ValueError for anything else than `to_json` writes."""
        data = parse_json(content)
        if not isinstance(data, dict) or not {f.name for f in fields(cls)} <= data.keys():
            raise ValueError("it is not an object with the items of a run")
        ids, counts = data["item_ids"], data["counts"]
        if not isinstance(ids, list) or not all(isinstance(i, str) and id_problem(i) is None for i in ids):
            raise ValueError("item_ids is not a list of item ids")
        if len(set(ids)) != len(ids):
            raise ValueError("an item id occurs twice")
        if not isinstance(data["integer_item_ids"], bool):
            raise ValueError("integer_item_ids is neither true nor false")
        if not isinstance(counts, list) or not all(is_whole_number(count, 0, LARGEST_COUNT) for count in counts):
            raise ValueError("counts is not a list of numbers of events")
        if len(counts) != len(ids):
            raise ValueError("there is not one count per item")
        if not isinstance(data["items"], dict):
            raise ValueError("items is not an object")
        items = {i: _item_info(info) for i, info in data["items"].items()}
        return cls(ids, data["integer_item_ids"], np.array(counts, np.int64), items)


def _item_info(info: object) -> ItemInfo:
    """An item as `Vocabulary.to_json` writes it. Raises ValueError."""
    if not isinstance(info, dict) or not isinstance(info.get("title"), str):
        raise ValueError("an item has no title that is a text")
    attributes = info.get("attributes")
    if not isinstance(attributes, dict) or not all(isinstance(value, str) for value in attributes.values()):
        raise ValueError("an item has attributes that are not texts")
    return ItemInfo(info["title"], attributes)
