"""Engines that follow the roll-out of a store: which bundle answers whom, and when that changes."""

from __future__ import annotations

import pytest
from conftest import new_store

from dman_runtime.engine import Engine
from dman_runtime.errors import NotLoadedError
from dman_runtime.model.generation import Generation
from dman_runtime.projection import Projection
from dman_runtime.requests import Query, Update
from dman_runtime.store.base import StateStore
from dman_runtime.store.rollout import Rollout

ITEMS = [str(number) for number in range(21, 61)]  # that both bundles know


@pytest.fixture
def engine(exact: Generation, renamed: Generation, store: StateStore) -> Engine:
    """Started with `exact`, and `renamed` is loaded too."""
    engine = Engine(exact, store, follows=True)
    engine.router.add(Projection(renamed, store))
    return engine


def rollout_of(store: StateStore, **changes: object) -> Rollout:
    before = store.rollout()
    after = before._replace(revision=before.revision + 1, **changes)  # type: ignore[arg-type]
    assert store.set_rollout(after)
    return after


def answering(engine: Engine, user_id: str) -> str:
    """The bundle of every kind of answer about a user: they must agree."""
    plain = engine.plain_answer(Query(user_id))
    found = {
        engine.recommend([Query(user_id, what_if=["30"])])[0].bundle.bundle_id,
        engine.recommend([Query(user_id)])[0].bundle.bundle_id,
        engine.update([Update(user_id, ["31"])])[0].bundle.bundle_id,
        engine.bundle_of(user_id).bundle_id,
        *([plain.bundle.bundle_id] if plain else []),
    }
    info = engine.user(user_id)
    assert info is not None
    (bundle_id,) = found | {info.bundle.bundle_id}
    return bundle_id


def test_active_bundle_answers_from_the_moment_it_is_set(
    engine: Engine, exact: Generation, renamed: Generation, store: StateStore
) -> None:
    engine.update([Update("u", ITEMS)])
    both = {exact.bundle_id: "", renamed.bundle_id: ""}
    assert answering(engine, "u") == exact.bundle_id
    rollout_of(store, bundles=both, prepared=renamed.bundle_id)
    assert answering(engine, "u") == engine.router.bundle_id == exact.bundle_id
    rollout_of(store, active=renamed.bundle_id, prepared="")
    assert answering(engine, "u") == engine.router.bundle_id == renamed.bundle_id
    rollout_of(store, active=exact.bundle_id)
    assert answering(engine, "u") == exact.bundle_id
    assert engine.user("u").history_count == 44  # type: ignore[union-attr]


def test_answers_after_a_change_are_those_of_the_bundle_alone(
    engine: Engine, exact: Generation, renamed: Generation, store: StateStore
) -> None:
    """Back and forth, with events in between: what an engine of one bundle says of the same history."""
    for number, generation in enumerate((exact, renamed, exact, renamed, renamed)):
        rollout_of(store, bundles={exact.bundle_id: "", renamed.bundle_id: ""}, active=generation.bundle_id)
        engine.update([Update("u", ITEMS[number : number + 9])])
        with new_store("memory") as other:
            alone = Engine(generation, other)
            alone.update([Update("u", store.item_ids(store.history("u")[0]))])
            (expected,), (found,) = alone.recommend([Query("u", k=20)]), engine.recommend([Query("u", k=20)])
        assert found.item_indices.tolist() == expected.item_indices.tolist()
        assert found.scores == pytest.approx(expected.scores, abs=1e-4)


def test_engine_whose_bundle_takes_no_part_goes_on_alone(
    engine: Engine, exact: Generation, renamed: Generation, store: StateStore
) -> None:
    rollout_of(store, active=renamed.bundle_id, bundles={renamed.bundle_id: ""})
    assert answering(engine, "u") == exact.bundle_id


def test_bundle_that_is_not_loaded_refuses_instead_of_another_answering(
    engine: Engine, exact: Generation, renamed: Generation, store: StateStore
) -> None:
    rollout_of(store, active=renamed.bundle_id, bundles={exact.bundle_id: "", renamed.bundle_id: ""})
    engine.router.remove(renamed.bundle_id)
    for call in (
        lambda: engine.recommend([Query("u")]),
        lambda: engine.update([Update("u", ["30"])]),
        lambda: engine.plain_answer(Query("u")),
        lambda: engine.user("u"),
    ):
        with pytest.raises(NotLoadedError, match=renamed.bundle_id):
            call()
    engine.router.remove(exact.bundle_id)  # its own stays
    assert list(engine.router.loaded) == [exact.bundle_id]


def test_trial_serves_its_users_and_one_batch_may_have_users_of_both(
    engine: Engine, exact: Generation, renamed: Generation, store: StateStore
) -> None:
    both = {exact.bundle_id: "", renamed.bundle_id: ""}
    rollout = rollout_of(store, active=exact.bundle_id, trial=renamed.bundle_id, share=0.5, bundles=both)
    users = [f"user {number}" for number in range(40)]
    outcomes = engine.update([Update(user, ITEMS[number % 7 :]) for number, user in enumerate(users)], "batch")
    answers = engine.recommend([Query(user) for user in users])
    expected = [rollout.of(user) for user in users]
    assert {*expected} == {exact.bundle_id, renamed.bundle_id}
    assert [one.bundle.bundle_id for one in outcomes] == expected
    assert [one.bundle.bundle_id for one in answers] == expected
    for user, bundle_id, found in zip(users, expected, answers, strict=True):
        generation = engine.router.loaded[bundle_id].generation
        alone = Engine(generation, store).recommend([Query(user)])[0]
        assert alone.item_indices.tolist() == found.item_indices.tolist()
    assert all(one.duplicate for one in engine.update([Update(user, ["30"]) for user in users], "batch"))
    (anonymous,) = engine.recommend([Query(None, what_if=["30"])])
    assert anonymous.bundle is engine.router.loaded[exact.bundle_id].bundle
