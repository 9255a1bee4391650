"""The parts of exact search; what it promises as a `Retriever` is in tests/contract."""

from __future__ import annotations

import numpy as np
import pytest

from dman_runtime.retrieval.base import Allowed
from dman_runtime.retrieval.exact import GROUP, SCORES_PER_BLOCK, ExactRetriever, first_of, search_scores, top_k


@pytest.mark.parametrize("count", [1, 15, 60, GROUP * 7, GROUP * 60 + 5])  # one score to many groups and a rest
@pytest.mark.parametrize("values", [5, 10**6])  # many ties; next to none
def test_top_k_equals_a_stable_sort_whatever_k_is(count: int, values: int) -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, values, count).astype(np.float32)
    exclude = random.choice(count, count // 3, replace=False)
    allowed = scores.copy()
    allowed[exclude] = -np.inf
    expected = np.lexsort((np.arange(count), -allowed))[: count - len(exclude)]
    for k in {1, 2, 7, 60, max(1, len(expected) - 1), count, count + 1}:
        found, best = top_k(scores.copy(), k, exclude=exclude)
        assert found.tolist() == expected[:k].tolist()
        assert best.tolist() == scores[found].tolist()


def test_search_scores_does_not_change_them() -> None:
    scores = np.array([0.5, 2.0, 1.0, 4.0, 3.0])
    before = scores.copy()
    found, best = search_scores(scores, 3, exclude=np.array([4, 3]), candidates=np.array([4, 1, 0, 1]))
    assert found.tolist() == [1, 0] and best.tolist() == [2.0, 0.5]
    assert (scores == before).all()


@pytest.mark.parametrize("share", [None, 0.0, 0.02, 0.5])  # of the items that are allowed
def test_first_of_a_known_order_is_what_a_search_of_all_scores_finds(share: float | None) -> None:
    random = np.random.default_rng(0)
    for values in (3, 10**6):
        scores = random.integers(0, values, 500).astype(float)
        order = np.argsort(-scores, kind="stable")
        allowed = None if share is None else Allowed.of(random.random(500) < share)
        for k in (1, 7, 499, 600):
            exclude = random.integers(0, 500, int(random.integers(0, 400)))
            limited = scores.copy()
            if allowed is not None:
                limited[~allowed.mask] = -np.inf
            expected = top_k(limited, k, exclude=exclude)
            found = first_of(order, scores, k, exclude=exclude, allowed=allowed)
            assert found.items.tolist() == expected.items.tolist()
            assert found.scores.tolist() == expected.scores.tolist()


def test_scores_of_one_user_and_of_many_are_the_inner_products() -> None:
    random = np.random.default_rng(0)
    table, users = random.integers(-9, 10, (50, 4)), random.integers(-9, 10, (7, 4))
    retriever = ExactRetriever(table.astype(np.float32))
    assert (retriever.scores(users.astype(np.float32)) == users @ table.T).all()
    for user in users:
        assert (retriever.scores(user[None].astype(np.float32)) == table @ user).all()


@pytest.mark.slow
def test_search_holds_no_more_scores_at_a_time_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.ones((SCORES_PER_BLOCK // 4, 1), np.float32)
    retriever, rows = ExactRetriever(table), []
    scores = retriever.scores

    def counted(users: np.ndarray) -> np.ndarray:
        rows.append(len(users))
        return scores(users)

    monkeypatch.setattr(retriever, "scores", counted)
    found = retriever.search(np.ones((10, 1), np.float32), 2, exclude=[np.array([row]) for row in range(10)])
    assert rows == [4, 4, 2]
    assert [hits.items.tolist() for hits in found[:3]] == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize("allowed", [[], [2], [0, 2, 3, 5, 7, 9]])
def test_search_scores_keeps_to_what_is_allowed(allowed: list[int]) -> None:
    scores, mask, candidates = np.arange(10.0) % 4, np.zeros(10, bool), [3, 2, 2, 8]
    mask[allowed] = True
    limit = Allowed.of(mask)
    found = search_scores(scores, 3, exclude=np.array([3]), candidates=np.array(candidates), allowed=limit)
    left = [item for item in allowed if item != 3 and item in candidates]
    assert found.items.tolist() == sorted(left, key=lambda item: (-scores[item], item))[:3]
