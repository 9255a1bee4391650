"""Exports a trained run as a bundle: python -m dman_train.export --run DIR --out BUNDLE

Writes both graphs, compares them with PyTorch, refuses a difference above the tolerance, and records a golden replay,
which the runtime repeats before it serves.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import torch

from dman_runtime.data.items import read_items
from dman_runtime.data.vocabulary import read_known
from dman_runtime.errors import BundleError, InputError
from dman_runtime.model import bundle as bundle_format
from dman_runtime.model.bundle import items_jsonl
from dman_runtime.model.bundle_writer import write_bundle
from dman_runtime.options import Parser, configure_logging, print_json, run_command
from dman_train.config import to_dict
from dman_train.graphs import OPSET, export_graphs, graph_errors, state_shape
from dman_train.model import DMAN
from dman_train.predictor import Audience, Fitted, audience_of, fit_predictor
from dman_train.replay import replay
from dman_train.run import Run, RunError, open_run
from dman_train.searching import FLOOR, MIN_ITEMS, Indexed, build_index
from dman_train.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
DEFAULT_RUN, DEFAULT_OUT = Path("runs/latest"), Path("bundle")
TOLERANCE = 1e-4  # largest torch-to-ONNX difference, relative to the largest value of the tensor
SEARCHES = ("auto", "exact", "index")
GOLDEN_SEED = 20210218
GOLDEN_SEGMENTS = (0.05, 0.5, 1.0, 1.35, 2.0, 3.6, 6.1)  # history lengths in segments; together they cross every border


def parser() -> Parser:
    p = Parser(prog="python -m dman_train.export", description="Export a trained run as a bundle for dman-runtime.")
    p.flag("--run", type=Path, default=DEFAULT_RUN, help="run directory of dman_train.train")
    p.flag("--out", type=Path, default=DEFAULT_OUT, help="bundle directory to write; an older bundle is replaced")
    p.flag("--items", type=Path, default=None, help="item file with titles and attributes; default: those of the run")
    p.flag(
        "--state-dtype",
        choices=bundle_format.STATE_DTYPES,
        default="float16",
        help="precision of stored hidden states and memories; float32 doubles the size of a state",
    )
    p.flag("--tolerance", type=float, default=TOLERANCE, help="largest accepted relative torch-to-ONNX difference")
    p.flag(
        "--search",
        choices=SEARCHES,
        default="auto",
        help=f"how items are found: exact, or through an index; auto: through one from {MIN_ITEMS:,} items on, if "
        "FAISS (dman[ann]) is installed and the recall is reached",
    )
    p.flag(
        "--recall",
        type=float,
        default=FLOOR,
        help="least share of the 100 best items that the index must find, by validation users",
    )
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    configure_logging()
    result = _export(arguments)
    print(f"bundle {result['bundle_id']} in {arguments.out}, torch-to-ONNX error {result['max_relative_error']:.1e}")
    if "new_items" in result:
        print(format_quality(result["new_items"]))
    if "search" in result:
        print(
            "search: an index of {lists:,} lists, of which {lists_read:,} are read; recall@{k} {recall:.4f} of "
            "{users:,} validation users".format(**result["search"])
        )
    bundle = "" if arguments.out == DEFAULT_OUT else f" --bundle {arguments.out}"
    log = result.pop("log")
    print(
        f"\nnext: dman-runtime score{bundle} --input {log}"
        f"\n  or: dman-runtime import{bundle} --input {log}, then dman-runtime serve{bundle}"
    )
    if arguments.json:
        print_json(result)
    return 0


def format_quality(quality: dict[str, Any]) -> str:
    """One line for people."""
    return (
        "new items: predicted from {features:,} features, fitted on {fitted_items:,} items. Held out, their HR@10 on "
        "validation is {hr@10:.3f}, with trained embeddings {trained_hr@10:.3f}".format(**quality)
    )


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    run = open_run(arguments.run)
    if run.metrics is None:
        logger.warning("%s is not finished; exporting its best epoch so far", run.path)
    if not run.family.has_state:
        raise RunError(f"{run.path} is a run of a {run.family.name}", "export a run of a DMAN", parameter="run")
    model, vocabulary = cast(DMAN, run.best_model()), run.vocabulary()
    if arguments.items is not None:
        vocabulary = replace(vocabulary, items=read_items(arguments.items))
    indexes = arguments.search == "index" or (arguments.search == "auto" and model.vocabulary >= MIN_ITEMS)
    audience = validation_audience(run, model, vocabulary) if vocabulary.items or indexes else None
    table, must = model.item_table().detach().numpy(), arguments.search == "index"
    result = export_bundle(
        model,
        vocabulary,
        arguments.out,
        state_dtype=arguments.state_dtype,
        tolerance=arguments.tolerance,
        data=run.data_record,
        metrics=run.metrics or {},
        fitted=fit_predictor(table, vocabulary, audience) if audience is not None else None,
        indexed=built_index(table, audience, floor=arguments.recall, must=must) if indexes else None,
    )
    return result | {"log": run.config["dataset"]["path"]}


def validation_audience(run: Run, model: DMAN, vocabulary: Vocabulary) -> Audience | None:
    """Validation users of the run's log; None, with a warning, where it cannot be read."""
    index = {item_id: place for place, item_id in enumerate(vocabulary.item_ids)}
    try:
        log = read_known(Path(run.config["dataset"]["path"]), index, run.data_config(), trained=run.data_record)
        return audience_of(model, log.held_out("valid"))
    except InputError as error:
        logger.warning(
            "the bundle will not predict embeddings of new items, and will be searched exactly, as both are measured "
            "with the log: %s",
            error,
        )
        return None


def built_index(table: np.ndarray, audience: Audience | None, *, floor: float, must: bool) -> Indexed | None:
    """The index of a (V, D) item table; None, with a warning, where there can be none of this recall.

    Raises BundleError instead if there `must` be one.
    """
    try:
        if audience is None:
            raise ValueError("there are no validation users to measure its recall with")
        return build_index(table, audience.users, floor=floor)
    except ImportError:
        problem, remedy = "FAISS is not installed", "install dman[ann]"
    except ValueError as error:
        problem, remedy = str(error), "accept a lower recall, or export for exact search"
    if must:
        raise BundleError(f"no index of the items can be used: {problem}", remedy, parameter="search")
    logger.warning("the bundle will be searched exactly, without an index of its items: %s; %s", problem, remedy)
    return None


def export_bundle(
    model: DMAN,
    vocabulary: Vocabulary,
    out: Path,
    *,
    state_dtype: str = "float16",
    tolerance: float = TOLERANCE,
    data: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    fitted: Fitted | None = None,
    indexed: Indexed | None = None,
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
        tensors = export_graphs(model, directory)
        errors.update(graph_errors(model, directory))
        _require_tolerance(max(errors.values()), tolerance)
        _write_tables(model, vocabulary, directory)
        np.savez(directory / bundle_format.GOLDEN, allow_pickle=False, **golden_replay(model))
        if fitted is not None:
            np.savez(directory / bundle_format.PREDICTOR, allow_pickle=False, **fitted.predictor.arrays())
        if indexed is not None:
            indexed.item_index.write(directory / bundle_format.INDEX)
        return {
            "model": to_dict(config),
            "state": state_shape(config, state_dtype, longest_gap=model.longest_gap),
            "vocabulary": model.vocabulary,
            "integer_item_ids": vocabulary.integer_item_ids,
            "tensors": tensors,
            "data": data or {},
            "metrics": metrics or {},
            "export": {"max_relative_error": errors, "tolerance": tolerance, "opset": OPSET},
            "new_items": fitted.quality if fitted else {},
            "search": indexed.quality if indexed else {},
            "versions": {module.__name__: module.__version__ for module in (torch, onnx, onnxruntime, np)},
        }

    manifest = write_bundle(out, fill)
    result = {"bundle_id": manifest.bundle_id, "out": str(out), "max_relative_error": max(errors.values())}
    result |= {"new_items": fitted.quality} if fitted else {}
    return result | ({"search": indexed.quality} if indexed else {})


def _require_tolerance(error: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise BundleError(
            f"ONNX differs from PyTorch by {error:.1e}, more than {tolerance:.1e}; no bundle written",
            "accept a larger difference or train again",
            parameter="tolerance",
        )


def _write_tables(model: DMAN, vocabulary: Vocabulary, directory: Path) -> None:
    with torch.no_grad():
        np.save(directory / bundle_format.EMBEDDINGS, model.item_table().numpy())
        np.save(directory / bundle_format.INITIAL_MEMORY, model.initial_memory.detach().numpy())
        if model.config.sees_times:
            np.save(directory / bundle_format.GAPS, (model.gaps * model.input_scale).numpy())
        if model.config.returns == "on":
            np.savez(directory / bundle_format.RETURNS, allow_pickle=False, **return_tables(model))
    entries = []
    for item_id, count in zip(vocabulary.item_ids, vocabulary.counts.tolist(), strict=True):
        entry: dict[str, Any] = {"item_id": item_id, "events": count}
        if (info := vocabulary.items.get(item_id)) is not None:
            entry |= {"title": info.title, "attributes": info.attributes}
        entries.append(entry)
    (directory / bundle_format.ITEMS).write_text(items_jsonl(entries), encoding="utf-8")


def golden_replay(model: DMAN) -> dict[str, np.ndarray]:
    """Random histories that cross every border, and PyTorch's results for them (see `Bundle.golden`)."""
    random = np.random.default_rng(GOLDEN_SEED)
    lengths = [max(1, round(share * model.config.segment_length)) for share in GOLDEN_SEGMENTS]
    histories = [random.integers(0, model.vocabulary, length) for length in lengths]
    times = [np.cumsum(random.geometric(2.0 ** -random.integers(0, 24, length))) for length in lengths]
    users, memories = replay(model, histories, times=times, rounds=False)
    padded, padded_times = (np.full((len(histories), max(lengths)), -1, np.int64) for _ in range(2))
    for row, history in enumerate(histories):
        padded[row, : len(history)], padded_times[row, : len(history)] = history, times[row]
    golden = {"histories": padded, "user_embeddings": users.numpy(), "memories": memories.numpy()}
    return golden | ({"times": padded_times} if model.config.sees_times else {})


def return_tables(model: DMAN) -> dict[str, np.ndarray]:
    """The weights of the term for items that come back, by user and, computed once, by item."""
    term = model.returns
    tables = {"by_user": term.by_user.weight, "bias": term.by_user.bias, "by_item": term.by_item(model.item_table())}
    tables |= {"by_age": term.by_age} | ({"by_gap": term.by_gap} if model.config.sees_times else {})
    return {name: table.detach().numpy() for name, table in tables.items()}


if __name__ == "__main__":
    sys.exit(main())
