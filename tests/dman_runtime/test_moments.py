"""The path of a request with a moment: engine, store and what-if events, against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from conftest import STORES, TIMED, TINY_ITEMS, assert_close, events_of, ids, new_store, random_model
from torch_graphs import TorchGraphs, generation_of

from dman_runtime.engine import Engine
from dman_runtime.errors import RequestError
from dman_runtime.model.events import KnownEvents
from dman_runtime.requests import Answer, Query, Update
from dman_train.model import DMAN
from dman_train.replay import replay, returned

T, BEGIN = 5, 10**9
EXACT = 1e-4  # relative, in root mean square


@pytest.fixture(scope="module")
def model() -> DMAN:
    return random_model(TIMED, TINY_ITEMS)


@pytest.fixture(params=STORES)
def engine(request: pytest.FixtureRequest, model: DMAN) -> Iterator[Engine]:
    with new_store(request.param) as store:
        yield Engine(generation_of(model), store)


def update(engine: Engine, user_id: str, events: KnownEvents) -> None:
    engine.update([Update(user_id, ids(events.items), events.times.tolist())])


def history_of(length: int) -> KnownEvents:
    random = np.random.default_rng(length)
    return events_of(random.integers(0, 20, length), BEGIN + np.cumsum(random.geometric(1e-4, length)))


def scores_of(model: DMAN, history: KnownEvents, at: int | None) -> np.ndarray:
    """(V) what PyTorch gives to each item."""
    moments = None if at is None else np.array([at])
    users, _ = replay(model, [history.items], times=[history.times], request_times=moments)
    items, added = returned(model, users, [history.items], times=[history.times], request_times=moments)
    scores = (users @ model.item_table().T).scatter_add(1, items, added)
    return scores[0].detach().numpy()


def check(answer: Answer, scores: np.ndarray, without: Sequence[int] | np.ndarray = ()) -> None:
    """All items but those `without`, best first."""
    found = answer.item_indices
    assert sorted(found.tolist()) == sorted(set(range(TINY_ITEMS)) - {int(item) for item in without})
    assert_close(answer.scores, scores[found], EXACT)
    assert_close(scores[found], np.sort(scores[found])[::-1], EXACT)


@pytest.mark.parametrize("length", [1, T, T + 1, 2 * T, 2 * T + 1, 3 * T, 23])
def test_answer_at_a_moment_equals_pytorch(engine: Engine, model: DMAN, length: int) -> None:
    history = history_of(length)
    update(engine, "u", history[: length // 2])
    update(engine, "u", history[length // 2 :])
    for at in (None, BEGIN, int(history.times[-1]), int(history.times[-1]) + 5000):
        known = at if at is not None and at >= history.times[-1] else None
        (seen, unseen) = engine.recommend(
            [Query("u", k=TINY_ITEMS, at=at, include_seen=include) for include in (True, False)]
        )
        scores = scores_of(model, history, known)
        check(seen, scores)
        check(unseen, scores, without=history.items)


def test_users_of_one_call_are_asked_at_their_own_moments(engine: Engine, model: DMAN) -> None:
    histories = {f"u{length}": history_of(length) for length in (3, 7, 10, 16)}
    for user_id, history in histories.items():
        update(engine, user_id, history)
    later = {user_id: int(history.times[-1]) + 10**row for row, (user_id, history) in enumerate(histories.items())}
    queries = [Query(user_id, k=TINY_ITEMS, at=at, include_seen=True) for user_id, at in later.items()]
    for query, answer in zip(queries, engine.recommend(queries), strict=True):
        assert query.user_id is not None
        check(answer, scores_of(model, histories[query.user_id], query.at))


@pytest.mark.parametrize("length", [0, 4, 9, 10])
def test_what_if_events_have_times_of_their_own(engine: Engine, model: DMAN, length: int) -> None:
    history, end = history_of(length), BEGIN + 10**6
    if length:
        update(engine, "u", history)
    more = events_of([30, 31, 30], [end, end + 50, end + 4000])
    query = Query(
        "u" if length else None,
        k=TINY_ITEMS,
        what_if=ids(more.items),
        what_if_times=more.times.tolist(),
        at=end + 9000,
        include_seen=True,
    )
    (answer,) = engine.recommend([query])
    check(answer, scores_of(model, history + more, end + 9000))
    (unknown,) = engine.recommend([replace(query, what_if_times=())])
    if length:  # what-if events at unknown times stand at the last one that is known, and are asked at no moment
        check(unknown, scores_of(model, history + events_of(more.items, [history.times[-1]] * 3), None))
    assert length == 0 or engine.recommend([Query("u")])[0].event_count == length, "nothing is stored"


def test_times_of_unknown_what_if_items_are_left_out_with_them(engine: Engine, model: DMAN) -> None:
    items, times = [*ids([5]), "never seen", *ids([6])], [BEGIN, BEGIN + 10, BEGIN + 5000]
    (answer,) = engine.recommend(
        [Query(None, k=TINY_ITEMS, what_if=items, what_if_times=times, at=BEGIN + 6000, include_seen=True)]
    )
    assert answer.unknown_item_ids == ["never seen"]
    check(answer, scores_of(model, events_of([5, 6], [BEGIN, BEGIN + 5000]), BEGIN + 6000))


@pytest.mark.parametrize("times", [[1], [1, 2, 3]])
def test_times_that_do_not_match_the_what_if_events_are_refused(engine: Engine, times: list[int]) -> None:
    with pytest.raises(RequestError, match="times do not match the what-if events"):
        engine.recommend([Query(None, what_if=["1", "2"], what_if_times=times)])


def test_answer_with_candidates_has_the_added_scores(engine: Engine, model: DMAN) -> None:
    history = history_of(12)
    update(engine, "u", history)
    at, candidates = int(history.times[-1]) + 60, [int(history.items[-1]), 40, 41]
    (answer,) = engine.recommend([Query("u", at=at, candidates=ids(candidates), include_seen=True)])
    scores = scores_of(model, history, at)
    assert answer.item_indices.tolist() == sorted(candidates, key=lambda item: -scores[item])
    assert_close(answer.scores, scores[answer.item_indices], EXACT)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_plain_answer_runs_no_graph_beside_others_on_cuda(engine: Engine, on_cuda: bool) -> None:
    """There, the one thread that runs graphs answers."""
    history = history_of(12)
    update(engine, "u", history)
    query = Query("u", at=int(history.times[-1]) + 60)
    graphs = TorchGraphs(random_model(TIMED, TINY_ITEMS))
    graphs.on_cuda = on_cuda
    there = Engine(replace(engine.projection.generation, graphs=graphs), engine.store)
    answer = there.plain_answer(query)
    assert (answer is None) == on_cuda
    if answer is not None:
        (expected,) = there.recommend([query])
        assert answer.item_indices.tolist() == expected.item_indices.tolist()


@pytest.mark.parametrize("length", [0, 1, T - 1, T, T + 1, 3 * T])
def test_a_full_segment_is_reported_as_open_until_the_next_event(engine: Engine, length: int) -> None:
    update(engine, "u", history_of(length) if length else events_of([]))
    info = engine.user("u")
    if info is None:
        assert length == 0
        return
    assert info.segment_fill == ((length - 1) % T + 1 if length else 0)
    assert info.segment_fill + T * (info.absorbed_segments + (length > T)) == length
