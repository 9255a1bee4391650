"""Items that were shown, through the engine: left out for a time, and otherwise as if nothing had happened."""

from __future__ import annotations

import time

import pytest
from conftest import TINY_ITEMS, ids

from dman_runtime.batcher import Batcher
from dman_runtime.engine import Engine
from dman_runtime.errors import RequestError
from dman_runtime.jobs.leaving import user_document
from dman_runtime.model.generation import Generation
from dman_runtime.requests import MAX_SHOWN_SECONDS, Query, Update
from dman_runtime.store.base import MAX_SHOWN, StateStore


@pytest.fixture
def engine(exact: Generation, store: StateStore) -> Engine:
    engine = Engine(exact, store)
    engine.update([Update("anna", ids([3, 5, 9]))])
    return engine


def ranking(engine: Engine, user_id: str | None, **options: object) -> list[int]:
    query = Query(user_id, k=TINY_ITEMS, **options)  # type: ignore[arg-type]
    found = engine.recommend([query])[0].item_indices.tolist()
    plain = engine.plain_answer(query)
    assert plain is None or plain.item_indices.tolist() == found
    return found


@pytest.mark.parametrize("user_id", ["anna", "nobody"])
def test_shown_items_are_left_out_of_that_users_recommendations(engine: Engine, user_id: str) -> None:
    before, other = ranking(engine, user_id), ranking(engine, "bob")
    all_items = ranking(engine, user_id, include_seen=True)
    outcome = engine.update([Update(user_id, (), shown=ids(before[:2]))])[0]
    assert (outcome.applied, outcome.unknown_item_ids, outcome.duplicate) == (0, [], False)
    assert ranking(engine, user_id) == before[2:]
    assert ranking(engine, user_id, candidates=ids(before[:4])) == before[2:4]
    assert ranking(engine, user_id, include_seen=True) == all_items
    assert ranking(engine, "bob") == other
    assert engine.recommend([Query(user_id)])[0].popular == (user_id == "nobody")


def test_shown_items_are_left_out_of_what_ifs_too(engine: Engine) -> None:
    before = ranking(engine, "anna", what_if=ids([20]))
    engine.update([Update("anna", (), shown=ids(before[:2]))])
    assert ranking(engine, "anna", what_if=ids([20])) == before[2:]


def test_showing_moves_no_state_and_enters_no_history(engine: Engine) -> None:
    number = engine.projection.number
    before = engine.store.get_many(["anna"], number), engine.store.history("anna")[0].tolist()
    engine.update([Update("anna", (), shown=ids([1, 2]))])
    assert (engine.store.get_many(["anna"], number), engine.store.history("anna")[0].tolist()) == before
    engine.update([Update("nobody", (), shown=ids([1, 2]))])
    assert engine.store.get_many(["nobody"], number) == [None] and engine.user("nobody") is None
    engine.update([Update("anna", ids([7])), Update("carl", ids([3, 5, 9, 7]))])
    assert [item for item in ranking(engine, "carl") if item not in (1, 2)] == ranking(engine, "anna")


def test_events_and_shown_items_of_one_update_are_applied_once(engine: Engine) -> None:
    update = Update("bob", ids([1]), request_id="r", shown=ids([2, 3]))
    first, second = (engine.update([update])[0] for _ in range(2))
    assert (first.applied, first.duplicate, second.applied, second.duplicate) == (1, False, 0, True)
    assert not {1, 2, 3} & set(ranking(engine, "bob"))
    engine.update([Update("bob", (), request_id="only shown", shown=ids([4]))])
    assert 4 not in ranking(engine, "bob") and engine.store.history("bob")[0].size == 1


def test_batch_takes_shown_items_of_several_users(engine: Engine) -> None:
    batcher = Batcher(engine)
    try:
        updates = [Update("anna", (), shown=ids([1])), Update("bob", (), shown=ids([2])), Update("anna", ids([7]))]
        outcomes = batcher.update(updates, batch_id="b")
        assert [outcome.applied for outcome in outcomes] == [0, 0, 1]
        assert 1 not in ranking(engine, "anna") and 2 not in ranking(engine, "bob")
        assert all(outcome.duplicate for outcome in batcher.update(updates, batch_id="b"))
    finally:
        batcher.close()


def test_items_that_nobody_knows_may_be_shown(engine: Engine) -> None:
    engine.update([Update("anna", (), shown=["new", *ids([1])])])
    assert 1 not in ranking(engine, "anna")
    assert engine.store.item_ids(engine.store.shown("anna")[0]) == ["new", "2"]


def test_times_are_those_that_were_asked_for(engine: Engine) -> None:
    before = int(time.time())
    engine.update([Update("anna", (), shown=ids([1])), Update("anna", (), shown=ids([2]), shown_seconds=5)])
    until = engine.store.shown("anna")[1] - before
    assert 3600 <= until[0] < 3700 and 5 <= until[1] < 105


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (Update("u", (), shown=["1"] * (MAX_SHOWN + 1)), f"{MAX_SHOWN + 1} shown_item_ids in one update"),
        (Update("u", (), shown=["1"], shown_seconds=0), "shown_seconds is 0; choose 1 to 2592000"),
        (Update("u", (), shown=["1"], shown_seconds=MAX_SHOWN_SECONDS + 1), "choose 1 to"),
        (Update("u", (), shown=["a\nb"]), "control characters"),
    ],
)
def test_what_cannot_be_shown_is_refused(engine: Engine, update: Update, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.update([update])


def test_document_of_a_user_has_what_was_shown(engine: Engine) -> None:
    engine.update([Update(user_id, (), shown=ids([1])) for user_id in ("anna", "nobody")])
    for user_id, events in (("anna", 3), ("nobody", 0)):
        document = user_document(engine.store, user_id)
        assert len(document["events"]) == events
        assert [shown["item_id"] for shown in document["shown"]] == ["2"]
        assert document["shown"][0]["until"] > time.time()
