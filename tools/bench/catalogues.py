"""Bundles of untrained models that differ in the number of their items only."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dman_runtime.model.bundle import read_manifest
from dman_train import export as exporting
from dman_train.config import ModelConfig
from dman_train.model import DMAN
from dman_train.searching import Indexed, build_index
from tools.bench.signals import export_untrained

ITEMS_A_CLUSTER, WITHIN, SCALE = 200, 0.5, 0.02  # spread within a cluster, by that of the clusters; of `DMAN.items`
USERS = 400  # whose best items an index must find


class Catalogues:
    """Makes bundles. Graphs are traced once, which takes longer than all else: the items are no part of them."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._weights: dict[str, torch.Tensor] = {}
        self._graphs: dict[str, bytes] = {}
        self._tensors: dict[str, Any] = {}

    def make(self, path: Path, items: int, *, indexed: bool = False) -> float | None:
        """The recall@100 of the index, if one is wanted and found. Items lie in clusters, as those of a log do."""
        torch.manual_seed(items)
        model = DMAN(self._config, items)
        if self._weights:
            model.load_state_dict(self._weights, strict=False)
        table = _clustered(items, self._config.width)
        with torch.no_grad():
            model.items.copy_(torch.from_numpy(table))
        index = _index_of(model.item_table().detach().numpy()) if indexed else None
        if self._graphs:
            with patch.object(exporting, "export_graphs", self._copy_graphs):
                export_untrained(model, path, index)
        else:
            export_untrained(model, path, index)
            self._weights = {name: weight for name, weight in model.state_dict().items() if name != "items"}
            self._graphs = {graph.name: graph.read_bytes() for graph in path.glob("*.onnx")}
            self._tensors = read_manifest(path).tensors
        return index.quality["recall"] if index else None

    def _copy_graphs(self, model: DMAN, directory: Path) -> dict[str, Any]:
        """In place of `export_graphs`. The export compares them with the model, as always."""
        for name, content in self._graphs.items():
            (directory / name).write_bytes(content)
        return self._tensors


def _clustered(items: int, width: int) -> np.ndarray:
    """(V, D) float32 vectors as large as those of an untrained model."""
    random = np.random.default_rng(items)
    centres = random.standard_normal((max(1, items // ITEMS_A_CLUSTER), width), np.float32)
    table = random.standard_normal((items, width), np.float32)
    table *= np.float32(WITHIN)
    table += centres[random.integers(0, len(centres), items)]
    table *= np.float32(SCALE)
    return table


def _index_of(table: np.ndarray) -> Indexed | None:
    """An index for users who are near items; None where FAISS is missing, or no index is good enough."""
    random = np.random.default_rng(0)
    near = table[random.integers(0, len(table), USERS)]
    try:
        return build_index(table, near + near.std() * WITHIN * random.standard_normal(near.shape).astype(np.float32))
    except (ImportError, ValueError):
        return None
