"""The items of a bundle, and items.jsonl, which lists them in index order. Format: docs/formats.md."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dman_runtime.data.ids import id_problem
from dman_runtime.data.untrusted import is_text, is_whole_number, parse_json_line

MAX_LINE_BYTES = 1 << 20
MAX_EVENTS = (1 << 63) - 1
_DECIMAL = re.compile("0|-?[1-9][0-9]*")
_NO_ITEMS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Items:
    """The vocabulary, in index order."""

    item_ids: list[str]
    popularity: np.ndarray  # (V) float64 share of the training events
    titles: list[str]  # "" where unknown
    attributes: list[dict[str, str]]
    index: dict[str, int]  # item id -> item index

    def indices(self, item_ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Item indices (int64) of the known ids in order, and the unknown ids."""
        if not item_ids:
            return _NO_ITEMS, []
        known, unknown = [], []
        for item_id in item_ids:
            index = self.index.get(item_id)
            if index is None:
                unknown.append(item_id)
            else:
                known.append(index)
        return np.array(known, np.int64), unknown


def parse_items(content: bytes, vocabulary: int, *, integer_item_ids: bool) -> Items:
    """The `vocabulary` items that items.jsonl lists. Raises ValueError."""
    item_ids: list[str] = []
    counts, titles, attributes = [], [], []
    stream = io.BytesIO(content)
    while line := stream.readline(MAX_LINE_BYTES + 1):
        try:
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"it is longer than {MAX_LINE_BYTES} bytes")
            entry = parse_json_line(line)
            _check_entry(entry, integer_item_ids=integer_item_ids)
        except ValueError as error:
            raise ValueError(f"line {len(item_ids) + 1} is malformed: {error}") from None
        item_ids.append(entry["item_id"])
        counts.append(entry["events"])
        titles.append(entry.get("title", ""))
        attributes.append(entry.get("attributes", {}))
        if len(item_ids) > vocabulary:
            raise ValueError(f"lists more than {vocabulary} items")
    index = {item_id: i for i, item_id in enumerate(item_ids)}
    if not len(item_ids) == len(index) == vocabulary:
        raise ValueError(f"lists {len(index)} distinct items, expected {vocabulary}")
    popularity = np.array(counts, np.float64)
    return Items(item_ids, popularity / max(popularity.sum(), 1.0), titles, attributes, index)


def _check_entry(entry: object, *, integer_item_ids: bool) -> None:
    """Raises ValueError for a line that breaks the format."""
    if not isinstance(entry, dict) or not {"item_id", "events"} <= entry.keys():
        raise ValueError("it is not an object with item_id and events")
    item_id = entry["item_id"]
    if not isinstance(item_id, str):
        raise ValueError("item_id is not a text")
    if problem := id_problem(item_id):
        raise ValueError(f"item_id {problem}")
    if integer_item_ids and not _DECIMAL.fullmatch(item_id):
        raise ValueError("item_id is not an integer")
    if not is_whole_number(entry["events"], 0, MAX_EVENTS):
        raise ValueError("events is not a number of events")
    if not is_text(entry.get("title", "")):
        raise ValueError("title is not a text")
    attributes = entry.get("attributes")
    if attributes is None and "attributes" not in entry:
        return
    if not isinstance(attributes, dict):
        raise ValueError("attributes is not an object")
    for name, value in attributes.items():
        if not is_text(name) or not is_text(value):
            raise ValueError("attributes holds something else than texts")


def items_jsonl(entries: Iterable[dict[str, Any]]) -> str:
    """The content of items.jsonl: one object a line with item_id, events and optional title and attributes."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
