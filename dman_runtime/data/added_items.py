"""Items that were added at run time: what is known of them, whatever bundle serves. Values and their JSON."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dman_runtime.data.ids import id_problem
from dman_runtime.data.untrusted import is_text

MAX_LIKE = 100  # items that one is like
MAX_WIDTH = 4096
MAX_TEXT_BYTES = 64 << 10  # of title and attributes together
_BUNDLE_ID = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class AddedItem:
    """An item that was added at run time. What its embedding comes from, in this order: `embedding` under the bundle
    that it belongs to, the mean of the items that it is `like`, its title and attributes."""

    title: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    like: tuple[str, ...] = ()  # external ids
    embedding: np.ndarray | None = field(default=None, compare=False)  # (D) float32
    bundle_id: str = ""  # whose item table the embedding belongs to; "" without one

    def as_json(self) -> dict[str, Any]:
        """The fields that say something."""
        found: dict[str, Any] = {"title": self.title, "attributes": dict(self.attributes), "like": list(self.like)}
        if self.embedding is not None:
            vector = base64.b64encode(self.embedding.astype("<f4").tobytes()).decode()
            found |= {"embedding": vector, "bundle_id": self.bundle_id}
        return {name: value for name, value in found.items() if value}

    @classmethod
    def from_json(cls, content: Any) -> AddedItem:
        """Raises ValueError for what `as_json` does not write."""
        known = {"title", "attributes", "like", "embedding", "bundle_id"}
        if not isinstance(content, dict) or not content.keys() <= known:
            raise ValueError("it is not an object with the fields of an added item")
        if ("embedding" in content) != ("bundle_id" in content):
            raise ValueError("an embedding and its bundle id belong together")
        like = content.get("like", [])
        if not isinstance(like, list):
            raise ValueError("what it is like is not a list")
        item = cls(
            content.get("title", ""),
            content.get("attributes", {}),
            tuple(like),
            _decoded(content["embedding"]) if "embedding" in content else None,
            content.get("bundle_id", ""),
        )
        return checked_item(item)


def checked_item(item: AddedItem) -> AddedItem:
    """The item itself. ValueError, which says why, for one that cannot be stored."""
    texts = [item.title, *_texts(item.attributes)]
    if not all(is_text(text) for text in texts):
        raise ValueError("title and attributes must be texts")
    if sum(len(text.encode()) for text in texts) > MAX_TEXT_BYTES:
        raise ValueError(f"title and attributes have more than {MAX_TEXT_BYTES} bytes")
    if len(item.like) > MAX_LIKE:
        raise ValueError(f"it is like {len(item.like)} items, more than {MAX_LIKE}")
    for other in item.like:
        if not isinstance(other, str) or id_problem(other) is not None:
            raise ValueError("it is like something that is no item id")
    if item.embedding is not None:
        if item.embedding.ndim != 1 or not 1 <= len(item.embedding) <= MAX_WIDTH:
            raise ValueError(f"its embedding is not a list of 1 to {MAX_WIDTH} numbers")
        if not np.isfinite(item.embedding).all():
            raise ValueError("its embedding holds a value that is not finite")
        if not isinstance(item.bundle_id, str) or not _BUNDLE_ID.fullmatch(item.bundle_id):
            raise ValueError("its embedding belongs to no bundle")
    return item


def _texts(attributes: Any) -> list[Any]:
    if not isinstance(attributes, Mapping):
        return [None]
    return [text for pair in attributes.items() for text in pair]


def _decoded(text: Any) -> np.ndarray:
    """Raises ValueError."""
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error, ValueError):
        raise ValueError("its embedding cannot be read") from None
    if len(content) % 4:
        raise ValueError("its embedding cannot be read")
    return np.frombuffer(content, "<f4").astype(np.float32)
