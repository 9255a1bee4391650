"""What stores promise that commit and show each user by itself: those of several servers."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.stores import HARNESSES, Crash, fresh_directory, request_id_limit

from dman_runtime.errors import ConflictError, StoreUnavailableError, TooManyRequestIdsError
from dman_runtime.store import redis_servers
from dman_runtime.store.base import Expected, StateStore, Step, Write
from dman_runtime.store.redis import RedisStore

NOTHING = np.zeros(0, np.uint32)
DIVIDED = [name for name, harness in HARNESSES.items() if not harness.together]


def events(*items: int) -> tuple[Any, Any]:
    return np.array(items, np.uint32), np.arange(len(items), dtype=np.int64)


def write(store: StateStore, user_id: str, *items: int, **fields: Any) -> Write:
    """Of the user as it is now."""
    return Write(user_id, version_of(store, user_id), fields.pop("records", {}), *events(*items), **fields)


def version_of(store: StateStore, user_id: str) -> int:
    (stored,) = store.get_many([user_id], 1)
    return stored.head.version if stored else 0


def items_of(store: StateStore, user_id: str) -> list[int]:
    return store.history(user_id)[0].tolist()


@pytest.fixture
def filled(divided: StateStore) -> StateStore:
    divided.add_items([f"item-{number}" for number in range(100)])
    return divided


def test_conflict_of_one_user_keeps_no_other_from_being_stored(filled: StateStore) -> None:
    filled.commit([write(filled, user, 1, 2) for user in "abc"])
    stale = write(filled, "b", 7)
    filled.commit([write(filled, "b", 3)])
    batch = [write(filled, "a", 4), stale, write(filled, "new", 5), Write("gone", 17, {}, *events(6))]
    assert filled.commit(batch) == ["b", "gone"]
    assert [items_of(filled, user) for user in ("a", "b", "c", "new", "gone")] == [
        [1, 2, 4],
        [1, 2, 3],
        [1, 2],
        [5],
        [],
    ]


def test_error_of_one_user_names_those_who_were_stored(filled: StateStore) -> None:
    with request_id_limit(3), pytest.raises(TooManyRequestIdsError) as caught:
        filled.commit([write(filled, "a", 1), write(filled, "b", 2, request_ids=range(5)), write(filled, "c", 3)])
    assert set(caught.value.stored) == {"a", "c"}
    assert [items_of(filled, user) for user in "abc"] == [[1], [], [3]]


@pytest.mark.parametrize("name", DIVIDED)
def test_commit_whose_answer_is_lost_is_stored_once(name: str) -> None:
    """The connection breaks before or after the servers have done it; it is sent again."""
    with fresh_directory() as directory:
        harness = HARNESSES[name](directory)
        with harness.open() as store:
            assert isinstance(store, RedisStore)
            store.add_items([f"item-{number}" for number in range(100)])
            run, lost = store._servers._on, [False]

            def losing(client: Any, commands: Any, wait: Any) -> list[Any]:
                answers = run(client, commands, wait)
                if not lost[0] and any("_commit" in str(command.arguments[1]) for command in commands):
                    lost[0] = True
                    return [ConnectionResetError("lost")] * len(answers)
                return answers

            store._servers._on = losing  # type: ignore[method-assign]
            for number in range(40):
                lost[0] = False
                steps = {1: Step(number - 1 if number else None, number)}
                records = {1: b"%d" % number}
                changes = [write(store, user, number, records=records, sequences=steps) for user in ("a", "b")]
                assert store.commit(changes) == []
                assert lost[0]
            for user in ("a", "b"):
                assert items_of(store, user) == list(range(40))
                assert store.sequences(user, [1]) == {1: 39}


@pytest.mark.parametrize("done", [True, False], ids=["stored", "not stored"])
def test_write_whose_server_stays_away_is_stored_once_when_it_is_sent_again(
    filled: StateStore, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """Neither has a request id. One of two is answered; nobody knows of the other."""
    assert isinstance(filled, RedisStore)
    monkeypatch.setattr(redis_servers, "PATIENCE_SECONDS", 0.2)
    filled.commit([write(filled, user, 1, request_ids=[]) for user in ("anna", "bob")])
    writes = [write(filled, user, 2, records={1: b"new"}) for user in ("anna", "bob")]
    run, away = filled._servers._on, filled._keys.of_user(b"bob").user

    def losing(client: Any, commands: Any, wait: Any) -> list[Any]:
        sent = [command for command in commands if done or command.key != away or "_commit" not in str(command)]
        answers = dict(zip(map(id, sent), run(client, sent, wait), strict=True))
        lost = ConnectionResetError("lost")
        return [lost if one.key == away and "_commit" in str(one) else answers[id(one)] for one in commands]

    with monkeypatch.context() as patch:
        patch.setattr(filled._servers, "_on", losing)
        with pytest.raises(StoreUnavailableError, match="lost") as caught:
            filled.commit(writes)
    assert set(caught.value.stored) == {"anna"}
    assert filled.commit(writes[1:]) == []
    assert filled.commit(writes) == []  # both, once more
    for user in ("anna", "bob"):
        (stored,) = filled.get_many([user], 1)
        assert stored is not None and (stored.record, items_of(filled, user)) == (b"new", [1, 2])


def test_snapshot_keeps_a_user_as_it_was_when_first_read(filled: StateStore) -> None:
    filled.commit([write(filled, user, *range(40), records={1: b"old"}, request_ids=[1]) for user in "ab"])
    with filled.snapshot() as snapshot:
        snapshot.expect({"a": Expected(1, whole=True, ranking=True, request_ids=(1, 2), producers=(5,))})
        filled.commit(
            [
                write(filled, user, 50, records={1: b"new"}, request_ids=[2], sequences={5: Step(None, 1)})
                for user in "ab"
            ]
        )
        (a, b) = snapshot.get_many(["a", "b"], 1)
        assert a is not None and (a.record, a.head.history_count) == (b"old", 40)
        assert b is not None and (b.record, b.head.history_count) == (b"new", 41)
        assert snapshot.history("a")[0].tolist() == list(range(40))
        assert snapshot.seen("a").tolist() == list(range(40))
        view = snapshot.ranking_view("a", 1, 10)
        assert view is not None and (view.record, view.history_count) == (b"old", 40)
        assert snapshot.applied("a", [1, 2]) == {1} and snapshot.sequences("a", [5]) == {}
        assert snapshot.applied("b", [1, 2]) == {1, 2} and snapshot.sequences("b", [5]) == {5: 1}


def test_reading_of_another_moment_than_the_one_before_says_so(filled: StateStore) -> None:
    filled.commit([write(filled, user, *range(70), records={1: b"old", 2: b"two"}) for user in "ab"])
    with filled.snapshot() as snapshot:
        assert snapshot.get_many(["a", "b"], 1)[0] is not None
        filled.commit([write(filled, "a", 50, replace_from=69)])
        filled.commit([write(filled, "b", 50)])
        with pytest.raises(ConflictError, match="changed while it was read; try again"):
            snapshot.history("a")  # was replaced
        with pytest.raises(ConflictError, match="changed while it was read; try again"):
            snapshot.get_many(["b"], 2)
        assert snapshot.history("b")[0].tolist() == list(range(70))  # only grew
    assert items_of(filled, "a")[-1] == items_of(filled, "b")[-1] == 50


def test_read_again_after_a_deletion_is_no_mix_of_two_lives(filled: StateStore) -> None:
    filled.commit([write(filled, "a", *range(40))])
    with filled.snapshot() as snapshot:
        snapshot.get_many(["a"], 1)
        filled.delete("a")
        filled.commit([write(filled, "a", *range(60, 100))])
        with pytest.raises(ConflictError):
            snapshot.history("a")


def test_expected_reading_takes_one_round_trip_to_each_server(filled: StateStore) -> None:
    assert isinstance(filled, RedisStore)
    users = [f"user-{number}" for number in range(30)]
    filled.commit([write(filled, user, *range(40), records={1: bytes(9000)}, request_ids=[1]) for user in users])
    run, trips = filled._servers._on, list[object]()

    def counted(client: Any, commands: Any, wait: Any) -> list[Any]:
        trips.append(client)
        return run(client, commands, wait)

    filled._servers._on = counted  # type: ignore[method-assign]
    with filled.snapshot() as snapshot:
        wanted = Expected(1, whole=True, ranking=True, request_ids=(1,), producers=(2,))
        snapshot.expect(dict.fromkeys(users, wanted))
        assert len(trips) == len(set(map(id, trips))) <= 3
        for user in users:
            assert snapshot.applied(user, [1]) == {1} and snapshot.sequences(user, [2]) == {}
            assert snapshot.ranking_view(user, 1, 100) is not None
        stored = snapshot.get_many(users, 1)
    del trips[:]
    changes = [
        Write(user, one.head.version, {1: b"more"}, *events(3), request_ids=[2])
        for user, one in zip(users, stored, strict=True)
        if one is not None
    ]
    assert len(changes) == 30 and filled.commit(changes) == []
    assert len(trips) == len(set(map(id, trips))) <= 3  # and a commit one more


def test_nothing_tells_the_name_of_a_deleted_user(filled: StateStore) -> None:
    assert isinstance(filled, RedisStore)
    filled.commit([write(filled, "anna", *range(40), request_ids=[1], sequences={1: Step(None, 1)})])
    filled.delete("anna")
    left = {
        key: client.dump(key)
        for client in filled._servers.primaries()
        for key in client.scan_iter(match=b"*" + filled._keys.users[:24] + b"*")
    }
    assert left and not any(b"anna" in key or b"anna" in value for key, value in left.items())
    assert filled.applied("anna", [1]) == {1} and filled.sequences("anna", [1]) == {1: 1}


def test_what_is_kept_for_a_time_expires_on_the_servers(filled: StateStore) -> None:
    assert isinstance(filled, RedisStore)
    shown = np.array([3], np.uint32), np.array([50], np.int64)
    filled.commit([write(filled, "a", 1, request_ids=[1], shown=shown)])
    keys = filled._keys.of_user(b"a")
    seconds = [filled._servers.one(key, "TTL", key) for key in keys]
    assert seconds[:3] == [-1, -1 if seconds[1] == -1 else -2, -2]  # user, chunks and sequences: for ever, or not there
    assert 24 * 3600 < seconds[3] <= 26 * 3600 and 49 <= seconds[4] <= 51


@pytest.mark.parametrize("name", DIVIDED)
def test_death_in_a_commit_leaves_each_user_whole(name: str, tmp_path: Path) -> None:
    for step in count():
        harness = HARNESSES[name](tmp_path / str(step))
        store = harness.open()
        store.add_items([f"item-{number}" for number in range(100)])
        users = ["a", "b", "c"]
        store.commit([write(store, user, *range(40), records={1: b"old"}) for user in users])
        changes = [write(store, user, *range(30), records={1: b"new"}, request_ids=[9]) for user in users]
        try:
            with harness.at_step(step, harness.crash):
                store.commit(changes)
            crashed = False
        except Crash:
            store, crashed = harness.recover(store), True
        with store:
            for user, stored in zip(users, store.get_many(users, 1), strict=True):
                assert stored is not None
                new = stored.record == b"new"
                assert items_of(store, user) == [*range(40), *(range(30) if new else ())]
                assert store.applied(user, [9]) == ({9} if new else set())
            repeated = [user for user in users if not store.applied(user, [9])]  # as a retry of the batch does
            assert store.commit([write(store, user, *range(30), request_ids=[9]) for user in repeated]) == []
            assert [len(items_of(store, user)) for user in users] == [70] * 3
        if not crashed:
            break
    assert step == 4
