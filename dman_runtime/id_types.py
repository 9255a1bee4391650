"""Whether ids are integers or text outside of the store: the bundle decides, and the store remembers it for exports."""

from __future__ import annotations

import logging

from dman_runtime.data.ids import INTEGER, TEXT
from dman_runtime.errors import StoreFullError
from dman_runtime.model.manifest import Manifest
from dman_runtime.store.base import IdTypes, StateStore

logger = logging.getLogger(__name__)


def remember_id_types(store: StateStore, manifest: Manifest) -> None:
    """Lets a store remember what a bundle decided. What the bundle does not say stays as it was. Raises StoreError.

    A store without room keeps what it had: nothing but exports depends on it.
    """
    known = store.id_types()
    users = manifest.data.get("user_ids")
    types = IdTypes(
        users if users in (INTEGER, TEXT) else known.users,  # earlier bundles do not say it
        INTEGER if manifest.integer_item_ids else TEXT,
    )
    if types != known:
        try:
            store.remember_id_types(types)
        except StoreFullError as error:
            logger.warning("cannot store what the ids are (%s): an export may write them with other types", error.cause)
