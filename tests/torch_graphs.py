"""A generation in memory that runs PyTorch in place of ONNX Runtime: any model, without the seconds of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dman_runtime.model.bundle import FORMAT_VERSION, Bundle, Items, Manifest, StateShape
from dman_runtime.model.generation import Generation
from dman_runtime.model.sketch import HALF_LIVES
from dman_runtime.model.times import BUCKETS
from dman_train.export import return_tables
from dman_train.graphs import AbstractionGraph, EncoderGraph, RequestGraph, state_shape
from dman_train.model import DMAN


class TorchGraphs:
    """What `Encoder` computes, by the modules that are exported."""

    provider, on_cuda = "torch", False

    def __init__(self, model: DMAN) -> None:
        self._model = model

    def encode(self, *arrays: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return self._run(EncoderGraph(self._model), arrays)

    def abstract(self, *arrays: np.ndarray) -> np.ndarray:
        return self._run(AbstractionGraph(self._model), arrays)

    def read_at_request(self, *arrays: np.ndarray) -> np.ndarray:
        return self._run(RequestGraph(self._model), arrays)

    @torch.no_grad()
    def _run(self, graph: nn.Module, arrays: tuple[np.ndarray | None, ...]) -> Any:
        found = graph(*(torch.from_numpy(array) for array in arrays if array is not None))
        return found.numpy() if isinstance(found, torch.Tensor) else tuple(tensor.numpy() for tensor in found)


class ZeroGraphs:
    """Graphs of any size whose outputs are zero: for what does not depend on them."""

    provider, on_cuda = "none", False

    def encode(
        self,
        item_embeddings: np.ndarray,
        new_lengths: np.ndarray,
        context: np.ndarray,
        context_lengths: np.ndarray,
        memory: np.ndarray,
        ages: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, new, width = item_embeddings.shape
        return np.zeros((rows, width), np.float32), np.zeros((rows, context.shape[1], new, width), np.float32)

    def abstract(self, memory: np.ndarray, segment_hidden: np.ndarray) -> np.ndarray:
        return np.zeros_like(memory)

    def read_at_request(self, sources: np.ndarray, *_: np.ndarray) -> np.ndarray:
        return np.zeros((len(sources), sources.shape[2]), np.float32)


def bundle_of(shape: StateShape, vocabulary: int, **arrays: Any) -> Bundle:
    """A bundle in memory for the items "1", "2", ...; arrays that are not given are zeros."""
    manifest = Manifest(FORMAT_VERSION, "00" * 8, {}, shape, vocabulary, True, {}, {})
    ids = [str(n) for n in range(1, vocabulary + 1)]
    index = {item_id: n for n, item_id in enumerate(ids)}
    items = Items(
        ids, np.full(vocabulary, 1 / vocabulary), np.arange(vocabulary), [""] * vocabulary, [{}] * vocabulary, index
    )
    lives = len(HALF_LIVES)
    returns = {"by_user": (lives, shape.width), "bias": (lives,), "by_item": (vocabulary, lives), "by_age": (BUCKETS,)}
    if shape.sees_times:
        returns["by_gap"] = (BUCKETS,)
    given: dict[str, Any] = {
        "item_embeddings": np.zeros((vocabulary, shape.width), np.float32),
        "initial_memory": np.zeros((shape.layers, shape.memory_slots, shape.width), np.float32),
        "gap_embeddings": np.zeros((BUCKETS, shape.width), np.float32) if shape.sees_times else None,
        "returns": {name: np.zeros(size, np.float32) for name, size in returns.items()} if shape.sketch_items else {},
    }
    return Bundle(Path(), manifest, items, **(given | arrays))


@torch.no_grad()
def generation_of(model: DMAN, state_dtype: str = "float32") -> Generation:
    """A model that serves without a bundle on disk."""
    arrays: dict[str, Any] = {
        "item_embeddings": model.item_table().numpy(),
        "initial_memory": model.initial_memory.numpy(),
    }
    if model.config.sees_times:
        arrays["gap_embeddings"] = (model.gaps * model.input_scale).numpy()
    if model.config.returns == "on":
        arrays["returns"] = return_tables(model)
    shape = state_shape(model.config, state_dtype, longest_gap=model.longest_gap)
    return Generation.of(bundle_of(shape, model.vocabulary, **arrays), TorchGraphs(model))
