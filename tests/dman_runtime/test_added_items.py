"""Items that are added while a store is served: they are recommended, learnt from and kept like any others.

**The invariant**: whatever was added when, an answer is that of a replay of the whole history under the bundle with the
items of now.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY_ITEMS, assert_close, events_of, ids, new_store
from hypothesis import given, settings
from hypothesis import strategies as st

from dman_runtime.data.added_items import AddedItem
from dman_runtime.engine import Engine
from dman_runtime.errors import UsageError
from dman_runtime.jobs.adding import add_items
from dman_runtime.jobs.rebuilding import rebuild
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query, Update
from dman_runtime.store.base import StateStore

ITEMS = TINY_ITEMS
EXACT = 1e-4


def like(*items: int) -> AddedItem:
    return AddedItem(title="New", attributes={"genre": "new"}, like=tuple(ids(items)))


def update(engine: Engine, user_id: str, item_ids: Sequence[str]) -> int:
    """Returns how many of the events the model has seen."""
    return engine.update([Update(user_id, item_ids)])[0].applied


def recommended(engine: Engine, user_id: str, *, k: int = 1000) -> list[str]:
    """All items for a user, best first."""
    answer = engine.recommend([Query(user_id, k=k, include_seen=True)])[0]
    return [answer.bundle.items.item_ids[item] for item in answer.item_indices.tolist()]


def assert_is_replay(engine: Engine, user_id: str) -> None:
    """The answer, and after it the record, are those of a replay with the items of now."""
    recommended(engine, user_id)
    projection = engine.current
    numbers, _ = engine.store.history(user_id)
    expected = projection.generation.replay([events_of(projection.known_indices(numbers))])[0]
    (stored,) = engine.store.get_many([user_id], projection.number)
    assert stored is not None and stored.record is not None
    with engine.store.snapshot() as snapshot:
        found, left, _ = projection.read(snapshot, user_id, stored.head, stored.record)
    assert not len(left) and found.event_count == expected.event_count
    assert_close(found.user_embedding, expected.user_embedding, EXACT)
    assert_close(found.memory, expected.memory, EXACT)
    plain = engine.plain_answer(Query(user_id, k=5))
    again = engine.recommend([Query(user_id, k=5)])[0]
    assert plain is not None and plain.item_indices.tolist() == again.item_indices.tolist()


def test_added_item_is_recommended_with_its_title(engine: Engine, store: StateStore) -> None:
    update(engine, "u", ids([1, 2, 3]))
    best, *_ = recommended(engine, "u")
    assert add_items(store, engine.projection.bundle, {"999": like(int(best) - 1)}).added == 1
    answer = engine.recommend([Query("u", k=2, include_seen=True)])[0]
    assert [answer.bundle.items.item_ids[item] for item in answer.item_indices] == [best, "999"]  # ties by index
    assert answer.bundle.items.titles[answer.item_indices[1]] == "New"
    assert answer.bundle.bundle_id == engine.projection.bundle.bundle_id


def test_event_of_an_added_item_moves_the_state_and_is_seen(engine: Engine, store: StateStore) -> None:
    add_items(store, engine.projection.bundle, {"999": like(5)})
    assert update(engine, "u", ["1", "999", "2"]) == 3
    assert store.item_ids(store.history("u")[0]) == ["1", "999", "2"]
    answer = engine.recommend([Query("u", k=1000)])[0]
    assert "999" not in [answer.bundle.items.item_ids[item] for item in answer.item_indices]
    assert_is_replay(engine, "u")


def test_event_that_came_before_its_item_is_encoded_once_it_is_known(engine: Engine, store: StateStore) -> None:
    assert update(engine, "u", [*ids(range(8)), "999", *ids(range(8, 14))]) == 14
    assert update(engine, "other", ids(range(3))) == 3
    before = store.get_many(["u", "other"], engine.projection.number)
    add_items(store, engine.projection.bundle, {"999": like(5)})
    assert engine.plain_answer(Query("u")) is None and engine.plain_answer(Query("other")) is not None
    assert_is_replay(engine, "u")
    assert_is_replay(engine, "other")
    after = store.get_many(["u", "other"], engine.projection.number)
    assert after[0] != before[0]
    assert after[1] == before[1]  # who has no event of the item keeps the record


def test_record_that_is_opened_says_that_it_holds_no_later_item(engine: Engine, store: StateStore) -> None:
    """An item that was shown to a user looks like one of the history: once, and not with every request."""
    update(engine, "u", ["1", "2"])
    add_items(store, engine.projection.bundle, {"999": like(5)})
    engine.update([Update("u", (), shown=["999"])])
    answer = engine.recommend([Query("u", k=1000)])[0]
    assert "999" not in [answer.bundle.items.item_ids[item] for item in answer.item_indices]
    assert engine.plain_answer(Query("u")) is not None
    assert_is_replay(engine, "u")


def test_what_if_and_candidates_know_added_items(engine: Engine, store: StateStore) -> None:
    add_items(store, engine.projection.bundle, {"999": like(5)})
    answer = engine.recommend([Query(None, what_if=["999"], candidates=["998", "999", "1"], include_seen=True)])[0]
    assert answer.unknown_item_ids == ["998"]
    assert sorted(answer.bundle.items.item_ids[item] for item in answer.item_indices) == ["1", "999"]


def test_two_engines_on_a_store_serve_an_item_at_once(exact: Generation, store: StateStore) -> None:
    """As two workers do."""
    first, second = Engine(exact, store), Engine(exact, store)
    update(first, "u", ["1", "2", "999"])
    assert "999" not in recommended(second, "u")
    add_items(store, exact.bundle, {"999": like(5)})
    assert "999" in recommended(second, "u") and "999" in recommended(first, "u")
    update(second, "u", ["999"])
    for engine in (first, second):
        assert_is_replay(engine, "u")


def test_record_of_newer_items_is_no_damage_to_whoever_lacks_them(engine: Engine, store: StateStore) -> None:
    """A request that began before the items were added reads what another worker has stored since."""
    update(engine, "u", ["1", "2", "999"])
    older = engine.projection
    add_items(store, older.bundle, {"999": like(5)})
    assert_is_replay(engine, "u")
    (stored,) = store.get_many(["u"], older.number)
    assert stored is not None
    with store.snapshot() as snapshot:
        state, left, lags = older.read(snapshot, "u", stored.head, stored.record)
    assert lags and not state.event_count and len(left) == 2


def test_item_that_is_added_again_gets_its_new_embedding(engine: Engine, store: StateStore) -> None:
    bundle = engine.projection.bundle
    for other in (5, 9):
        add_items(store, bundle, {"999": like(other)})
        update(engine, "u", ["1", "999"])
        found = engine.current.bundle
        np.testing.assert_array_equal(found.item_embeddings[found.items.index["999"]], bundle.item_embeddings[other])
        assert_is_replay(engine, "u")
        assert recommended(engine, "u").count("999") == 1


def test_item_that_is_switched_off_is_recommended_no_more(engine: Engine, store: StateStore) -> None:
    update(engine, "u", ["1"])
    add_items(store, engine.projection.bundle, {"998": like(4), "999": like(5)})
    store.switch_items(store.find_items(["999"]), off=True)
    assert {"998", "999"} & set(recommended(engine, "u")) == {"998"}
    store.switch_items(store.find_items(["999"]), off=False)
    assert {"998", "999"} & set(recommended(engine, "u")) == {"998", "999"}


def test_item_without_an_embedding_is_kept_and_not_served(
    engine: Engine, store: StateStore, caplog: pytest.LogCaptureFixture
) -> None:
    update(engine, "u", ["1", "2"])
    found = add_items(store, engine.projection.bundle, {"998": like(4), "999": AddedItem("Only a title")})
    assert found.added == 2 and found.unusable == {"999": "the bundle predicts no embeddings"}
    with caplog.at_level(logging.WARNING):
        assert {"998", "999"} & set(recommended(engine, "u")) == {"998"}
    assert "cannot serve 1 of the added items, such as '999': the bundle predicts no embeddings" in caplog.text
    assert update(engine, "u", ["999", "998"]) == 1
    assert_is_replay(engine, "u")
    popular = engine.recommend([Query(None, what_if=(), k=1000)])[0]
    assert "999" not in [popular.bundle.items.item_ids[item] for item in popular.item_indices]


def test_items_that_training_knew_are_left_alone(engine: Engine, store: StateStore) -> None:
    found = add_items(store, engine.projection.bundle, {"1": like(5), "999": like(5)})
    assert found.known == ["1"] and found.added == 1
    assert engine.current.bundle.items.titles[0] == engine.projection.bundle.items.titles[0] != "New"


def test_later_bundle_that_was_trained_with_the_item_uses_what_it_learnt(
    exact: Generation, renamed: Generation, store: StateStore
) -> None:
    """Items "61" to "80" are new to the first bundle, and trained in the second."""
    first = Engine(exact, store)
    add_items(store, exact.bundle, {"70": like(5), "999": like(29)})
    update(first, "u", ["30", "70", "999"])
    assert_is_replay(first, "u")
    second = Engine(renamed, store)
    bundle = second.current.bundle
    assert bundle.items.index["70"] < ITEMS <= bundle.items.index["999"]
    assert recommended(second, "u").count("70") == 1
    assert_is_replay(second, "u")
    assert_is_replay(first, "u")


def test_embedding_belongs_to_its_bundle(exact: Generation, renamed: Generation, store: StateStore) -> None:
    vector = np.arange(exact.bundle.manifest.state.width, dtype=np.float32)
    item = AddedItem(embedding=vector, bundle_id=exact.bundle_id)
    add_items(store, exact.bundle, {"999": item})
    found = Engine(exact, store).current.bundle
    np.testing.assert_array_equal(found.item_embeddings[found.items.index["999"]], vector)
    assert "999" not in Engine(renamed, store).current.bundle.items.index


def test_ids_are_of_the_form_of_the_bundle(engine: Engine, store: StateStore) -> None:
    with pytest.raises(UsageError, match="no integer"):
        add_items(store, engine.projection.bundle, {"new": like(5)})
    assert not store.catalogue().added


def test_rebuild_makes_records_anew_that_lack_added_items(engine: Engine, store: StateStore) -> None:
    update(engine, "u", ["1", "999", "2"])
    update(engine, "other", ["1", "2"])
    add_items(store, engine.projection.bundle, {"999": like(5)})
    assert rebuild(engine).rebuilt == 1
    assert engine.plain_answer(Query("u")) is not None
    assert_is_replay(engine, "u")


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("update"), st.lists(st.sampled_from([*ids(range(6)), "901", "902", "903"]), max_size=6)),
            st.tuples(st.just("add"), st.sampled_from(["901", "902", "903"])),
            st.tuples(st.just("recommend"), st.just("")),
        ),
        min_size=2,
        max_size=9,
    )
)
def test_any_order_of_events_and_additions_gives_the_replay(
    exact: Generation, steps: list[tuple[str, list[str] | str]]
) -> None:
    with new_store("memory") as store:
        engines = Engine(exact, store), Engine(exact, store)
        engines[0].update([Update("u", ["1"])])
        for place, (kind, value) in enumerate(steps):
            engine = engines[place % 2]
            if kind == "update":
                engine.update([Update("u", list(value))])
            elif kind == "add":
                add_items(store, exact.bundle, {str(value): like(place, 20)})
            else:
                recommended(engine, "u")
        assert_is_replay(engines[0], "u")


def test_model_that_counts_returns_scores_added_items_like_a_trained_one_of_the_same_embedding(
    exact: Generation, store: StateStore
) -> None:
    """`by_item` of an added item is that of the item it equals."""
    width, lives = exact.bundle.manifest.state.width, 3
    weights = np.random.default_rng(0).normal(size=(width, lives)).astype(np.float32)
    bundle = replace(exact.bundle, returns={"by_item": exact.bundle.item_embeddings @ weights})
    from dman_runtime.model.additions import extended

    more = extended(bundle, [("999", like(7))]).bundle
    np.testing.assert_allclose(more.returns["by_item"][-1], more.returns["by_item"][7], rtol=1e-3, atol=1e-4)
