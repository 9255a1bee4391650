"""Trains a model: python -m dman_train.train --data FILE --run DIR [--preset default|paper|paper-literal|tiny]
[--items FILE]

Several processes, on one host or several: torchrun --nproc-per-node 2 -m -- dman_train.train ...
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dman_runtime.data.evaluation import Split, format_report, held_out, report
from dman_runtime.data.filters import FILTERS
from dman_runtime.data.input_report import InputReport
from dman_runtime.data.interactions import Interactions, ItemInfo
from dman_runtime.data.items import read_items
from dman_runtime.data.logs import Log
from dman_runtime.errors import DmanError, UsageError
from dman_runtime.options import Parser, configure_logging, overridden, print_json, run_command
from dman_train import distributed
from dman_train.config import BaselineConfig, DataConfig, ModelConfig, TrainConfig, to_dict
from dman_train.data import as_found, load_log, training_data
from dman_train.families import family_of
from dman_train.log_warnings import warn_of_items, warn_of_log
from dman_train.presets import PRESETS, Preset, Presets, decided_by, preset_of
from dman_train.ranking import all_ranks
from dman_train.run import Run, RunError, create_run, describe, open_run
from dman_train.signals import stop_requests
from dman_train.synthetic import SyntheticConfig, generate, write_items, write_log
from dman_train.trainer import MISFITS, SELECTION_METRIC, Trainer
from dman_train.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
DEFAULT_RUN, DEFAULT_DATA, DEFAULT_ITEMS = Path("runs/latest"), Path("data/log.csv"), Path("data/items.csv")
CHECKPOINT_SECONDS = 120.0  # from one checkpoint to the next, at least
CHECKPOINT_SHARE = 20  # and so many times what it took to write: that of a million items has 2 GB
SPLITS: tuple[Split, ...] = ("valid", "test")


def parser(presets: Presets = PRESETS) -> Parser:
    """The options of a command that trains the models of `presets`, one of which is "default"."""
    family = family_of(preset_of(presets, "default").model)
    p = Parser(prog=f"python -m {family.command}", description=f"Train a {family.name} on an interaction log.")
    p.flag("--data", type=Path, default=DEFAULT_DATA, help="interaction log; the default is generated if it is absent")
    p.flag("--items", type=Path, default=None, help="item file with titles and attributes")
    p.flag("--run", type=Path, default=DEFAULT_RUN, help="run directory to write")
    p.flag("--preset", choices=sorted(presets), default="default", help="the settings that the other options change")
    p.flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    p.flag("--threads", type=int, default=0, help="CPU threads; 0: one per core")
    p.add_argument("--resume", action="store_true", help="continue the interrupted run in --run")
    p.add_argument("--dry-run", action="store_true", help="read the log, say what was understood, and stop")
    p.add_argument("--json", action="store_true", help="print the final metrics as JSON on the last line")
    p.config_flags(family.config, title="model")
    p.config_flags(TrainConfig, title="training")
    p.config_flags(DataConfig, title="data")
    return p


def main(argv: Sequence[str] | None = None, *, presets: Presets = PRESETS) -> int:
    command = functools.partial(_main, presets=presets)
    return run_command(command, argv)


def _main(argv: Sequence[str] | None, *, presets: Presets) -> int:
    arguments = parser(presets).parse_args(argv)
    configure_logging()
    distributed.join()
    code = _train(arguments, list(sys.argv[1:] if argv is None else argv), presets)
    distributed.leave()  # not after an error: the other processes would never arrive there
    return code


def _train(arguments: argparse.Namespace, command: list[str], presets: Presets) -> int:
    if arguments.threads < 0:
        raise UsageError(
            f"threads is {arguments.threads}", "give 1 or more, or 0 for one per core", parameter="threads"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, train, data = _configs(arguments, chosen_preset(arguments, presets))
    if arguments.resume and arguments.data == DEFAULT_DATA:
        arguments.data = Path(open_run(arguments.run).config["dataset"]["path"])
    if arguments.data == DEFAULT_DATA and not DEFAULT_DATA.exists() and distributed.is_first():
        _generate_default_data()
    distributed.barrier()
    log, interactions = load_log(arguments.data, data)
    if not distributed.is_the_same_everywhere(interactions.fingerprint):
        cause = f"{arguments.data} is not the same log for all processes"
        raise UsageError(cause, "give every host the same file", parameter="data")
    infos = _understand(arguments, log, interactions, train) if distributed.is_first() else {}
    input_report, data = log.report, as_found(data, log)
    del log  # with the events that the filters have removed
    if arguments.dry_run:
        _print_report(input_report, as_json=arguments.json)
        return 0
    # First the trainer, then the directory: a failure here must not leave a run behind.
    chosen = _decided(Preset(model, train), interactions)
    trainer = Trainer(chosen.model, chosen.train, training_data(interactions), _device(arguments.device))
    describe_run = functools.partial(
        describe, chosen.model, chosen.train, data, path=arguments.data, interactions=interactions,
        input_report=input_report, command=command, device=trainer.device,
    )  # fmt: skip
    run = _open(arguments, interactions, infos, describe_run)
    if arguments.resume:
        _resume(trainer, run)
    _print_report(input_report, as_json=False)
    if not _loop(trainer, run):
        logger.info("stopped at step %d; continue with --resume --run %s", trainer.step, run.path)
        return 130
    del trainer
    gc.collect()  # its tables, of a large catalogue: the evaluation needs two of its own
    if distributed.is_first():
        _finish(run, interactions, input_report, as_json=arguments.json)
    return 0


def chosen_preset(arguments: argparse.Namespace, presets: Presets) -> Preset:
    """The preset that the options of `parser(presets)` name."""
    return preset_of(presets, arguments.preset, system=getattr(arguments, "system", BaselineConfig.system))


def given_configs(
    arguments: argparse.Namespace, preset: Preset
) -> tuple[ModelConfig | BaselineConfig, TrainConfig, DataConfig]:
    """The configs of a new run: those of the preset, changed by the options. Raises ConfigError."""
    return overridden(preset.model, arguments), overridden(preset.train, arguments), overridden(DataConfig(), arguments)


def _configs(
    arguments: argparse.Namespace, preset: Preset
) -> tuple[ModelConfig | BaselineConfig, TrainConfig, DataConfig]:
    """Configs from preset and options; when resuming, from the run, with options checked against it."""
    if not arguments.resume:
        return given_configs(arguments, preset)
    run = open_run(arguments.run)
    saved = (run.model_config(), run.train_config(), run.data_config())
    if run.family is not family_of(preset.model):
        raise UsageError(f"{run.path} is a run of another command", f"resume it with python -m {run.family.command}")
    run.refuse_earlier_form()
    for config in saved:
        if overridden(config, arguments) != config:
            raise UsageError(
                f"{run.path} is resumed with its own configuration", "leave the options out", parameter="resume"
            )
    return saved


def _decided(preset: Preset, interactions: Interactions) -> Preset:
    """With what the log decides, which is reported."""
    found = decided_by(interactions, preset)
    before, after = (to_dict(one.model) | to_dict(one.train) for one in (preset, found))
    changed = [f"{name}={value}" for name, value in after.items() if value != before[name]]
    if changed and distributed.is_first():
        logger.info("decided by the log and by seen_items: %s", ", ".join(changed))
    return found


def _open(
    arguments: argparse.Namespace,
    interactions: Interactions,
    infos: dict[str, ItemInfo],
    describe_run: Callable[[], dict[str, Any]],
) -> Run:
    """The run directory. The first process writes the files that describe the run."""
    if not distributed.is_first():
        distributed.barrier()
        return open_run(arguments.run)
    if arguments.resume:
        run = open_run(arguments.run)
        if run.config["dataset"]["fingerprint"] != interactions.fingerprint():
            raise UsageError(
                f"{arguments.data} is not the data that {run.path} was started with", "give that data", parameter="data"
            )
    else:
        run = create_run(arguments.run, keep_old=arguments.run == DEFAULT_RUN)
        counts = training_data(interactions).item_counts
        vocabulary = Vocabulary(interactions.item_ids, interactions.integer_item_ids, counts, infos)
        run.write("vocabulary.json", vocabulary.to_json())
        run.write_json("config.json", describe_run())
    distributed.barrier()
    logger.info(
        "%d users, %d items, %d events from %s; run directory %s",
        interactions.num_users, len(interactions.item_ids), len(interactions), arguments.data, run.path,
    )  # fmt: skip
    return run


def _understand(
    arguments: argparse.Namespace, log: Log, interactions: Interactions, train: TrainConfig
) -> dict[str, ItemInfo]:
    """Adds to the report what may go wrong with the log; returns what the item file says."""
    warn_of_log(log, interactions, seen_items=train.seen_items)
    file = arguments.items
    if file is None and arguments.data == DEFAULT_DATA and DEFAULT_ITEMS.exists():
        file = DEFAULT_ITEMS
    if file is None or arguments.resume:  # a run has its items already
        return {}
    infos = read_items(file, item_column=log.options.item_column)
    warn_of_items(log.report, file, infos, interactions.item_ids)
    return infos


def _print_report(report: InputReport, *, as_json: bool) -> None:
    """What was understood of the log; only the first process prints."""
    if distributed.is_first():
        print(report.table(), end="\n\n", flush=True)
        if as_json:
            print_json(report.as_dict())


def _resume(trainer: Trainer, run: Run) -> None:
    if run.metrics is not None:
        raise UsageError(f"{run.path} is finished", "train longer in another run", parameter="run")
    file = run.path / "checkpoint.pt"
    if not file.exists():
        raise UsageError(f"{run.path} has no checkpoint", "start again in another directory", parameter="run")
    state = run.load_tensors(file.name)
    try:
        trainer.load_state_dict(state)
    except DmanError:
        raise
    except MISFITS:
        raise RunError(f"{file} does not fit config.json", "restore both or train again") from None
    if distributed.is_first():
        run.write_epochs(run.epochs()[: trainer.epoch])  # one may have been recorded after the checkpoint
    distributed.barrier()
    logger.info("resumed at step %d", trainer.step)


def _loop(trainer: Trainer, run: Run) -> bool:
    """Epochs until done. Returns False if a stop was requested, after writing the checkpoint."""
    from torch.utils.tensorboard import SummaryWriter

    first, saved, took = distributed.is_first(), time.monotonic(), 0.0
    board = SummaryWriter(run.path / "tensorboard") if first else None

    with stop_requests() as stop_requested:

        def save() -> None:
            nonlocal saved, took
            began, state = time.monotonic(), trainer.state_dict()
            if first:
                run.save_tensors("checkpoint.pt", state)
            saved = time.monotonic()
            took = saved - began

        def on_step() -> None:
            if trainer.world == 1 or trainer.step % 20 == 0:  # processes talk at the same step
                stop = distributed.any_process(stop_requested())
                if stop or distributed.any_process(checkpoint_due(time.monotonic() - saved, took=took)):
                    save()
                if stop:
                    raise _Stop

        try:
            while trainer.epoch < trainer.config.epochs and not _out_of_patience(run, trainer.config.patience):
                result = trainer.train_epoch(on_step=on_step, progress=first)
                if first:
                    _record_epoch(run, trainer, result, board)
                distributed.barrier()
                save()
        except _Stop:
            return False
        finally:
            if board is not None:
                board.close()
    return True


def checkpoint_due(seconds: float, *, took: float) -> bool:
    """Whether to write a checkpoint so long after the last one, which took `took` seconds to write."""
    return seconds > max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * took)


class _Stop(Exception):
    """A stop was requested and the checkpoint is written."""


def _record_epoch(run: Run, trainer: Trainer, result: dict[str, float], board: Any) -> None:
    from dman_train.plots import plot_curves

    metric = f"valid/{SELECTION_METRIC}"
    previous = [epoch.get(metric, 0.0) for epoch in run.epochs()]
    if result.get(metric, 0.0) >= max(previous, default=-1.0):
        run.save_tensors("best.pt", trainer.result.state_dict())
    run.append_epoch(result)
    for name, value in result.items():
        board.add_scalar(name, value, trainer.step)
    plot_curves(run.epochs(), run.path / "curves.png")
    logger.info(
        "epoch %d: loss %.4f, valid HR@10 %.4f, NDCG@10 %.4f, %.0f s, %.0f events/s",
        result["epoch"], result["loss"], result.get("valid/hr@10", 0.0), result.get("valid/ndcg@10", 0.0),
        result["seconds"], result["events_per_second"],
    )  # fmt: skip


def _out_of_patience(run: Run, patience: int) -> bool:
    """Decided by the first process: on a shared disk, others may see what it wrote later. Collective."""
    values = [epoch.get(f"valid/{SELECTION_METRIC}", 0.0) for epoch in run.epochs()] if distributed.is_first() else []
    return distributed.any_process(bool(values) and len(values) - 1 - int(np.argmax(values)) >= patience)


def _finish(run: Run, interactions: Interactions, input_report: InputReport, *, as_json: bool) -> None:
    """Evaluates the best epoch on both splits and closes the run."""
    model = run.best_model()
    data = {split: held_out(interactions, split) for split in SPLITS}
    ranks = {split: all_ranks(model, data[split]) for split in SPLITS}
    run.save_ranks(ranks, [len(history) for history in data["test"].histories])
    filters = {name: getattr(run.data_config(), name) for name in FILTERS}
    result: dict[str, Any] = {split: report(ranks[split], split, filters=filters) for split in SPLITS}
    seconds = [epoch["seconds"] for epoch in run.epochs()]
    result |= {"epochs": len(seconds), "training_seconds": sum(seconds)}
    run.write_json("metrics.json", result)
    (run.path / "checkpoint.pt").unlink(missing_ok=True)
    print(format_report(result["test"]))
    if run.family.has_state:
        print(f"\nnext: python -m dman_train.export{f' --run {run.path}' if run.path != DEFAULT_RUN else ''}")
    if as_json:
        print_json(result | {"input": input_report.as_dict()})


def _generate_default_data() -> None:
    DEFAULT_DATA.parent.mkdir(parents=True, exist_ok=True)
    config = SyntheticConfig()
    write_items(config, DEFAULT_ITEMS)
    write_log(generate(config), DEFAULT_DATA)
    logger.info("%s did not exist: wrote a generated log there", DEFAULT_DATA)


def _device(choice: str) -> torch.device:
    if choice == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no CUDA device", "choose auto or cpu", parameter="device")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", distributed.rank() % torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(main())
