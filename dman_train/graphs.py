"""The two ONNX graphs of a bundle: written from a DMAN, and compared with it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from dman_runtime.model import bundle as bundle_format
from dman_runtime.model.bundle import StateShape
from dman_runtime.model.device_items import MIN_ITEMS
from dman_runtime.model.encoder import Encoder
from dman_runtime.model.times import ANY_GAP, BUCKETS, NO_EVENT
from dman_train.config import ModelConfig
from dman_train.model import DMAN
from dman_train.timing import Timing

for chatty in ("torch.onnx", "onnx_ir", "onnxscript"):  # they report each graph rewrite, and that torchvision is absent
    logging.getLogger(chatty).setLevel(logging.ERROR)
OPSET = 20
IR_VERSION = 10  # of the file format, which ONNX Runtime 1.18 and later read


class EncoderGraph(nn.Module):
    """The interface of segment_encoder.onnx."""

    def __init__(self, model: DMAN) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        item_embeddings: Tensor,
        new_lengths: Tensor,
        context: Tensor,
        context_lengths: Tensor,
        memory: Tensor,
        ages: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        timing = None if ages is None else Timing(ages, ages)
        encoding = self.model.encode(item_embeddings, context, context_lengths, memory, new_lengths - 1, timing)
        return encoding.user_embedding[:, 0], encoding.hidden


class RequestGraph(nn.Module):
    """The interface of request_reader.onnx."""

    def __init__(self, model: DMAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, sources: Tensor, memory: Tensor, ages: Tensor, gaps: Tensor) -> Tensor:
        return self.model.read_at_request(sources, memory, ages, gaps)


class AbstractionGraph(nn.Module):
    """The interface of memory_abstraction.onnx."""

    def __init__(self, model: DMAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, memory: Tensor, segment_hidden: Tensor) -> Tensor:
        return self.model.abstract(memory, segment_hidden)


def state_shape(config: ModelConfig, dtype: str, *, longest_gap: int = ANY_GAP) -> StateShape:
    """The sizes of a state of this model; `dtype` is what it is stored as. `longest_gap`: `DMAN.longest_gap`."""
    return StateShape(
        segment_length=config.segment_length,
        memory_slots=config.slots,
        layers=config.layers,
        width=config.width,
        recurrent=config.recurrent,
        dtype=dtype,
        times=config.time if config.sees_times else "none",
        sketch_items=config.sketch_items if config.returns == "on" else 0,
        closed=config.closed_states if config.recurrent and config.layers > 1 else "full",
        longest_gap=longest_gap if config.time == "request" else ANY_GAP,
    )


def _example(model: DMAN, *, batch: int, new: int, context: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of the encoder graph, with every length between the extremes."""
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors: tuple[Tensor, ...] = (
        normal(batch, new, config.width) * model.item_table().std().item(),
        torch.randint(1, new + 1, (batch,), generator=generator),
        normal(batch, config.layers, context, config.width),
        torch.randint(0, context + 1, (batch,), generator=generator),
        normal(batch, config.layers, config.slots, config.width),
    )
    if config.sees_times:
        tensors += (torch.randint(0, BUCKETS, (batch, new, context + new), generator=generator),)
    return tensors


def _request_example(model: DMAN, *, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of the graph that reads at the time of a request: contexts of all lengths."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    context = state_shape(config, "float32").context_limit
    ages = torch.randint(0, BUCKETS, (batch, context), generator=generator)
    padding = torch.randint(0, context, (batch, 1), generator=generator)
    return (
        torch.randn(batch, context, config.width, generator=generator),
        torch.randn(batch, config.slots, config.width, generator=generator),
        torch.where(torch.arange(context) < padding, NO_EVENT, ages),
        torch.randint(0, BUCKETS, (batch,), generator=generator),
    )


def export_graphs(model: DMAN, directory: Path) -> dict[str, Any]:
    """Writes the graphs into `directory`. Returns names, types and shapes of their inputs and outputs, by file."""
    batch, new, context = (torch.export.Dim(name, min=1, max=1 << 20) for name in ("B", "S", "C"))
    encoder_inputs = {
        "item_embeddings": {0: batch, 1: new},
        "new_lengths": {0: batch},
        "context": {0: batch, 2: context},
        "context_lengths": {0: batch},
        "memory": {0: batch},
    }
    if model.config.sees_times:
        encoder_inputs["ages"] = {0: batch, 1: new, 2: torch.export.Dim.DYNAMIC}
    _export_graph(
        EncoderGraph(model),
        _example(model, batch=3, new=5, context=7),
        directory / bundle_format.ENCODER,
        inputs=encoder_inputs,
        outputs=["user_embedding", "hidden"],
    )
    config = model.config
    memory = torch.randn(3, config.layers, config.slots, config.width)
    hidden = torch.randn(3, config.layers, config.segment_length, config.width)
    _export_graph(
        AbstractionGraph(model),
        (memory, hidden),
        directory / bundle_format.ABSTRACTION,
        inputs={"memory": {0: batch}, "segment_hidden": {0: batch}},
        outputs=["new_memory"],
    )
    if config.time == "request":
        _export_graph(
            RequestGraph(model),
            _request_example(model, batch=3),
            directory / bundle_format.REQUEST,
            inputs={name: {0: batch} for name in ("sources", "memory", "ages", "gaps")},
            outputs=["user_embedding"],
        )
    names = [*bundle_format.graphs_of(state_shape(config, "float32"))]
    if model.vocabulary >= MIN_ITEMS:
        (directory / bundle_format.SEARCH).write_bytes(search_graph(config.width))
        names.append(bundle_format.SEARCH)
    return {name: _describe_graph(directory / name) for name in names}


def _export_graph(
    graph: nn.Module, example: tuple[Tensor, ...], file: Path, *, inputs: dict[str, Any], outputs: list[str]
) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # about future changes of the exporter itself
        torch.onnx.export(
            graph.eval(),
            example,
            str(file),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple(inputs.values()),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def search_graph(width: int) -> bytes:
    """item_search.onnx: inner products of (B, D) users and a (V, D) table, and the (B, K) items that score highest.

    The table is an input, so that a runtime may keep it on a device, and the file is the same for all catalogues.
    """
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Gemm", ["users", "table"], ["scores"], transB=1),
        helper.make_node("TopK", ["scores", "count"], ["best", "items"]),
    ]
    inputs = [
        helper.make_tensor_value_info("users", kinds.FLOAT, ["B", width]),
        helper.make_tensor_value_info("table", kinds.FLOAT, ["V", width]),
        helper.make_tensor_value_info("count", kinds.INT64, [1]),
    ]
    outputs = [helper.make_tensor_value_info("items", kinds.INT64, ["B", "K"])]
    graph = helper.make_graph(nodes, "item_search", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _describe_graph(file: Path) -> dict[str, list[dict[str, Any]]]:
    graph = onnx.load(str(file)).graph

    def describe(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "dtype": onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    return {"inputs": describe(graph.input), "outputs": describe(graph.output)}


@torch.no_grad()
def graph_errors(model: DMAN, directory: Path) -> dict[str, float]:
    """Largest ONNX-to-PyTorch difference of each graph over many shapes, relative to the largest value."""
    shape = state_shape(model.config, "float32")
    graphs = {name: (directory / name).read_bytes() for name in bundle_format.graphs_of(shape)}
    encoder = Encoder(graphs, shape, provider="cpu", where=directory)
    T, errors = model.config.segment_length, dict.fromkeys(graphs, 0.0)
    shapes = [(1, 1, 0), (1, 1, 2 * T - 1), (1, T, 0), (4, T, T), (3, 1, 5), (2, max(1, T - 3), 0), (5, 2, T + 1)]
    for seed, (batch, new, context) in enumerate(shapes):
        example = _example(model, batch=batch, new=new, context=context, seed=seed)
        expected = EncoderGraph(model)(*example)
        found = encoder.encode(*(tensor.numpy() for tensor in example))
        error = max(_relative(a, b) for a, b in zip(found, expected, strict=True))
        errors[bundle_format.ENCODER] = max(errors[bundle_format.ENCODER], error)
        memory, hidden = example[4], torch.randn(batch, model.config.layers, T, model.config.width)
        if model.config.has_memory:
            new_memory = encoder.abstract(memory.numpy(), hidden.numpy())
            error = _relative(new_memory, model.abstract(memory, hidden))
            errors[bundle_format.ABSTRACTION] = max(errors[bundle_format.ABSTRACTION], error)
        if bundle_format.REQUEST in graphs:
            asked = _request_example(model, batch=batch, seed=seed)
            found_users = encoder.read_at_request(*(tensor.numpy() for tensor in asked))
            error = _relative(found_users, RequestGraph(model)(*asked))
            errors[bundle_format.REQUEST] = max(errors[bundle_format.REQUEST], error)
    return errors


def _relative(found: np.ndarray, expected: Tensor) -> float:
    reference = expected.numpy()
    error = float(np.abs(found - reference).max() / max(np.abs(reference).max(), 1e-12))
    return error if np.isfinite(error) else np.inf  # max() would lose a NaN
