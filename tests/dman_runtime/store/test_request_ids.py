"""Where an LMDB store keeps request ids: in heads while there is room, then by period, until they are swept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dman_runtime.errors import StoreDamagedError
from dman_runtime.store import lmdb as lmdb_module
from dman_runtime.store import lmdb_reads, request_ids
from dman_runtime.store.base import REMEMBER_SECONDS, Write
from dman_runtime.store.checks import MAX_IDS, PERIOD_SECONDS
from dman_runtime.store.history import RECENT_IDS
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.request_ids import KEPT_PERIODS, period_of, period_to_spill

NONE = np.zeros(0, np.int64)
PERIOD = 80_000  # a moment
USERS = ("a", "b", "c0", "c1", "c2", "c3", "gone")


class Clock:
    now = PERIOD * PERIOD_SECONDS + 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[LmdbStore]:
    with LmdbStore.open(tmp_path / "state", map_size=64 << 20, clock=clock) as opened:
        yield opened


def add(store: LmdbStore, user_id: str, *ids: int) -> None:
    (stored,) = store.get_many([user_id], 1)
    assert store.commit([Write(user_id, stored.head.version if stored else 0, {}, NONE, NONE, ids)]) == []


def spilled(store: LmdbStore) -> dict[tuple[int, str], list[int]]:
    """The ids in the database, by period and user."""
    found: dict[tuple[int, str], list[int]] = {}
    owners = {store._databases.owner(user.encode()): user for user in USERS}
    with store._env.read() as reading, reading.txn.cursor(db=store._databases.requests) as cursor:
        for key, value in cursor:
            assert request_ids.is_sound(store._databases, bytes(key), bytes(value))
            place = int.from_bytes(key[:4], "big"), owners[bytes(key[4:-8])]
            found.setdefault(place, []).append(int.from_bytes(key[-8:], "big"))
    return found


def test_numbers_are_the_documented_ones() -> None:
    assert (REMEMBER_SECONDS, PERIOD_SECONDS, KEPT_PERIODS, MAX_IDS, RECENT_IDS) == (86_400, 21_600, 4, 100_000, 16)


def test_ids_stay_in_the_head_until_it_is_full_and_are_then_spilled_together(store: LmdbStore) -> None:
    for one in range(RECENT_IDS):
        add(store, "a", one)
    assert spilled(store) == {}
    add(store, "a", 100)
    assert spilled(store) == {(PERIOD, "a"): list(range(RECENT_IDS))}
    for one in range(200, 200 + RECENT_IDS - 1):
        add(store, "a", one)
    assert len(spilled(store)[PERIOD, "a"]) == RECENT_IDS
    add(store, "a", *range(1000, 1000 + RECENT_IDS + 4))  # those that the head cannot take go at once
    expected = [*range(RECENT_IDS), 100, *range(200, 200 + RECENT_IDS - 1), *range(1000, 1004)]
    assert spilled(store) == {(PERIOD, "a"): expected}
    assert store.applied("a", range(2000)) == {*expected, *range(1004, 1020)}


def test_most_updates_do_not_look_into_the_database(
    store: LmdbStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    original = request_ids._holds
    monkeypatch.setattr(request_ids, "_holds", lambda txn, db, key: asked.append(key) or original(txn, db, key))
    add(store, "a", 1)
    assert store.applied("a", [1, 2]) == {1} and store.applied("new", [1]) == set()
    assert asked == []
    add(store, "a", *range(10, 30))
    assert store.applied("a", [1, 2, 29]) == {1, 29} and len(asked) <= 2 * (KEPT_PERIODS + 1)
    asked.clear()
    clock.now += (KEPT_PERIODS + 1) * PERIOD_SECONDS  # what was spilled has expired
    assert store.applied("a", [1, 2, 29]) == {29} and asked == []


def test_expired_ids_are_swept_a_part_with_each_spilling(
    store: LmdbStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_ids, "SWEPT_PER_COMMIT", 10)
    add(store, "a", *range(41))
    clock.now += PERIOD_SECONDS
    add(store, "b", *range(31))
    assert {place: len(ids) for place, ids in spilled(store).items()} == {(PERIOD, "a"): 25, (PERIOD + 1, "b"): 15}
    clock.now += KEPT_PERIODS * PERIOD_SECONDS  # the first period expires, the second does not
    for number, left in enumerate((15, 5, 0, 0)):
        add(store, f"c{number}", *range(1 + RECENT_IDS))
        assert len(spilled(store).get((PERIOD, "a"), [])) == left
    assert len(spilled(store)[PERIOD + 1, "b"]) == 15


def test_maintain_sweeps_expired_ids_in_pieces_and_leaves_the_others(
    store: LmdbStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_module, "_SWEPT_PER_SWEEP", 7)
    add(store, "a", *range(116))
    clock.now += (KEPT_PERIODS + 1) * PERIOD_SECONDS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_ids, "SWEPT_PER_COMMIT", 0)
        add(store, "b", *range(100, 150))
    store.maintain()
    assert {place: len(ids) for place, ids in spilled(store).items()} == {(PERIOD, "a"): 30, (PERIOD + 5, "b"): 34}
    store.maintain()
    assert list(spilled(store)) == [(PERIOD + 5, "b")]
    before = store._env._environment().info()["last_txnid"]
    store.maintain()
    assert store._env._environment().info()["last_txnid"] == before  # nothing to sweep: nothing is written


def test_deletion_spills_what_the_head_held_and_a_new_life_knows_of_it(store: LmdbStore, clock: Clock) -> None:
    add(store, "a", 1, 2)
    store.delete("a")
    assert spilled(store) == {(PERIOD, "a"): [1, 2]}
    clock.now += PERIOD_SECONDS
    add(store, "a", 3)
    assert store.applied("a", range(9)) == {1, 2, 3}
    with store.snapshot() as snapshot:
        head = lmdb_reads.read_head(snapshot.txn, store._databases, b"a")
    assert head is not None and head.spilled == (PERIOD, 2)


def test_deletion_of_a_damaged_head_works_without_its_ids(store: LmdbStore) -> None:
    add(store, "a", 1, 2)
    with store._env.write() as txn:
        txn.put(b"a\0\0\0\0\0", b"damaged" * 9, db=store._databases.users)
    assert store.delete("a") is not None
    assert spilled(store) == {} and store.get_many(["a"], 1) == [None]


@pytest.mark.parametrize("periods_back", [1, KEPT_PERIODS])
def test_clock_that_is_set_back_forgets_nothing(store: LmdbStore, clock: Clock, periods_back: int) -> None:
    add(store, "a", *range(20))
    add(store, "gone", *range(20))
    store.delete("gone")
    clock.now -= periods_back * PERIOD_SECONDS
    assert store.applied("a", range(30)) == store.applied("gone", range(30)) == set(range(20))
    add(store, "a", *range(20, 40))  # into the period that the user had reached
    assert set(spilled(store)) == {(PERIOD, "a"), (PERIOD, "gone")}
    add(store, "gone", 50)
    assert store.applied("gone", range(60)) == {*range(20), 50}
    clock.now += (periods_back + KEPT_PERIODS) * PERIOD_SECONDS
    assert store.applied("a", range(50)) == set(range(40))


def test_clock_that_is_set_back_for_longer_starts_anew_and_that_one_is_right(store: LmdbStore, clock: Clock) -> None:
    add(store, "a", *range(20))
    clock.now -= 100 * PERIOD_SECONDS
    add(store, "a", *range(20, 60))
    assert (PERIOD - 100, "a") in spilled(store)
    assert store.applied("a", range(20, 60)) == set(range(20, 60))


def test_periods_are_those_of_the_clock_and_never_below_zero() -> None:
    assert [period_of(now) for now in (-1e9, 0, 4 * 21600, 5 * 21600 - 1, 5 * 21600)] == [4, 4, 4, 4, 5]
    assert [period_to_spill(100 * 21600, last) for last in (0, 99, 100, 101, 104, 105)] == [
        100,
        100,
        100,
        101,
        104,
        100,
    ]


def test_damaged_id_is_reported(store: LmdbStore) -> None:
    add(store, "a", *range(20))
    with store._env.write() as txn:
        key = request_ids.request_key(PERIOD, store._databases.owner(b"a"), 0)
        txn.put(key, b"1234", db=store._databases.requests)
    with pytest.raises(StoreDamagedError, match="request id is damaged"):
        store.applied("a", [0])
    assert store.applied("a", [1, 2]) == {1, 2}


@pytest.mark.slow
def test_hundred_thousand_ids_of_a_user_are_taken_in_six_hours(store: LmdbStore) -> None:
    for start in range(0, 100_000, 500):
        add(store, "a", *range(start, start + 500))
    assert store.applied("a", range(0, 100_000, 7)) == set(range(0, 100_000, 7))
