"""The map from titles and attributes to embeddings: what it computes, and what it refuses to read."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

from dman_runtime.model.predictor import (
    MAX_FEATURES,
    TITLE_YEAR,
    Feature,
    Predictor,
    parse_predictor,
)

FEATURES = [
    Feature("value", "genre", "drama"),
    Feature("value", "genre", "comedy"),
    Feature("word", "title", "star"),
    Feature("near", TITLE_YEAR, 1990.0),
    Feature("near", TITLE_YEAR, 2000.0),
]
WEIGHTS = np.array([[1, 1], [10, 0], [0, 10], [100, 0], [0, 100], [1000, 0]], np.float32)


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(FEATURES, WEIGHTS)


def stored(features: Any = None, weights: np.ndarray = WEIGHTS, text: bytes | None = None, **more: np.ndarray) -> bytes:
    listed = [one.as_list() for one in FEATURES] if features is None else features
    content = json.dumps(listed).encode() if text is None else text
    buffer = io.BytesIO()
    np.savez(buffer, features=np.frombuffer(content, np.uint8), weights=weights, **more)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("title", "attributes", "expected"),
    [
        ("", {"genre": "Drama"}, [11, 1]),
        ("", {"genre": "comedy | DRAMA|unknown"}, [11, 11]),
        ("", {"genre": "drama|drama"}, [11, 1]),  # a feature is there or not
        ("Star Star", {}, [101, 1]),
        ("Starlight", {"genre": "drama"}, [11, 1]),  # whole words
        ("Any (1990)", {}, [1, 101]),
        ("Any (1995)", {}, [501, 51]),
        ("Any (1920)", {}, [1, 101]),  # beyond the first knot: that knot
        ("Any (2020)", {}, [1001, 1]),
        ("Star (1998)", {"genre": "drama"}, [1 + 10 + 100 + 800, 1 + 20]),
    ],
)
def test_prediction_is_the_start_and_the_weights_of_the_features(
    predictor: Predictor, title: str, attributes: dict[str, str], expected: list[float]
) -> None:
    found = predictor.predict(title, attributes)
    assert found is not None and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("title", "attributes"), [("", {}), ("Other", {"genre": "western", "colour": "drama"})])
def test_item_without_a_known_feature_is_not_predicted(
    predictor: Predictor, title: str, attributes: dict[str, str]
) -> None:
    assert predictor.predict(title, attributes) is None


def test_numbers_of_attributes_are_read_and_others_are_left_alone() -> None:
    features = [Feature("near", "price", 1.0), Feature("near", "price", 3.0), Feature("value", "colour", "red")]
    predictor = Predictor(features, np.array([[0], [1], [2], [5]], np.float32))
    assert predictor.predict("", {"price": "2"}) == pytest.approx([1.5])
    assert predictor.predict("", {"price": "1e999", "colour": "red"}) == pytest.approx([5])
    assert predictor.predict("", {"price": "cheap"}) is None


def test_prediction_that_is_too_large_is_none() -> None:
    weights = np.array([[3e38], [3e38]], np.float32)
    assert Predictor([Feature("value", "a", "b")], weights).predict("", {"a": "b"}) is None


def test_stored_map_predicts_the_same(predictor: Predictor) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **predictor.arrays())
    again = parse_predictor(buffer.getvalue(), 2)
    assert list(again.features) == FEATURES
    title, attributes = "Star (1993)", {"genre": "Comedy"}
    np.testing.assert_array_equal(again.predict(title, attributes), predictor.predict(title, attributes))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        stored(text=b"["),
        stored(text=b"\xff"),
        stored(features={}),
        stored(features=[], weights=WEIGHTS[:1]),
        stored(features=[["value", "genre"]], weights=WEIGHTS[:2]),
        stored(features=[["other", "genre", "x"]], weights=WEIGHTS[:2]),
        stored(features=[["value", 1, "x"]], weights=WEIGHTS[:2]),
        stored(features=[["value", "genre", 1]], weights=WEIGHTS[:2]),
        stored(features=[["near", "year", "1990"]], weights=WEIGHTS[:2]),
        stored(features=[["near", "year", True]], weights=WEIGHTS[:2]),
        stored(features=[["near", "year", 10**400]], weights=WEIGHTS[:2]),
        stored(features=[["value", "g", "x"], ["value", "g", "x"]], weights=WEIGHTS[:3]),
        stored(features=[["word", "title", str(n)] for n in range(MAX_FEATURES + 1)]),
        stored(weights=WEIGHTS[:-1]),
        stored(weights=WEIGHTS[:, :1]),
        stored(weights=WEIGHTS.astype(np.float64)),
        stored(weights=np.where(WEIGHTS == 10, np.nan, WEIGHTS)),
        stored(more=WEIGHTS),
    ],
)
def test_other_content_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_predictor(content, 2)
