"""The item table on the device that the graphs run on, and the best items of users, found there.

B users, V items, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dman_runtime.model.sessions import FLOAT, INTEGER, Graph, Tensors

MIN_ITEMS = 20_000  # a search of fewer takes less time on the CPU than the way to a device
SCORES_PER_RUN = 64 << 20  # 256 MB on the device
SPARE = 8  # items beyond those wanted: sums in another order may give near ties other places


class DeviceItems:
    """A `Finder` that misses nothing: inner products with all items, and the best of them. One thread on CUDA."""

    quick = False

    def __init__(self, graph: bytes, table: np.ndarray, file: Path, *, provider: str, threads: int = 1) -> None:
        """Copies a (V, D) float32 table to the device, where it stays.

        Args:
            graph: The content of item_search.onnx; `file` is where it is from, for messages.
            provider, threads: As in `sessions.Graph`.

        Raises EncoderError.
        """
        count, width = table.shape
        inputs: Tensors = {"users": (FLOAT, ("B", width)), "table": (FLOAT, ("V", width)), "count": (INTEGER, (1,))}
        outputs: Tensors = {"items": (INTEGER, ("B", "K"))}
        self._graph = Graph(graph, file, inputs=inputs, outputs=outputs, provider=provider, threads=threads)
        self._table, self.items = self._graph.resident(table), count

    def fetched(self, k: int) -> int:
        """As in `Finder`."""
        return k + SPARE

    def find(self, users: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """As in `Finder`, in as many runs as the memory for the scores asks for."""
        count = np.array([min(max(counts), self.items)])
        step, found = max(1, SCORES_PER_RUN // self.items), list[np.ndarray]()
        for start in range(0, len(users), step):
            block = np.ascontiguousarray(users[start : start + step])
            (items,) = self._graph.run_beside({"table": self._table}, {"users": block, "count": count})
            found += list(items)
        return found
