"""Leave-one-out metrics of a run (PyTorch) or a bundle (ONNX Runtime):

python -m dman_train.evaluate --run DIR | --bundle DIR  [--data FILE] [--split valid|test] [--json]
python -m dman_train.evaluate --run DIR --interpret DIR [--user ID]    how the memory is used, as JSON and plots
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from dman_runtime.data.evaluation import HeldOut, format_report, report
from dman_runtime.data.filters import FILTERS
from dman_runtime.data.log_options import options_of_training
from dman_runtime.data.vocabulary import KnownLog, read_known
from dman_runtime.errors import UsageError
from dman_runtime.jobs.evaluating import evaluate as evaluate_bundle
from dman_runtime.model.generation import Generation
from dman_runtime.options import Parser, configure_logging, overridden, print_json, run_command
from dman_train.config import DataConfig
from dman_train.interpret import write_interpretation
from dman_train.model import DMAN
from dman_train.ranking import all_ranks
from dman_train.run import open_run
from dman_train.train import DEFAULT_RUN


def parser() -> Parser:
    p = Parser(prog="python -m dman_train.evaluate", description="Leave-one-out metrics of a run or a bundle.")
    p.flag("--run", type=Path, default=None, help="run directory, evaluated by PyTorch; runs/latest without --bundle")
    p.flag("--bundle", type=Path, default=None, help="bundle directory, evaluated by ONNX Runtime")
    p.flag("--data", type=Path, default=None, help="interaction log; default: the one trained on")
    p.flag("--split", choices=["valid", "test"], default="test", help="which held-out event to predict")
    p.flag("--provider", choices=["auto", "cuda", "cpu"], default="auto", help="where the graphs of a bundle run")
    p.flag("--interpret", type=Path, default=None, metavar="DIR", help="write how the memory of a run is used")
    p.flag("--user", default=None, metavar="ID", help="with --interpret: only this user, segment by segment")
    p.add_argument("--json", action="store_true", help="print the metrics as JSON on the last line")
    p.config_flags(DataConfig, title="data (default: as in training)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    configure_logging()
    if arguments.run is not None and arguments.bundle is not None:
        raise UsageError("a run and a bundle cannot be evaluated together", "give one of them", parameter="bundle")
    if arguments.interpret is not None and arguments.bundle is not None:
        raise UsageError("a bundle cannot be interpreted", "give --run instead of --bundle", parameter="interpret")
    if arguments.user is not None and arguments.interpret is None:
        raise UsageError("a user is chosen, but nothing is interpreted", "give --interpret too", parameter="user")
    result, log = _evaluate_run(arguments) if arguments.bundle is None else _evaluate_bundle(arguments)
    print(format_report(result))
    if arguments.json:
        print_json(result | {"input": log.report.as_dict()})
    return 0


def _read(arguments: argparse.Namespace, path: Path, index: Mapping[str, int], trained: dict[str, Any]) -> KnownLog:
    """The log, read as in training but for the options given."""
    config = overridden(_trained_config(trained), arguments)
    given = {name: getattr(config, name) for name in FILTERS if hasattr(arguments, name)}
    return read_known(path, index, config, trained=trained, filters=given)


def _trained_config(trained: dict[str, Any]) -> DataConfig:
    """How the training log was read. Raises ConfigError for what no training can have recorded."""
    names = {field.name for field in fields(DataConfig)}
    recorded = DataConfig(**{name: value for name, value in trained.items() if name in names})
    return replace(recorded, **asdict(options_of_training(trained)))


def _print_report(log: KnownLog) -> None:
    print(log.report.table(), end="\n\n", flush=True)


def _evaluate_run(arguments: argparse.Namespace) -> tuple[dict[str, object], KnownLog]:
    run = open_run(arguments.run or DEFAULT_RUN)
    if arguments.interpret is not None and not run.family.has_state:
        raise UsageError(
            f"a {run.family.name} has no memory: nothing to interpret", "choose another run", parameter="interpret"
        )
    vocabulary, model = run.vocabulary(), run.best_model()
    index = {item_id: i for i, item_id in enumerate(vocabulary.item_ids)}
    path = arguments.data or Path(run.config["dataset"]["path"])
    log = _read(arguments, path, index, run.data_record)
    if hasattr(model, "user_table") and not log.as_trained:
        raise UsageError(
            f"{run.path} holds a vector for each user of its training log, and ranks for no others",
            "give that log, filtered as in training",
            parameter="data",
        )
    data = log.held_out(arguments.split)
    if arguments.user is not None:
        data = _only(arguments.user, data, log)
    if arguments.interpret is not None:
        about = {"run": str(run.path), "split": arguments.split, "user": arguments.user}
        segments = arguments.user is not None
        histories = [history for history in data.histories if len(history)]
        times = [moments for moments in data.times if len(moments)]
        write_interpretation(
            cast(DMAN, model), histories, arguments.interpret, times=times, about=about, segments=segments
        )
    _print_report(log)
    ranks = all_ranks(model, data, popularity=vocabulary.counts)
    unknown = data.unknown_targets
    return report(ranks, arguments.split, unknown_targets=unknown, log=log.kind, filters=log.filters), log


def _only(user_id: str, data: HeldOut, log: KnownLog) -> HeldOut:
    """The part of `data` that belongs to one user."""
    if user_id not in log.interactions.user_ids:
        raise UsageError(
            f"user {user_id!r:.60} is not in {log.report.path}, or has fewer than min_user_events events",
            "choose another user",
            parameter="user",
        )
    rows = np.flatnonzero(data.users == log.interactions.user_ids.index(user_id))
    if not len(rows) or not len(data.histories[rows[0]]):
        problem = "has no event of a known item before the target" if len(rows) else "has fewer than three events"
        raise UsageError(f"user {user_id!r:.60} {problem}", "choose another user", parameter="user")
    return data.rows(rows)


def _evaluate_bundle(arguments: argparse.Namespace) -> tuple[dict[str, object], KnownLog]:
    generation = Generation.open(arguments.bundle, provider=arguments.provider)
    bundle = generation.bundle
    trained = bundle.manifest.data
    _trained_config(trained)  # before a missing path is complained of, as this says more
    if arguments.data is None and not isinstance(trained.get("path"), str):
        raise UsageError(f"{bundle.path} does not record its training data", "give the log", parameter="data")
    log = _read(arguments, arguments.data or Path(trained["path"]), bundle.items.index, trained)
    _print_report(log)
    return evaluate_bundle(log, generation, split=arguments.split), log


if __name__ == "__main__":
    sys.exit(main())
