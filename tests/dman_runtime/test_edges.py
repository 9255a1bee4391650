"""The edges of an answer: users who have had everything, small catalogues, nothing to choose among."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import STORES, TINY, TINY_ITEMS, export_tiny, new_store, random_model

from dman_runtime.engine import Engine
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Answer, Query, Update

EVERYTHING = [str(item) for item in range(1, TINY_ITEMS + 1)]


@pytest.fixture(params=STORES)
def engine(request: pytest.FixtureRequest, exact: Generation) -> Iterator[Engine]:
    with new_store(request.param) as store:
        yield Engine(exact, store)


def answer(engine: Engine, query: Query) -> Answer:
    (found,) = engine.recommend([query])
    return found


def items_of(found: Answer) -> list[int]:
    assert len(found.item_indices) == len(found.scores)
    return [int(index) + 1 for index in found.item_indices]


def test_user_who_has_had_everything_gets_an_empty_answer_that_is_not_popular(engine: Engine) -> None:
    engine.update([Update("u", EVERYTHING)])
    found = answer(engine, Query("u", k=10))
    assert (items_of(found), found.popular, found.event_count) == ([], False, TINY_ITEMS)
    assert items_of(answer(engine, Query("u", k=10, candidates=["1", "2"]))) == []
    assert len(items_of(answer(engine, Query("u", k=10, include_seen=True)))) == 10


def test_user_with_one_item_left_gets_that_item_for_any_k(engine: Engine) -> None:
    engine.update([Update("u", EVERYTHING[:-1])])
    for k in (1, 2, 1000):
        assert items_of(answer(engine, Query("u", k=k))) == [TINY_ITEMS]
    assert items_of(answer(engine, Query("u", exclude=[str(TINY_ITEMS)]))) == []
    assert items_of(answer(engine, Query("u", what_if=[str(TINY_ITEMS)]))) == []


@pytest.mark.parametrize("seen", [[], ["3", "4", "3"], ["unknown"]], ids=["new user", "two items", "unknown item"])
def test_k_beyond_the_catalogue_gives_every_item_left_once(engine: Engine, seen: list[str]) -> None:
    if seen:
        engine.update([Update("u", seen)])
    found = answer(engine, Query("u", k=1000))
    assert sorted(items_of(found)) == sorted(set(range(1, TINY_ITEMS + 1)) - {3, 4} if "3" in seen else range(1, 61))
    assert found.popular is ("3" not in seen)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


@pytest.mark.parametrize("seen", [[], ["3", "4"]], ids=["new user", "known user"])
def test_no_candidates_and_unknown_candidates_give_an_empty_answer(engine: Engine, seen: list[str]) -> None:
    """An empty list is a choice among nothing, not among everything."""
    if seen:
        engine.update([Update("u", seen)])
    assert items_of(answer(engine, Query("u", candidates=[]))) == []
    found = answer(engine, Query("u", candidates=["x", "y"]))
    assert (items_of(found), found.unknown_item_ids) == ([], ["x", "y"])
    assert items_of(answer(engine, Query(None, candidates=[], what_if=["5"]))) == []


def test_answers_of_a_batch_do_not_depend_on_those_that_are_empty(engine: Engine) -> None:
    engine.update([Update("all", EVERYTHING), Update("some", ["3", "4"])])
    queries = [Query("all"), Query("some", k=3), Query("new", k=2), Query("some", candidates=[]), Query("all", k=1000)]
    together = [items_of(found) for found in engine.recommend(queries)]
    assert together == [items_of(answer(engine, query)) for query in queries]
    assert [len(items) for items in together] == [0, 3, 2, 0, 0]


@pytest.fixture(scope="module")
def one_item(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    bundle = export_tiny(random_model(TINY, 1), tmp_path_factory.mktemp("one") / "bundle")
    return Generation.open(bundle, provider="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORES)
def test_catalogue_of_one_item_is_recommended_until_it_was_seen(one_item: Generation, kind: str) -> None:
    with new_store(kind) as store:
        engine = Engine(one_item, store)
        found = answer(engine, Query("u", k=5))
        assert (items_of(found), found.popular, found.scores.tolist()) == ([1], True, [1.0])
        engine.update([Update("u", ["1"] * 12)])  # across segments
        assert items_of(answer(engine, Query("u", k=5))) == []
        assert items_of(answer(engine, Query("u", k=5, include_seen=True))) == [1]


@pytest.mark.slow
def test_catalogue_of_one_item_is_scored(one_item: Generation, tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from log_files import score_log, text_log

    log = text_log(tmp_path, "user_id,item_id\n1,1\n2,9\n")
    result = score_log(log, tmp_path / "s.parquet", one_item, k=5)
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert rows == [{"user_id": 2, "rank": 1, "item_id": 1, "score": 1.0, "source": "popular"}]
    assert (result.users, result.users_with_nothing) == (2, 1)
