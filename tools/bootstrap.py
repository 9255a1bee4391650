"""Whether one system is better than another, user by user: the paired bootstrap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """The mean over users of one system's metric minus another's, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def paired_bootstrap(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, metric: str, samples: int = 2000, seed: int = 0
) -> Difference:
    """How much better `ours` is by `metric` ("hr@10", "ndcg@10"), users drawn with replacement.

    `ours` and `theirs` hold one array (N) of test ranks per seed; a user's gain is the mean over the seeds.
    """
    gain = _gain(ours, metric) - _gain(theirs, metric)
    random = np.random.default_rng(seed)
    means = np.concatenate([
        gain[random.integers(0, len(gain), (100, len(gain)))].mean(1) for _ in range(max(1, samples // 100))
    ])  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(gain.mean()), float(low), float(high))


def _gain(ranks: Iterable[np.ndarray], metric: str) -> np.ndarray:
    """(N) what each user adds to the metric, mean over the seeds."""
    kind, _, cutoff = metric.partition("@")
    each = []
    for rank in ranks:
        hit = rank <= int(cutoff)
        each.append(hit / np.log2(1.0 + rank) if kind == "ndcg" else hit.astype(float))
    return np.mean(each, axis=0)
