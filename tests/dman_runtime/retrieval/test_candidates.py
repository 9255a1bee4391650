"""Search through an index; what it promises as a `Retriever` is in tests/contract."""

from __future__ import annotations

import numpy as np
import pytest
from contract.retrievers import BestFirst
from hypothesis import given, settings
from hypothesis import strategies as st

from dman_runtime.retrieval.base import NO_ITEMS, Added, Allowed, Hits
from dman_runtime.retrieval.candidates import MAX_SHARE, CandidateRetriever
from dman_runtime.retrieval.exact import ExactRetriever
from dman_runtime.retrieval.index import ItemIndex


def of(table: np.ndarray, items: int | None = None) -> tuple[CandidateRetriever, BestFirst]:
    index = BestFirst(table, len(table) if items is None else items)
    return CandidateRetriever(table, index), index


def same(found: Hits, expected: Hits) -> bool:
    return found.items.tolist() == expected.items.tolist() and np.allclose(found.scores, expected.scores)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    items=st.integers(200, 2000),
    later=st.integers(0, 50),
    k=st.integers(1, 30),
    share=st.sampled_from([None, 0.05, 0.3, 0.9]),
)
def test_search_over_a_perfect_index_is_exact_search(
    seed: int, items: int, later: int, k: int, share: float | None
) -> None:
    random = np.random.default_rng(seed)
    table = random.standard_normal((items + later, 8)).astype(np.float32)
    users = random.standard_normal((4, 8)).astype(np.float32)
    exclude = [random.integers(0, len(table), int(random.integers(0, 60))) for _ in users]
    candidates = [None, random.integers(0, len(table), 40), None, None]
    allowed = [None if share is None else Allowed.of(random.random(len(table)) < share) for _ in users]
    some = random.permutation(len(table))[:20]
    added = [Added(some, np.abs(random.standard_normal(20)).astype(np.float32)), None, None, Added(some, np.ones(20))]
    searched, _ = of(table, items)
    arguments = {"exclude": exclude, "candidates": candidates, "allowed": allowed, "added": added}
    found = searched.search(users, k, **arguments)
    expected = ExactRetriever(table).search(users, k, **arguments)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_search_asks_the_index_only_where_that_is_cheaper() -> None:
    table = np.random.default_rng(0).standard_normal((4000, 4)).astype(np.float32)
    searched, index = of(table)
    user, one, many = table[:1], [np.arange(3)], np.arange(4000) % 2 == 0
    few = np.zeros(4000, bool)
    few[:300] = True
    for expected, k, exclude, candidates, allowed in [
        (1, 10, [NO_ITEMS], None, None),
        (1, 10, one, None, None),
        (1, 10, one, None, [Allowed.of(many)]),
        (0, 10, one, None, [Allowed.of(few)]),
        (0, 10, one, [np.arange(50)], None),
        (0, 4000 // MAX_SHARE, one, None, None),
        (0, 10, [np.arange(4000 // MAX_SHARE)], None, None),
    ]:
        index.asked = 0
        searched.search(user, k, exclude=exclude, candidates=candidates, allowed=allowed)
        assert index.asked == expected


def test_user_who_may_get_nothing_of_what_the_index_finds_gets_exact_search() -> None:
    table = np.ones((1000, 2), np.float32)
    table[:500] = 2
    searched, index = of(table)
    mask = np.ones(1000, bool)
    mask[:500] = False  # all that score high
    (hits,) = searched.search(table[:1], 5, exclude=[NO_ITEMS], allowed=[Allowed.of(mask)])
    assert index.asked == 1 and hits.items.tolist() == [500, 501, 502, 503, 504]


def test_quick_says_whether_others_may_wait() -> None:
    searched, _ = of(np.ones((200_000, 1), np.float32))
    rows = np.arange(200_000)
    assert searched.quick(None) and searched.quick(Allowed.of(rows >= 100_000)) and searched.quick(Allowed.of(rows < 9))
    assert not searched.quick(Allowed.of(rows < 20_000))
    exact = ExactRetriever(np.ones((200_000, 1), np.float32))
    assert not exact.quick(None) and exact.quick(Allowed.of(rows < 9))


def test_index_of_real_vectors_finds_most_of_the_best_with_their_exact_scores() -> None:
    random = np.random.default_rng(0)
    centres = random.standard_normal((60, 16))
    table = (centres[random.integers(0, 60, 6000)] + 0.3 * random.standard_normal((6000, 16))).astype(np.float32)
    users = (centres[random.integers(0, 60, 50)] + 0.3 * random.standard_normal((50, 16))).astype(np.float32)
    index = ItemIndex.build(table, threads=1)
    index.probes = index.lists // 4
    exclude = [random.integers(0, 6000, 30) for _ in users]
    found = CandidateRetriever(table, index).search(users, 20, exclude=exclude)
    expected = ExactRetriever(table).search(users, 20, exclude=exclude)
    recall = np.mean([len(np.intersect1d(one.items, other.items)) for one, other in zip(found, expected, strict=True)])
    assert recall / 20 > 0.95
    for user, hits, left_out in zip(users, found, exclude, strict=True):
        assert np.allclose(hits.scores, table[hits.items] @ user, atol=1e-4)
        assert (np.diff(hits.scores) <= 0).all() and len(np.unique(hits.items)) == 20
        assert not np.isin(hits.items, left_out).any()


def test_items_that_were_added_do_not_hide_better_ones_that_were_not_found() -> None:
    table = np.arange(1000, 0, -1, dtype=np.float32)[:, None]
    table[999] = 0.5  # the index does not know it
    searched, _ = of(table, 999)
    mask = np.ones(1000, bool)
    mask[:300] = False  # what the index finds
    (hits,) = searched.search(np.ones((1, 1), np.float32), 1, exclude=[NO_ITEMS], allowed=[Allowed.of(mask)])
    assert hits.items.tolist() == [300]
