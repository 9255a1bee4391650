"""How the hidden states of a closed segment are kept: in steps of the largest value of each vector.

Training rounds them in the same way (`dman_train.rounding`), so what is served is what was trained. A vector that was
rounded stays as it is when it is rounded again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STEPS = 127  # on each side of zero, as int8 holds them


def rounded(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    """(..., D) vectors, each value a whole number of steps, in the precision given."""
    return from_steps(*to_steps(vectors)).astype(vectors.dtype)


def to_steps(vectors: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.floating]]:
    """(..., D) vectors as whole numbers of steps, and the largest absolute value (...) of each."""
    values = vectors.astype(np.float32)  # NumPy computes slowly in float16
    largest = np.abs(values).max(axis=-1, initial=0)
    values *= (STEPS / np.where(largest > 0, largest, np.float32(1)))[..., None]
    return np.rint(values, out=values).astype(np.int8), largest.astype(vectors.dtype)


def from_steps(steps: NDArray[np.int8], largest: NDArray[np.floating]) -> NDArray[np.float32]:
    """The vectors (..., D) with the largest absolute values (...)."""
    vectors = steps.astype(np.float32)
    vectors *= (largest.astype(np.float32) / np.float32(STEPS))[..., None]
    return vectors
