"""What `StateStore` promises, over every implementation."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from itertools import count, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.stores import Crash, Harness, request_id_limit
from numpy.typing import NDArray

from dman_runtime.data.ids import INTEGER, RULE, TEXT
from dman_runtime.errors import StoreError, TooManyRequestIdsError
from dman_runtime.store import lmdb
from dman_runtime.store.base import (
    REMEMBER_SECONDS,
    UNKNOWN,
    Events,
    Head,
    IdTypes,
    Snapshot,
    StateStore,
    Step,
    StoredRecord,
    StoredUser,
    Write,
)
from dman_runtime.store.history import CHUNK_EVENTS
from dman_runtime.store.memory import MemoryStore
from dman_runtime.store.rollout import NO_ROLLOUT, Rollout

GOOD_IDS = ["a", "ab", "a b", "b", " ", "ü", "u\u0308", "0", "00", "x" * 400, "ü" * 200, "\U0001f600" * 100, "x" * 399]
BAD_IDS = ["", "x" * 401, "ü" * 201, "a\0b", "a\nb", "a\x7f", "a\x85", "\ud800"]
BORDERS = sorted({n + d for n in (0, CHUNK_EVENTS, 2 * CHUNK_EVENTS, 3 * CHUNK_EVENTS) for d in (-1, 0, 1)} - {-1})
NO_EVENTS: Events = (np.zeros(0, np.uint32), np.zeros(0, np.int64))


def items_for(store: StateStore, number: int = 100) -> NDArray[np.uint32]:
    return store.add_items([f"item-{index}" for index in range(number)])


def write(
    user_id: str,
    expected_version: int = 0,
    items: Any = (),
    *,
    records: dict[int, bytes] | None = None,
    first_time: int = 1000,
    request_ids: Any = (),
    replace_from: int | None = None,
    sequences: dict[int, Step] | None = None,
) -> Write:
    """Events at the times first_time, first_time + 1, ..."""
    numbers, times = np.array(items, np.uint32), first_time + np.arange(len(items))
    return Write(
        user_id, expected_version, records or {}, numbers, times, request_ids, replace_from, sequences=sequences or {}
    )


def get(store: StateStore, user_id: str, generation: int = 1) -> StoredUser | None:
    return store.get_many([user_id], generation)[0]


def head_of(store: StateStore, user_id: str) -> Head:
    stored = get(store, user_id)
    assert stored is not None
    return stored.head


def version_of(store: StateStore, user_id: str) -> int:
    stored = get(store, user_id)
    return stored.head.version if stored else 0


def as_lists(events: Events) -> tuple[list[int], list[int]]:
    items, timestamps = events
    assert items.dtype == np.uint32 and timestamps.dtype == np.int64
    return items.tolist(), timestamps.tolist()


def everything(store: StateStore) -> dict[str, Any]:
    """All that can be read of all users, for comparing."""
    return {user_id: of_user(store, user_id) for user_id in sorted(store.scan())}


def of_user(store: StateStore, user_id: str) -> tuple[Any, ...]:
    generations = sorted({*store.generations().values(), 1, 2, 3})
    return (
        [get(store, user_id, generation) for generation in generations],
        as_lists(store.history(user_id)),
        store.seen(user_id).tolist(),
        store.applied(user_id, range(1000)),
        store.sequences(user_id, range(10)),
    )


# -- items and generations ---------------------------------------------------------------------------------------------


def test_items_are_numbered_from_zero_in_the_order_given(store: StateStore) -> None:
    numbers = store.add_items(["c", "a", "c", "b"])
    assert numbers.dtype == np.uint32 and numbers.tolist() == [0, 1, 0, 2]
    assert store.add_items(["d", "b", "a", "d"]).tolist() == [3, 2, 1, 3]
    assert store.add_items([]).tolist() == []
    assert store.item_ids(np.arange(4)) == ["c", "a", "b", "d"]
    assert store.stats().items == 4


def test_find_items_adds_nothing(store: StateStore) -> None:
    store.add_items(["a", "b"])
    found = store.find_items(["b", "new", "a", "b"])
    assert found.dtype == np.int64 and found.tolist() == [1, -1, 0, 1]
    assert store.find_items([]).tolist() == []
    assert store.stats().items == 2


def test_item_ids_are_those_of_the_numbers_in_any_order(store: StateStore) -> None:
    store.add_items(GOOD_IDS)
    order = [3, 0, 3, len(GOOD_IDS) - 1]
    assert store.item_ids(order) == [GOOD_IDS[number] for number in order]
    assert store.item_ids([]) == []


@pytest.mark.parametrize("number", [-1, 2, 2**32, 2**32 + 1, -(2**32), 2**63])
def test_item_ids_refuses_a_number_that_was_never_given(store: StateStore, number: int) -> None:
    store.add_items(["a", "b"])
    with pytest.raises(ValueError, match="never given a number"):
        store.item_ids([0, number])


def test_item_numbers_survive_all_their_users(store: StateStore) -> None:
    items = items_for(store, 3)
    store.commit([write("a", items=items)])
    store.delete("a")
    assert store.add_items(["new", "item-1"]).tolist() == [3, 1]


def test_generations_are_numbered_from_one_and_keep_their_numbers(store: StateStore) -> None:
    assert store.generations() == {}
    assert [store.add_generation(bundle) for bundle in ("one", "two", "one", "three")] == [1, 2, 1, 3]
    store.drop_records(2)
    assert list(store.generations().items()) == [("one", 1), ("two", 2), ("three", 3)]
    assert store.add_generation("two") == 2


def test_id_types_are_those_remembered_last(store: StateStore) -> None:
    assert store.id_types() == IdTypes(UNKNOWN, UNKNOWN)
    for types in (IdTypes(UNKNOWN, INTEGER), IdTypes(TEXT, INTEGER), IdTypes(INTEGER, TEXT), IdTypes(UNKNOWN, UNKNOWN)):
        store.remember_id_types(types)
        assert store.id_types() == types


ROLLOUT = Rollout(1, "one", bundles={"one": "/bundles/one", "two": ""})


def test_rollout_is_the_one_set_last_and_has_the_next_revision(store: StateStore) -> None:
    assert store.rollout() == NO_ROLLOUT
    assert store.set_rollout(ROLLOUT) and store.rollout() == ROLLOUT
    trial = ROLLOUT._replace(trial="two", share=0.25)
    for revision in (0, 1, 3):  # somebody has seen another one
        assert not store.set_rollout(trial._replace(revision=revision))
        assert store.rollout() == ROLLOUT
    assert store.set_rollout(trial._replace(revision=2)) and store.rollout() == trial._replace(revision=2)
    assert store.set_rollout(Rollout(3)) and store.rollout() == Rollout(3)


@pytest.mark.parametrize(
    "rollout",
    [
        ROLLOUT._replace(active="three"),
        ROLLOUT._replace(active="", trial="two", share=0.5),
        ROLLOUT._replace(prepared="three"),
        ROLLOUT._replace(trial="three", share=0.5),
        ROLLOUT._replace(trial="two"),
        ROLLOUT._replace(trial="two", share=1.5),
        ROLLOUT._replace(share=0.5),
    ],
)
def test_rollout_that_is_none_is_refused(store: StateStore, rollout: Rollout) -> None:
    with pytest.raises(ValueError, match="roll-out"):
        store.set_rollout(rollout)
    assert store.rollout() == NO_ROLLOUT


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_trial_gets_its_share_of_the_users_always_the_same_ones(share: float) -> None:
    rollout = ROLLOUT._replace(trial="two", share=share)
    users = [f"user {number}" for number in range(4000)]
    chosen = {user for user in users if rollout.of(user) == "two"}
    assert {rollout.of(user) for user in users} == {"one", "two"}
    assert len(chosen) / len(users) == pytest.approx(share, abs=0.03)
    wider = rollout._replace(share=share * 1.5)
    assert chosen < {user for user in users if wider.of(user) == "two"}  # a trial that grows keeps its users
    other = rollout._replace(trial="three")
    both = sum(other.of(user) == "three" for user in chosen) / len(chosen)
    assert both == pytest.approx(share, abs=0.06)  # trials are independent


@pytest.mark.parametrize("types", [IdTypes("int", TEXT), IdTypes(TEXT, None), IdTypes(0, "")])  # type: ignore[arg-type]
def test_id_types_that_are_none_are_refused(store: StateStore, types: IdTypes) -> None:
    store.remember_id_types(IdTypes(TEXT, INTEGER))
    with pytest.raises(ValueError, match="ids are 'integer', 'text' or ''"):
        store.remember_id_types(types)
    assert store.id_types() == IdTypes(TEXT, INTEGER)


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_ids_up_to_the_limits_are_kept_apart(store: StateStore) -> None:
    assert store.add_items(GOOD_IDS).tolist() == list(range(len(GOOD_IDS)))
    assert store.find_items(GOOD_IDS).tolist() == list(range(len(GOOD_IDS)))
    store.commit([write(user, items=[number] * (number + 30)) for number, user in enumerate(GOOD_IDS)])
    for number, user in enumerate(GOOD_IDS):
        assert store.history(user)[0].tolist() == [number] * (number + 30)
        assert store.seen(user).tolist() == [number]
    assert sorted(store.scan()) == sorted(GOOD_IDS)
    for number, user in enumerate(GOOD_IDS):
        assert store.delete(user) == number + 30
        assert sorted(store.scan()) == sorted(GOOD_IDS[number + 1 :])


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize(
    "call",
    [
        lambda store, bad: store.add_items(["good", bad]),
        lambda store, bad: store.find_items(["good", bad]),
        lambda store, bad: store.get_many(["good", bad], 1),
        lambda store, bad: store.ranking_view(bad, 1, 10),
        lambda store, bad: store.history(bad),
        lambda store, bad: store.seen(bad),
        lambda store, bad: store.applied(bad, [1]),
        lambda store, bad: store.commit([write("good"), write(bad)]),
        lambda store, bad: store.delete(bad),
    ],
    ids=["add_items", "find_items", "get_many", "ranking_view", "history", "seen", "applied", "commit", "delete"],
)
def test_bad_ids_are_refused(store: StateStore, call: Callable[[StateStore, str], object], bad: str) -> None:
    with pytest.raises(ValueError, match=re.escape(RULE)):
        call(store, bad)
    assert store.stats().items == 0 and list(store.scan()) == []


# -- heads and records -------------------------------------------------------------------------------------------------


def test_unknown_user_has_nothing(store: StateStore) -> None:
    assert store.get_many(["a", "b"], 1) == [None, None]
    assert store.get_many([], 1) == []
    assert store.ranking_view("a", 1, 10) is None
    assert as_lists(store.history("a")) == ([], [])
    assert store.seen("a").dtype == np.uint32 and store.seen("a").tolist() == []
    assert store.delete("a") is None


def test_deletion_of_another_version_leaves_the_user_alone(store: StateStore) -> None:
    items = items_for(store)
    store.commit([write("a", items=items[:40], records={1: b"one"}), write("ab", items=items[:3])])
    seen = version_of(store, "a")
    assert store.delete("b", expected_version=seen) is None
    assert store.delete("a", expected_version=seen + 1) is None
    store.commit([write("a", seen, items[:1])])
    before = everything(store)
    assert store.delete("a", expected_version=seen) is None and everything(store) == before
    assert store.delete("a", expected_version=version_of(store, "a")) == 41
    assert everything(store) == {"ab": before["ab"]}


def test_commit_of_no_events_creates_a_user(store: StateStore) -> None:
    assert store.commit([write("a"), write("b", records={2: b""})]) == []
    a, b = store.get_many(["a", "b"], 2)
    assert a is not None and b is not None
    assert a.head == Head(a.head.version, 0, 0) and a.head.version > 0 and a.record is None
    assert b.head == Head(b.head.version, 0, 2) and b.record == b""  # an empty record is a record
    assert as_lists(store.history("a")) == ([], []) and store.seen("a").tolist() == []
    view = store.ranking_view("a", 2, 10)
    assert view is not None and (view.history_count, view.record, view.seen.tolist()) == (0, None, [])
    assert store.stats().users == 2


def test_each_generation_has_its_own_record(store: StateStore) -> None:
    assert store.commit([write("a", records={1: b"one", 2: b"two"})]) == []
    assert store.commit([write("a", version_of(store, "a"), records={1: b"ONE"})]) == []
    stored = [get(store, "a", generation) for generation in (1, 2, 3)]
    assert [user and user.record for user in stored] == [b"ONE", b"two", None]
    assert head_of(store, "a").generation == 1  # that wrote last


def test_events_without_a_record_keep_the_records_and_their_generation(store: StateStore) -> None:
    items = items_for(store)
    store.commit([write("a", items=items[:3], records={2: b"two"})])
    store.commit([write("a", version_of(store, "a"), items[3:5])])
    stored = get(store, "a", 2)
    assert stored is not None and stored.record == b"two"
    assert (stored.head.history_count, stored.head.generation) == (5, 2)


def test_records_lists_each_record_of_each_user_once_with_its_start(store: StateStore) -> None:
    items = items_for(store)
    long = bytes(range(250)) * 80
    store.commit([write("a", items=items[:3], records={1: b"one", 2: long}), write("ab", items=items[:40])])
    store.commit([write("b", records={300: b""}), write("c", items=items[:1], records={2: b"two"})])
    store.delete("c")
    assert sorted(store.records(4)) == [
        StoredRecord("a", 1, 3, 3, b"one"),
        StoredRecord("a", 2, 3, len(long), long[:4]),
        StoredRecord("b", 300, 0, 0, b""),
    ]
    assert sorted(record.start for record in store.records(1 << 20)) == [b"", long, b"one"]
    store.drop_records(2)
    assert [record.start for record in sorted(store.records(0))] == [b"", b""]


def test_records_of_more_users_than_are_read_at_once(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb, "_SCAN_USERS", 3)
    users = [f"user {number}" for number in range(8)]
    store.commit([write(user, records={1: user.encode(), 2: b"two"}) for user in users])
    listed = list(store.records(6))
    assert sorted(record.user_id for record in listed) == sorted(users * 2)
    assert [one.user_id for one in listed[::2]] == [one.user_id for one in listed[1::2]]  # those of a user together


def test_get_many_gives_the_first_bytes_of_records(store: StateStore) -> None:
    store.commit([write("a", records={1: b"record"}), write("b")])
    found = store.get_many(["a", "b", "c"], 1, 3)
    assert [stored and stored.record for stored in found] == [b"rec", None, None]
    assert found[:2] == [get(store, "a")._replace(record=b"rec"), get(store, "b")]  # type: ignore[union-attr]
    assert get(store, "a") == store.get_many(["a"], 1, 100)[0]


@pytest.mark.parametrize("generation", [0, -1])
def test_records_are_of_generations_from_one(store: StateStore, generation: int) -> None:
    store.commit([write("a", records={1: b"one"})])
    before = everything(store)
    with pytest.raises(ValueError, match="generation"):
        store.commit([write("b", records={1: b"", generation: b"zero"})])
    with pytest.raises(ValueError, match="generation"):
        store.drop_records(generation)
    assert everything(store) == before


def test_what_is_no_generation_has_no_records(store: StateStore) -> None:
    store.commit([write("a", records={1: b"one"})])
    for generation in (0, -1):
        assert get(store, "a", generation) == StoredUser(head_of(store, "a"), None)
        view = store.ranking_view("a", generation, 100)
        assert view is not None and view.record is None


def test_drop_records_removes_one_generation_and_nothing_else(store: StateStore) -> None:
    items = items_for(store)
    users = [f"user-{number}" for number in range(7)]
    records = [{1: b"one", 2: b"two"} if number % 2 else {2: b"two", 3: b"three"} for number in range(7)]
    store.commit(
        [write(user, 0, items[:40], records=own, request_ids=[7]) for user, own in zip(users, records, strict=True)]
    )
    before = {user: (head_of(store, user), everything(store)[user][1:]) for user in users}
    assert store.drop_records(2) == 7
    assert store.drop_records(2) == 0
    assert store.drop_records(1) == 3
    for user, own in zip(users, records, strict=True):
        assert (head_of(store, user), everything(store)[user][1:]) == before[user]
        stored = [get(store, user, generation) for generation in (1, 2, 3)]
        assert [found and found.record for found in stored] == [None, None, own.get(3)]
    assert store.commit([write(users[0], version_of(store, users[0]), records={2: b"again"})]) == []
    assert store.drop_records(2) == 1


def test_large_records_come_back_whole(store: StateStore) -> None:
    record = np.random.default_rng(0).bytes(300_000)
    store.commit([write("a", records={1: record})])
    store.commit([write("a", version_of(store, "a"), records={2: record[:4096]})])
    assert get(store, "a", 1) == StoredUser(head_of(store, "a"), record)
    view = store.ranking_view("a", 1, 5000)
    assert view is not None and view.record == record[:5000]


def test_get_many_answers_in_order_with_unknown_and_repeated_users(store: StateStore) -> None:
    store.commit([write("a", records={1: b"a"}), write("b", records={1: b"b"})])
    found = store.get_many(["b", "unknown", "a", "b"], 1)
    assert [user and user.record for user in found] == [b"b", None, b"a", b"b"]


# -- request ids -------------------------------------------------------------------------------------------------------

HOUR = 3600
NOON = 1_800_000_000.0  # a moment


def test_request_ids_are_remembered_whatever_comes_after_them(store: StateStore) -> None:
    ids = [2**64 - 1, 0, *range(7, 107)]
    for one in ids[:50]:
        assert store.commit([write("a", version_of(store, "a"), request_ids=[one])]) == []
    assert store.commit([write("a", version_of(store, "a"), request_ids=ids[50:])]) == []
    assert store.commit([write("a", version_of(store, "a")), write("b", request_ids=[1000])]) == []
    assert store.applied("a", [*ids, 1, 2, 3, 1000]) == set(ids)
    assert store.applied("a", []) == set()
    assert store.applied("b", [*ids, 1000]) == {1000}  # each user has its own


def test_request_ids_are_each_users_own_though_one_name_begins_another(store: StateStore) -> None:
    users = ["a", "ab", "a b", "z" * 400]
    for number, user in enumerate(users):
        for part in range(20):
            store.commit([write(user, version_of(store, user), request_ids=[100 * number + part])])
    every = range(400)
    for number, user in enumerate(users):
        assert store.applied(user, every) == set(range(100 * number, 100 * number + 20))
    store.delete("a")
    assert store.applied("a", every) == set(range(20)) and store.applied("unknown", every) == set()


@pytest.mark.parametrize("deleted", [False, True])
def test_request_ids_are_remembered_for_a_day_from_the_last_moment(harness: Harness, deleted: bool) -> None:
    for offset in (0, 1, HOUR, 6 * HOUR - 1, 11 * HOUR):
        now = NOON + offset
        harness.clock = lambda: now  # noqa: B023 - read in this round only
        user = f"user-{offset}"
        with harness.open() as store:
            for number in range(40):
                store.commit([write(user, version_of(store, user), request_ids=[number])])
            if deleted:
                store.delete(user)
            applied = now
            for passed in (0, HOUR, 6 * HOUR, 23 * HOUR, REMEMBER_SECONDS):
                now = applied + passed
                store.maintain()
                store.commit([write("other", version_of(store, "other"), request_ids=range(50))])
                assert store.applied(user, range(40)) == set(range(40)), (offset, passed)


def test_request_ids_of_a_deleted_user_keep_a_retry_from_bringing_the_user_back(store: StateStore) -> None:
    items = items_for(store)
    store.commit([write("a", items=items, request_ids=[1, 2])])
    store.delete("a")
    assert get(store, "a") is None
    assert store.applied("a", [1, 2, 3]) == {1, 2}
    # what was prepared while the user was unknown, and was applied meanwhile
    assert store.commit([write("a", items=items, request_ids=[2]), write("b")]) == ["a"]
    assert list(store.scan()) == ([] if store.commits_together else ["b"])
    assert store.commit([write("a", items=items[:1], request_ids=[3])]) == []  # the user may come back
    assert store.applied("a", range(9)) == {1, 2, 3}
    for number in range(100, 120):
        store.commit([write("a", version_of(store, "a"), request_ids=[number])])
    store.delete("a")
    assert store.applied("a", range(200)) == {1, 2, 3, *range(100, 120)}


def test_request_ids_are_those_of_the_snapshot(whole_store: StateStore) -> None:
    whole_store.commit([write("a", request_ids=[1])])
    with whole_store.snapshot() as snapshot:
        whole_store.commit([write("a", version_of(whole_store, "a"), request_ids=range(2, 40))])
        whole_store.commit([write("new", request_ids=[5])])
        assert snapshot.applied("a", range(40)) == {1} and snapshot.applied("new", [5]) == set()
    assert whole_store.applied("a", range(40)) == set(range(1, 40)) and whole_store.applied("new", [5]) == {5}


def test_too_many_request_ids_are_refused_and_none_is_forgotten(harness: Harness) -> None:
    now = NOON
    harness.clock = lambda: now
    with harness.open() as store, request_id_limit(60):
        items = items_for(store)
        taken: list[int] = []
        with pytest.raises(TooManyRequestIdsError, match=r"user 'a' has more than 60 .*wait") as caught:
            while True:
                batch = range(len(taken), len(taken) + 5)
                store.commit(
                    [
                        write("b", version_of(store, "b"), items),
                        write("a", version_of(store, "a"), items[:1], request_ids=batch),
                    ]
                )
                taken += batch
        assert caught.value.public is None and caught.value.status == "RESOURCE_EXHAUSTED"
        assert 60 - 16 <= len(taken) <= 60 + 16
        before = everything(store)
        counts = [head_of(store, user).history_count for user in "ab"]
        # all of a commit, or nothing; or of the user without a request id, all the same
        assert counts[1] - 100 * counts[0] == (0 if store.commits_together else 100)
        assert store.applied("a", range(1000)) == set(taken)
        with pytest.raises(TooManyRequestIdsError):
            store.commit([write("a", version_of(store, "a"), items[:1], request_ids=range(500, 520))])
        assert everything(store) == before
        assert store.commit([write("a", version_of(store, "a"), items[:1])]) == []  # without an id
        assert store.commit([write("b", version_of(store, "b"), request_ids=range(30))]) == []  # another user
        assert store.delete("a") == counts[0] + 1
        now += 6 * HOUR
        assert store.commit([write("a", items=items[:1], request_ids=range(500, 520))]) == []
        assert store.applied("a", range(1000)) == {*taken, *range(500, 520)}


# -- commits -----------------------------------------------------------------------------------------------------------


def test_conflicting_commit_stores_nothing_and_names_exactly_the_conflicting_users(whole_store: StateStore) -> None:
    items = items_for(whole_store)
    whole_store.commit([write(user, items=items[:40], records={1: b"x"}) for user in "abc"])
    old = version_of(whole_store, "a")
    whole_store.commit([write("a", old, items[:1])])
    before = everything(whole_store)
    batch = [
        write("a", old, items),  # stale
        write("b", version_of(whole_store, "b"), items),
        write("c", 0, items),  # exists
        write("new", 0, items),
        write("gone", version_of(whole_store, "b"), items),  # does not exist
    ]
    for order in (batch, batch[::-1]):
        assert sorted(whole_store.commit(order)) == ["a", "c", "gone"]
        assert everything(whole_store) == before
    assert whole_store.commit([batch[1], batch[3]]) == []
    counts = {user: head_of(whole_store, user).history_count for user in whole_store.scan()}
    assert counts == {"a": 41, "b": 140, "c": 40, "new": 100}


# -- histories that are replaced ---------------------------------------------------------------------------------------


def test_replaced_history_is_the_new_one_and_no_other(store: StateStore) -> None:
    items = items_for(store, 200)
    for before, after in [(b, a) for b, a in product(BORDERS, BORDERS) if b <= a]:
        a, ab, b = (f"{name} {before} {after}" for name in ("a", "ab", "b"))
        old, new = items[np.arange(before) % 7], items[100 + np.arange(after) % 9]
        store.commit([write(a, items=old), write(ab, items=old), write(b, items=old)])
        others = [of_user(store, user) for user in (ab, b)]
        assert store.commit([write(a, version_of(store, a), new, first_time=7, replace_from=0)]) == []
        assert as_lists(store.history(a)) == (new.tolist(), list(range(7, 7 + after)))
        assert store.seen(a).tolist() == sorted(set(new.tolist()))
        view = store.ranking_view(a, 1, 1)
        assert view is not None and set(view.seen.tolist()) == set(new.tolist())
        assert head_of(store, a).history_count == after
        assert [of_user(store, user) for user in (ab, b)] == others

        assert store.commit([write(a, version_of(store, a), items[:40], first_time=7 + after)]) == []  # and goes on
        assert as_lists(store.history(a)) == ([*new.tolist(), *items[:40].tolist()], list(range(7, 47 + after)))
        assert store.seen(a).tolist() == sorted({*new.tolist(), *items[:40].tolist()})


ENDS = [(b, s, a) for b, s, a in product(BORDERS, BORDERS, BORDERS) if s <= b <= a]


@pytest.mark.parametrize("kept", [True, False], ids=["same items", "other items"])
def test_history_that_is_replaced_from_a_position_on_keeps_what_is_before(store: StateStore, kept: bool) -> None:
    """The replaced events come again in another order with more, or others stand there."""
    items = items_for(store, 200)
    for number, (before, start, after) in enumerate(ENDS):
        old, user = items[(np.arange(before) * 7) % 40], f"user {number}"
        store.commit([write(user, items=old, records={1: b"one", 2: b"two"}, request_ids=[3])])
        new = items[100 + np.arange(after - start) % 9]
        if kept:
            new = np.concatenate(
                [items[199:200][: after - before], old[start:][::-1], new[: max(0, after - before - 1)]]
            )
        assert len(new) == after - start
        again = write(user, version_of(store, user), new, first_time=7, records={2: b"new"}, replace_from=start)
        assert store.commit([again]) == []
        expected = [*old[:start].tolist(), *new.tolist()]
        assert as_lists(store.history(user)) == (expected, [*range(1000, 1000 + start), *range(7, 7 + after - start)])
        assert store.seen(user).tolist() == sorted(set(expected))
        view = store.ranking_view(user, 1, 1)
        assert view is not None and set(view.seen.tolist()) == set(expected)
        assert [found and found.record for found in (get(store, user, n) for n in (1, 2))] == [None, b"new"]
        assert store.applied(user, [3]) == {3}
        store.commit([write(user, version_of(store, user), items[:33])])
        assert store.seen(user).tolist() == sorted({*expected, *items[:33].tolist()})


@pytest.mark.parametrize("durable", ["lmdb"], indirect=True)
def test_history_is_replaced_at_its_end_without_touching_the_rest(durable: Harness) -> None:
    """A late event costs the chunks behind its place, not the history."""
    with durable.open() as store:
        items = items_for(store)
        store.commit([write("a", items=np.resize(items, 3200 + 20))])
        steps = list[int]()
        with durable.at_step(10**9, lambda: None):
            for position in (3210, 3199, 3180, 0):
                before = durable._steps_left  # type: ignore[attr-defined]
                rest = store.history("a", position)[0]
                store.commit([write("a", version_of(store, "a"), [*rest, 1], replace_from=position)])
                steps.append(before - durable._steps_left)  # type: ignore[attr-defined]
        assert steps[0] < steps[1] <= steps[2] < 10 and steps[3] > 100


@pytest.mark.parametrize(("start", "count"), [(-1, 50), (41, 1), (39, 0), (0, 39)])
def test_history_is_not_replaced_from_nowhere_or_by_less(store: StateStore, start: int, count: int) -> None:
    items = items_for(store)
    store.commit([write("a", items=items[:40])])
    before = everything(store)
    with pytest.raises(ValueError, match="has 40 events"):
        store.commit([write("a", version_of(store, "a"), items[:count], replace_from=start)])
    assert everything(store) == before
    assert store.commit([write("a", version_of(store, "a"), items[:1], replace_from=39)]) == []


def test_replaced_history_drops_the_records_of_the_old_one(store: StateStore) -> None:
    items = items_for(store)
    records = {1: b"one", 2: b"two", 300: b"three"}
    store.commit([write(user, items=items[:40], records=records) for user in ("a", "ab", "b")])
    store.commit([write("a", version_of(store, "a"), items[:50], records={2: b"new"}, replace_from=0)])
    assert [user and user.record for user in (get(store, "a", number) for number in records)] == [None, b"new", None]
    assert head_of(store, "a").generation == 2
    for user in ("ab", "b"):
        assert [found and found.record for found in (get(store, user, n) for n in records)] == list(records.values())
    store.commit([write("ab", version_of(store, "ab"), items[:50], replace_from=0)])
    assert [user and user.record for user in (get(store, "ab", number) for number in records)] == [None] * 3
    assert head_of(store, "ab").generation == 300  # that wrote last
    assert store.drop_records(300) == 1


def test_replaced_history_keeps_the_request_ids(store: StateStore) -> None:
    items = items_for(store)
    for one in range(40):  # more than a head holds
        store.commit([write("a", version_of(store, "a"), items[:1], request_ids=[one])])
    store.commit([write("a", version_of(store, "a"), items, request_ids=[100], replace_from=0)])
    assert store.applied("a", range(200)) == {*range(40), 100}
    store.commit([write("a", version_of(store, "a"), items, replace_from=0)])
    assert store.applied("a", range(200)) == {*range(40), 100}


def test_replacement_of_another_version_stores_nothing(whole_store: StateStore) -> None:
    items = items_for(whole_store)
    whole_store.commit([write("a", items=items[:40], records={1: b"x"}), write("b", items=items[:3])])
    old = version_of(whole_store, "a")
    whole_store.commit([write("a", old, items[:1])])
    before = everything(whole_store)
    for version in (old, 0):
        batch = [
            write("a", version, items, replace_from=0),
            write("b", version_of(whole_store, "b"), items, replace_from=0),
            write("gone", old, items, replace_from=0),
        ]
        assert sorted(whole_store.commit(batch)) == ["a", "gone"]
        assert everything(whole_store) == before
    assert whole_store.commit([write("new", 0, items[:40], replace_from=0)]) == []  # nothing is a history too
    assert whole_store.history("new")[0].tolist() == items[:40].tolist()


@pytest.mark.parametrize(("before", "after"), [(1, 0), (33, 32), (70, 1), (70, 69)])
def test_history_is_not_replaced_by_a_shorter_one(store: StateStore, before: int, after: int) -> None:
    items = items_for(store)
    store.commit([write("a", items=items[:before], records={1: b"x"}), write("b", items=items[:before])])
    unchanged = everything(store)
    with pytest.raises(ValueError, match=f"user 'a' has {before} events; {after} cannot replace {before} of them"):
        store.commit(
            [
                write("b", version_of(store, "b"), items),
                write("a", version_of(store, "a"), items[:after], replace_from=0),
            ]
        )
    assert everything(store) == unchanged


def test_snapshot_sees_the_history_that_was_replaced_meanwhile(whole_store: StateStore) -> None:
    items = items_for(whole_store)
    whole_store.commit([write(user, items=items[:70], records={1: b"old"}) for user in "ab"])
    before = readings(whole_store)
    with whole_store.snapshot() as snapshot:
        whole_store.commit([write("a", version_of(whole_store, "a"), items[::-1], replace_from=0)])
        assert readings(snapshot) == before
    assert readings(whole_store) != before


def test_empty_commit_does_nothing(store: StateStore) -> None:
    store.commit([write("a")])
    before = everything(store)
    assert store.commit([]) == []
    assert everything(store) == before


def test_versions_are_never_given_again(store: StateStore) -> None:
    items = items_for(store)
    given: set[int] = {0}

    def commit(*users: str) -> None:
        untouched = {user: version_of(store, user) for user in store.scan() if user not in users}
        assert store.commit([write(user, version_of(store, user), items[:1]) for user in users]) == []
        fresh = {version_of(store, user) for user in users}
        assert not fresh & given
        assert untouched == {user: version_of(store, user) for user in untouched}
        given.update(fresh)

    for _ in range(3):
        commit("a", "b")
        commit("a")
        version = version_of(store, "a")
        store.delete("a")
        store.commit([])
        commit("a")
        assert store.commit([write("a", version)]) == ["a"]  # of an earlier life
        store.delete("a")
        store.delete("b")
        assert store.commit([write("a", version)]) == ["a"]
        commit("b")


@pytest.mark.parametrize(
    ("items", "timestamps"),
    [
        (np.array([100]), np.array([1])),
        (np.array([-1]), np.array([1])),
        (np.array([2**32 + 1]), np.array([1])),
        (np.array([1.0]), np.array([1])),
        (np.array([True]), np.array([1])),
        (np.array([1]), np.array([1.5])),
        (np.array([1]), np.array([2**63], np.uint64)),
        (np.array([1, 2]), np.array([1])),
        (np.array([], np.uint32), np.array([1])),
        (np.array([[1]]), np.array([[1]])),
    ],
)
def test_commit_refuses_bad_events_and_stores_nothing(
    store: StateStore, items: NDArray[Any], timestamps: NDArray[Any]
) -> None:
    items_for(store)
    with pytest.raises(ValueError, match="item"):
        store.commit([write("good", items=[1]), Write("bad", 0, {}, items, timestamps)])
    assert list(store.scan()) == []


def test_commit_refuses_a_user_named_twice(store: StateStore) -> None:
    with pytest.raises(ValueError, match="twice"):
        store.commit([write("a"), write("b"), write("a")])
    assert list(store.scan()) == []


# -- histories ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", BORDERS)
def test_history_gives_every_slice(store: StateStore, length: int) -> None:
    items = items_for(store)[np.arange(length) * 7 % 100]
    store.commit([write("a", items=items), write("aa", items=items[::-1])])
    for start, stop in product([*BORDERS, 1000], [*BORDERS, 1000, None]):
        expected = items[start:stop].tolist(), (1000 + np.arange(length))[start:stop].tolist()
        assert as_lists(store.history("a", start, stop)) == expected, (start, stop)
    assert as_lists(store.history("a")) == as_lists(store.history("a", 0, length))


@pytest.mark.parametrize(
    "batches", [[1] * 70, [31, 1, 1, 31, 33], [32, 32, 1], [33, 31, 64], [65, 63], [0, 97, 0, 1000]]
)
def test_history_and_seen_grow_by_appending(store: StateStore, batches: list[int]) -> None:
    numbers = items_for(store, 1200)
    random = np.random.default_rng(len(batches))
    items, times = np.zeros(0, np.uint32), np.zeros(0, np.int64)
    for size in batches:
        new = random.choice(numbers, size), random.integers(-(2**63), 2**63 - 1, size, endpoint=True)
        items, times = np.append(items, new[0]), np.append(times, new[1])
        assert store.commit([Write("a", version_of(store, "a"), {}, *new)]) == []
        assert as_lists(store.history("a")) == (items.tolist(), times.tolist())
        assert store.seen("a").tolist() == sorted(set(items.tolist()))
        view = store.ranking_view("a", 1, 0)
        assert view is not None and set(view.seen.tolist()) == set(items.tolist())
        assert view.history_count == head_of(store, "a").history_count == len(items)


def test_events_of_any_integer_type_are_kept_exactly(store: StateStore) -> None:
    items_for(store)
    events = [
        (np.array([99], np.uint64), np.array([-(2**63)])),
        (np.array([0], np.int8), np.array([2**63 - 1])),
        (np.array([1], np.int64), np.array([7], np.uint32)),
        (np.array([]), np.array([])),  # no events, of no integer type
    ]
    for new in events:
        assert store.commit([Write("a", version_of(store, "a"), {}, *new)]) == []
    assert as_lists(store.history("a")) == ([99, 0, 1], [-(2**63), 2**63 - 1, 7])


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (0, -1), (-5, -1)])
def test_history_refuses_negative_positions(store: StateStore, start: int, stop: int | None) -> None:
    with pytest.raises(ValueError, match="position"):
        store.history("a", start, stop)


@pytest.mark.parametrize(("record_bytes", "expected"), [(0, b""), (3, b"rec"), (6, b"record"), (100, b"record")])
def test_ranking_view_gives_the_first_bytes_of_the_record(
    store: StateStore, record_bytes: int, expected: bytes
) -> None:
    items = items_for(store)
    store.commit([write("a", items=items[[5, 3, 5]], records={2: b"record"})])
    view = store.ranking_view("a", 2, record_bytes)
    assert view is not None and view.seen.dtype == np.uint32
    assert (view.history_count, view.record, set(view.seen.tolist())) == (3, expected, {3, 5})
    other = store.ranking_view("a", 1, record_bytes)
    assert other is not None and (other.history_count, other.record, set(other.seen.tolist())) == (3, None, {3, 5})


def test_what_was_read_stays_as_it_was(store: StateStore) -> None:
    """Nothing returned is a view into memory that the store reuses or unmaps."""
    items = items_for(store)
    store.commit([write("a", items=items[:70], records={1: b"x" * 9000}), write("few", items=[3] * 32)])
    view, other = store.ranking_view("a", 1, 8000), store.ranking_view("few", 1, 8000)
    assert view is not None and other is not None
    read = get(store, "a"), store.history("a"), store.seen("a"), view, other
    copies = repr([np.copy(part) for part in (*read[1], read[2], view.seen, other.seen)]), repr(read[0]), repr(view)
    for number in range(5):
        store.delete("a")
        store.delete("few")
        store.commit([write(user, items=items[::-1], records={1: b"%d" % number * 9000}) for user in ("a", "few")])
    store.close()
    assert copies == (repr([*read[1], read[2], view.seen, other.seen]), repr(read[0]), repr(view))


def readings(reader: Snapshot) -> dict[str, Any]:
    """All that a snapshot or a store can read of three users and some items."""
    users, view = ["a", "b", "new"], [reader.ranking_view(user, 1, 3) for user in ("a", "b", "new")]
    return {
        "get_many": reader.get_many(users, 1),
        "ranking_view": [one and (one.history_count, one.record, sorted(one.seen.tolist())) for one in view],
        "history": [as_lists(reader.history(user)) for user in users],
        "seen": [reader.seen(user).tolist() for user in users],
        "find_items": reader.find_items(["item-1", "later"]).tolist(),
        "item_ids": reader.item_ids([3, 99]),
    }


def test_snapshot_is_one_moment_whatever_is_written_meanwhile(whole_store: StateStore) -> None:
    items = items_for(whole_store)
    whole_store.commit([write(user, items=items[:70], records={1: b"old"}) for user in "ab"])
    before = readings(whole_store)
    with whole_store.snapshot() as snapshot:
        assert readings(snapshot) == before
        for number in range(3):
            whole_store.commit([write("a", version_of(whole_store, "a"), items[::-1], records={1: b"%d" % number})])
            whole_store.commit([write(f"other-{number}", items=items, records={1: bytes(9000)})])
        whole_store.delete("b")
        whole_store.commit([write("new", items=items[:1])])
        whole_store.add_items(["later"])
        whole_store.drop_records(1)
        assert readings(snapshot) == before
        with whole_store.snapshot() as inner:  # another moment, in the same thread
            after = readings(inner)
        assert readings(snapshot) == before
        with pytest.raises(ValueError, match="never given a number"):
            snapshot.item_ids([100])
    assert after == readings(whole_store)
    assert all(after[name] != before[name] for name in before if name != "item_ids")


def test_snapshot_that_a_failure_ends_lets_the_store_go_on(store: StateStore) -> None:
    with pytest.raises(ZeroDivisionError), store.snapshot() as snapshot:
        assert snapshot.get_many(["a"], 1) == [None]
        raise ZeroDivisionError
    assert store.commit([write("a")]) == []
    assert head_of(store, "a").history_count == 0


# -- deletion and scans ------------------------------------------------------------------------------------------------


def test_delete_leaves_nothing_of_the_user_and_everything_of_the_others(store: StateStore) -> None:
    items = items_for(store)
    users = ["a", "ab", "a b", "b"]
    store.commit([write(user, 0, np.tile(items, 6), records={1: b"1", 3: b"3"}, request_ids=[1]) for user in users])
    before = everything(store)
    assert store.delete("a") == 600
    assert store.delete("a") is None
    assert get(store, "a") is None and store.ranking_view("a", 1, 1) is None
    assert as_lists(store.history("a")) == ([], []) and store.seen("a").tolist() == []
    assert everything(store) == {user: before[user] for user in users[1:]}
    assert store.stats().users == 3

    assert store.commit([write("a", items=items[:1])]) == []  # nothing comes back
    stored = [get(store, "a", generation) for generation in (1, 2, 3)]
    assert [user and user.record for user in stored] == [None] * 3
    head = head_of(store, "a")
    assert head == Head(head.version, 1, 0)
    assert store.history("a")[0].tolist() == store.seen("a").tolist() == items[:1].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("partitions", [1, 2, 3, 16])
def test_scan_partitions_are_disjoint_and_complete(store: StateStore, partitions: int) -> None:
    users = [f"user-{number}" for number in range(2500)] + GOOD_IDS
    store.commit([write(user, records={1: b"", 256: b"", 2**31: b""}) for user in users])
    parts = [list(store.scan(partition, partitions)) for partition in range(partitions)]
    assert sorted(user for part in parts for user in part) == sorted(users)
    assert min(map(len, parts)) > 0
    assert sorted(store.scan()) == sorted(users)


@pytest.mark.parametrize(("partition", "partitions"), [(1, 1), (-1, 1), (3, 2), (0, 0)])
def test_scan_refuses_a_partition_that_does_not_exist(store: StateStore, partition: int, partitions: int) -> None:
    with pytest.raises(ValueError, match="partition"):
        list(store.scan(partition, partitions))


def test_scan_names_users_that_stay_once_while_others_come_and_go(store: StateStore) -> None:
    store.commit([write(f"user-{number}") for number in range(2500)])
    named = []
    for position, user in enumerate(store.scan()):
        named.append(user)
        if position % 100 == 0:
            store.delete(user)  # was named already
            store.commit([write(f"{user}-new", request_ids=[1])])
    stay = [user for user in named if not user.endswith("-new")]
    assert sorted(stay) == sorted(f"user-{number}" for number in range(2500))
    assert len(set(named)) == len(named)


def test_stats_count_users_and_items(store: StateStore) -> None:
    assert (store.stats().users, store.stats().items) == (0, 0)
    items_for(store, 5)
    store.commit([write("a"), write("b")])
    store.delete("a")
    stats = store.stats()
    assert (stats.users, stats.items) == (1, 5)
    assert 0 <= stats.bytes_used <= stats.file_bytes


# -- threads -----------------------------------------------------------------------------------------------------------


def in_threads(work: list[Callable[[], object]]) -> None:
    """Runs all at once; the first failure fails the test."""
    failures: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.slow
def test_readers_see_whole_commits_while_a_thread_writes(whole_store: StateStore) -> None:
    items = items_for(whole_store)
    done = threading.Event()
    seen_commits = set()

    def read() -> None:
        while not done.is_set():
            users = whole_store.get_many(["a", "b"], 1)
            assert users[0] == users[1]  # of one moment, and written by one commit
            view = whole_store.ranking_view("a", 1, 10)
            if view is not None:
                assert view.record is not None
                assert int(view.record) == view.history_count == len(set(view.seen.tolist()))
                seen_commits.add(view.history_count)
            events = as_lists(whole_store.history("b"))
            assert events[1] == list(range(len(events[0])))

    def commit() -> None:
        try:
            for number in range(100):
                records = {1: b"%d" % (number + 1)}
                version = version_of(whole_store, "a")
                new = items[number : number + 1]
                batch = [write(user, version, new, records=records, first_time=number) for user in "ab"]
                assert whole_store.commit(batch) == []
        finally:
            done.set()

    in_threads([read, read, commit])
    assert seen_commits
    assert head_of(whole_store, "a").history_count == 100


def test_threads_that_write_one_user_lose_nothing(store: StateStore) -> None:
    items = items_for(store)

    def work(worker: int) -> Callable[[], None]:
        def commits() -> None:
            done = 0
            while done < 25:
                version = version_of(store, "shared")
                done += store.commit([write("shared", version, items[:1], first_time=100 * worker + done)]) == []

        return commits

    in_threads([work(worker) for worker in range(4)])
    times = store.history("shared")[1].tolist()
    assert sorted(times) == [100 * worker + number for worker in range(4) for number in range(25)]
    for worker in range(4):
        own = [time for time in times if time // 100 == worker]
        assert all(before < after for before, after in pairwise(own))


def test_threads_that_add_items_and_generations_agree(store: StateStore) -> None:
    ids = [f"item-{number}" for number in range(60)]
    numbers: list[dict[str, int]] = []
    generations: list[dict[str, int]] = []

    def work(seed: int) -> Callable[[], None]:
        def add() -> None:
            order = np.random.default_rng(seed).permutation(ids).tolist()
            added = [store.add_items(order[start : start + 7]) for start in range(0, 60, 7)]
            numbers.append(dict(zip(order, np.concatenate(added).tolist(), strict=True)))
            generations.append({bundle: store.add_generation(bundle) for bundle in order[:3] + ids[:5]})

        return add

    in_threads([work(seed) for seed in range(4)])
    assert all(found == numbers[0] for found in numbers)
    assert sorted(numbers[0].values()) == list(range(60))
    stored = store.generations()
    assert sorted(stored.values()) == list(range(1, len(stored) + 1))
    assert all(found.items() <= stored.items() for found in generations)


# -- closing and durability --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.add_items(["a"]),
        lambda store: store.find_items(["a"]),
        lambda store: store.item_ids([0]),
        lambda store: store.add_generation("bundle"),
        lambda store: store.generations(),
        lambda store: store.id_types(),
        lambda store: store.remember_id_types(IdTypes(TEXT, TEXT)),
        lambda store: store.rollout(),
        lambda store: store.set_rollout(ROLLOUT),
        lambda store: list(store.records(1)),
        lambda store: store.drop_records(1),
        lambda store: store.get_many(["a"], 1),
        lambda store: store.ranking_view("a", 1, 1),
        lambda store: store.history("a"),
        lambda store: store.seen("a"),
        lambda store: store.applied("a", [1]),
        lambda store: store.maintain(),
        lambda store: store.snapshot().__enter__(),
        lambda store: store.commit([write("a")]),
        lambda store: store.delete("a"),
        lambda store: list(store.scan()),
        lambda store: store.stats(),
        lambda store: store.flush(),
    ],
)
def test_closed_store_refuses(store: StateStore, call: Callable[[StateStore], object]) -> None:
    store.flush()
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        call(store)


def test_store_closes_at_the_end_of_its_block(harness: Harness) -> None:
    with harness.open() as store:
        store.commit([write("a")])
    with pytest.raises(StoreError, match="closed"):
        get(store, "a")


def fill(store: StateStore) -> None:
    items = store.add_items(GOOD_IDS)
    assert [store.add_generation(bundle) for bundle in ("one", "two")] == [1, 2]
    store.remember_id_types(IdTypes(TEXT, INTEGER))
    assert store.set_rollout(ROLLOUT)
    assert store.switch_items([2, 5], off=True) == 2
    batch = [
        write(user, 0, np.resize(items, 70), records={1: b"1", 2: b"2"}, request_ids=[9], sequences={1: Step(None, 7)})
        for user in "abc"
    ]
    assert store.commit(batch) == []
    store.delete("c")


def test_durable_store_keeps_everything(durable: Harness) -> None:
    with durable.open() as store:
        fill(store)
        before, version = everything(store), version_of(store, "a")
        store.delete("a")
    with durable.open() as store:
        assert everything(store) == {"b": before["b"]}
        assert store.find_items(GOOD_IDS).tolist() == list(range(len(GOOD_IDS)))
        assert store.add_items(["new", "b"]).tolist() == [len(GOOD_IDS), GOOD_IDS.index("b")]
        assert list(store.generations().items()) == [("one", 1), ("two", 2)]
        assert store.add_generation("three") == 3
        assert store.id_types() == IdTypes(TEXT, INTEGER)
        assert store.rollout() == ROLLOUT
        store.commit([write("a")])
        assert version_of(store, "a") not in (version, 0)
        assert store.commit([write("a", version)]) == ["a"]


WRITES: dict[str, Callable[[StateStore], object]] = {
    "commit": lambda store: store.commit(
        [
            write("a", version_of(store, "a"), [1] * 70, records={1: b"new", 2: b"new"}, request_ids=[1, 2]),
            write("new", 0, [2] * 33, records={2: b"new"}),
            write("b", version_of(store, "b"), [3]),
        ]
    ),
    "replace": lambda store: store.commit(
        [
            write("a", version_of(store, "a"), [1, 2] * 40, records={1: b"new"}, request_ids=[1, 2], replace_from=0),
            write("b", version_of(store, "b"), [3] * 70, records={2: b"new"}, replace_from=0),
        ]
    ),
    "sequences": lambda store: store.commit(
        [
            write("a", version_of(store, "a"), [1] * 3, sequences={1: Step(7, 9), 2: Step(None, 0)}),
            write("new", 0, [2] * 3, sequences={1: Step(None, 2**64 - 1)}),
        ]
    ),
    "replace the end": lambda store: store.commit(
        [write("a", version_of(store, "a"), [1, 2] * 9, records={1: b"new"}, replace_from=60)]
    ),
    "delete": lambda store: store.delete("a"),
    "add_items": lambda store: store.add_items(["new-1", "a", "new-2", "new-3"]),
    "add_generation": lambda store: store.add_generation("three"),
    "remember_id_types": lambda store: store.remember_id_types(IdTypes(INTEGER, TEXT)),
    "set_rollout": lambda store: store.set_rollout(ROLLOUT._replace(revision=2, trial="two", share=0.5)),
    "switch_items": lambda store: store.switch_items([1, 2, 3], off=True),
}


def is_part(contents: tuple[Any, ...], before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether each user is as before or as after, and all else is too."""
    users = {user for one in (before, after) for user in one[0]}
    each = all(contents[0].get(user) in (before[0].get(user), after[0].get(user)) for user in users)
    return each and users >= contents[0].keys() and contents[1:] in (before[1:], after[1:])


def without_versions(store: StateStore) -> tuple[Any, ...]:
    users = {
        user: ([found and (found.head[1:], found.record) for found in stored], *rest)
        for user, (stored, *rest) in everything(store).items()
    }
    items = store.item_ids(range(store.stats().items))
    catalogue = store.catalogue().revision, store.catalogue().off.tolist()
    return users, items, store.generations(), store.id_types(), store.rollout(), catalogue


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_crash_at_any_step_leaves_all_of_a_write_or_nothing(durable: Harness, directory: Path, name: str) -> None:
    with MemoryStore() as reference:
        fill(reference)
        before = without_versions(reference)
        WRITES[name](reference)
        after = without_versions(reference)

    found = []
    for step in count():
        harness = type(durable)(directory / str(step))
        store = harness.open()
        fill(store)
        try:
            with harness.at_step(step, harness.crash):
                WRITES[name](store)
            crashed = False
        except Crash:
            store, crashed = harness.recover(store), True
        contents = without_versions(store)
        assert contents in (before, after) or (not harness.together and is_part(contents, before, after))
        found.append(contents == after)
        store.close()
        assert harness.problems() == []
        if not crashed:
            break
    steps = 4 if harness.together else 3  # what several commands change is one step of a server
    assert len(found) >= steps and found == sorted(found)  # before all changes: nothing; at some step, all of them
    assert found[-2:] == [True, True]  # the crash before the return, and no crash


def test_crash_while_records_are_dropped_loses_only_those(durable: Harness) -> None:
    store = durable.open()
    fill(store)
    kept = {user: (head_of(store, user), everything(store)[user][1:]) for user in "ab"}
    for step in count():
        try:
            with durable.at_step(step, durable.crash):
                store.drop_records(2)
            break
        except Crash:
            store = durable.recover(store)
        assert {user: (head_of(store, user), everything(store)[user][1:]) for user in "ab"} == kept
        assert [stored and stored.record for stored in store.get_many(["a", "b"], 1)] == [b"1", b"1"]
    assert step >= 3
    assert [stored and stored.record for stored in store.get_many(["a", "b"], 2)] == [None, None]
    store.close()
