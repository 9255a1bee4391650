"""Bundles of untrained models that differ in the number of their items only."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dman_runtime.model.bundle import read_manifest
from dman_train import export as exporting
from dman_train.config import ModelConfig
from dman_train.model import DMAN
from tools.bench.signals import export_untrained


class Catalogues:
    """Makes bundles. Graphs are traced once, which takes longer than all else: the items are no part of them."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._weights: dict[str, torch.Tensor] = {}
        self._graphs: dict[str, bytes] = {}
        self._tensors: dict[str, Any] = {}

    def make(self, path: Path, items: int) -> Path:
        torch.manual_seed(items)
        model = DMAN(self._config, items)
        if not self._graphs:
            export_untrained(model, path)
            self._weights = {name: weight for name, weight in model.state_dict().items() if name != "items"}
            self._graphs = {graph.name: graph.read_bytes() for graph in path.glob("*.onnx")}
            self._tensors = read_manifest(path).tensors
            return path
        model.load_state_dict(self._weights, strict=False)
        with patch.object(exporting, "export_graphs", self._copy_graphs):
            export_untrained(model, path)
        return path

    def _copy_graphs(self, model: DMAN, directory: Path) -> dict[str, Any]:
        """In place of `export_graphs`. The export compares them with the model, as always."""
        for name, content in self._graphs.items():
            (directory / name).write_bytes(content)
        return self._tensors
