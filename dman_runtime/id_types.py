"""Whether ids are integers or text outside of the store: the bundle decides, and the store remembers it for exports."""

from __future__ import annotations

from dman_runtime.model.manifest import Manifest
from dman_runtime.store.base import INTEGER, TEXT, IdTypes, StateStore


def remember_id_types(store: StateStore, manifest: Manifest) -> None:
    """Lets a store remember what a bundle decided. What the bundle does not say stays as it was. Raises StoreError."""
    known = store.id_types()
    users = manifest.data.get("user_ids")
    types = IdTypes(
        users if users in (INTEGER, TEXT) else known.users,  # earlier bundles do not say it
        INTEGER if manifest.integer_item_ids else TEXT,
    )
    if types != known:
        store.remember_id_types(types)
