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
    steps, largest = to_steps(vectors)
    return from_steps(steps, largest)


def to_steps(vectors: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.floating]]:
    """(..., D) vectors as whole numbers of steps, and the largest absolute value (...) of each."""
    largest = np.abs(vectors).max(axis=-1, initial=0)
    scale = STEPS / np.where(largest > 0, largest, 1).astype(np.float32)
    return np.rint(vectors.astype(np.float32) * scale[..., None]).astype(np.int8), largest


def from_steps(steps: NDArray[np.int8], largest: NDArray[np.floating]) -> NDArray[np.floating]:
    """The vectors (..., D) in the precision of `largest` (...)."""
    return (steps * (largest.astype(np.float32) / STEPS)[..., None]).astype(largest.dtype)
