"""What `StateStore` promises about the sequences of producers, over every implementation."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from contract.stores import Harness

from dman_runtime.errors import TooManyProducersError
from dman_runtime.store import checks
from dman_runtime.store.base import Expected, StateStore, Step, Write

LAST = 2**64 - 1


def take(store: StateStore, user_id: str, steps: dict[int, Step], *, events: int = 1) -> list[str]:
    """Commits some events, and steps of producers, on top of what is there."""
    (item,) = store.add_items(["item"]).tolist()
    (stored,) = store.get_many([user_id], 1)
    version = stored.head.version if stored else 0
    return store.commit([Write(user_id, version, {}, np.full(events, item), np.arange(events), sequences=steps)])


def test_sequences_are_the_last_ones_of_each_user_and_producer(store: StateStore) -> None:
    assert store.sequences("a", [1, 2]) == {}
    assert take(store, "a", {1: Step(None, 0), LAST: Step(None, LAST)}) == []
    assert store.sequences("a", [1, 2, LAST]) == {1: 0, LAST: LAST}
    assert store.sequences("a", []) == store.sequences("ab", [1]) == {}
    assert take(store, "a", {1: Step(0, 5), 2: Step(None, 3)}) == []
    assert take(store, "a", {}) == []
    assert store.sequences("a", [2, 1, LAST]) == {1: 5, 2: 3, LAST: LAST}
    assert store.stats().producer_users == 1


@pytest.mark.parametrize("before", [None, 4, 6])
def test_step_from_somewhere_else_is_a_conflict_and_stores_nothing(store: StateStore, before: int | None) -> None:
    take(store, "a", {1: Step(None, 5)})
    take(store, "b", {})
    versions = {user: stored.head.version for user in "ab" if (stored := store.get_many([user], 1)[0])}
    writes = [
        Write("b", versions["b"], {}, np.zeros(1, np.uint32), np.zeros(1, np.int64), sequences={2: Step(None, 1)}),
        Write("a", versions["a"], {}, np.zeros(1, np.uint32), np.zeros(1, np.int64), sequences={1: Step(before, 9)}),
    ]
    assert store.commit(writes) == ["a"]
    assert store.sequences("a", [1, 2]) == {1: 5} and len(store.history("a")[0]) == 1
    together = store.commits_together
    assert store.sequences("b", [1, 2]) == ({} if together else {2: 1})
    assert len(store.history("b")[0]) == (1 if together else 2)


def test_sequences_outlive_the_user(store: StateStore) -> None:
    take(store, "a", {1: Step(None, 5)}, events=40)
    assert store.delete("a") == 40
    assert store.sequences("a", [1]) == {1: 5}
    assert take(store, "a", {1: Step(None, 6)}) == ["a"]  # of a writer that has not seen the earlier life
    assert store.get_many(["a"], 1) == [None]
    assert take(store, "a", {1: Step(5, 6)}) == []
    store.delete("a")
    store.maintain()
    assert store.sequences("a", [1]) == {1: 6}
    assert (store.stats().users, store.stats().producer_users) == (0, 1)


def test_sequences_outlive_the_process(durable: Harness) -> None:
    with durable.open() as store:
        for sequence in range(3):
            take(store, "a", {1: Step(sequence - 1 if sequence else None, sequence)})
    with durable.open() as store:
        assert store.sequences("a", [1]) == {1: 2}


def test_snapshot_sees_the_sequences_of_its_moment(store: StateStore) -> None:
    take(store, "a", {1: Step(None, 5)})
    with store.snapshot() as snapshot:
        snapshot.expect({"a": Expected(1, producers=(1,))})
        take(store, "a", {1: Step(5, 6)})
        assert snapshot.sequences("a", [1]) == {1: 5}
    assert store.sequences("a", [1]) == {1: 6}


@pytest.mark.parametrize("step", [Step(None, -1), Step(5, 5), Step(5, 4), Step(None, 2**64)])
def test_step_that_does_not_go_forward_is_refused(store: StateStore, step: Step) -> None:
    with pytest.raises(ValueError, match="a sequence cannot go from"):
        take(store, "a", {1: step})
    assert list(store.scan()) == []


def test_producers_of_a_user_are_bounded_and_those_known_go_on(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.MAX_PRODUCERS >= 4096
    monkeypatch.setattr(checks, "MAX_PRODUCERS", 5)
    take(store, "a", {producer: Step(None, 1) for producer in range(5)})
    with pytest.raises(TooManyProducersError, match="more than 5 producers; name producers after logs"):
        take(store, "a", {3: Step(1, 2), 9: Step(None, 1)})
    assert store.sequences("a", [3, 9]) == {3: 1} and len(store.history("a")[0]) == 1
    assert take(store, "a", {3: Step(1, 2)}) == []
    assert take(store, "b", {9: Step(None, 1)}) == []


def test_of_writers_with_the_same_step_one_is_first(store: StateStore) -> None:
    """Also where the user is deleted in between, so that the versions say nothing."""
    applied, barrier = [], threading.Barrier(4)
    store.add_items(["item"])

    def writer() -> None:
        barrier.wait()
        for sequence in range(20):
            before = sequence - 1 if sequence else None
            events = np.zeros(1, np.uint32), np.zeros(1, np.int64)
            write = Write("a", 0, {}, *events, sequences={1: Step(before, sequence)})
            while True:
                store.delete("a")
                if store.commit([write]) == []:
                    applied.append(sequence)
                    break
                if store.sequences("a", [1]).get(1, -1) >= sequence:
                    break

    threads = [threading.Thread(target=writer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(applied) == list(range(20))
