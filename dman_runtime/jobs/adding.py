"""Items that are added to a store at run time, for all its servers and all bundles at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dman_runtime.data.added_items import AddedItem, checked_item
from dman_runtime.data.arrays import MAX_HEADER_BYTES, parse_npy
from dman_runtime.data.ids import is_integer_id
from dman_runtime.data.interactions import LIST_SEPARATOR, ItemInfo
from dman_runtime.data.items import read_items
from dman_runtime.data.untrusted import read_file
from dman_runtime.errors import InputError, UsageError
from dman_runtime.model.additions import vector_of
from dman_runtime.model.bundle import Bundle
from dman_runtime.store.base import StateStore
from dman_runtime.store.catalogue import MAX_ADDED, Addition

_NAMED = 10  # items that are shown to people


@dataclass(frozen=True)
class Added:
    """What a command did with the items of its file."""

    added: int
    unchanged: int  # they were there already, just so
    known: Sequence[str]  # the bundle knows them by training: nothing was done about them
    unusable: Mapping[str, str]  # added, but the bundle cannot serve them -> why
    total: int  # additions in the store

    def summary(self, bundle: Bundle) -> str:
        """For people."""
        text = (
            f"added {self.added} items; {self.unchanged} were there already; the store has {self.total} additions now"
        )
        if self.known:
            text += f"\n{len(self.known)} items not added: bundle {bundle.bundle_id} was trained with them"
        if self.unusable:
            text += f"\nwarning: bundle {bundle.bundle_id} cannot serve {len(self.unusable)} of them:"
            text += "".join(f"\n  {item!r}: {why}" for item, why in list(self.unusable.items())[:_NAMED])
            text += "\n  ..." if len(self.unusable) > _NAMED else ""
        return text


def read_additions(
    file: Path, bundle: Bundle, *, item_column: str, like_column: str, embeddings: Path | None
) -> dict[str, AddedItem]:
    """The items of a table by external id. Embeddings belong to the bundle. Raises InputError."""
    infos = read_items(file, item_column=item_column, titles=False)
    vectors = None if embeddings is None else _read_embeddings(embeddings, len(infos), bundle)
    found = {}
    for row, (item_id, info) in enumerate(infos.items()):
        try:
            found[item_id] = checked_item(_item(info, like_column, None if vectors is None else vectors[row], bundle))
        except ValueError as error:
            raise InputError(f"{file}: item {item_id!r:.80} cannot be added: {error}", "correct it") from None
    return found


def _item(info: ItemInfo, like_column: str, vector: np.ndarray | None, bundle: Bundle) -> AddedItem:
    attributes = dict(info.attributes)
    like = tuple(one for part in attributes.pop(like_column, "").split(LIST_SEPARATOR) if (one := part.strip()))
    if vector is None:
        return AddedItem(info.title, attributes, like)
    return AddedItem(info.title, attributes, like, vector, bundle.bundle_id)


def _read_embeddings(file: Path, rows: int, bundle: Bundle) -> np.ndarray:
    width = bundle.manifest.state.width
    try:
        return parse_npy(read_file(file, limit=4 * rows * width + 2 * MAX_HEADER_BYTES), "float32", (rows, width))
    except FileNotFoundError:
        raise InputError(f"{file} is missing", "give a file with one row per item", parameter="embeddings") from None
    except ValueError as error:  # InputError is one, and names the file
        cause = str(error) if isinstance(error, InputError) else f"{file} {error}"
        raise InputError(cause, "write one row of float32 per item, in the order of the items") from None


def add_items(store: StateStore, bundle: Bundle, items: Mapping[str, AddedItem]) -> Added:
    """Adds items, durably when it returns. Items that training knew are left alone. Raises UsageError, StoreError."""
    known = [item_id for item_id in items if item_id in bundle.items.index]
    new = {item_id: item for item_id, item in items.items() if item_id not in bundle.items.index}
    unusable = {}
    for item_id, item in new.items():
        try:
            vector_of(item, bundle)
        except ValueError as error:
            unusable[item_id] = str(error)
    _require_form(bundle, new)
    before = store.catalogue().added
    there = {number: item.as_json() for number, item in before}  # of those of one item the last one
    asked = zip(store.find_items(list(new)).tolist(), new.items(), strict=True)
    changed = {item_id: item for number, (item_id, item) in asked if there.get(number) != item.as_json()}
    if len(before) + len(changed) > MAX_ADDED:
        raise UsageError(
            f"the store has {len(before)} additions, and {MAX_ADDED} are the most", "train a bundle with these items"
        )
    numbers = store.add_items(list(changed))
    additions = [Addition(int(number), item) for number, item in zip(numbers, changed.values(), strict=True)]
    return Added(len(changed), len(new) - len(changed), known, unusable, store.append_additions(additions))


def _require_form(bundle: Bundle, items: Mapping[str, AddedItem]) -> None:
    """UsageError for ids that the bundle's replies could not name."""
    if not bundle.manifest.integer_item_ids:
        return
    odd = next((item_id for item_id in items if not is_integer_id(item_id)), None)
    if odd is not None:
        raise UsageError(
            f"item id {odd!r:.80} is no integer, and the items of bundle {bundle.bundle_id} have integers as ids",
            "write the ids as in training",
        )
