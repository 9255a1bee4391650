"""A bundle with the items that were added to it at run time. numpy only.

They follow the items of the training: the item in *slot* s has index V + s, under every bundle and for ever. A slot
that a bundle cannot serve keeps its place, so that the indices in records stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dman_runtime.data.added_items import AddedItem
from dman_runtime.model.bundle import Bundle
from dman_runtime.model.items import Items

_ROWS = 65_536  # of an item table that are multiplied at a time


@dataclass(frozen=True)
class Extended:
    """A bundle with added items."""

    bundle: Bundle
    unusable: Mapping[str, str]  # added items that the bundle cannot serve -> why
    empty: np.ndarray  # (n) int64 indices of slots that are no item of the bundle: never to be recommended


def vector_of(item: AddedItem, bundle: Bundle) -> np.ndarray:
    """The embedding (D) float32 of an added item under a bundle. ValueError, which says why, where there is none.

    The first that there is: its own embedding, if it belongs to the bundle; the mean of the items that it is like, as
    far as training knew them; what the bundle predicts from title and attributes.
    """
    reasons = []
    if item.embedding is not None:
        if item.bundle_id == bundle.bundle_id and len(item.embedding) == bundle.item_embeddings.shape[1]:
            return item.embedding.astype(np.float32)
        reasons.append(f"its embedding belongs to bundle {item.bundle_id}")
    if item.like:
        trained = len(bundle.item_embeddings) - bundle.added
        known = [place for other in item.like if 0 <= (place := bundle.items.index.get(other, -1)) < trained]
        if known:
            mean: np.ndarray = bundle.item_embeddings[known].mean(axis=0, dtype=np.float64).astype(np.float32)
            return mean
        reasons.append("training knew none of the items that it is like")
    if item.title or item.attributes:
        predicted = bundle.predictor.predict(item.title, item.attributes) if bundle.predictor is not None else None
        if predicted is not None:
            return predicted
        known_none = "the bundle knows none of its attributes"
        reasons.append("the bundle predicts no embeddings" if bundle.predictor is None else known_none)
    raise ValueError(" and ".join(reasons) or "it has no title, no attributes, no items that it is like, no embedding")


def extended(bundle: Bundle, slots: Sequence[tuple[str, AddedItem] | None]) -> Extended:
    """A bundle as it was opened, with the item (external id, item) of each slot; None for a slot that is given up."""
    vectors = np.zeros((len(slots), bundle.item_embeddings.shape[1]), np.float32)
    unusable, empty, index = dict[str, str](), list[int](), dict(bundle.items.index)
    for slot, entry in enumerate(slots):
        place = len(bundle.items.item_ids) + slot
        try:
            if entry is None or entry[0] in bundle.items.index:  # training knows it better
                raise ValueError
            vectors[slot] = vector_of(entry[1], bundle)
            index[entry[0]] = place
        except ValueError as error:
            empty.append(place)
            if entry is not None and error.args:
                unusable[entry[0]] = str(error)
    larger = replace(
        with_embeddings(bundle, vectors),
        items=_with(bundle.items, slots, index),
        returns=_returns(bundle, vectors),
    )
    return Extended(larger, unusable, np.array(empty, np.int64))


def with_embeddings(bundle: Bundle, added: np.ndarray) -> Bundle:
    """A bundle as it was opened, whose item table goes on with the embeddings (n, D) float32 of added items."""
    return replace(
        bundle,
        manifest=replace(bundle.manifest, vocabulary=bundle.manifest.vocabulary + len(added)),
        item_embeddings=_joined(bundle.item_embeddings, added),
        added=len(added),
    )


def _with(items: Items, slots: Sequence[tuple[str, AddedItem] | None], index: dict[str, int]) -> Items:
    """Also of slots that are not served, whose places are in no index."""
    added = [("", AddedItem()) if entry is None else entry for entry in slots]
    return Items(
        [*items.item_ids, *(item_id for item_id, _ in added)],
        np.concatenate([items.popularity, np.zeros(len(added))]),
        np.concatenate([items.by_popularity, np.arange(len(items.item_ids), len(items.item_ids) + len(added))]),
        [*items.titles, *(item.title for _, item in added)],
        [*items.attributes, *(dict(item.attributes) for _, item in added)],
        index,
    )


def _returns(bundle: Bundle, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """The weights for items that come back, with what `by_item` gives to new ones: it is a linear map of the embedding,
    and so known from what it gives to the others."""
    if not bundle.returns:
        return {}
    table, by_item = bundle.item_embeddings, bundle.returns["by_item"]
    width = table.shape[1]
    products, targets = np.zeros((width, width)), np.zeros((width, by_item.shape[1]))
    for begin in range(0, len(table), _ROWS):
        part = table[begin : begin + _ROWS].astype(np.float64)
        products += part.T @ part
        targets += part.T @ by_item[begin : begin + _ROWS]
    weights = np.linalg.lstsq(products, targets, rcond=None)[0]
    return {**bundle.returns, "by_item": _joined(by_item, (vectors @ weights).astype(np.float32))}


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    joined = np.concatenate([first, second])
    joined.flags.writeable = False
    return joined
