"""Keeps what reports need of a finished run, so that the run itself can go.

    python -m tools.records --run runs/ml-1m --name dman-s0    # add the run, or replace the record of that name
    python -m tools.records --list
    python -m tools.records --drop dman-s0

A record holds the configuration, the fingerprint of the data, the metrics of each epoch, the seconds, and the test
rank of every user, so that two systems can be compared user by user. `tools.record_file` describes the file.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from dman_runtime.data.evaluation import held_out, report, training_events
from dman_runtime.errors import UsageError
from dman_runtime.model.record import max_record_bytes
from dman_runtime.options import Parser, overridden, run_command
from dman_train.baselines.counts import COUNTS, count_ranks
from dman_train.config import DataConfig, ModelConfig, TrainConfig, to_dict
from dman_train.data import load
from dman_train.graphs import state_shape
from dman_train.interpret import length_group
from dman_train.run import Run, RunError, open_run
from dman_train.train import SPLITS
from tools.record_file import RECORDS, Record, add, drop, ranking_of, read_records

RANK_LIMIT = 500  # larger ranks are stored as one number, as no metric looks further
_DROPPED = {"--run": 1, "--json": 0, "--threads": 1, "--resume": 0}  # options that say nothing about the result


def record_of(run: Run, name: str) -> Record:
    """What is kept of a finished run. Raises RunError."""
    if run.metrics is None or not (run.path / "ranks.npz").exists():
        raise RunError(f"{run.path} is not finished", "let the training end first", parameter="run")
    config, model = run.config, run.best_model()
    ranks, lengths = run.test_ranks(ranking_of(config))
    content = {
        "command": _command(config),
        "model": config["model"],
        "train": config["train"],
        "data": config["data"],
        "dataset": config["dataset"] | _location(Path(config["dataset"]["path"])),
        "versions": config["versions"],
        "machine": platform.machine(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "state_bytes": _state_bytes(run),
        "epochs": [_rounded(epoch) for epoch in run.epochs()],
        "metrics": run.metrics,
    }
    return _record(name, content, ranks, lengths)


def record_of_counts(system: str, path: Path, name: str, config: DataConfig, seen_items: str) -> Record:
    """The record of a system of `dman_train.baselines.counts`, which has no run. Raises InputError."""
    began, data = time.perf_counter(), load(path, config)
    items, offsets, _ = training_events(data)
    scorer = COUNTS[system](items, offsets, len(data.item_ids))
    held = {split: held_out(data, split) for split in SPLITS}
    ranks = {split: count_ranks(scorer, held[split]) for split in SPLITS}
    result: dict[str, Any] = {split: report(ranks[split], split) for split in SPLITS}
    dataset = {
        "fingerprint": data.fingerprint(),
        "users": data.num_users,
        "items": len(data.item_ids),
        "events": len(data),
        **_location(path),
    }
    train = {"seen_items": seen_items} if seen_items != TrainConfig.seen_items else {}
    changed = {key: value for key, value in to_dict(config).items() if value != getattr(DataConfig(), key)}
    options = [f"--{key.replace('_', '-')} {value}" for key, value in (changed | train).items()]
    content = {
        "command": " ".join([f"python -m tools.records --counts {system} --data {dataset['path']}", *options]),
        "model": {"system": system},
        "train": train,
        "data": to_dict(config),
        "dataset": dataset,
        "versions": {"numpy": np.__version__},
        "machine": platform.machine(),
        "parameters": 0,
        "state_bytes": None,
        "epochs": [],
        "metrics": result | {"epochs": 0, "training_seconds": time.perf_counter() - began},
    }
    lengths = np.array([len(history) for history in held["test"].histories])
    return _record(name, content, ranks["test"].of(ranking_of(content)), lengths)


def _record(name: str, content: dict[str, Any], ranks: np.ndarray, lengths: np.ndarray) -> Record:
    capped = np.minimum(ranks, RANK_LIMIT + 1).astype(np.uint16)
    return Record(name, content, capped, length_group(lengths).astype(np.uint8), RANK_LIMIT)


def _rounded(epoch: dict[str, float]) -> dict[str, float]:
    """Six significant digits: half the bytes, and no less to read."""
    return {key: float(f"{value:.6g}") for key, value in epoch.items()}


def _location(path: Path) -> dict[str, str]:
    """Name and path of a log. Generated ones lie in `data` and are named by the file; else the folder names it."""
    folder, file = path.resolve().parts[-2:]
    if folder == "data":
        return {"name": path.stem, "path": f"data/{file}"}
    return {"name": folder, "path": f"../shared/data/{folder}/{file}"}


def _command(config: dict[str, Any]) -> str:
    """The command line that repeats the run, without the options that say nothing about the result."""
    words, kept = iter(config["command"]), []
    for word in words:
        if word in _DROPPED:
            for _ in range(_DROPPED[word]):
                next(words, None)
        elif word == "--data":
            kept += [word, _location(Path(next(words)))["path"]]
        elif word == "--items":
            next(words, None)
        else:
            kept.append(word)
    module = "dman_train.baselines" if "system" in config["model"] else "dman_train.train"
    return " ".join(["python -m", module, *kept])


def _state_bytes(run: Run) -> int | None:
    """Largest state of a user in float16, or None for a model without one."""
    config = run.model_config()
    if not isinstance(config, ModelConfig):
        return None
    return max_record_bytes(state_shape(config, "float16"))


def summary(record: Record) -> str:
    """A record in one line."""
    hit_rate, gain = record.metric("hr@10"), record.metric("ndcg@10")
    return f"{record.name}: {record.dataset}, test HR@10 {hit_rate:.4f}, NDCG@10 {gain:.4f}"


def parser() -> Parser:
    p = Parser(prog="python -m tools.records", description="Keep what reports need of a finished run, in one file.")
    p.flag("--run", type=Path, default=Path("runs/latest"), help="the run to add")
    p.flag("--name", default=None, help="name of the record, replaced if it exists; without it, the run's name")
    p.flag("--records", type=Path, default=RECORDS, help="the file of all records")
    other = p.add_mutually_exclusive_group()
    other.add_argument("--counts", choices=sorted(COUNTS), help="add a system that only counts, not a run")
    other.add_argument("--list", action="store_true", help="print one line per record and change nothing")
    other.add_argument("--drop", nargs="+", metavar="NAME", help="remove these records")
    p.flag("--data", type=Path, default=None, help="interaction log, with --counts")
    choices = get_args(get_type_hints(TrainConfig)["seen_items"])
    p.flag("--seen-items", choices=choices, default=TrainConfig.seen_items, help="as in training, with --counts")
    p.config_flags(DataConfig, title="data, with --counts")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.list:
        for record in read_records(arguments.records):
            print(summary(record))
        return 0
    if arguments.drop:
        drop(arguments.records, arguments.drop)
        print(f"{arguments.records}: {len(arguments.drop)} records removed")
        return 0
    if arguments.counts and arguments.data is None:
        raise UsageError("a system that only counts needs a log", "name one", parameter="data")
    if arguments.counts:
        name, config = arguments.name or arguments.counts, overridden(DataConfig(), arguments)
        record = record_of_counts(arguments.counts, arguments.data, name, config, arguments.seen_items)
    else:
        record = record_of(open_run(arguments.run), arguments.name or arguments.run.resolve().name)
    add(arguments.records, record)
    print(f"{arguments.records}: {summary(record)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
