"""What every `Retriever` promises: one table of cases worked out by hand, and properties against a plain sort.

Embeddings are small integers, so that scores are exact in float32 whatever the order of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from contract.retrievers import RETRIEVERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dman_runtime.retrieval.base import FEW, NO_ITEMS, Added, Allowed, Hits, Retriever

Make = Callable[[np.ndarray], Retriever]


@pytest.fixture(params=RETRIEVERS)
def make(request: pytest.FixtureRequest) -> Make:
    return RETRIEVERS[request.param]


def indices(values: list[int] | None) -> np.ndarray | None:
    return None if values is None else np.array(values, np.int64)


def search_one(
    retriever: Retriever,
    user: np.ndarray,
    k: int,
    *,
    exclude: list[int] | np.ndarray = NO_ITEMS,
    candidates: list[int] | None = None,
) -> tuple[list[int], list[float]]:
    exclude = np.asarray(exclude, np.int64)
    (hits,) = retriever.search(user[None], k, exclude=[exclude], candidates=[indices(candidates)])
    return hits.items.tolist(), hits.scores.tolist()


# -- the table ---------------------------------------------------------------------------------------------------------

ITEMS = np.array([[1, 0], [0, 1], [1, 1], [-1, 0], [2, -1], [1, 0]], np.float32)  # (6, 2)
EAST, NORTH, BOTH, NOWHERE = [1, 0], [0, 1], [1, 1], [0, 0]
# scores:   EAST 1 0 1 -1 2 1     NORTH 0 1 1 0 -1 0     BOTH 1 1 2 -1 1 1     NOWHERE 0 0 0 0 0 0


class Case(NamedTuple):
    user: list[int]
    k: int
    exclude: list[int]
    candidates: list[int] | None
    items: list[int]  # expected, best first
    scores: list[float]


CASES = {
    "the best": Case(EAST, 1, [], None, [4], [2]),
    "ties in order of index": Case(EAST, 4, [], None, [4, 0, 2, 5], [2, 1, 1, 1]),
    "ties cut off by k": Case(EAST, 3, [], None, [4, 0, 2], [2, 1, 1]),
    "all there are": Case(EAST, 6, [], None, [4, 0, 2, 5, 1, 3], [2, 1, 1, 1, 0, -1]),
    "k above the vocabulary": Case(NORTH, 100, [], None, [1, 2, 0, 3, 5, 4], [1, 1, 0, 0, 0, -1]),
    "nothing but ties": Case(NOWHERE, 4, [], None, [0, 1, 2, 3], [0, 0, 0, 0]),
    "the best excluded": Case(EAST, 2, [4], None, [0, 2], [1, 1]),
    "the first of a tie excluded": Case(EAST, 2, [0], None, [4, 2], [2, 1]),
    "repeats among the excluded": Case(BOTH, 2, [2, 2, 0, 2], None, [1, 4], [1, 1]),
    "fewer than k left": Case(BOTH, 4, [0, 1, 2, 4], None, [5, 3], [1, -1]),
    "all excluded": Case(BOTH, 3, [5, 4, 3, 2, 1, 0], None, [], []),
    "candidates": Case(EAST, 2, [], [3, 5, 1], [5, 1], [1, 0]),
    "candidates in any order with repeats": Case(EAST, 5, [], [5, 0, 5, 2, 0], [0, 2, 5], [1, 1, 1]),
    "an excluded candidate": Case(EAST, 3, [4, 0], [4, 0, 3, 2], [2, 3], [1, -1]),
    "no candidate left": Case(EAST, 3, [4], [4], [], []),
    "no candidate at all": Case(EAST, 3, [], [], [], []),
    "fewer candidates than k": Case(NORTH, 100, [], [4, 3], [3, 4], [0, -1]),
    "excluded items that are no candidates": Case(NORTH, 1, [1, 2], [0, 5], [0], [0]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_table_one_by_one(make: Make, case: Case) -> None:
    user = np.array(case.user, np.float32)
    found = search_one(make(ITEMS), user, case.k, exclude=case.exclude, candidates=case.candidates)
    assert found == (case.items, case.scores)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.candidates is None])
def test_table_without_the_argument_candidates(make: Make, case: Case) -> None:
    (hits,) = make(ITEMS).search(np.array([case.user], np.float32), case.k, exclude=[np.array(case.exclude, int)])
    assert (hits.items.tolist(), hits.scores.tolist()) == (case.items, case.scores)


@pytest.mark.parametrize("k", sorted({case.k for case in CASES.values()}))
def test_table_all_at_once(make: Make, k: int) -> None:
    """One call for all users of the table, with and without candidates among each other."""
    cases = [case for case in CASES.values() if case.k >= k]
    found = make(ITEMS).search(
        np.array([case.user for case in cases], np.float32),
        k,
        exclude=[np.array(case.exclude, np.int64) for case in cases],
        candidates=[indices(case.candidates) for case in cases],
    )
    assert [hits.items.tolist() for hits in found] == [case.items[:k] for case in cases]
    assert [hits.scores.tolist() for hits in found] == [case.scores[:k] for case in cases]


# -- properties --------------------------------------------------------------------------------------------------------


def reference(
    table: np.ndarray, user: np.ndarray, k: int, exclude: np.ndarray, candidates: np.ndarray | None
) -> tuple[list[int], list[float]]:
    """By a plain sort."""
    scores = table.astype(np.float64) @ user.astype(np.float64)
    allowed = np.arange(len(table)) if candidates is None else np.unique(candidates)
    allowed = np.setdiff1d(allowed, exclude)
    allowed = allowed[np.isfinite(scores[allowed])]
    best = allowed[np.argsort(-scores[allowed], kind="stable")][:k]
    return best.tolist(), scores[best].tolist()


def assert_found(found: Hits, expected: tuple[list[int], list[float]]) -> None:
    assert (found.items.tolist(), found.scores.tolist()) == expected
    assert found.items.dtype == np.int64


def some_indices(random: np.random.Generator, vocabulary: int) -> np.ndarray:
    return random.integers(0, vocabulary, int(random.integers(0, 2 * vocabulary)))


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.integers(1, 200),
    users=st.integers(1, 12),
    k=st.integers(1, 220),
    largest=st.sampled_from([1, 3, 1000]),  # many ties; some; next to none
)
def test_search_is_a_sort_of_all_scores(
    make: Make, seed: int, vocabulary: int, users: int, k: int, largest: int
) -> None:
    random = np.random.default_rng(seed)
    table = random.integers(-largest, largest + 1, (vocabulary, 3)).astype(np.float32)
    queries = random.integers(-3, 4, (users, 3)).astype(np.float32)
    exclude = [some_indices(random, vocabulary) for _ in range(users)]
    candidates = [some_indices(random, vocabulary) if random.random() < 0.5 else None for _ in range(users)]
    found = make(table).search(queries, k, exclude=exclude, candidates=candidates)
    assert len(found) == users
    for row, hits in enumerate(found):
        assert_found(hits, reference(table, queries[row], k, exclude[row], candidates[row]))


def test_search_with_a_smaller_k_is_the_beginning_of_a_longer_list(make: Make) -> None:
    random = np.random.default_rng(0)
    table = random.integers(-2, 3, (300, 4)).astype(np.float32)
    user, exclude = random.integers(-2, 3, 4).astype(np.float32), np.arange(0, 300, 7)
    retriever = make(table)
    longest = search_one(retriever, user, 300, exclude=exclude)
    for k in (1, 2, 7, 60, 299):
        assert search_one(retriever, user, k, exclude=exclude) == (longest[0][:k], longest[1][:k])


@pytest.mark.slow
def test_search_of_many_users_over_many_items_gives_what_each_gets_alone(make: Make) -> None:
    """18 million scores: more than an implementation should hold at a time."""
    random = np.random.default_rng(1)
    table = random.integers(-50, 51, (60_000, 2)).astype(np.float32)
    users = random.integers(-50, 51, (300, 2)).astype(np.float32)
    exclude = [random.integers(0, len(table), 20) for _ in users]
    candidates = [random.integers(0, len(table), 500) if row % 7 == 3 else None for row in range(len(users))]
    retriever = make(table)
    found = retriever.search(users, 25, exclude=exclude, candidates=candidates)
    for row in [*range(0, 300, 13), 3, 10, 17, 299]:
        assert_found(found[row], reference(table, users[row], 25, exclude[row], candidates[row]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("candidates", [None, [0, 1, 2, 3]])
def test_item_whose_score_is_not_finite_never_appears(make: Make, value: float, candidates: list[int] | None) -> None:
    table = np.array([[1, 0], [value, 0], [3, 0], [2, 0]], np.float32)
    retriever = make(table)
    user = np.array([1, 0], np.float32)
    for k in (4, 10):
        assert search_one(retriever, user, k, candidates=candidates) == ([2, 3, 0], [3, 2, 1])
    assert search_one(retriever, np.array([np.nan, 0], np.float32), 4, candidates=candidates) == ([], [])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_item_whose_score_is_not_finite_takes_no_place_of_the_k_best(make: Make, value: float, k: int) -> None:
    table = np.zeros((64, 1), np.float32)
    table[[5, 20, 40], 0] = 9, 8, 7
    table[[0, 6, 63], 0] = value
    found = search_one(make(table), np.ones(1, np.float32), k)
    assert found == ([5, 20, 40][:k], [9, 8, 7][:k])


def test_no_users_have_no_hits(make: Make) -> None:
    assert make(ITEMS).search(np.zeros((0, 2), np.float32), 3, exclude=[]) == []
    assert make(ITEMS).search(np.zeros((0, 2), np.float32), 3, exclude=[], candidates=[]) == []


def test_search_changes_no_argument_and_gives_arrays_of_its_own(make: Make) -> None:
    table, users = ITEMS.copy(), np.array([EAST, NORTH], np.float32)
    exclude, candidates = [np.array([4, 4]), np.array([1])], [None, np.array([5, 0, 1])]
    copies = [array.copy() for array in (*exclude, candidates[1], users) if array is not None]
    retriever = make(table)
    first = retriever.search(users, 3, exclude=exclude, candidates=candidates)
    second = retriever.search(users, 3, exclude=exclude, candidates=candidates)
    for one, other in zip(first, second, strict=True):
        assert one.items.tolist() == other.items.tolist() and one.scores.tolist() == other.scores.tolist()
        one.items[:], one.scores[:] = -1, -1
        assert (other.items >= 0).all()
    arrays = [*exclude, candidates[1], users]
    assert all((copy == array).all() for copy, array in zip(copies, arrays, strict=True))
    assert (table == ITEMS).all()


def test_search_may_be_called_from_many_threads(make: Make) -> None:
    random = np.random.default_rng(2)
    table = random.integers(-9, 10, (2000, 3)).astype(np.float32)
    users = random.integers(-9, 10, (64, 3)).astype(np.float32)
    retriever, exclude = make(table), [random.integers(0, 2000, 30) for _ in users]
    expected = [search_one(retriever, user, 10, exclude=one) for user, one in zip(users, exclude, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        rows = [row % 64 for row in range(500)]
        found = list(pool.map(lambda row: search_one(retriever, users[row], 10, exclude=exclude[row]), rows))
    assert found == [expected[row] for row in rows]


def test_search_over_a_table_that_is_read_only(make: Make) -> None:
    table = ITEMS.copy()
    table.flags.writeable = False  # as a bundle's, which is mapped from its file
    assert search_one(make(table), np.array(EAST, np.float32), 2, exclude=[0]) == ([4, 2], [2, 1])


# -- what is added -----------------------------------------------------------------------------------------------------


def test_added_scores_count_in_the_ranking_and_in_the_scores(make: Make) -> None:
    added = Added(np.array([3, 1]), np.array([4.0, 1.0]))  # EAST: 1 1 1 3 2 1
    for candidates, items, scores in (
        (None, [3, 4, 0, 1, 2, 5], [3, 2, 1, 1, 1, 1]),
        ([5, 3, 1, 3], [3, 1, 5], [3, 1, 1]),
        ([0, 5], [0, 5], [1, 1]),
    ):
        (hits,) = make(ITEMS).search(
            np.array([EAST], np.float32), 6, exclude=[NO_ITEMS], candidates=[indices(candidates)], added=[added]
        )
        assert (hits.items.tolist(), hits.scores.tolist()) == (items, scores)


def test_added_scores_do_not_bring_excluded_items_back(make: Make) -> None:
    added = Added(np.array([3, 4]), np.array([9.0, 9.0]))
    for candidates in (None, [2, 3, 4]):
        (hits,) = make(ITEMS).search(
            np.array([EAST], np.float32), 1, exclude=[np.array([3, 4])], candidates=[indices(candidates)], added=[added]
        )
        assert hits.items.tolist() == [0 if candidates is None else 2]


def test_added_scores_are_those_of_their_user_and_of_one_search(make: Make) -> None:
    retriever, users = make(ITEMS), np.array([EAST, NORTH, EAST, NORTH], np.float32)
    plain = retriever.search(users, 2, exclude=[NO_ITEMS] * 4)
    added = [None, Added(np.array([3]), np.array([5.0])), Added(NO_ITEMS, np.zeros(0)), None]
    candidates = [None, None, None, np.array([3, 4])]
    found = retriever.search(users, 2, exclude=[NO_ITEMS] * 4, candidates=candidates, added=added)
    assert [hits.items.tolist() for hits in found] == [[4, 0], [3, 1], [4, 0], [3, 4]]
    assert found[1].scores.tolist() == [5, 1]
    again = retriever.search(users, 2, exclude=[NO_ITEMS] * 4)
    assert [hits.items.tolist() for hits in again] == [hits.items.tolist() for hits in plain]


@pytest.mark.parametrize("count", [1, 5])
def test_search_with_added_scores_is_a_plain_sort(make: Make, count: int) -> None:
    random = np.random.default_rng(count)
    table, users = random.integers(-9, 10, (300, 4)), random.integers(-9, 10, (count, 4))
    added = [Added(random.choice(300, 40, replace=False), random.integers(-99, 100, 40).astype(float)) for _ in users]
    excluded = [random.choice(300, 30, replace=False) for _ in users]
    retriever = make(table.astype(np.float32))
    found = retriever.search(users.astype(np.float32), 25, exclude=excluded, added=added)
    for user, more, left_out, hits in zip(users, added, excluded, found, strict=True):
        scores = (table @ user).astype(float)
        scores[more.items] += more.scores
        scores[left_out] = -np.inf
        expected = np.argsort(-scores, kind="stable")[:25]
        assert hits.items.tolist() == expected.tolist()
        assert hits.scores.tolist() == scores[expected].tolist()


# -- what is allowed ---------------------------------------------------------------------------------------------------


def allowed_of(items: list[int] | np.ndarray, vocabulary: int = len(ITEMS)) -> Allowed:
    mask = np.zeros(vocabulary, bool)
    mask[items] = True
    return Allowed.of(mask)


def test_few_items_that_are_allowed_are_listed() -> None:
    for count in (0, 1, 10, 100 // FEW, 100 // FEW + 1, 100):
        allowed = allowed_of(list(range(count)), 100)
        assert (allowed.items is not None) == (count * FEW <= 100)
        assert allowed.items is None or allowed.items.tolist() == list(range(count))
        assert allowed.size == 100 + (0 if allowed.items is None else 8 * count)


@pytest.mark.parametrize(
    ("allowed", "exclude", "candidates", "items"),
    [
        ([0, 1, 2, 3, 4, 5], [], None, [4, 0, 2, 5, 1, 3]),
        ([1, 3, 5], [], None, [5, 1, 3]),
        ([1, 3, 5], [5, 5, 4], None, [1, 3]),
        ([3], [], None, [3]),
        ([3], [3], None, []),
        ([], [], None, []),
        ([1, 3, 5], [], [5, 4, 5, 1], [5, 1]),
        ([1, 3, 5], [1], [5, 4, 1], [5]),
        ([1, 3], [], [5, 4], []),
        ([1, 3], [], [], []),
    ],
)
def test_only_what_is_allowed_appears(
    make: Make, allowed: list[int], exclude: list[int], candidates: list[int] | None, items: list[int]
) -> None:
    table = np.concatenate([ITEMS, np.full((100, 2), 9, np.float32)])  # better ones, so that the allowed are few
    for vocabulary in (len(ITEMS), len(table)):
        (hits,) = make(table[:vocabulary]).search(
            np.array([EAST], np.float32),
            6,
            exclude=[np.array(exclude, np.int64)],
            candidates=[indices(candidates)],
            allowed=[allowed_of(allowed, vocabulary)],
        )
        assert hits.items.tolist() == items
        assert hits.scores.tolist() == [ITEMS[item] @ EAST for item in items]


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.integers(1, 300),
    users=st.integers(1, 12),
    k=st.integers(1, 60),
    shares=st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]), min_size=1, max_size=3),
)
def test_search_among_what_is_allowed_is_a_sort_of_its_scores(
    make: Make, seed: int, vocabulary: int, users: int, k: int, shares: list[float]
) -> None:
    """Users share what they are allowed, have their own, or none; with exclusions, candidates and added scores."""
    random = np.random.default_rng(seed)
    table = random.integers(-9, 10, (vocabulary, 3)).astype(np.float32)
    queries = random.integers(-3, 4, (users, 3)).astype(np.float32)
    kinds = [None, *(Allowed.of(random.random(vocabulary) < share) for share in shares)]
    allowed = [kinds[int(random.integers(0, len(kinds)))] for _ in range(users)]
    exclude = [some_indices(random, vocabulary) for _ in range(users)]
    candidates = [some_indices(random, vocabulary) if random.random() < 0.3 else None for _ in range(users)]
    chosen = [random.choice(vocabulary, int(random.integers(0, vocabulary + 1)), replace=False) for _ in range(users)]
    added = [
        Added(items, random.integers(-9, 10, len(items)).astype(float)) if random.random() < 0.5 else None
        for items in chosen
    ]
    found = make(table).search(queries, k, exclude=exclude, candidates=candidates, allowed=allowed, added=added)
    for row, hits in enumerate(found):
        scores = table.astype(float) @ queries[row].astype(float)
        if (more := added[row]) is not None:
            scores[more.items] += more.scores
        left = np.ones(vocabulary, bool) if allowed[row] is None else allowed[row].mask.copy()
        left[exclude[row]] = False
        if (limit := candidates[row]) is not None:
            left &= np.isin(np.arange(vocabulary), limit)
        items = np.flatnonzero(left)
        expected = items[np.argsort(-scores[items], kind="stable")][:k]
        assert_found(hits, (expected.tolist(), scores[expected].tolist()))


def test_what_is_allowed_is_not_changed(make: Make) -> None:
    allowed = [allowed_of([1, 3, 5]), allowed_of([0])]
    for _ in range(2):
        found = make(ITEMS).search(np.array([EAST, EAST], np.float32), 6, exclude=[NO_ITEMS] * 2, allowed=allowed)
        assert [hits.items.tolist() for hits in found] == [[5, 1, 3], [0]]
        for hits in found:
            hits.items[:] = -1


def test_item_that_is_allowed_and_has_no_finite_score_never_appears(make: Make) -> None:
    table = np.ones((64, 1), np.float32)
    table[[3, 4], 0] = np.nan, np.inf
    for items in ([3, 4, 5], list(range(60))):
        (hits,) = make(table).search(
            np.ones((1, 1), np.float32), 3, exclude=[NO_ITEMS], allowed=[allowed_of(items, 64)]
        )
        assert hits.items.tolist() == ([5] if len(items) == 3 else [0, 1, 2])
