"""Ids by 64-bit hash: how many distinct ones a log has, and how often each, in 16 bytes an id."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dman_runtime.data.columns import text_buffers

if TYPE_CHECKING:
    import pyarrow as pa

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits everywhere
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))  # of splitmix64
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

    def distinct(self) -> np.ndarray:
        """The distinct hashes, (distinct,) uint64."""
        self._merge()
        return self._hashes

    def counts(self) -> np.ndarray:
        """How often each distinct id was added, (distinct,) int64."""
        self._merge()
        return self._counts


def id_hashes(ids: pa.StringArray) -> np.ndarray:
    """Hashes (N,) uint64 of ids, the same in every process: a log has the same parts whenever it is read.

    A polynomial of the bytes, whose bits are then mixed.
    """
    data, offsets = text_buffers(ids)
    lengths = np.diff(offsets)
    places = np.arange(len(data)) - np.repeat(offsets[:-1], lengths)  # of each byte in its id
    powers = np.cumprod(np.full(int(lengths.max(initial=0)), _FACTOR))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[places], out=sums[1:])
    hashes: np.ndarray = sums[offsets[1:]] - sums[offsets[:-1]]
    for shift, factor in _MIX:
        hashes ^= hashes >> np.uint64(shift)
        hashes *= factor
    return hashes ^ (hashes >> np.uint64(31))
