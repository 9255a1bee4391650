"""The graphs of a bundle: one interface to them, whatever device they run on.

B rows, S new positions, C context positions; T events per segment, m memory slots, L layers, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dman_runtime.errors import EncoderError
from dman_runtime.model.bundle import ABSTRACTION, ENCODER, REQUEST, SEARCH, Bundle, StateShape
from dman_runtime.model.device_items import MIN_ITEMS, DeviceItems
from dman_runtime.model.sessions import CUDA, FLOAT, INTEGER, VERSION, Graph, Provider, Tensors, chosen

logger = logging.getLogger(__name__)


class Encoder:
    """Runs the segment encoder and the memory abstraction. Thread-safe on CPU; use one thread on CUDA."""

    def __init__(
        self,
        graphs: Mapping[str, bytes],
        shape: StateShape,
        *,
        provider: Provider = "auto",
        threads: int = 1,
        where: Path = Path(),
    ) -> None:
        """Loads the two graphs, given as ONNX files by name.

        Args:
            provider: "auto" takes CUDA when a device is there and ONNX Runtime really initialises on it.
            threads: CPU threads inside one run.
            where: The bundle that they are from, for messages.

        Raises:
            EncoderError: provider "cuda" does not work here, or a graph cannot be loaded or is of another model.
        """
        self.provider = chosen(provider, graphs[ABSTRACTION])
        loaded = {
            name: Graph(
                graphs[name], where / name, inputs=inputs, outputs=outputs, provider=self.provider, threads=threads
            )
            for name, (inputs, outputs) in _expected_tensors(shape).items()
        }
        self._encoder, self._abstraction, self._reader = loaded[ENCODER], loaded[ABSTRACTION], loaded.get(REQUEST)
        logger.info("ONNX Runtime %s runs on %s", VERSION, self.provider)

    @classmethod
    def of(cls, bundle: Bundle, *, provider: Provider = "auto", threads: int = 1) -> Encoder:
        """The graphs of an opened bundle. Arguments and errors as above."""
        return cls(bundle.graphs, bundle.manifest.state, provider=provider, threads=threads, where=bundle.path)

    @property
    def on_cuda(self) -> bool:
        return self.provider == CUDA

    def device_items(self, bundle: Bundle) -> DeviceItems | None:
        """The item table of a bundle on the device; None where search on the CPU is quicker, or there is no room."""
        if not self.on_cuda or SEARCH not in bundle.graphs or len(bundle.item_embeddings) < MIN_ITEMS:
            return None
        file = bundle.path / SEARCH
        try:
            return DeviceItems(bundle.graphs[SEARCH], bundle.item_embeddings, file, provider=self.provider)
        except EncoderError as error:
            logger.warning("items are searched on the CPU: %s", error)
            return None

    def encode(
        self,
        item_embeddings: np.ndarray,
        new_lengths: np.ndarray,
        context: np.ndarray,
        context_lengths: np.ndarray,
        memory: np.ndarray,
        ages: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes new positions (eq. 1-3).

        Args:
            item_embeddings: (B, S, D) float32, left-aligned; new_lengths: (B) int64, 1..S.
            context: (B, L, C, D) float32, right-aligned; context_lengths: (B) int64, 0..C.
            memory: (B, L, m, D) float32.
            ages: (B, S, C + S) int64 buckets of the time from each event to each new position; for a model that sees
                times.

        Returns:
            User embeddings (B, D) at the last new position, and the layer inputs (B, L, S, D) to keep as context.
        """
        feed = {
            "item_embeddings": item_embeddings,
            "new_lengths": new_lengths,
            "context": context,
            "context_lengths": context_lengths,
            "memory": memory,
        }
        if ages is not None:
            feed["ages"] = ages
        user_embedding, hidden = self._encoder.run(feed)
        return user_embedding, hidden

    def abstract(self, memory: np.ndarray, segment_hidden: np.ndarray) -> np.ndarray:
        """Absorbs a closed segment (eq. 4): (B, L, m, D), (B, L, T, D) -> (B, L, m, D), all float32."""
        return self._abstraction.run({"memory": memory, "segment_hidden": segment_hidden})[0]

    def read_at_request(
        self, sources: np.ndarray, memory: np.ndarray, ages: np.ndarray, gaps: np.ndarray
    ) -> np.ndarray:
        """User embeddings (B, D) for requests at known times.

        Args:
            sources: (B, C, D) float32 inputs of the last layer, right-aligned, C the most context.
            memory: (B, m, D) float32, of the last layer.
            ages: (B, C) int64 buckets of the time from each event to the request, NO_EVENT before the first.
            gaps: (B) int64 buckets of the time from the last event to the request.
        """
        assert self._reader is not None
        feed = {"sources": sources, "memory": memory, "ages": ages, "gaps": gaps}
        return self._reader.run(feed)[0]


def _expected_tensors(shape: StateShape) -> dict[str, tuple[Tensors, Tensors]]:
    """Inputs and outputs of each graph, as the format has them."""
    L, D = shape.layers, shape.width
    memory = (FLOAT, ("B", L, shape.memory_slots, D))
    encoder_inputs: Tensors = {
        "item_embeddings": (FLOAT, ("B", "S", D)),
        "new_lengths": (INTEGER, ("B",)),
        "context": (FLOAT, ("B", L, "C", D)),
        "context_lengths": (INTEGER, ("B",)),
        "memory": memory,
    }
    if shape.sees_times:
        encoder_inputs["ages"] = (INTEGER, ("B", "S", "K"))
    encoder_outputs: Tensors = {"user_embedding": (FLOAT, ("B", D)), "hidden": (FLOAT, ("B", L, "S", D))}
    abstraction_inputs: Tensors = {"memory": memory, "segment_hidden": (FLOAT, ("B", L, shape.segment_length, D))}
    expected: dict[str, tuple[Tensors, Tensors]] = {
        ENCODER: (encoder_inputs, encoder_outputs),
        ABSTRACTION: (abstraction_inputs, {"new_memory": memory}),
    }
    if shape.times == "request":
        reader_inputs: Tensors = {
            "sources": (FLOAT, ("B", shape.context_limit, D)),
            "memory": (FLOAT, ("B", shape.memory_slots, D)),
            "ages": (INTEGER, ("B", shape.context_limit)),
            "gaps": (INTEGER, ("B",)),
        }
        expected[REQUEST] = (reader_inputs, {"user_embedding": (FLOAT, ("B", D))})
    return expected
