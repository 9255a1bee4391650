"""What ids are, as the bundle decides and the store remembers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dman_runtime.data.ids import INTEGER, TEXT
from dman_runtime.errors import StoreFullError
from dman_runtime.id_types import remember_id_types
from dman_runtime.model.generation import Generation
from dman_runtime.store.base import UNKNOWN, IdTypes
from dman_runtime.store.memory import MemoryStore


@pytest.mark.parametrize(
    ("users", "integer_items", "before", "after"),
    [
        ("text", True, IdTypes(UNKNOWN, UNKNOWN), IdTypes(TEXT, INTEGER)),
        ("integer", False, IdTypes(TEXT, INTEGER), IdTypes(INTEGER, TEXT)),
        (None, False, IdTypes(INTEGER, INTEGER), IdTypes(INTEGER, TEXT)),
        ("auto", False, IdTypes(UNKNOWN, INTEGER), IdTypes(UNKNOWN, TEXT)),
        (["text"], True, IdTypes(TEXT, UNKNOWN), IdTypes(TEXT, INTEGER)),
    ],
)
def test_store_remembers_what_the_bundle_says(
    exact: Generation, users: object, integer_items: bool, before: IdTypes, after: IdTypes
) -> None:
    data = {} if users is None else {"user_ids": users}
    manifest = replace(exact.bundle.manifest, data=data, integer_item_ids=integer_items)
    with MemoryStore() as store:
        store.remember_id_types(before)
        remember_id_types(store, manifest)
        assert store.id_types() == after


def test_store_is_not_written_where_nothing_differs(exact: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryStore() as store:
        remember_id_types(store, exact.bundle.manifest)
        monkeypatch.setattr(store, "remember_id_types", lambda types: pytest.fail("was written again"))
        remember_id_types(store, exact.bundle.manifest)


def test_store_without_room_serves_all_the_same(exact: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: IdTypes) -> None:
        raise StoreFullError("the state store is full")

    with MemoryStore() as store:
        monkeypatch.setattr(store, "remember_id_types", full)
        remember_id_types(store, exact.bundle.manifest)
        assert store.id_types() == IdTypes(UNKNOWN, UNKNOWN)
