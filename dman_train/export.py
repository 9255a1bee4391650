"""Exports a trained run as a bundle: python -m dman_train.export --run DIR --out BUNDLE

Writes both graphs, compares them with PyTorch, refuses a difference above the tolerance, and records a golden replay,
which the runtime repeats before it serves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from dman_runtime.errors import BundleError
from dman_runtime.model import bundle as bundle_format
from dman_runtime.model.bundle import StateShape, items_jsonl, write_bundle
from dman_runtime.model.encoder import Encoder
from dman_runtime.options import Parser, configure_logging, print_json, run_command
from dman_train.config import to_dict
from dman_train.model import DMAN
from dman_train.replay import replay
from dman_train.run import RunError, Vocabulary, open_run

logger = logging.getLogger(__name__)
for chatty in ("torch.onnx", "onnx_ir", "onnxscript"):  # they report each graph rewrite, and that torchvision is absent
    logging.getLogger(chatty).setLevel(logging.ERROR)
DEFAULT_RUN, DEFAULT_OUT = Path("runs/latest"), Path("bundle")
TOLERANCE = 1e-4  # largest torch-to-ONNX difference, relative to the largest value of the tensor
OPSET = 20
GOLDEN_SEED = 20210218
GOLDEN_SEGMENTS = (0.05, 0.5, 1.0, 1.35, 2.0, 3.6, 6.1)  # history lengths in segments; together they cross every border


def parser() -> Parser:
    p = Parser(prog="python -m dman_train.export", description="Export a trained run as a bundle for dman-runtime.")
    p.flag("--run", type=Path, default=DEFAULT_RUN, help="run directory of dman_train.train")
    p.flag("--out", type=Path, default=DEFAULT_OUT, help="bundle directory to write; an older bundle is replaced")
    p.flag(
        "--state-dtype",
        choices=bundle_format.STATE_DTYPES,
        default="float16",
        help="precision of stored hidden states and memories; float32 doubles the size of a state",
    )
    p.flag("--tolerance", type=float, default=TOLERANCE, help="largest accepted relative torch-to-ONNX difference")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    configure_logging()
    result = _export(arguments)
    print(f"bundle {result['bundle_id']} in {arguments.out}, torch-to-ONNX error {result['max_relative_error']:.1e}")
    if arguments.json:
        print_json(result)
    return 0


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    run = open_run(arguments.run)
    if run.metrics is None:
        logger.warning("%s is not finished; exporting its best epoch so far", run.path)
    if not run.family.has_state:
        raise RunError(f"{run.path} is a run of a {run.family.name}", "export a run of a DMAN", parameter="run")
    return export_bundle(
        cast(DMAN, run.best_model()),
        run.vocabulary(),
        arguments.out,
        state_dtype=arguments.state_dtype,
        tolerance=arguments.tolerance,
        data=run.config["data"] | run.config["dataset"],
        metrics=run.metrics or {},
    )


class EncoderGraph(nn.Module):
    """The interface of segment_encoder.onnx."""

    def __init__(self, model: DMAN) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, item_embeddings: Tensor, new_lengths: Tensor, context: Tensor, context_lengths: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        encoding = self.model.encode(item_embeddings, context, context_lengths, memory, new_lengths - 1)
        return encoding.user_embedding[:, 0], encoding.hidden


class AbstractionGraph(nn.Module):
    """The interface of memory_abstraction.onnx."""

    def __init__(self, model: DMAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, memory: Tensor, segment_hidden: Tensor) -> Tensor:
        return self.model.abstract(memory, segment_hidden)


def export_bundle(
    model: DMAN,
    vocabulary: Vocabulary,
    out: Path,
    *,
    state_dtype: str = "float16",
    tolerance: float = TOLERANCE,
    data: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the bundle of `model` to `out`. Returns bundle id and errors.

    Raises BundleError if ONNX Runtime and PyTorch differ by more than `tolerance`, or if a weight is not finite.
    """
    model = model.eval()
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise BundleError(f"weight {name} is not finite", "train again with a lower learning rate")
    config, errors = model.config, {}

    def fill(directory: Path) -> dict[str, Any]:
        tensors = _export_graphs(model, directory)
        errors.update(graph_errors(model, directory))
        worst = max(errors.values())
        if not worst <= tolerance:
            raise BundleError(
                f"ONNX differs from PyTorch by {worst:.1e}, more than {tolerance:.1e}; no bundle written",
                "accept a larger difference or train again",
                parameter="tolerance",
            )
        _write_tables(model, vocabulary, directory)
        np.savez(directory / bundle_format.GOLDEN, allow_pickle=False, **golden_replay(model))
        return {
            "model": to_dict(config),
            "state": StateShape(
                segment_length=config.segment_length,
                memory_slots=config.slots,
                layers=config.layers,
                width=config.width,
                recurrent=config.recurrent,
                dtype=state_dtype,
            ),
            "vocabulary": model.vocabulary,
            "integer_item_ids": vocabulary.integer_item_ids,
            "tensors": tensors,
            "data": data or {},
            "metrics": metrics or {},
            "export": {"max_relative_error": errors, "tolerance": tolerance, "opset": OPSET},
            "versions": {
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                "numpy": np.__version__,
            },
        }

    manifest = write_bundle(out, fill)
    return {"bundle_id": manifest.bundle_id, "out": str(out), "max_relative_error": max(errors.values())}


def _write_tables(model: DMAN, vocabulary: Vocabulary, directory: Path) -> None:
    with torch.no_grad():
        np.save(directory / bundle_format.EMBEDDINGS, model.item_table().numpy())
        np.save(directory / bundle_format.INITIAL_MEMORY, model.initial_memory.detach().numpy())
    entries = []
    for item_id, count in zip(vocabulary.item_ids, vocabulary.counts.tolist(), strict=True):
        entry: dict[str, Any] = {"item_id": item_id, "events": count}
        if (info := vocabulary.items.get(item_id)) is not None:
            entry |= {"title": info.title, "attributes": info.attributes}
        entries.append(entry)
    (directory / bundle_format.ITEMS).write_text(items_jsonl(entries), encoding="utf-8")


def _example(model: DMAN, *, batch: int, new: int, context: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of the encoder graph, with every length between the extremes."""
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return (
        normal(batch, new, config.width) * model.item_table().std().item(),
        torch.randint(1, new + 1, (batch,), generator=generator),
        normal(batch, config.layers, context, config.width),
        torch.randint(0, context + 1, (batch,), generator=generator),
        normal(batch, config.layers, config.slots, config.width),
    )


def _export_graphs(model: DMAN, directory: Path) -> dict[str, Any]:
    batch, new, context = (torch.export.Dim(name, min=1, max=1 << 20) for name in ("B", "S", "C"))
    encoder_inputs = {
        "item_embeddings": {0: batch, 1: new},
        "new_lengths": {0: batch},
        "context": {0: batch, 2: context},
        "context_lengths": {0: batch},
        "memory": {0: batch},
    }
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
    return {name: _describe_graph(directory / name) for name in (bundle_format.ENCODER, bundle_format.ABSTRACTION)}


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
    encoder = Encoder(directory, provider="cpu")
    T, errors = model.config.segment_length, {bundle_format.ENCODER: 0.0, bundle_format.ABSTRACTION: 0.0}
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
    return errors


def _relative(found: np.ndarray, expected: Tensor) -> float:
    reference = expected.numpy()
    error = float(np.abs(found - reference).max() / max(np.abs(reference).max(), 1e-12))
    return error if np.isfinite(error) else np.inf  # max() would lose a NaN


def golden_replay(model: DMAN) -> dict[str, np.ndarray]:
    """Random histories that cross every border, and PyTorch's results for them (see `Bundle.golden`)."""
    random = np.random.default_rng(GOLDEN_SEED)
    lengths = [max(1, round(share * model.config.segment_length)) for share in GOLDEN_SEGMENTS]
    histories = [random.integers(0, model.vocabulary, length) for length in lengths]
    users, memories = replay(model, histories)
    padded = np.full((len(histories), max(lengths)), -1, np.int64)
    for row, history in enumerate(histories):
        padded[row, : len(history)] = history
    return {"histories": padded, "user_embeddings": users.numpy(), "memories": memories.numpy()}


if __name__ == "__main__":
    sys.exit(main())
