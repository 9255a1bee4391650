"""What `StateStore` promises of its catalogue, over every implementation."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from contract.processes import finish, say, start_with
from contract.stores import Harness

from dman_runtime.data.added_items import MAX_TEXT_BYTES, AddedItem
from dman_runtime.errors import StoreError
from dman_runtime.store import checks
from dman_runtime.store.base import StateStore, Write
from dman_runtime.store.catalogue import NOTHING_STANDS, Addition, Standing
from dman_runtime.store.redis_shared import STANDING_SECONDS
from dman_runtime.store.rollout import Rollout

ITEMS = [f"item-{number}" for number in range(300)]
ROLLOUT = Rollout(1, "one", bundles={"one": ""})


def found(store: StateStore) -> tuple[int, list[int]]:
    catalogue = store.catalogue()
    assert catalogue.off.dtype == np.uint32
    assert store.standing().catalogue_revision == catalogue.revision
    return catalogue.revision, catalogue.off.tolist()


def test_new_store_has_all_items_on(store: StateStore) -> None:
    assert store.standing() == NOTHING_STANDS
    assert found(store) == (0, [])
    store.add_items(ITEMS)
    assert found(store) == (0, [])


def test_switches_are_kept_until_they_are_taken_back(store: StateStore) -> None:
    store.add_items(ITEMS)
    assert store.switch_items([7, 299, 0, 256, 7], off=True) == 4
    assert found(store) == (1, [0, 7, 256, 299])
    assert store.switch_items(np.array([8, 7], np.uint32), off=True) == 1
    assert found(store) == (2, [0, 7, 8, 256, 299])
    assert store.switch_items([0, 1, 299], off=False) == 2
    assert found(store) == (3, [7, 8, 256])
    assert store.switch_items([7, 8, 256], off=False) == 3
    assert found(store) == (4, [])


def test_revision_grows_only_with_a_change(store: StateStore) -> None:
    store.add_items(ITEMS)
    store.switch_items([3], off=True)
    for numbers, off in (([3], True), ([4], False), ([], True), ([], False)):
        assert store.switch_items(numbers, off=off) == 0
        assert found(store) == (1, [3])


@pytest.mark.parametrize("number", [-1, 300, 2**32, 2**63])
@pytest.mark.parametrize("off", [True, False])
def test_number_that_was_never_given_is_refused(store: StateStore, number: int, off: bool) -> None:
    store.add_items(ITEMS)
    store.switch_items([3], off=True)
    with pytest.raises(ValueError, match="never given a number"):
        store.switch_items([3, 4, number], off=off)
    assert found(store) == (1, [3])


def test_standing_shows_rollout_and_revision_as_they_are_now(store: StateStore) -> None:
    store.add_items(ITEMS)
    assert store.set_rollout(ROLLOUT)
    assert store.standing() == Standing(ROLLOUT, 0)
    store.switch_items([1], off=True)
    assert store.standing() == Standing(ROLLOUT, 1)
    store.commit([Write("user", 0, {}, np.array([1]), np.array([5]))])  # changes neither
    assert store.standing() == Standing(ROLLOUT, 1) and store.rollout() == ROLLOUT


def test_items_that_are_off_stay_in_histories(store: StateStore) -> None:
    store.add_items(ITEMS)
    store.switch_items([5], off=True)
    store.commit([Write("user", 0, {}, np.array([5, 6]), np.array([1, 2]))])
    assert store.history("user")[0].tolist() == store.seen("user").tolist() == [5, 6]
    assert store.delete("user") == 2
    assert found(store) == (1, [5])


def test_many_items_are_switched_together(store: StateStore) -> None:
    store.add_items([f"many-{number}" for number in range(5000)])
    assert store.switch_items(np.arange(5000), off=True) == 5000
    assert found(store) == (1, list(range(5000)))
    assert store.switch_items(np.arange(0, 5000, 2), off=False) == 2500
    assert found(store) == (2, list(range(1, 5000, 2)))


def test_switches_of_many_threads_all_count(store: StateStore) -> None:
    store.add_items(ITEMS)

    def switch(first: int) -> None:
        for number in range(first, 40, 4):
            assert store.switch_items([number], off=True) == 1

    threads = [threading.Thread(target=switch, args=[first]) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found(store) == (40, list(range(40)))


def test_closed_store_refuses_to_tell_or_switch(store: StateStore) -> None:
    store.add_items(ITEMS)
    store.close()
    for call in (store.standing, store.catalogue, lambda: store.switch_items([1], off=True)):
        with pytest.raises(StoreError, match="closed"):
            call()


def test_durable_store_keeps_what_is_off(durable: Harness) -> None:
    with durable.open() as store:
        store.add_items(ITEMS)
        store.switch_items([1, 2], off=True)
    with durable.open() as store:
        assert found(store) == (1, [1, 2])
        assert store.switch_items([1], off=False) == 1
    with durable.open() as store:
        assert found(store) == (2, [2])


SWITCH = """
for line in sys.stdin:
    with harness.open() as store:
        print(store.switch_items([int(line)], off=True), store.catalogue().revision, flush=True)
"""


def test_other_process_sees_a_switch_at_once(durable: Harness, directory: Path) -> None:
    with durable.open() as store:
        store.add_items(ITEMS)
        assert found(store) == (0, [])
        process = start_with(durable, directory, SWITCH)
        assert process.stdout is not None
        for revision, number in enumerate((9, 4), start=1):
            say(process, str(number))
            assert process.stdout.readline() == f"1 {revision}\n"
            if not durable.together:  # it may be known a moment later
                time.sleep(4 * STANDING_SECONDS)
            assert store.standing().catalogue_revision == revision
        assert found(store) == (2, [4, 9])
        finish(process)


# -- items that are added ----------------------------------------------------------------------------------------------

NEW = AddedItem("A title", {"genre": "odd|even"}, like=("item-1", "item-2"))
GIVEN = AddedItem(embedding=np.array([1.5, -2.0], np.float32), bundle_id="0123456789abcdef")


def added(store: StateStore) -> list[tuple[int, AddedItem]]:
    return [(number, item) for number, item in store.catalogue().added]


def test_additions_are_kept_in_their_slots(store: StateStore) -> None:
    store.add_items(ITEMS)
    assert store.append_additions([Addition(7, NEW), Addition(3, GIVEN)]) == 2
    assert store.standing().catalogue_revision == 1
    store.switch_items([7], off=True)
    assert store.append_additions([Addition(7, AddedItem("Another"))]) == 3
    assert added(store) == [(7, NEW), (3, GIVEN), (7, AddedItem("Another"))]
    assert store.catalogue().added[1].item.as_json() == GIVEN.as_json()
    assert found(store) == (3, [7])


def test_adding_nothing_changes_nothing(store: StateStore) -> None:
    assert store.append_additions([]) == 0
    assert found(store) == (0, [])


@pytest.mark.parametrize(
    "addition",
    [
        Addition(300, NEW),
        Addition(-1, NEW),
        Addition(1, AddedItem("\ud800")),
        Addition(1, AddedItem("x" * (MAX_TEXT_BYTES + 1))),
        Addition(1, AddedItem(like=("",))),
        Addition(1, AddedItem(embedding=np.array([np.nan], np.float32), bundle_id="0123456789abcdef")),
        Addition(1, AddedItem(embedding=np.array([1], np.float32), bundle_id="other")),
    ],
)
def test_addition_that_cannot_be_stored_is_refused_and_nothing_is_added(store: StateStore, addition: Addition) -> None:
    store.add_items(ITEMS)
    with pytest.raises(ValueError):
        store.append_additions([Addition(2, NEW), addition])
    assert found(store) == (0, []) and added(store) == []


def test_more_additions_than_fit_are_refused(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MAX_ADDED", 2)
    store.add_items(ITEMS)
    store.append_additions([Addition(2, NEW)])
    with pytest.raises(ValueError, match="2 are the most"):
        store.append_additions([Addition(2, NEW), Addition(2, NEW)])
    assert store.append_additions([Addition(2, NEW)]) == 2


def test_durable_store_keeps_additions(durable: Harness) -> None:
    with durable.open() as store:
        store.add_items(ITEMS)
        store.append_additions([Addition(7, NEW), Addition(3, GIVEN)])
    with durable.open() as store:
        assert added(store) == [(7, NEW), (3, GIVEN)]
