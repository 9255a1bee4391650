"""Searches training options with Optuna, by the validation metric, and keeps every trial.

    python -m tools.tune --data FILE --system sasrec --epochs 4 --trials 8 \\
        --space dropout=0.1:0.5 --space learning_rate=3e-4:3e-3:log --space heads=1,2,4 --study reports/trials/sasrec

A study is a journal (one JSON line per event; an interrupted search continues from it) and a Markdown table next to it.
The measure is the best validation NDCG@10 of a trial's epochs. A trial is stopped if, after two epochs or more, it is
below the median of the earlier trials. The test split is never read.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from dman_runtime.data.interactions import Interactions
from dman_runtime.errors import UsageError
from dman_runtime.options import Parser, configure_logging, field_value, overridden, require_positive, run_command
from dman_train.config import BaselineConfig, ConfigError, DataConfig, ModelConfig, TrainConfig, to_dict
from dman_train.data import load, training_data
from dman_train.presets import BASELINE_PRESETS, PRESETS, Preset, decided_by, preset_of
from dman_train.trainer import SELECTION_METRIC, Trainer
from tools.bench.report import table, write_page

Suggest = Callable[[optuna.Trial], Any]
MEASURE = f"valid/{SELECTION_METRIC}"
UNDISTURBED_TRIALS, UNDISTURBED_EPOCHS = 3, 2  # before any trial is stopped early


def parse_space(text: str, preset: Preset) -> tuple[str, Suggest]:
    """`field=low:high`, `field=low:high:log` or `field=a,b,c` -> the field and how to draw it. Raises UsageError."""
    name, _, values = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    kinds = get_type_hints(type(preset.model)) | get_type_hints(type(preset.train))
    if name not in kinds or not values:
        raise UsageError(
            f"space {text!r} names no config field with values",
            "give field=low:high, field=low:high:log or field=a,b,c",
            parameter="space",
        )
    kind, parts = kinds[name], values.split(":")
    try:
        if len(parts) == 1:
            choices = [_converted(value.strip(), kind) for value in values.split(",")]
            return name, lambda trial: trial.suggest_categorical(name, choices)
        low, high, log = _converted(parts[0], kind), _converted(parts[1], kind), parts[2:] == ["log"]
        if kind not in (int, float) or len(parts) > 3 or (len(parts) == 3 and not log) or not low < high:
            raise ValueError(text)
    except ValueError:
        cause = f"space {text!r} is no range or list of {getattr(kind, '__name__', 'choices')}"
        raise UsageError(cause, "give low:high, low:high:log or a,b,c", parameter="space") from None
    if kind is int:
        return name, lambda trial: trial.suggest_int(name, low, high, log=log)
    return name, lambda trial: trial.suggest_float(name, low, high, log=log)


def _converted(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal and text not in get_args(kind):
        raise ValueError(text)
    return field_value(text, kind)


def search(
    study: optuna.Study, trials: int, spaces: dict[str, Suggest], preset: Preset, interactions: Interactions
) -> None:
    """Adds trials to the study until it has this many."""
    data = training_data(interactions)

    def objective(trial: optuna.Trial) -> float:
        drawn = argparse.Namespace(**{name: suggest(trial) for name, suggest in spaces.items()})
        given = Preset(overridden(preset.model, drawn), overridden(preset.train, drawn))
        chosen = decided_by(interactions, given)
        trainer = Trainer(chosen.model, chosen.train, data, torch.device("cpu"))
        began, best = time.perf_counter(), 0.0
        for epoch in range(trainer.config.epochs):
            measured = trainer.train_epoch(on_step=lambda: None, progress=False)
            best = max(best, measured[MEASURE])
            trial.set_user_attr("hr@10", measured["valid/hr@10"])
            trial.set_user_attr("seconds", round(time.perf_counter() - began))
            trial.report(measured[MEASURE], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return best

    done = sum(trial.state.is_finished() for trial in study.trials)
    if done < trials:
        study.optimize(objective, n_trials=trials - done, catch=(ConfigError, FloatingPointError))


def page(study: optuna.Study, command: str) -> list[str]:
    """Title, command and the trials, best first, as Markdown."""
    names = sorted({name for trial in study.trials for name in trial.params})
    heads = ["trial", *names, "valid NDCG@10 by epoch", "best", "valid HR@10, last", "seconds", "outcome"]
    rows = []
    for trial in sorted(study.trials, key=lambda trial: -max(trial.intermediate_values.values(), default=0.0)):
        values = [trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)]
        drawn = [f"{trial.params[name]:.4g}" if isinstance(trial.params.get(name), float) else
                 str(trial.params.get(name, "-")) for name in names]  # fmt: skip
        rows.append(
            [
                str(trial.number),
                *drawn,
                " ".join(f"{value:.4f}" for value in values),
                f"{max(values):.4f}" if values else "-",
                f"{trial.user_attrs['hr@10']:.4f}" if "hr@10" in trial.user_attrs else "-",
                str(trial.user_attrs.get("seconds", "-")),
                trial.state.name.lower(),
            ]
        )
    return [f"# {study.study_name}", f"`{command}`", table(heads, rows)]


def _parser(model: type[ModelConfig] | type[BaselineConfig]) -> Parser:
    p = Parser(prog="python -m tools.tune", description="Search training options by validation.")
    p.add_argument("--data", type=Path, required=True, help="interaction log")
    p.add_argument("--space", action="append", required=True, help="what to vary: field=low:high[:log] or field=a,b,c")
    p.add_argument("--trials", type=int, default=10, metavar="N", help="number of trials in the study at the end")
    p.add_argument("--study", type=Path, required=True, help="journal and table, without suffix")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    p.config_flags(model, title="model; --system: a baseline instead of DMAN")
    p.config_flags(TrainConfig, title="training")
    p.config_flags(DataConfig, title="data")
    return p


def _main(argv: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    system = any(word == "--system" or word.startswith("--system=") for word in given)
    arguments = _parser(BaselineConfig if system else ModelConfig).parse_args(given)
    chosen = preset_of(BASELINE_PRESETS, "default", system=arguments.system) if system else PRESETS["default"]
    require_positive(arguments, "trials", "threads")
    configure_logging()
    torch.set_num_threads(arguments.threads)
    preset = Preset(overridden(chosen.model, arguments), overridden(chosen.train, arguments))
    spaces = dict(parse_space(text, preset) for text in arguments.space)
    interactions = load(arguments.data, overridden(DataConfig(), arguments))
    study = _open(arguments.study, preset, interactions.fingerprint())
    search(study, arguments.trials, spaces, preset, interactions)
    command = shlex.join(["python", "-m", "tools.tune", *given])
    write_page(Path(f"{arguments.study}.md"), page(study, command))
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not finished:
        raise UsageError("no trial could be finished", f"see {arguments.study}.md")
    print(f"best: {study.best_trial.params}, {MEASURE} {study.best_value:.4f}, of {len(study.trials)} trials")
    return 0


def _open(path: Path, preset: Preset, fingerprint: str) -> optuna.Study:
    """The study of this name, new or continued. Raises UsageError if it has another configuration or log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(f"{path}.journal"))
    about = {"data": fingerprint, "model": to_dict(preset.model), "train": to_dict(preset.train)}
    study = optuna.create_study(
        storage=storage,
        study_name=path.name,
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(UNDISTURBED_TRIALS, UNDISTURBED_EPOCHS - 1),
    )
    if study.user_attrs.get("about", about) != about:
        raise UsageError(
            f"{path}.journal has trials of another configuration or log", "choose another study", parameter="study"
        )
    study.set_user_attr("about", about)
    # A new seed, or the values of the earlier trials would be drawn again.
    study.sampler = optuna.samplers.TPESampler(seed=preset.train.seed + len(study.trials))
    return study


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
