"""Updates of a producer with an order of its own are applied once each, whatever is sent again, and whenever."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import STORES, new_store
from contract.stores import fresh_directory
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dman_runtime.batcher import Batcher
from dman_runtime.engine import Engine
from dman_runtime.errors import RequestError, TooManyProducersError
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Update, UpdateOutcome
from dman_runtime.store import checks
from dman_runtime.store.lmdb import LmdbStore

USERS = ("a", "b")
LOG = [Update("ab"[number % 3 > 1], [str(number + 1)], producer="log", sequence=3 * number) for number in range(12)]


@pytest.fixture(params=STORES)
def engine(request: pytest.FixtureRequest, exact: Generation):  # type: ignore[no-untyped-def]
    with new_store(request.param) as store:
        yield Engine(exact, store)


def send(engine: Engine, *items: object, sequence: int, user: str = "u", producer: str = "p") -> UpdateOutcome:
    return engine.update([Update(user, list(map(str, items)), producer=producer, sequence=sequence)])[0]


def history(engine: Engine, user_id: str) -> list[str]:
    return engine.store.item_ids(engine.store.history(user_id)[0])


def test_update_at_or_below_the_last_sequence_is_a_repeat(engine: Engine) -> None:
    assert not send(engine, 1, sequence=0).duplicate
    assert send(engine, 1, sequence=0).duplicate
    assert not send(engine, 2, 3, sequence=7).duplicate  # it may leave numbers out
    for sequence in (0, 5, 7):
        again = send(engine, 9, sequence=sequence)
        assert (again.duplicate, again.applied, again.event_count, again.history_count) == (True, 0, 3, 3)
    assert not send(engine, 4, sequence=8).duplicate
    assert history(engine, "u") == ["1", "2", "3", "4"]


def test_producers_and_users_have_their_own_order(engine: Engine) -> None:
    assert not send(engine, 1, sequence=5).duplicate
    assert not send(engine, 2, sequence=5, producer="q").duplicate
    assert not send(engine, 3, sequence=5, user="v").duplicate
    assert send(engine, 4, sequence=5, producer="q").duplicate
    assert (history(engine, "u"), history(engine, "v")) == (["1", "2"], ["3"])


def test_update_without_events_moves_no_sequence(engine: Engine) -> None:
    assert not send(engine, sequence=9).duplicate
    assert list(engine.store.scan()) == []
    assert not send(engine, 1, sequence=3).duplicate


def test_updates_of_one_batch_apply_in_the_order_given(engine: Engine) -> None:
    updates = [Update("u", [str(n)], producer="p", sequence=n) for n in (3, 1, 4, 4, 6)]
    outcomes = engine.update([*updates, Update("u", ["9"]), Update("v", ["9"], producer="q", sequence=0)])
    assert [one.duplicate for one in outcomes] == [False, True, False, True, False, False, False]
    assert history(engine, "u") == ["3", "4", "6", "9"]


def test_batch_with_a_request_id_is_a_repeat_as_a_whole_and_else_by_its_producers(engine: Engine) -> None:
    send(engine, 1, sequence=1)
    batch = [Update("u", ["1"], producer="p", sequence=1), Update("u", ["2"], producer="p", sequence=2)]
    batch.append(Update("v", ["3"]))
    assert [one.duplicate for one in engine.update(batch, "batch")] == [True, False, False]
    assert [one.duplicate for one in engine.update(batch, "batch")] == [True, True, True]
    assert [one.duplicate for one in engine.update(batch)] == [True, True, False]
    assert (history(engine, "u"), history(engine, "v")) == (["1", "2"], ["3", "3"])


def test_update_may_have_a_request_id_too_and_is_a_repeat_by_either(engine: Engine) -> None:
    def both(request_id: str, sequence: int) -> bool:
        update = Update("u", ["1"], request_id=request_id, producer="p", sequence=sequence)
        return engine.update([update])[0].duplicate

    assert [both("r", 1), both("r", 2), both("s", 1), both("s", 2)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("producer", "sequence", "words"),
    [("", 0, "give both"), ("p", None, "give both"), ("p" * 129, 1, "128 bytes"), ("é" * 65, 1, "128 bytes"),
     ("p", -1, "0 to 2"), ("p", 2**64, "0 to 2")],
)  # fmt: skip
def test_producer_that_cannot_be_is_refused(engine: Engine, producer: str, sequence: int | None, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.update([Update("u", ["1"], producer=producer, sequence=sequence)])
    assert list(engine.store.scan()) == []


def test_too_many_producers_of_one_user_store_nothing_and_harm_nobody_else(
    exact: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "MAX_PRODUCERS", 3)
    with new_store("lmdb") as store:
        batcher = Batcher(Engine(exact, store))
        for number in range(3):
            batcher.update([Update("u", ["1"], producer=f"run {number}", sequence=0)])
        more = batcher.submit_updates([Update("u", ["2"], producer="run 3", sequence=0)])
        other = batcher.submit_updates([Update("v", ["2"], producer="run 3", sequence=0)])
        with pytest.raises(TooManyProducersError):
            more.result(30)
        assert not other.result(30)[0].duplicate
        assert len(store.history("u")[0]) == 3
        batcher.close()


parts = st.lists(st.tuples(st.integers(0, len(LOG)), st.integers(0, len(LOG)), st.booleans()), max_size=8)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    parts=parts, deleted=st.sets(st.integers(0, 8), max_size=2), switches=st.lists(st.booleans(), min_size=9)
)  # fmt: skip
@example(parts=[(0, 12, True), (0, 12, False)], deleted={1}, switches=[False, True] * 5)
def test_log_that_is_read_again_from_any_point_changes_nothing(
    exact: Generation,
    renamed: Generation,
    parts: list[tuple[int, int, bool]],
    deleted: set[int],
    switches: list[bool],
) -> None:
    """Readers that start anywhere before what is done, under either of two bundles, after deletions and restarts."""
    done, expected = 0, defaultdict[str, list[str]](list)
    with fresh_directory() as path:
        for number, (wanted, stop, one_by_one) in enumerate([*parts, (0, len(LOG), False)]):
            start = min(wanted, done)  # a reader never leaves out what is not applied
            with LmdbStore.open(path / "state", map_size=32 << 20) as store:
                engine = Engine(renamed if switches[number] else exact, store)
                if number in deleted:
                    engine.delete("a")
                    expected.pop("a", None)
                chunk = LOG[start:stop]
                outcomes = [engine.update([one])[0] for one in chunk] if one_by_one else engine.update(chunk)
                for position, (update, outcome) in enumerate(zip(chunk, outcomes, strict=True), start=start):
                    assert outcome.duplicate == (position < done)
                    if position >= done:
                        expected[update.user_id] += update.item_ids
                done = max(done, stop)
                for user_id in USERS:
                    assert history(engine, user_id) == expected.get(user_id, [])


def test_workers_that_read_the_same_log_apply_each_update_once(exact: Generation, tmp_path: Path) -> None:
    """Also while the user is deleted again and again: what was applied never comes back."""
    log = [Update("u", [str(number % 60 + 1)], producer="log", sequence=number) for number in range(40)]
    applied, barrier = list[int](), threading.Barrier(3)
    with LmdbStore.open(tmp_path / "state", map_size=32 << 20) as store:
        engines = [Engine(exact, store) for _ in range(3)]

        def worker(engine: Engine) -> None:
            barrier.wait()
            for number, update in enumerate(log):
                if not engine.update([update])[0].duplicate:
                    applied.append(number)
                if number % 10 == 5:
                    engine.delete("u")

        threads = [threading.Thread(target=worker, args=(engine,)) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(applied) == list(range(40))
