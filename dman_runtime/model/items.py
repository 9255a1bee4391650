"""The items of a bundle, and items.jsonl, which lists them in index order. Format: docs/formats.md."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dman_runtime.data.ids import MAX_ID_BYTES, id_problem
from dman_runtime.data.untrusted import is_text, is_whole_number, parse_json_line

MAX_LINE_BYTES = 1 << 20
MAX_EVENTS = (1 << 63) - 1
_DECIMAL = re.compile("0|-?[1-9][0-9]*")
_NO_ITEMS = np.zeros(0, np.int64)
_NO_ATTRIBUTES: dict[str, str] = {}  # shared by all items without
_BLOCK_BYTES = 1 << 20  # of lines that are parsed together


@dataclass(frozen=True)
class Items:
    """The vocabulary, in index order."""

    item_ids: list[str]
    popularity: np.ndarray  # (V) float64 share of the training events
    by_popularity: np.ndarray  # (V) int64 item indices, the most popular first, equal ones by index
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
    counts, titles, attributes = list[int](), list[str](), list[dict[str, str]]()
    stream = io.BytesIO(content)
    while lines := stream.readlines(_BLOCK_BYTES):
        entries = _entries_at_once(lines, integer_item_ids=integer_item_ids)
        if entries is None:
            entries = _entries_one_by_one(lines, len(item_ids), integer_item_ids=integer_item_ids)
        item_ids += [entry["item_id"] for entry in entries]
        counts += [entry["events"] for entry in entries]
        titles += [entry.get("title", "") for entry in entries]
        attributes += [entry.get("attributes", _NO_ATTRIBUTES) for entry in entries]
        if len(item_ids) > vocabulary:
            raise ValueError(f"lists more than {vocabulary} items")
    index = dict(zip(item_ids, range(len(item_ids)), strict=True))
    if not len(item_ids) == len(index) == vocabulary:
        raise ValueError(f"lists {len(index)} distinct items, expected {vocabulary}")
    popularity = np.array(counts, np.float64)
    popularity /= max(popularity.sum(), 1.0)
    by_popularity = np.argsort(-popularity, kind="stable")
    return Items(item_ids, popularity, by_popularity, titles, attributes, index)


def _entries_at_once(lines: Sequence[bytes], *, integer_item_ids: bool) -> list[dict[str, Any]] | None:
    """The entries of some lines, parsed and checked together, which takes a fifth of the time; None for what is not
    plainly in order."""
    if max(map(len, lines)) > MAX_LINE_BYTES or not all(line.startswith(b"{") for line in lines):
        return None
    try:
        entries = parse_json_line(b"[" + b",".join(lines) + b"]")
        item_ids = [entry["item_id"] for entry in entries]
        events = [entry["events"] for entry in entries]
    except (ValueError, KeyError, TypeError):
        return None
    titles = [entry.get("title", "") for entry in entries]
    texts = set(map(type, item_ids)) | set(map(type, titles))
    if len(entries) != len(lines) or texts != {str} or set(map(type, events)) != {int}:
        return None
    together = "".join(item_ids)
    plain = together.isascii() and together.isprintable() and is_text("".join(titles))
    sizes = min(map(len, item_ids)) > 0 and max(map(len, item_ids)) <= MAX_ID_BYTES
    counted = min(events) >= 0 and max(events) <= MAX_EVENTS
    if not (plain and sizes and counted) or (integer_item_ids and not all(map(_DECIMAL.fullmatch, item_ids))):
        return None
    fine = all(_are_attributes(entry["attributes"]) for entry in entries if "attributes" in entry)
    return entries if fine else None


def _entries_one_by_one(lines: Sequence[bytes], before: int, *, integer_item_ids: bool) -> list[dict[str, Any]]:
    """The entries of some lines, with so many lines before them. Raises ValueError, which names the line."""
    entries = []
    for number, line in enumerate(lines, start=before + 1):
        try:
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"it is longer than {MAX_LINE_BYTES} bytes")
            entry = parse_json_line(line)
            _check_entry(entry, integer_item_ids=integer_item_ids)
        except ValueError as error:
            raise ValueError(f"line {number} is malformed: {error}") from None
        entries.append(entry)
    return entries


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
    if "attributes" in entry and not isinstance(entry["attributes"], dict):
        raise ValueError("attributes is not an object")
    if not _are_attributes(entry.get("attributes", _NO_ATTRIBUTES)):
        raise ValueError("attributes holds something else than texts")


def _are_attributes(value: object) -> bool:
    return isinstance(value, dict) and all(is_text(name) and is_text(text) for name, text in value.items())


def items_jsonl(entries: Iterable[dict[str, Any]]) -> str:
    """The content of items.jsonl: one object a line with item_id, events and optional title and attributes."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
