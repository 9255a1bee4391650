"""Counts by 64-bit hash: how many distinct ids a log has, and how often each, in 16 bytes an id."""

from __future__ import annotations

import numpy as np

_GROWTH = 2  # what is new is merged when it is this many times what was merged before


class HashCounts:
    """Two ids are taken for one if their hashes are equal: among ten million, with a chance of one in 300,000."""

    def __init__(self) -> None:
        self._hashes, self._counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._new_size = 0

    def add(self, hashes: np.ndarray) -> None:
        """Hashes (N,) uint64, one for each row."""
        self._new.append(np.unique(hashes, return_counts=True))
        self._new_size += len(self._new[-1][0])
        if self._new_size > max(1 << 20, _GROWTH * len(self._hashes)):
            self._merge()

    def _merge(self) -> None:
        parts = [(self._hashes, self._counts), *self._new]
        self._hashes, places = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
        counts = np.concatenate([part[1] for part in parts])
        self._counts = np.bincount(places, weights=counts, minlength=len(self._hashes)).astype(np.int64)
        self._new, self._new_size = [], 0

    def counts(self) -> np.ndarray:
        """How often each distinct id was added, (distinct,) int64."""
        self._merge()
        return self._counts
