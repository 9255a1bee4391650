"""Items that are switched off, filters and rules, through the engine: every way to an answer keeps to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import TINY_ITEMS, ids

from dman_runtime.batcher import Batcher
from dman_runtime.diversity import Rule
from dman_runtime.engine import Engine
from dman_runtime.errors import RequestError
from dman_runtime.item_filters import AllOf, In, Not, Range
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Answer, Query, Update
from dman_runtime.store.base import StateStore

OFF = [0, 5, 6, 59]
HISTORY = [3, 5, 9]
ODD = In("genre", ("odd",))  # of item ids: even indices


@pytest.fixture(scope="module")
def described(exact: Generation) -> Generation:
    """`exact` with more attributes: four items have each `decade`, and the first ten items have no `shelf`."""
    items = exact.bundle.items
    attributes = [
        {"genre": "odd" if item % 2 == 0 else "even", "decade": str(1900 + 10 * (item // 4))}
        | ({"shelf": f"s{item % 3}"} if item >= 10 else {})
        for item in range(TINY_ITEMS)
    ]
    changed = replace(items, attributes=attributes)
    return Generation.of(replace(exact.bundle, items=changed), exact.graphs)


@pytest.fixture
def engine(described: Generation, store: StateStore) -> Engine:
    engine = Engine(described, store)
    engine.update([Update("anna", ids(HISTORY))])
    return engine


def switch(engine: Engine, items: list[int], *, off: bool = True) -> None:
    engine.store.switch_items(engine.projection.numbers(np.array(items, np.int64)), off=off)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"user_id": "anna"},
    "seen too": {"user_id": "anna", "include_seen": True},
    "popular": {"user_id": "nobody"},
    "what-if": {"user_id": "anna", "what_if": ids([20, 5])},
    "anonymous": {"user_id": None, "what_if": ids([20, 5])},
    "candidates": {"user_id": "anna", "candidates": ids(range(0, 40, 3))},
    "popular candidates": {"user_id": "nobody", "candidates": ids(range(0, 40, 3))},
    "exclude": {"user_id": "anna", "exclude": ids([1, 2, 59])},
}


def every_answer(engine: Engine, query: Query) -> list[Answer]:
    """From all doors: the shortest way, if it answers, the engine, a batch, and a batcher."""
    batcher = Batcher(engine)
    try:
        (batched,) = batcher.recommend([query])
    finally:
        batcher.close()
    other = Query("nobody", k=3)
    found = [batched, engine.recommend([query])[0], engine.recommend([other, query, other])[1]]
    plain = engine.plain_answer(query)  # last: by now what its filter leaves is known
    return found if plain is None else [plain, *found]


def without_limits(engine: Engine, way: str) -> list[int]:
    """The whole ranking of a query that may get every item."""
    return engine.recommend([Query(**WAYS[way], k=TINY_ITEMS)])[0].item_indices.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_item_that_is_off_is_in_no_answer_and_the_others_stay_in_order(engine: Engine, way: str) -> None:
    before = without_limits(engine, way)
    switch(engine, OFF)
    for k in (5, TINY_ITEMS):
        for answer in every_answer(engine, Query(**WAYS[way], k=k)):
            assert answer.item_indices.tolist() == [item for item in before if item not in OFF][:k]
    switch(engine, OFF, off=False)
    assert without_limits(engine, way) == before


def test_item_that_is_off_stays_in_the_history_and_moves_the_state(engine: Engine, described: Generation) -> None:
    switch(engine, OFF)
    outcome = engine.update([Update("bob", ids(HISTORY))])[0]
    assert (outcome.applied, outcome.unknown_item_ids) == (3, [])
    switch(engine, OFF, off=False)
    anna, bob = (engine.recommend([Query(user)])[0] for user in ("anna", "bob"))
    assert (anna.item_indices.tolist(), anna.scores.tolist()) == (bob.item_indices.tolist(), bob.scores.tolist())


def test_every_item_may_be_off(engine: Engine) -> None:
    switch(engine, list(range(TINY_ITEMS)))
    for way in WAYS.values():
        assert engine.recommend([Query(**way)])[0].item_indices.tolist() == []


def test_item_stays_off_under_another_bundle(exact: Generation, renamed: Generation, store: StateStore) -> None:
    """Both know the items "21" to "60", under other indices."""
    Engine(exact, store)
    store.switch_items(store.find_items(["30", "40", "1"]), off=True)
    found = Engine(renamed, store).recommend([Query("nobody", k=TINY_ITEMS)])[0]
    known = set(renamed.bundle.items.item_ids)
    assert {renamed.bundle.items.item_ids[item] for item in found.item_indices} == known - {"30", "40"}


FILTERS = {
    "half": (ODD, range(0, TINY_ITEMS, 2)),
    "few": (Range("decade", 1920, 1920), range(8, 12)),
    "both": (AllOf((ODD, Range("decade", 1920, 1930))), range(8, 16, 2)),
    "others": (Not(In("shelf", ("s0", "s1"))), [*range(10), *range(11, TINY_ITEMS, 3)]),
    "none": (In("genre", ("none",)), []),
}


@pytest.mark.parametrize("off", [[], OFF], ids=["all on", "some off"])
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("way", WAYS)
def test_filter_leaves_the_ranking_as_it_is_but_for_what_it_leaves_out(
    engine: Engine, way: str, name: str, off: list[int]
) -> None:
    wanted, left = FILTERS[name]
    before = without_limits(engine, way)
    switch(engine, off)
    for k in (3, TINY_ITEMS):
        for answer in every_answer(engine, Query(**WAYS[way], k=k, filter=wanted)):
            assert answer.item_indices.tolist() == [item for item in before if item in left and item not in off][:k]
            assert answer.popular == ("popular" in way)


@pytest.mark.parametrize("way", WAYS)
def test_rule_holds_whatever_is_filtered_or_off(engine: Engine, way: str) -> None:
    before = [item for item in without_limits(engine, way) if item % 2 == 0]
    switch(engine, [before[0]])
    expected, counts = list[int](), dict[int, int]()
    for item in before[1:]:
        counts[item // 4] = counts.get(item // 4, 0) + 1
        if counts[item // 4] <= 1 and len(expected) < 6:
            expected.append(item)
    for answer in every_answer(engine, Query(**WAYS[way], k=6, filter=ODD, diversity=[Rule("decade", 1, 6)])):
        assert answer.item_indices.tolist() == expected
        assert len(answer.scores) == len(expected)


def test_rule_reaches_the_last_item_of_the_catalogue(engine: Engine) -> None:
    ranking = [item for item in without_limits(engine, "plain") if item >= 12]
    best = [next(item for item in ranking if item % 3 == shelf) for shelf in range(3)]
    wanted = Not(Range("decade", None, 1920))
    found = engine.recommend([Query("anna", k=10, filter=wanted, diversity=[Rule("shelf", 1, 10)])])[0]
    assert found.item_indices.tolist() == sorted(best, key=ranking.index)


def test_queries_of_one_batch_keep_to_their_own_filters(engine: Engine) -> None:
    queries = [Query("anna", k=4), Query("anna", k=4, filter=ODD), Query("nobody", k=4, filter=Not(ODD))]
    plain, odd, even = (answer.item_indices.tolist() for answer in engine.recommend(queries))
    assert plain == without_limits(engine, "plain")[:4]
    assert odd == [item for item in without_limits(engine, "plain") if item % 2 == 0][:4]
    assert even == [item for item in without_limits(engine, "popular") if item % 2][:4]


@pytest.mark.parametrize(
    "options",
    [
        {"filter": In("gendre", ("odd",))},
        {"filter": AllOf((ODD, Not(Range("gendre", 1))))},
        {"diversity": [Rule("gendre", 1, 5)]},
    ],
)
@pytest.mark.parametrize("way", ["plain", "popular", "candidates"])
def test_attribute_that_the_bundle_lacks_is_an_error_that_names_the_others(
    engine: Engine, way: str, options: dict[str, Any]
) -> None:
    query = Query(**WAYS[way], **options)
    batcher = Batcher(engine)
    try:
        for recommend in (engine.recommend, batcher.recommend):
            with pytest.raises(RequestError, match="no item has an attribute 'gendre'; use one of 'decade', 'genre', "):
                recommend([query])
        assert batcher.recommend([Query("anna")])[0].item_indices.size
    finally:
        batcher.close()


def test_shortest_way_does_not_build_what_a_filter_leaves(engine: Engine) -> None:
    query = Query("anna", filter=ODD)
    assert engine.plain_answer(query) is None
    expected = engine.recommend([query])[0]
    found = engine.plain_answer(query)
    assert found is not None and found.item_indices.tolist() == expected.item_indices.tolist()
    assert engine.plain_answer(Query("anna", diversity=[Rule("genre", 1, 5)])) is None


def test_engines_over_one_store_see_a_switch_at_their_next_query(described: Generation, store: StateStore) -> None:
    first, second = Engine(described, store), Engine(described, store, follows=True)
    best = second.recommend([Query("nobody", k=1)])[0].item_indices.tolist()
    switch(first, best)
    assert best[0] not in second.recommend([Query("nobody", k=TINY_ITEMS)])[0].item_indices
    switch(second, best, off=False)
    assert first.recommend([Query("nobody", k=1)])[0].item_indices.tolist() == best
