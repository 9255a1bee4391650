"""Predicts the embedding of an item from its title and its attributes: a linear map, which export fits on the trained
embeddings (`dman_train.predictor`). numpy only. Format: docs/formats.md.

A feature of an item is one value of an attribute, one word of its title, or the closeness of a number to a knot. Values
of a list are split at "|". Case does not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from dman_runtime.data.arrays import parse_npz
from dman_runtime.data.interactions import LIST_SEPARATOR
from dman_runtime.data.untrusted import is_text, parse_json

Kind = Literal["value", "word", "near"]
KINDS = ("value", "word", "near")
TITLE, TITLE_YEAR = "title", "year in the title"  # fields that every item with a title has; the second: "... (1995)"
MAX_FEATURES = 2048
MAX_KNOT = 1e300  # of a number, either way
MAX_FEATURE_BYTES = 1 << 20  # of the list of them
_YEAR, _WORD = re.compile(r"\s*\((\d{4})\)\s*$"), re.compile(r"\w+")
_ARCHIVE_BYTES = 4096  # names and headers of an .npz file; beyond its arrays


class Feature(NamedTuple):
    """What a column of the map stands for."""

    kind: Kind
    field: str  # name of the attribute; TITLE for words
    value: str | float  # the value, the word, or the knot

    def as_list(self) -> list[str | float]:
        return [self.kind, self.field, self.value]


def texts_of(title: str, attributes: Mapping[str, str]) -> Iterable[tuple[Kind, str, str]]:
    """Values and words of an item, as features name them; some may come twice."""
    for word in _WORD.findall(_YEAR.sub("", title).casefold()):
        yield "word", TITLE, word
    for name, text in attributes.items():
        for value in text.split(LIST_SEPARATOR):
            if value := value.strip().casefold():
                yield "value", name, value


def numbers_of(title: str, attributes: Mapping[str, str]) -> dict[str, float]:
    """The attributes that are numbers, by field, and the year that the title ends with."""
    found = {name: number for name, text in attributes.items() if (number := as_number(text)) is not None}
    if year := _YEAR.search(title):
        found[TITLE_YEAR] = float(year.group(1))
    return found


def as_number(text: str) -> float | None:
    """The number that a text is, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= MAX_KNOT else None


@dataclass(frozen=True, eq=False)
class Predictor:
    """The map. An item without any of its features is not predicted."""

    features: Sequence[Feature]  # F
    weights: np.ndarray  # (1 + F, D) float32: the start, and what each feature adds
    _columns: Mapping[tuple[str, str, str], int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = {(one.kind, one.field, str(one.value)): place for place, one in enumerate(self.features)}
        object.__setattr__(self, "_columns", columns)

    @cached_property
    def _knots(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By field: knots, ascending, and their columns."""
        by_field: dict[str, list[tuple[float, int]]] = {}
        for place, one in enumerate(self.features):
            if one.kind == "near":
                by_field.setdefault(one.field, []).append((float(one.value), place))
        return {
            name: (np.array([knot for knot, _ in sorted(found)]), np.array([place for _, place in sorted(found)]))
            for name, found in by_field.items()
        }

    def row(self, title: str, attributes: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
        """The features that an item has: their columns (n) int64, distinct, and their values (n) float64."""
        found = {
            column: 1.0
            for kind, name, text in texts_of(title, attributes)
            if (column := self._columns.get((kind, name, text))) is not None
        }
        for name, number in numbers_of(title, attributes).items():
            if name in self._knots:
                knots, columns = self._knots[name]
                found |= _closeness(number, knots, columns)
        columns_found = np.fromiter(found, np.int64, len(found))
        return columns_found, np.fromiter(found.values(), np.float64, len(found))

    def predict(self, title: str, attributes: Mapping[str, str]) -> np.ndarray | None:
        """(D) float32; None where the item has no feature that the map knows, or the sum is too large."""
        columns, values = self.row(title, attributes)
        if not len(columns):
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            vector: np.ndarray = (self.weights[0] + values @ self.weights[1 + columns]).astype(np.float32)
        return vector if np.isfinite(vector).all() else None

    def arrays(self) -> dict[str, np.ndarray]:
        """What `parse_predictor` reads, for `np.savez`."""
        text = json.dumps([one.as_list() for one in self.features], ensure_ascii=False)
        return {"features": np.frombuffer(text.encode(), np.uint8), "weights": self.weights}


def _closeness(number: float, knots: np.ndarray, columns: np.ndarray) -> dict[int, float]:
    """Between two knots, the share of each; beyond the last, that one alone."""
    above = int(np.searchsorted(knots, number))
    if above == 0 or above == len(knots):
        return {int(columns[min(above, len(knots) - 1)]): 1.0}
    low, high = knots[above - 1], knots[above]
    share = float((number - low) / (high - low))
    return {int(columns[above - 1]): 1.0 - share, int(columns[above]): share}


def parse_predictor(content: bytes, width: int) -> Predictor:
    """The map in a file that anybody may have written. Raises ValueError."""
    limit = MAX_FEATURE_BYTES + 4 * width * (1 + MAX_FEATURES) + _ARCHIVE_BYTES
    kinds: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "features": ("uint8", (None,)),
        "weights": ("float32", (None, width)),
    }
    arrays = parse_npz(content, kinds, limit=limit)
    if len(arrays["features"]) > MAX_FEATURE_BYTES:
        raise ValueError(f"its list of features has more than {MAX_FEATURE_BYTES} bytes")
    try:
        listed = parse_json(arrays["features"].tobytes())
    except ValueError:
        raise ValueError("its list of features is not JSON") from None
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_FEATURES:
        raise ValueError(f"does not list 1 to {MAX_FEATURES} features")
    features = [_feature(one) for one in listed]
    if len(set(features)) != len(features):
        raise ValueError("lists a feature twice")
    if len(arrays["weights"]) != 1 + len(features):
        raise ValueError("does not hold one row of weights for each feature, and one more")
    if not np.isfinite(arrays["weights"]).all():
        raise ValueError("holds a weight that is not finite")
    return Predictor(features, arrays["weights"])


def max_predictor_bytes(width: int) -> int:
    """Of the largest file."""
    return MAX_FEATURE_BYTES + 4 * width * (1 + MAX_FEATURES) + 2 * _ARCHIVE_BYTES


def _feature(listed: Any) -> Feature:
    """Raises ValueError."""
    if not isinstance(listed, list) or len(listed) != 3 or listed[0] not in KINDS or not is_text(listed[1]):
        raise ValueError("lists something else than features")
    kind, name, value = listed
    number = type(value) in (int, float) and abs(value) <= MAX_KNOT
    if not (number if kind == "near" else is_text(value)):
        raise ValueError("lists a feature without its value")
    return Feature(kind, name, float(value) if kind == "near" else value)
