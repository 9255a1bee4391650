"""Leave-one-out metrics of a run (PyTorch) or a bundle (ONNX Runtime):

python -m dman_train.evaluate --run DIR | --bundle DIR  [--data FILE] [--split valid|test] [--json]
python -m dman_train.evaluate --run DIR --interpret DIR [--user ID]    how the memory is used, as JSON and plots
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from dman_runtime.data.evaluation import HeldOut, format_report, held_out, report
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import options_of_training
from dman_runtime.data.tables import quoted
from dman_runtime.data.vocabulary import read_known
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
    result = _evaluate_run(arguments) if arguments.bundle is None else _evaluate_bundle(arguments)
    print(format_report(result))
    if arguments.json:
        print_json(result)
    return 0


def _data_config(arguments: argparse.Namespace, trained: dict[str, Any]) -> tuple[DataConfig, dict[str, int]]:
    """How the log is read, and filters: the options given, else those of the training. Raises ConfigError."""
    filters: dict[str, Any] = {name: int(trained.get(name, 0)) for name in ("min_user_events", "min_item_events")}
    config = overridden(DataConfig(**(asdict(options_of_training(trained)) | filters)), arguments)
    return config, {name: getattr(config, name) for name in filters}


def _evaluate_run(arguments: argparse.Namespace) -> dict[str, object]:
    run = open_run(arguments.run or DEFAULT_RUN)
    config, filters = _data_config(arguments, run.config["data"])
    path = arguments.data or Path(run.config["dataset"]["path"])
    vocabulary = run.vocabulary()
    index = {item_id: i for i, item_id in enumerate(vocabulary.item_ids)}
    log = read_known(path, index, config, **filters)
    data, model = held_out(log, arguments.split), run.best_model()
    if arguments.interpret is not None and not run.family.has_state:
        raise UsageError(
            f"a {run.family.name} has no memory: nothing to interpret", "choose another run", parameter="interpret"
        )
    if arguments.user is not None:
        data = _only(arguments.user, data, log, path)
    if arguments.interpret is not None:
        about = {"run": str(run.path), "split": arguments.split, "user": arguments.user}
        segments = arguments.user is not None
        write_interpretation(cast(DMAN, model), data.histories, arguments.interpret, about=about, segments=segments)
    return report(all_ranks(model, data), arguments.split)


def _only(user_id: str, data: HeldOut, log: Interactions, path: Path) -> HeldOut:
    """The part of `data` that belongs to one user."""
    if user_id not in log.user_ids:
        raise UsageError(
            f"user {quoted(user_id)} is not in {path}, or has fewer than min_user_events events",
            "choose another user",
            parameter="user",
        )
    rows = np.flatnonzero(data.users == log.user_ids.index(user_id))
    if not len(rows):
        cause = f"user {quoted(user_id)} has fewer than three events of known items"
        raise UsageError(cause, "choose another user", parameter="user")
    return HeldOut(data.users[rows], [data.histories[row] for row in rows], data.targets[rows])


def _evaluate_bundle(arguments: argparse.Namespace) -> dict[str, object]:
    generation = Generation.open(arguments.bundle, provider=arguments.provider)
    bundle = generation.bundle
    trained = bundle.manifest.data
    config, filters = _data_config(arguments, trained)
    if arguments.data is None and not isinstance(trained.get("path"), str):
        raise UsageError(f"{bundle.path} does not record its training data", "give the log", parameter="data")
    path = arguments.data or Path(trained["path"])
    return evaluate_bundle(path, generation, split=arguments.split, options=config, **filters)


if __name__ == "__main__":
    sys.exit(main())
