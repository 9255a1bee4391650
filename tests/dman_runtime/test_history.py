"""Reading histories in parts."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import STORES, new_store

from dman_runtime.errors import RequestError
from dman_runtime.history import HistoryPage, history_page
from dman_runtime.requests import MAX_EVENTS
from dman_runtime.store.base import StateStore, Write


def append(store: StateStore, user_id: str, items: list[str], times: list[int]) -> None:
    (stored,) = store.get_many([user_id], 0)
    version = stored.head.version if stored else 0
    write = Write(user_id, version, {1: b"record"}, store.add_items(items), np.array(times, np.int64))
    assert store.commit([write]) == []


@pytest.mark.parametrize("kind", STORES)
def test_the_parts_of_a_history_are_the_history(kind: str) -> None:
    items, times = [f"item {n % 7}" for n in range(150)], [*range(-5, 145)]
    with new_store(kind) as store:
        for begin in range(0, 150, 40):
            append(store, "anna", items[begin : begin + 40], times[begin : begin + 40])
        assert history_page(store, "anna") == HistoryPage(150, items, times)
        for size in (1, 31, 150, MAX_EVENTS):
            parts = [history_page(store, "anna", start=start, limit=size) for start in range(0, 150, size)]
            assert [item for part in parts if part for item in part.item_ids] == items
            assert [time for part in parts if part for time in part.timestamps] == times
        for start in (150, 151, 2**64 - 1):
            assert history_page(store, "anna", start=start) == HistoryPage(150, [], [])


@pytest.mark.parametrize("kind", STORES)
def test_an_unknown_user_has_no_history_and_one_without_events_an_empty_one(kind: str) -> None:
    with new_store(kind) as store:
        assert history_page(store, "anna") is None
        append(store, "anna", [], [])
        assert history_page(store, "anna") == HistoryPage(0, [], [])
        store.delete("anna")
        assert history_page(store, "anna") is None


@pytest.mark.parametrize(("start", "limit"), [(-1, 1), (0, 0), (0, -1), (0, MAX_EVENTS + 1)])
def test_a_part_that_cannot_be_is_refused(start: int, limit: int) -> None:
    with new_store("memory") as store, pytest.raises(RequestError, match=f"limit of 1 to {MAX_EVENTS}"):
        history_page(store, "anna", start=start, limit=limit)
