"""A planted puzzle that only a long memory can solve, with a known chance level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from dman_train.synthetic.popularity import CheckedConfig, Popularity


@dataclass(frozen=True)
class PlantedConfig(CheckedConfig):
    """A puzzle about the first events of a history. Raises ValueError for an impossible combination.

    A user has two independent keys of `answers` values; one item for each key is among the first `head` events. Then
    every query item comes once, in random order, after min_gap to max_gap ordinary events each. Two answers follow it:
    the first key decides the first answer, the second key the second. Each query has two alphabets of its own, so no
    answer comes twice, and those already seen rule none out. A history ends with `query, first answer, second answer`:
    the validation and the test target of leave-one-out. The first says nothing about the second.

    So the last min_gap + 2 inputs before the test target (min_gap + 1 before the validation target) are independent of
    its key: ordinary events follow a user's stable genres. Further back, the key item and the answers to earlier
    queries reveal it. Without memory, L layers over segments of T reach back at most (L + 1) T inputs, 80 by default.
    A model that knows the rules but not the key reaches `chance`; one that sees everything predicts `expected`.
    """

    users: int = 4000
    items: int = 800  # in the catalogue; those that are no keys, queries or answers are ordinary
    answers: int = 40  # values of a key, and items in each alphabet
    queries: int = 4  # per user
    head: int = 15  # events at the start of a history, which include the keys
    min_gap: int = 80  # ordinary events before a query, at least: as far as three layers and segments of 20 reach
    max_gap: int = 120  # and at most, uniformly
    genres: int = 20  # of the ordinary items
    home_genres: int = 3  # that a user browses
    popularity_exponent: float = 0.8  # of the Zipf law over the items of a genre
    seed: int = 0

    def __post_init__(self) -> None:
        lows = {"users": 1, "answers": 2, "queries": 1, "head": 2, "min_gap": 1, "home_genres": 1}
        for name, low in lows.items():
            self.require(getattr(self, name) >= low, name, f"at least {low}")
        for name in ("popularity_exponent", "seed"):
            self.require(getattr(self, name) >= 0, name, "0 or more")
        self.require(self.max_gap >= self.min_gap, "max_gap", f"at least min_gap, {self.min_gap}")
        self.require(self.genres >= self.home_genres, "genres", f"at least home_genres, {self.home_genres}")
        least = self.items - self.ordinary_items + self.genres
        self.require(self.items >= least, "items", f"at least {least}: an ordinary item for each genre as well")

    @property
    def ordinary_items(self) -> int:
        """Ordinary items come first in the catalogue, then the keys, the queries and the answers."""
        return self.items - 2 * self.answers - self.queries * (1 + 2 * self.answers)

    def chance(self, k: int = 10) -> float:
        """Best possible HR@k, seen items excluded or kept, from the last min_gap inputs alone."""
        return min(k, self.answers) / self.answers

    def key(self, number: int, value: int) -> int:
        """The catalogue index of the item that gives the first (number 0) or second key a value."""
        return self.ordinary_items + number * self.answers + value

    def query(self, number: int) -> int:
        """The catalogue index of a query item."""
        return self.key(2, number)

    def answer(self, query: int, number: int, value: int) -> int:
        """The catalogue index of the first (number 0) or second answer to a query, for a value of the same key."""
        return self.query(self.queries) + (2 * query + number) * self.answers + value

    def expected(self, history: Sequence[int]) -> int | None:
        """The answer that follows a history of catalogue indices; None if no answer does. Reads the keys."""
        last = history[-1] - self.query(0)  # a query, or an answer
        query, number = (last, 0) if last < self.queries else divmod((last - self.queries) // self.answers, 2)
        number += last >= self.queries  # after a first answer comes the second
        if last < 0 or number > 1:
            return None
        value = next(item - self.key(number, 0) for item in history if 0 <= item - self.key(number, 0) < self.answers)
        return self.answer(query, number, value)

    def histories(self, _rng: np.random.Generator) -> Iterator[tuple[list[int], list[int]]]:
        """Each user's items (indices into the catalogue), and the positions at which a new turn begins."""
        return _histories(self)

    def item_columns(self) -> dict[str, np.ndarray]:
        """Ids, titles and kinds of the whole catalogue."""
        return _item_columns(self)


def planted_keys(config: PlantedConfig) -> np.ndarray:
    """Both keys of every user: (users, 2) int64, uniform and independent of each other and of everything else."""
    return np.random.default_rng((config.seed, 1)).integers(0, config.answers, (config.users, 2))


def _histories(config: PlantedConfig) -> Iterator[tuple[list[int], list[int]]]:
    random, ordinary = Random(f"{config.seed}/catalogue"), range(config.ordinary_items)
    genres = [
        Popularity(list(ordinary[genre :: config.genres]), config.popularity_exponent, random)
        for genre in range(config.genres)
    ]
    for user, keys in enumerate(planted_keys(config).tolist()):
        random = Random(f"{config.seed}/{user}")  # draws the same for all keys
        homes = random.sample(genres, config.home_genres)
        history = [random.choice(homes).draw(random, set()) for _ in range(config.head)]
        for number, position in enumerate(random.sample(range(config.head), 2)):
            history[position] = config.key(number, keys[number])
        for query in random.sample(range(config.queries), config.queries):
            gap = random.randint(config.min_gap, config.max_gap)
            history += [random.choice(homes).draw(random, set()) for _ in range(gap)]
            history += [config.query(query), *(config.answer(query, number, keys[number]) for number in range(2))]
        yield history, list(range(0, len(history), 10))


def _item_columns(config: PlantedConfig) -> dict[str, np.ndarray]:
    values, queries = range(1, config.answers + 1), range(1, config.queries + 1)
    titles = [f"Ordinary {n + 1}" for n in range(config.ordinary_items)]
    titles += [f"Key {number}: {value}" for number in (1, 2) for value in values]
    titles += [f"Query {n}" for n in queries]
    titles += [f"Answer {number} to query {n}: {value}" for n in queries for number in (1, 2) for value in values]
    kinds = [title.partition(" ")[0] for title in titles]
    texts = {"title": np.array(titles, dtype=object), "kind": np.array(kinds, dtype=object)}
    return {"item_id": np.arange(config.items) + 1} | texts
