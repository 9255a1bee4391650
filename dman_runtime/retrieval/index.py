"""An index of an item table: lists of similar items, of which a search reads the most promising ones.

IVF with the vectors of the lists in 8 bits (Jégou et al., TPAMI 2011, as FAISS has it). The only module that imports
FAISS, which is the optional dependency `ann`.

Symbols: V items, D width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np

LISTS_PER_ROOT = 4  # lists by the square root of the items: more lists cost more than their smaller size saves
MAX_LISTS = 16_384
POINTS_PER_LIST = 39  # items that the centroids are found from
ROUNDS = 10  # of k-means
SEED = 20210218
FETCHED = 2  # items asked for by the number of those wanted


def faiss() -> ModuleType | None:
    """The library, or None where it is not installed."""
    try:
        import faiss as library
    except ImportError:
        return None
    return library


def max_index_bytes(items: int, width: int) -> int:
    """Of a file: vectors in 8 bits and item numbers, the centroids, and what describes each list."""
    return items * (width + 8) + MAX_LISTS * (4 * width + 64) + (1 << 20)


class ItemIndex:
    """A `Finder` that reads a part of the table. Thread-safe; one search uses one thread."""

    def __init__(self, index: Any) -> None:
        """An IVF index of FAISS; `build` and `open` make one."""
        self._index = index

    @classmethod
    def build(cls, table: np.ndarray, *, threads: int = 0) -> Self:
        """The index of a (V, D) float32 item table; the same for the same table and number of threads.

        Args:
            threads: 0: all cores.

        Raises ImportError without FAISS.
        """
        import faiss

        count, width = table.shape
        lists = max(1, min(MAX_LISTS, 1 << round(math.log2(LISTS_PER_ROOT * math.sqrt(count)))))
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads or os.cpu_count() or 1)
        try:
            index: Any = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
            index.cp.niter, index.cp.seed, index.cp.min_points_per_centroid = ROUNDS, SEED, 1
            sample = np.random.default_rng(SEED).permutation(count)[: POINTS_PER_LIST * lists]
            index.train(np.ascontiguousarray(table[np.sort(sample)]))
            index.add(np.ascontiguousarray(table))
        finally:
            faiss.omp_set_num_threads(before)
        return cls(index)

    @classmethod
    def open(cls, file: str | Path, *, items: int, width: int) -> Self:
        """The index in a file, which is mapped: processes share its memory, and it must never change.

        Raises ValueError where it is none of so many items of this width, ImportError without FAISS.
        """
        import faiss

        try:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError:
            raise ValueError("is no index that FAISS reads") from None
        if not isinstance(index, faiss.IndexIVFScalarQuantizer) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError("is an index of another kind")
        if (index.ntotal, index.d) != (items, width):
            raise ValueError(f"is an index of {index.ntotal} x {index.d} values, expected {items} x {width}")
        lists: Any = faiss.downcast_InvertedLists(index.invlists)  # type: ignore[arg-type]
        if hasattr(lists, "prefetch_nthread"):
            lists.prefetch_nthread = 0  # it would start threads for each search
        return cls(index)

    def write(self, file: Path) -> None:
        """Raises OSError."""
        import faiss

        try:
            faiss.write_index(self._index, str(file))
        except RuntimeError as error:
            raise OSError(f"{file} cannot be written") from error

    @property
    def items(self) -> int:
        """V."""
        return int(self._index.ntotal)

    @property
    def lists(self) -> int:
        return int(self._index.nlist)

    @property
    def probes(self) -> int:
        """How many lists a search reads; stored with the index."""
        return int(self._index.nprobe)

    @probes.setter
    def probes(self, count: int) -> None:
        self._index.nprobe = count

    @property
    def quick(self) -> bool:
        """As in `Finder`."""
        return True

    def fetched(self, k: int) -> int:
        """As in `Finder`: more than k, as the index ranks items by vectors in 8 bits."""
        return FETCHED * k

    def find(self, users: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """As in `Finder`."""
        found = []
        for user, count in zip(users, counts, strict=True):
            _, rows = self._index.search(user[None], min(count, self.items))
            found.append(rows[0][rows[0] >= 0])  # -1 where the lists held fewer
        return found
