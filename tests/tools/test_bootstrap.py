"""The paired bootstrap, against hand computations and the normal approximation."""

from __future__ import annotations

import numpy as np
import pytest

from tools.bootstrap import paired_bootstrap


def test_paired_bootstrap_of_a_system_with_itself_is_zero() -> None:
    ranks = np.random.default_rng(0).integers(1, 30, 500)
    found = paired_bootstrap([ranks], [ranks], metric="hr@10")
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_paired_bootstrap_interval_is_that_of_the_normal_approximation() -> None:
    random = np.random.default_rng(0)
    ours, theirs = random.integers(1, 21, (2, 3000))
    gain = (ours <= 10).astype(float) - (theirs <= 10)
    found = paired_bootstrap([ours], [theirs], metric="hr@10")
    assert found.mean == pytest.approx(gain.mean())
    half = 1.96 * gain.std() / np.sqrt(len(gain))
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)


def test_paired_bootstrap_means_over_seeds_and_knows_ndcg() -> None:
    ours, theirs = [np.array([1, 3]), np.array([1, 11])], [np.array([3, 3])]
    found = paired_bootstrap(ours, theirs, metric="ndcg@10", samples=100)
    assert found.mean == pytest.approx(((1 - 0.5) + (0.25 - 0.5)) / 2)
