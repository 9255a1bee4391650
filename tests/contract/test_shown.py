"""What `StateStore` promises of items that were shown, over every implementation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from contract.stores import Harness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dman_runtime.store.base import MAX_SHOWN, Events, Expected, StateStore, Write
from dman_runtime.store.shown import joined_shown

NOW = 1_700_000_000
NONE = np.zeros(0, np.uint32)


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(harness: Harness) -> Clock:
    """Of the store that `store` opens."""
    harness.clock = clock = Clock()
    return clock


@pytest.fixture
def filled(clock: Clock, store: StateStore) -> StateStore:
    store.add_items([f"item-{number}" for number in range(MAX_SHOWN + 500)])
    return store


def shown(items: Sequence[int], seconds: int = 100) -> Events:
    return np.array(items, np.uint32), np.full(len(items), seconds, np.int64)


def show(store: StateStore, user_id: str, items: Sequence[int], seconds: int = 100, **fields: object) -> None:
    (stored,) = store.get_many([user_id], 1)
    version = stored.head.version if stored else 0
    write = Write(user_id, version, {}, NONE, NONE, shown=shown(items, seconds), **fields)  # type: ignore[arg-type]
    assert store.commit([write]) == []


def found(store: StateStore, user_id: str) -> list[tuple[int, int]]:
    items, until = store.shown(user_id)
    assert items.dtype == np.uint32 and until.dtype == np.int64
    return [(item, moment - NOW) for item, moment in zip(items.tolist(), until.tolist(), strict=True)]


def seen(store: StateStore, user_id: str) -> list[int] | None:
    view = store.ranking_view(user_id, 1, 10)
    return None if view is None else sorted(set(view.seen.tolist()))


def test_shown_items_count_until_their_time_is_over(filled: StateStore, clock: Clock) -> None:
    assert found(filled, "anna") == []
    show(filled, "anna", [5, 3], 100)
    clock.now += 10
    show(filled, "anna", [7], 20)
    assert found(filled, "anna") == [(5, 100), (3, 100), (7, 30)]
    clock.now = NOW + 30
    assert found(filled, "anna") == [(5, 100), (3, 100)]
    clock.now = NOW + 100
    assert found(filled, "anna") == []


def test_item_that_is_shown_again_counts_until_the_later_end_and_is_the_latest(filled: StateStore) -> None:
    show(filled, "anna", [1, 2, 1], 100)
    show(filled, "anna", [1], 50)
    show(filled, "anna", [2], 500)
    assert found(filled, "anna") == [(1, 100), (2, 500)]


def test_only_the_latest_items_stay(filled: StateStore) -> None:
    show(filled, "anna", range(300))
    show(filled, "anna", range(300, MAX_SHOWN + 100))
    assert [item for item, _ in found(filled, "anna")] == list(range(100, MAX_SHOWN + 100))


def test_user_who_was_only_shown_items_is_unknown(filled: StateStore) -> None:
    show(filled, "anna", [1])
    assert filled.get_many(["anna"], 1) == [None] and seen(filled, "anna") is None
    assert list(filled.scan()) == [] and filled.stats().users == 0
    assert filled.history("anna")[0].tolist() == [] and filled.seen("anna").tolist() == []
    assert filled.commit([Write("anna", 0, {1: b"record"}, np.array([2]), np.array([9]))]) == []
    assert (found(filled, "anna"), seen(filled, "anna")) == ([(1, 100)], [1, 2])


def test_showing_changes_nothing_else_of_a_user(filled: StateStore, clock: Clock) -> None:
    assert filled.commit([Write("anna", 0, {1: b"record"}, np.arange(40), np.arange(40), [7])]) == []
    before = filled.get_many(["anna"], 1), filled.history("anna")[0].tolist(), filled.seen("anna").tolist()
    show(filled, "anna", [50, 3])
    assert (filled.get_many(["anna"], 1), filled.history("anna")[0].tolist(), filled.seen("anna").tolist()) == before
    assert filled.applied("anna", [7]) == {7}
    assert seen(filled, "anna") == [*range(40), 50]
    clock.now += 100
    assert seen(filled, "anna") == list(range(40))


def test_events_and_shown_items_are_stored_together_or_not_at_all(filled: StateStore) -> None:
    write = Write("anna", 0, {1: b"record"}, np.array([2]), np.array([9]), shown=shown([4]))
    assert filled.commit([write]) == []
    write = Write("anna", 0, {1: b"record"}, np.array([2]), np.array([9]), shown=shown([4]))  # the same by another
    assert filled.commit([write]) == ["anna"]  # another version by now
    assert filled.commit([Write("bob", 0, {}, NONE, NONE, shown=shown([5])), write]) == ["anna"]
    of_bob = [] if filled.commits_together else [(5, 100)]
    assert (found(filled, "anna"), found(filled, "bob")) == ([(4, 100)], of_bob)
    with pytest.raises(ValueError, match="item numbers must be 0 to"):
        filled.commit([Write("bob", 0, {}, NONE, NONE, shown=shown([4, MAX_SHOWN + 500]))])
    with pytest.raises(ValueError, match="two lists of one length"):
        filled.commit([Write("bob", 0, {}, NONE, NONE, shown=(NONE, np.zeros(1, np.int64)))])
    assert found(filled, "bob") == of_bob


def test_replacing_a_history_keeps_what_was_shown(filled: StateStore) -> None:
    filled.commit([Write("anna", 0, {1: b"record"}, np.array([2]), np.array([9]), shown=shown([4]))])
    (stored,) = filled.get_many(["anna"], 1)
    assert stored is not None
    filled.commit([Write("anna", stored.head.version, {}, np.array([1, 2]), np.array([8, 9]), replace_from=0)])
    assert found(filled, "anna") == [(4, 100)]


def test_deletion_removes_what_was_shown_also_to_an_unknown_user(filled: StateStore) -> None:
    filled.commit([Write("anna", 0, {1: b"record"}, np.array([2]), np.array([9]), shown=shown([4]))])
    show(filled, "bob", [4])
    assert filled.delete("anna") == 1 and filled.delete("bob") is None
    assert found(filled, "anna") == found(filled, "bob") == []


def test_users_do_not_see_what_others_were_shown(filled: StateStore) -> None:
    for number, user_id in enumerate(["a", "ab", "a b", "ü"]):
        show(filled, user_id, [number])
    assert [found(filled, user_id) for user_id in ("a", "ab", "a b", "ü", "b")] == [
        [(0, 100)],
        [(1, 100)],
        [(2, 100)],
        [(3, 100)],
        [],
    ]


def test_maintenance_drops_what_counts_no_longer_and_nothing_else(filled: StateStore, clock: Clock) -> None:
    for number in range(20):
        show(filled, f"user-{number:02}", [number], 100 if number % 2 else 500)
    clock.now += 200
    for _ in range(3):
        filled.maintain()
    if filled.commits_together:  # else what expires is removed by the clock of the servers
        clock.now = NOW  # what was dropped does not come back
    assert [len(found(filled, f"user-{number:02}")) for number in range(20)] == [1, 0] * 10


def test_snapshot_shows_one_moment(filled: StateStore) -> None:
    show(filled, "anna", [1])
    with filled.snapshot() as snapshot:
        snapshot.expect({"anna": Expected(ranking=True)})
        show(filled, "anna", [2])
        assert snapshot.shown("anna")[0].tolist() == [1]
    assert [item for item, _ in found(filled, "anna")] == [1, 2]


def test_durable_store_keeps_what_was_shown(durable: Harness) -> None:
    durable.clock = lambda: NOW
    with durable.open() as store:
        store.add_items(["a", "b"])
        show(store, "anna", [1])
    with durable.open() as store:
        assert found(store, "anna") == [(1, 100)]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 60), st.integers(0, 40)), max_size=8
    )
)
def test_what_counts_is_what_a_plain_list_says(parts: list[tuple[list[int], int, int]]) -> None:
    kept: Events = (NONE, np.zeros(0, np.int64))
    log: list[tuple[int, int]] = []  # (item, end)
    now = NOW
    for items, seconds, pause in parts:
        kept = joined_shown(kept, shown(items, seconds), now)
        log = [entry for entry in log if entry[1] > now]
        for item in items:
            ends = [end for other, end in log if other == item]
            log = [entry for entry in log if entry[0] != item] + [(item, max([now + seconds, *ends]))]
        assert list(zip(kept[0].tolist(), kept[1].tolist(), strict=True)) == log
        now += pause
