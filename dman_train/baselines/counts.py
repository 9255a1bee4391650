"""Systems that only count: what is popular, what most often follows the recent items, and what a user had before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dman_runtime.data.evaluation import HeldOut, Ranks, ranks_of_targets

Scorer = Callable[[Sequence[np.ndarray]], np.ndarray]  # N histories, none of them empty -> (N, V) scores
DISTANCE, RECENT = 8, 10  # chosen on MovieLens-1M's validation split, like the weights below
HALF_LIFE = 20  # events until one of a user's own counts half
_BATCH = 256


def most_popular(items: np.ndarray, offsets: np.ndarray, vocabulary: int) -> Scorer:
    """Scores by the number of training events, the same for all users."""
    counts = np.bincount(items, minlength=vocabulary).astype(float)
    return lambda histories: np.tile(counts, (len(histories), 1))


def transitions(items: np.ndarray, offsets: np.ndarray, vocabulary: int) -> Scorer:
    """Scores an item by how often it came 1 to `DISTANCE` events after each of a user's last `RECENT` items.

    A pair d events apart counts 1/d, the n-th last item 1/n. The sum is divided by the square root of the popularity.
    """
    user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    apart = range(1, min(DISTANCE, len(items) - 1) + 1)
    same = [user[:-d] == user[d:] for d in apart]
    pairs = [
        items[:-d][ok].astype(np.int64) * vocabulary + items[d:][ok] for d, ok in zip(apart, same, strict=True)
    ]  # fmt: skip
    weights = np.concatenate([np.full(len(p), 1 / d) for d, p in zip(apart, pairs, strict=True)] or [np.zeros(0)])
    codes, positions = np.unique(np.concatenate([*pairs, np.zeros(0, np.int64)]), return_inverse=True)
    sums = np.bincount(positions, weights, minlength=len(codes))
    starts, followers = np.searchsorted(codes, np.arange(vocabulary + 1) * vocabulary), codes % vocabulary
    popularity = np.bincount(items, minlength=vocabulary)

    def scores(histories: Sequence[np.ndarray]) -> np.ndarray:
        result = np.zeros((len(histories), vocabulary))
        for row, history in enumerate(histories):
            for back, item in enumerate(history[: -RECENT - 1 : -1], start=1):
                of_item = slice(starts[item], starts[item + 1])
                result[row, followers[of_item]] += sums[of_item] / back
        return result / np.sqrt(popularity + 1) + popularity * 1e-12  # popularity breaks ties

    return scores


def own_frequency(items: np.ndarray, offsets: np.ndarray, vocabulary: int) -> Scorer:
    """A user's own items by how often they came up, the rest by popularity."""
    return _own_items(items, vocabulary, lambda ages: np.ones(len(ages)))


def own_decayed(items: np.ndarray, offsets: np.ndarray, vocabulary: int) -> Scorer:
    """A user's own items by how often they came up, an event counting half for every `HALF_LIFE` that came later."""
    return _own_items(items, vocabulary, lambda ages: 2.0 ** (-ages / HALF_LIFE))


def own_latest(items: np.ndarray, offsets: np.ndarray, vocabulary: int) -> Scorer:
    """A user's own items, the latest first, the rest by popularity."""
    return _own_items(items, vocabulary, lambda ages: 2.0 ** -ages.astype(float))


def _own_items(items: np.ndarray, vocabulary: int, weights: Callable[[np.ndarray], np.ndarray]) -> Scorer:
    """`weights`: of events that are (n) events old."""
    counts = np.bincount(items, minlength=vocabulary)
    popularity = counts / (counts.sum() + 1)  # below 1

    def scores(histories: Sequence[np.ndarray]) -> np.ndarray:
        result = np.tile(popularity, (len(histories), 1))
        for row, history in enumerate(histories):
            own, place = np.unique(history, return_inverse=True)
            found = np.bincount(place, weights(np.arange(len(history))[::-1]))
            order = np.lexsort((popularity[own], found))  # ties by popularity; the values themselves would underflow
            result[row, own] = 1 + np.argsort(order)
        return result

    return scores


COUNTS = {
    "popular": most_popular,
    "transitions": transitions,
    "own-frequency": own_frequency,
    "own-decayed": own_decayed,
    "own-latest": own_latest,
}


def count_ranks(scorer: Scorer, data: HeldOut) -> Ranks:
    """Ranks of all targets, in the order of `data`."""
    parts = []
    for start in range(0, len(data.targets), _BATCH):
        rows = slice(start, start + _BATCH)
        histories = data.histories[rows]
        parts.append(ranks_of_targets(scorer(histories), data.targets[rows], histories))
    return Ranks.concatenate(parts)
