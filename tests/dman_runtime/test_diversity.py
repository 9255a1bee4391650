"""Rules of diversity: exact and greedy, however far down the ranking the next item is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from item_filters import FIELDS, item_lists
from item_filters import diverse as reference

from dman_runtime.diversity import MAX_RULES, WIDER, Rule, check_rules, diverse, fields_of
from dman_runtime.errors import RequestError
from dman_runtime.model.attributes import Attributes
from dman_runtime.retrieval.base import Hits


def best(items: list[dict[str, str]], k: int, *rules: Rule, ranked: list[int] | None = None) -> list[int]:
    ranking = np.arange(len(items)) if ranked is None else np.array(ranked)
    asked: list[int] = []

    def search(count: int) -> Hits:
        asked.append(count)
        return Hits(ranking[:count], -np.arange(len(ranking), dtype=float)[:count])

    fields = fields_of(rules, Attributes(items))
    found = diverse(search, k, rules, fields, found=search(WIDER * k))
    assert found.scores.tolist() == [-float(np.flatnonzero(ranking == item)[0]) for item in found.items]
    assert asked == [WIDER ** (power + 1) * k for power in range(len(asked))]
    return found.items.tolist()


KINDS = [{"kind": kind} for kind in "aaabbbccc"]


def test_no_value_comes_more_often_than_its_rule_says() -> None:
    assert best(KINDS, 6, Rule("kind", 2, 6)) == [0, 1, 3, 4, 6, 7]
    assert best(KINDS, 3, Rule("kind", 1, 3)) == [0, 3, 6]
    assert best(KINDS, 3, Rule("kind", 3, 3)) == [0, 1, 2]


def test_answer_is_short_only_where_nothing_else_is_left() -> None:
    assert best(KINDS, 9, Rule("kind", 1, 9)) == [0, 3, 6]
    assert best([*KINDS, {}, {}], 9, Rule("kind", 1, 9)) == [0, 3, 6, 9, 10]


def test_items_come_back_behind_the_places_of_a_rule() -> None:
    assert best(KINDS, 7, Rule("kind", 1, 3)) == [0, 3, 6, 1, 2, 4, 5]
    assert best(KINDS, 4, Rule("kind", 1, 2)) == [0, 3, 1, 2]


def test_rule_for_more_places_than_are_asked_for_holds_for_all_of_them() -> None:
    assert best(KINDS, 3, Rule("kind", 1, 1000)) == [0, 3, 6]


def test_items_without_the_attribute_are_not_limited() -> None:
    assert best([{}, {"kind": "a"}, {}, {"kind": "a"}, {}], 4, Rule("kind", 1, 4)) == [0, 1, 2, 4]


def test_item_with_several_values_counts_for_each() -> None:
    items = [{"kind": kind} for kind in ("a|b", "a", "b|c", "c|c", "d")]
    assert best(items, 3, Rule("kind", 1, 3)) == [0, 3, 4]


def test_rules_hold_together() -> None:
    items = [{"kind": kind, "maker": maker} for kind, maker in ("ax", "ay", "bx", "by", "cz")]
    assert best(items, 3, Rule("kind", 1, 3), Rule("maker", 1, 3)) == [0, 3, 4]
    assert best(items, 4, Rule("kind", 1, 4), Rule("maker", 1, 2)) == [0, 3, 4]
    assert best(items, 5, Rule("kind", 2, 5), Rule("maker", 1, 3)) == [0, 1, 4, 2, 3]


def test_next_item_is_found_however_far_down_it_is() -> None:
    items = [{"kind": "a"}] * 5000 + [{"kind": "b"}] + [{"kind": "a"}] * 5000 + [{"kind": "c"}]
    assert best(items, 3, Rule("kind", 1, 3)) == [0, 5000, 10_001]
    assert best(items, 4, Rule("kind", 1, 4)) == [0, 5000, 10_001]


@settings(deadline=None, max_examples=200)
@given(
    items=item_lists(60),
    k=st.integers(1, 12),
    rules=st.lists(st.builds(Rule, st.sampled_from(FIELDS), st.integers(1, 3), st.integers(1, 14)), max_size=3),
    random=st.randoms(use_true_random=False),
)
def test_answer_is_that_of_going_through_the_ranking_place_by_place(
    items: list[dict[str, str]], k: int, rules: list[Rule], random: np.random.Generator
) -> None:
    ranked = list(range(len(items)))
    random.shuffle(ranked)
    assert best(items, k, *rules, ranked=ranked) == reference(ranked, items, k, rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("kind", 0, 5)], "at most 0 items with the same 'kind'; allow 1 or more"),
        ([Rule("kind", -1, 5)], "at most -1 items"),
        ([Rule("kind", 1, 0)], "the first 0 items; choose 1 to 1000"),
        ([Rule("kind", 1, 1001)], "the first 1001 items"),
        ([Rule("kind", 1, 5)] * (MAX_RULES + 1), f"send at most {MAX_RULES}"),
    ],
)
def test_rule_that_cannot_be_meant_is_refused(rules: list[Rule], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_rules(rules, 1000)


def test_attribute_that_no_item_has_is_refused() -> None:
    with pytest.raises(RequestError, match="no item has an attribute 'king'; use one of 'kind'"):
        fields_of([Rule("king", 1, 5)], Attributes(KINDS))
