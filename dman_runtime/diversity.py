"""Rules on how often the same value of an attribute may be among the first recommendations.

Greedy: each place gets the best item that breaks no rule there. So the answer depends on the ranking alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dman_runtime.errors import RequestError
from dman_runtime.item_filters import known_field
from dman_runtime.model.attributes import Attributes, Field
from dman_runtime.retrieval.base import Hits

MAX_RULES = 4
WIDER = 4  # so many times as many items are looked at, at first than are wanted, and then again and again


@dataclass(frozen=True, slots=True)
class Rule:
    """At most `at_most` of the first `first` items have the same value; items without the attribute are not counted.

    An item with several values counts for each.
    """

    field: str
    at_most: int
    first: int


def check_rules(rules: Sequence[Rule], most_items: int) -> None:
    """Raises RequestError for rules that can never be meant."""
    if len(rules) > MAX_RULES:
        raise RequestError(f"{len(rules)} rules of diversity", f"send at most {MAX_RULES}")
    for rule in rules:
        if rule.at_most < 1:
            raise RequestError(f"at most {rule.at_most} items with the same {rule.field!r:.80}", "allow 1 or more")
        if not 1 <= rule.first <= most_items:
            raise RequestError(f"a rule of diversity is for the first {rule.first} items", f"choose 1 to {most_items}")


def fields_of(rules: Sequence[Rule], attributes: Attributes) -> list[Field]:
    """The attribute of each rule. Raises RequestError, which lists those that there are, for one that no item has."""
    return [known_field(attributes, rule.field) for rule in rules]


def diverse(
    search: Callable[[int], Hits], k: int, rules: Sequence[Rule], fields: Sequence[Field], *, found: Hits
) -> Hits:
    """The k best items that break no rule, in the order of their places; fewer only where no other item would do.

    `search` gives the so many best of all items that may appear; `found` are the best `WIDER * k` of them.
    """
    asked = WIDER * k
    while True:
        places, done = _places(found.items, k, rules, fields)
        if done or len(found.items) < asked:
            return Hits(found.items[places], found.scores[places])
        asked *= WIDER
        found = search(asked)


def _places(ranked: np.ndarray, k: int, rules: Sequence[Rule], fields: Sequence[Field]) -> tuple[list[int], bool]:
    """Positions in (N) ranked items, and whether they are k: if not, the next place needs an item that is not there."""
    counts = [_Count(rule, field, ranked) for rule, field in zip(rules, fields, strict=True)]
    blocked, chosen = bytearray(len(ranked)), list[int]()
    view = np.frombuffer(blocked, np.uint8)
    for end in sorted({k, *(min(k, rule.first) for rule in rules)}):
        counts = [count for count in counts if count.first >= end]
        view[:] = 0  # what a rule blocked that has ended may appear
        view[chosen] = 1
        for count in counts:
            view[count.blocked()] = 1
        while len(chosen) < end:
            if (position := blocked.find(0)) < 0:
                return chosen, False
            chosen.append(position)
            blocked[position] = 1
            for count in counts:
                view[count.add(position)] = 1
    return chosen, True


class _Count:
    """How often each value of a rule's attribute was chosen, and where in a ranking the items are that have it."""

    def __init__(self, rule: Rule, field: Field, ranked: np.ndarray) -> None:
        self.first = rule.first
        self._rule, self._field, self._ranked = rule, field, ranked
        self._positions, self._codes = field.pairs_of(ranked)
        order = np.argsort(self._codes, kind="stable")
        self._positions, self._codes = self._positions[order], self._codes[order]
        self._counts: dict[int, int] = {}

    def add(self, position: int) -> np.ndarray:
        """Counts the item at a position. Returns the positions that this blocks."""
        full = []
        for code in self._field.codes_of(int(self._ranked[position])):
            self._counts[code] = self._counts.get(code, 0) + 1
            if self._counts[code] == self._rule.at_most:
                full.append(code)
        return self._with(full)

    def blocked(self) -> np.ndarray:
        """The positions of all items that have a value that was chosen often enough."""
        return self._with([code for code, count in self._counts.items() if count >= self._rule.at_most])

    def _with(self, codes: Sequence[int]) -> np.ndarray:
        starts, ends = (np.searchsorted(self._codes, codes, side=side) for side in ("left", "right"))
        parts = [self._positions[start:end] for start, end in zip(starts, ends, strict=True)]
        return np.concatenate([*parts, np.zeros(0, np.int64)])
