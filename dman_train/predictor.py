"""Fits the map from titles and attributes to item embeddings that a bundle predicts new items with, and measures it on
items held out: ridge regression on the trained embeddings.

Least squares shrink what they predict towards the mean, and users then hardly ever get a new item. So predictions are
multiplied by a *scale*: the one with which items that were held out come into the first ten of validation users as
often as they do with their trained embeddings. More would show new items to more users who want them, at the cost of
everything else in the list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dman_runtime.data.evaluation import HeldOut
from dman_runtime.data.interactions import ItemInfo
from dman_runtime.model.predictor import MAX_FEATURES, TITLE, Feature, Predictor, numbers_of, texts_of
from dman_train.model import DMAN
from dman_train.replay import replay
from dman_train.vocabulary import Vocabulary

MIN_ITEMS = 50  # with features; fewer teach nothing
MAX_ITEMS, MAX_USERS = 50_000, 1000  # that are looked at: the most frequent items, and users drawn at random
MAX_SCORES = 50_000_000  # of users for items, held at a time; fewer users where there are many items
MAX_TEXT = 100  # characters of a value that can be a feature
MIN_COUNTS = {"word": 3, "value": 2}  # items that a feature needs
KNOTS, MIN_NUMBERS = 12, 24  # of a number; how many different values make an attribute a number
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
FOLDS, SEED, K = 5, 20210218, 10
BLOCK, USERS_PER_RUN = 2048, 128  # items and users that are worked on together
SCALES = (0.25, 8.0)


class Audience(NamedTuple):
    """Validation users: what rankings of held-out items are measured with."""

    users: np.ndarray  # (N, D) float32 user embeddings before the target
    seen: Sequence[np.ndarray]  # N x (h) item indices
    targets: np.ndarray  # (N) int64 item indices

    def some(self, most: int) -> Audience:
        """At most so many of them, drawn at random."""
        if len(self.users) <= most:
            return self
        rows = np.sort(np.random.default_rng(SEED).permutation(len(self.users))[:most])
        return Audience(self.users[rows], [self.seen[row] for row in rows], self.targets[rows])


class Fitted(NamedTuple):
    predictor: Predictor
    quality: dict[str, Any]  # `new_items` of a manifest


def audience_of(model: DMAN, data: HeldOut) -> Audience:
    """Of some of the users of a split, in the item indices of the model."""
    usable = [row for row, history in enumerate(data.histories) if len(history) and data.targets[row] >= 0]
    rows = np.sort(np.random.default_rng(SEED).permutation(usable)[:MAX_USERS].astype(np.int64))
    chosen = data.rows(rows[np.argsort([len(data.histories[row]) for row in rows], kind="stable")])
    parts = [np.zeros((0, model.config.width), np.float32)]
    for begin in range(0, len(rows), USERS_PER_RUN):
        part = chosen.rows(np.arange(begin, min(begin + USERS_PER_RUN, len(rows))))
        users, _ = replay(model, part.histories, times=part.times, request_times=part.target_times)
        parts.append(users.cpu().numpy())
    return Audience(np.concatenate(parts), chosen.histories, chosen.targets)


def fit_predictor(table: np.ndarray, vocabulary: Vocabulary, audience: Audience) -> Fitted | None:
    """The map for a (V, D) item table; None where too few items have titles or attributes."""
    chosen = np.sort(np.argsort(-vocabulary.counts, kind="stable")[:MAX_ITEMS])
    infos = [vocabulary.items.get(vocabulary.item_ids[item], ItemInfo("", {})) for item in chosen.tolist()]
    features = _features(infos)
    empty = Predictor(features, np.zeros((1 + len(features), table.shape[1]), np.float32))
    rows = [empty.row(info.title, info.attributes) for info in infos]
    described = np.array([row for row, (columns, _) in enumerate(rows) if len(columns)], np.int64)
    if len(described) < MIN_ITEMS:
        return None
    items = chosen[described]
    design = _Design([rows[row] for row in described.tolist()], len(features), table[items].astype(np.float64))
    held_out = _HeldOutItems(table, items, audience.some(max(1, MAX_SCORES // len(table))))
    found = {penalty: held_out.measured(design.predicted_when_held_out(penalty)) for penalty in PENALTIES}
    penalty = max(PENALTIES, key=lambda one: found[one]["gain"])
    quality = found[penalty]
    weights = (design.fit(penalty) * quality["scale"]).astype(np.float32)
    del quality["gain"]
    about = {"fitted_items": len(items), "features": len(features), "folds": FOLDS, "penalty": penalty}
    return Fitted(Predictor(features, weights), about | quality)


def _features(infos: Sequence[ItemInfo]) -> list[Feature]:
    """Those that enough items have, the most frequent ones first; and the knots of numbers."""
    texts, numbers = Counter[tuple[str, str, str]](), dict[str, list[float]]()
    for info in infos:
        texts.update(set(texts_of(info.title, info.attributes)))
        for name, number in numbers_of(info.title, info.attributes).items():
            numbers.setdefault(name, []).append(number)
    given = Counter(name for info in infos for name in info.attributes)
    knots: list[Feature] = []
    for name, values in sorted(numbers.items()):
        if len(set(values)) >= MIN_NUMBERS and len(values) >= 0.9 * given.get(name, 0):
            places = np.unique(np.quantile(values, np.linspace(0, 1, KNOTS)))
            knots += [Feature("near", name, float(place)) for place in places]
    in_words = {(one.field, one.kind) for one in knots}
    common = [
        Feature(kind, name, text)  # type: ignore[arg-type]
        for (kind, name, text), count in texts.most_common()
        if count >= MIN_COUNTS[kind] and len(text) <= MAX_TEXT and (name == TITLE or (name, "near") not in in_words)
    ]
    return [*knots, *common][:MAX_FEATURES]


class _Design:
    """Features and embeddings of the items, with their products by fold."""

    def __init__(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], features: int, embeddings: np.ndarray) -> None:
        self._rows, self._features, self._embeddings = rows, features, embeddings
        self._fold = np.random.default_rng(SEED).permutation(len(rows)) % FOLDS
        size = 1 + features  # the first column is the start, 1 for every item
        self._products = np.zeros((FOLDS, size, size))
        self._targets = np.zeros((FOLDS, size, embeddings.shape[1]))
        for fold in range(FOLDS):
            for part, dense in self._blocks(np.flatnonzero(self._fold == fold)):
                self._products[fold] += dense.T @ dense
                self._targets[fold] += dense.T @ embeddings[part]

    def _blocks(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Items, and their (n, 1 + F) features."""
        for begin in range(0, len(chosen), BLOCK):
            part = chosen[begin : begin + BLOCK]
            dense = np.zeros((len(part), 1 + self._features))
            dense[:, 0] = 1.0
            for place, item in enumerate(part.tolist()):
                columns, values = self._rows[item]
                dense[place, 1 + columns] = values
            yield part, dense

    def fit(self, penalty: float, *, without: int | None = None) -> np.ndarray:
        """(1 + F, D) weights from all folds but one. The start is not penalised."""
        folds = [fold for fold in range(FOLDS) if fold != without]
        products, targets = self._products[folds].sum(0), self._targets[folds].sum(0)
        ridge = np.full(len(products), penalty)
        ridge[0] = 1e-6
        weights: np.ndarray = np.linalg.solve(products + np.diag(ridge), targets)
        return weights

    def predicted_when_held_out(self, penalty: float) -> np.ndarray:
        """(n, D) what each item is predicted to be by the items of the other folds."""
        predicted = np.empty_like(self._embeddings)
        for fold in range(FOLDS):
            weights = self.fit(penalty, without=fold)
            for part, dense in self._blocks(np.flatnonzero(self._fold == fold)):
                predicted[part] = dense @ weights
        return predicted


class _HeldOutItems:
    """Measures predictions: each item alone takes its predicted embedding, beside the trained ones of all others."""

    def __init__(self, table: np.ndarray, items: np.ndarray, audience: Audience) -> None:
        self._table, self._items, self._users = table, items, audience.users
        scores = audience.users @ table.T  # (N, V)
        place = np.full(len(table), -1, np.int64)
        place[items] = np.arange(len(items))
        self._place = place
        self._seen = audience.seen
        for row, seen in enumerate(self._seen):
            scores[row, seen] = -np.inf
        k = min(K, scores.shape[1])
        self._bound = np.partition(scores, -k, axis=1)[:, -k]  # (N) of the k-th best
        self._shown = float((scores[:, items] >= self._bound[:, None]).sum())  # how often these items are shown
        self._rows = np.flatnonzero(place[audience.targets] >= 0)
        self._targets = audience.targets[self._rows]
        self._own = scores[self._rows, self._targets]
        self._sorted = np.sort(scores[self._rows], axis=1)
        self._trained = self._ranks(self._own)

    def measured(self, predicted: np.ndarray) -> dict[str, Any]:
        """Of (n, D) predictions: the scale that they need, and how good they are with it."""
        scale = self._scale(predicted)
        vectors = scale * predicted[self._place[self._targets]]
        ranks = self._ranks((self._users[self._rows] * vectors).sum(1))
        trained = self._table[self._items]
        error = ((predicted - trained) ** 2).sum() / max(((trained - trained.mean(0)) ** 2).sum(), 1e-12)
        return {
            "scale": scale,
            "cosine": float(_cosines(predicted, trained).mean()),
            "r2": float(1 - error),
            "neighbour_rank": self._neighbour_rank(predicted),
            "users": len(ranks),
            "hr@10": float((ranks <= K).mean()) if len(ranks) else 0.0,
            "trained_hr@10": float((self._trained <= K).mean()) if len(ranks) else 0.0,
            "gain": float((1 / np.log2(1 + ranks)).mean()) if len(ranks) else 0.0,
        }

    def _ranks(self, scores: np.ndarray) -> np.ndarray:
        """Ranks of the targets with (n) scores instead of their own; ties count against them."""
        ahead = [len(row) - np.searchsorted(row, score) for row, score in zip(self._sorted, scores, strict=True)]
        return np.array(ahead, np.int64) + 1 - (self._own >= scores)

    def _scale(self, predicted: np.ndarray) -> float:
        """With which predicted items are shown as often as trained ones: more, the larger it is."""
        scores = self._users @ predicted.T.astype(np.float32)  # (N, n)
        for row, seen in enumerate(self._seen):
            places = self._place[seen]
            scores[row, places[places >= 0]] = -np.inf
        low, high = SCALES
        for _ in range(20):
            middle = (low + high) / 2
            enough = (middle * scores >= self._bound[:, None]).sum() >= self._shown
            low, high = (low, middle) if enough else (middle, high)
        return high

    def _neighbour_rank(self, predicted: np.ndarray) -> float:
        """Median place of an item among all trained ones, by the cosine with what it was predicted to be."""
        most = max(1, min(BLOCK, MAX_SCORES // len(self._table)))
        some = np.random.default_rng(SEED).permutation(len(predicted))[:most]
        unit = self._table / np.maximum(np.linalg.norm(self._table, axis=1, keepdims=True), 1e-12)
        scores = predicted[some] @ unit.T
        own = scores[np.arange(len(some)), self._items[some]]
        return float(np.median((scores >= own[:, None]).sum(1)))


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: np.ndarray = (first * second).sum(1) / np.maximum(lengths, 1e-12)
    return cosines
