"""Updates of several users over a store that commits each user by itself: nobody's events are lost or doubled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from contract.stores import RedisHarness

from dman_runtime.batcher import Batcher
from dman_runtime.engine import Engine
from dman_runtime.errors import StoreUnavailableError, TooManyRequestIdsError
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query, Update
from dman_runtime.store import checks
from dman_runtime.store.base import Write
from dman_runtime.store.redis import RedisStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RedisStore]:
    with RedisHarness(tmp_path).open() as opened:
        yield opened


@pytest.fixture
def engine(exact: Generation, store: RedisStore) -> Engine:
    return Engine(exact, store)


def events_of(engine: Engine, user_id: str) -> list[str]:
    return engine.store.item_ids(engine.store.history(user_id)[0])


def before_next_commit(store: RedisStore, monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    commit, waiting = store.commit, [action]

    def commits(writes: Sequence[Write]) -> list[str]:
        if waiting:
            waiting.pop()()
        return commit(writes)

    monkeypatch.setattr(store, "commit", commits)


def assert_states_are_replays(engine: Engine, users: Sequence[str]) -> None:
    """What is answered is what a fresh store answers for the same histories."""
    for user in users:
        found = engine.recommend([Query(user, 5, include_seen=True)])[0]
        assert found.event_count == len(events_of(engine, user))
        (opened,) = engine.open_users([user])
        assert not opened.record_lags and not len(opened.left)


def test_user_without_a_conflict_is_stored_once_while_another_is_tried_again(
    engine: Engine, exact: Generation, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.update([Update("a", ["1"]), Update("b", ["1"])])
    other = Engine(exact, store)
    before_next_commit(store, monkeypatch, lambda: other.update([Update("b", ["5"])]))
    outcomes = engine.update([Update("a", ["2", "3"]), Update("b", ["2"]), Update("new", ["4"])])
    assert [one.applied for one in outcomes] == [2, 1, 1]
    assert [events_of(engine, user) for user in ("a", "b", "new")] == [["1", "2", "3"], ["1", "5", "2"], ["4"]]
    assert_states_are_replays(engine, ["a", "b", "new"])


def test_batch_that_was_cut_off_is_completed_by_the_same_batch(engine: Engine, store: RedisStore) -> None:
    batch = [Update("a", ["1", "2"]), Update("b", ["3"])]
    opened = engine.open_updates(batch, "batch 1")
    engine.advance(opened.users)
    assert store.commit([opened.users[0].write()]) == []  # then the process dies
    outcomes = engine.update(batch, "batch 1")
    assert [(one.applied, one.duplicate) for one in outcomes] == [(0, True), (1, False)]
    assert [one.duplicate for one in engine.update(batch, "batch 1")] == [True, True]
    assert [events_of(engine, user) for user in "ab"] == [["1", "2"], ["3"]]
    assert_states_are_replays(engine, "ab")


def test_batch_that_two_servers_get_is_applied_once(
    engine: Engine, exact: Generation, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, batch = Engine(exact, store), [Update("a", ["1"]), Update("b", ["2"])]
    before_next_commit(store, monkeypatch, lambda: other.update(batch[1:], "batch 1"))
    outcomes = engine.update(batch, "batch 1")
    assert [(one.applied, one.duplicate) for one in outcomes] == [(1, False), (0, True)]
    assert [events_of(engine, user) for user in "ab"] == [["1"], ["2"]]


def test_updates_that_share_a_commit_with_one_that_is_refused_are_stored_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no request ids: nothing but the batcher's care keeps them from being stored twice."""
    monkeypatch.setattr(checks, "MAX_IDS", 0)
    batcher = Batcher(engine)
    with batcher._changed:  # all in one turn
        updates = [Update("a", ["1"]), Update("b", ["1"], request_id="id"), Update("c", ["1"])]
        results = {update.user_id: batcher.submit_updates([update]) for update in updates}
    assert [results[user].result(20)[0].applied for user in "ac"] == [1, 1]
    with pytest.raises(TooManyRequestIdsError):
        results["b"].result(20)
    batcher.close()
    assert [events_of(engine, user) for user in "abc"] == [["1"], [], ["1"]]
    assert_states_are_replays(engine, "ac")


def test_updates_of_a_turn_whose_commit_conflicts_are_stored_once(
    engine: Engine, exact: Generation, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Engine(exact, store)
    before_next_commit(store, monkeypatch, lambda: other.update([Update("b", ["9"])]))
    batcher = Batcher(engine)
    with batcher._changed:
        results = [batcher.submit_updates([Update(user, ["1"])]) for user in "abc"]
    assert [result.result(20)[0].applied for result in results] == [1, 1, 1]
    batcher.close()
    assert [events_of(engine, user) for user in "abc"] == [["1"], ["9", "1"], ["1"]]


def test_error_that_names_nobody_leaves_nothing_marked_as_stored(
    engine: Engine, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise StoreUnavailableError("gone", "wait")

    before_next_commit(store, monkeypatch, fails)
    with pytest.raises(StoreUnavailableError):
        engine.update([Update("a", ["1"])])
    assert events_of(engine, "a") == []
    assert engine.update([Update("a", ["1"])])[0].applied == 1
