"""Rounding to steps: close, the same when repeated, and the same in NumPy and PyTorch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY

from dman_runtime.model.rounding import STEPS, from_steps, rounded, to_steps
from dman_train.rounding import as_kept

RANDOM = np.random.default_rng(5)
VECTORS = np.concatenate(
    [RANDOM.normal(size=(40, 32)) * 10.0 ** RANDOM.integers(-3, 3, (40, 1)), np.zeros((1, 32)), np.full((1, 32), -2.5)]
)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rounded_vectors_are_close_and_stay_as_they_are(dtype: str) -> None:
    vectors = VECTORS.astype(dtype)
    found = rounded(vectors)
    assert found.dtype == vectors.dtype
    step = np.abs(vectors).max(-1, keepdims=True).astype(np.float64) / STEPS
    assert (np.abs(found.astype(np.float64) - vectors) <= 0.5 * step + 1e-3 * np.abs(vectors)).all()
    np.testing.assert_array_equal(rounded(found), found)
    np.testing.assert_array_equal(from_steps(*to_steps(found)).astype(dtype), found)  # a record gives back what it got


def test_steps_are_those_of_the_largest_value() -> None:
    steps, largest = to_steps(np.array([[0.0, 1.0, -2.0, 0.004], [0.0, 0.0, 0.0, 0.0]], np.float32))
    assert steps.tolist() == [[0, 64, -127, 0], [0, 0, 0, 0]] and largest.tolist() == [2, 0]  # 63.5 to the even one


def test_training_rounds_as_a_server_does() -> None:
    config = replace(TINY, layers=3, closed_states="int8")
    hidden = torch.from_numpy(VECTORS.astype(np.float32)).reshape(2, 3, 7, 32)
    found = as_kept(hidden, config)
    assert torch.equal(found[:, 0], hidden[:, 0])  # made anew from the items
    torch.testing.assert_close(found[:, 1:], torch.from_numpy(rounded(hidden[:, 1:].numpy())), rtol=1e-6, atol=1e-9)
    assert as_kept(hidden, replace(config, closed_states="full")) is hidden
    assert as_kept(hidden[:, :1], replace(config, layers=1)).shape == (2, 1, 7, 32)
