"""A plan of trainings: which runs, in which order. `tools.runs` carries it out.

A plan is a TOML file:

    [data]                                   # the logs, by the name that runs use
    ml-1m = "--data ../shared/data/ml-1m/interactions.parquet"
    taobao = "--data taobao.parquet --item-column category_id --seen-items keep"

    [[runs]]                                 # in order of priority
    name = "paper"                           # with the seeds: paper-s0, paper-s1, paper-s2
    train = "--preset paper"                 # arguments of dman_train.train
    data = "ml-1m"
    seeds = [0, 1, 2]                        # [0] if left out

    [[runs]]
    name = "{data}-sasrec"                   # one run for each log
    baselines = "--system sasrec"            # arguments of dman_train.baselines
    data = ["ml-1m", "taobao"]
"""

from __future__ import annotations

import argparse
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dman_runtime.errors import DmanError, UsageError
from dman_train.config import BaselineConfig, DataConfig, ModelConfig, TrainConfig
from dman_train.presets import BASELINE_PRESETS, PRESETS, Presets
from dman_train.train import chosen_preset, given_configs, parser

COMMANDS: dict[str, Presets] = {"train": PRESETS, "baselines": BASELINE_PRESETS}
KEYS = {"name", "data", "seeds", *COMMANDS}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Options that `tools.runs` gives, or that a plan has no use for.
RESERVED = {"--run", "--resume", "--threads", "--device", "--dry-run", "--json", "--seed", "--help", "-h"}


@dataclass(frozen=True)
class PlannedRun:
    """One training of a plan."""

    name: str
    command: str  # a key of COMMANDS
    arguments: tuple[str, ...]  # of that module, without the run directory

    @property
    def module(self) -> str:
        return f"dman_train.{self.command}"

    @property
    def log(self) -> Path:
        """The interaction log."""
        path: Path = self._given.data
        return path

    def configs(self) -> tuple[ModelConfig | BaselineConfig, TrainConfig, DataConfig]:
        """The settings that the arguments give today. Raises UsageError, ConfigError."""
        return given_configs(self._given, chosen_preset(self._given, COMMANDS[self.command]))

    @cached_property
    def _given(self) -> argparse.Namespace:
        return parser(COMMANDS[self.command]).parse_args(self.arguments)


def read_plan(path: Path) -> list[PlannedRun]:
    """The runs of a plan file, in its order. Raises UsageError."""
    try:
        plan = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})", "give the file of a plan") from None
    except ValueError as error:
        raise UsageError(f"{path} is no TOML file ({error})", "correct it") from None
    try:
        runs = list(_runs(plan))
        _check_names(runs)
        for run in runs:
            _check_arguments(run)
    except _PlanError as error:
        raise UsageError(f"{path}: {error.cause}", error.remedy) from None
    return runs


class _PlanError(ValueError):
    """What is wrong with a plan, without the name of its file, and what to do about it."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause, remedy)
        self.cause, self.remedy = cause, remedy or "correct the plan"


def _runs(plan: dict[str, Any]) -> Iterator[PlannedRun]:
    logs, entries = plan.get("data"), plan.get("runs")
    if set(plan) != {"data", "runs"} or not isinstance(logs, dict) or not isinstance(entries, list):
        raise _PlanError("a plan has a table data and a list runs, and nothing else")
    for entry in entries:
        yield from _expanded(entry, logs)


def _expanded(entry: Any, logs: dict[str, Any]) -> Iterator[PlannedRun]:
    """The runs of one entry: one for each log and seed."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise _PlanError("an entry of runs has no name")
    name = entry["name"]
    if unknown := sorted(set(entry) - KEYS):
        raise _PlanError(f"{name} has an unknown key {unknown[0]!r}")
    commands = [key for key in COMMANDS if key in entry]
    if len(commands) != 1:
        raise _PlanError(f"{name} needs one of {' and '.join(COMMANDS)}")
    seeds = entry.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise _PlanError(f"{name} has seeds that are no list of whole numbers")
    for log in _log_names(entry):
        if log not in logs:
            raise _PlanError(f"{name} names a log {log!r} that the table data lacks")
        words = [*_words(logs[log], name), *_words(entry[commands[0]], name)]
        for seed in seeds:
            arguments = (*words, "--seed", str(seed)) if seed else tuple(words)  # 0 is the default
            yield PlannedRun(f"{name.replace('{data}', log)}-s{seed}", commands[0], arguments)


def _log_names(entry: dict[str, Any]) -> list[str]:
    given = entry.get("data")
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _PlanError(f"{entry['name']} has data that is no name of a log or list of them")
    return names


def _words(text: Any, name: str) -> list[str]:
    if not isinstance(text, str):
        raise _PlanError(f"{name} has arguments that are no text")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _PlanError(f"{name} has arguments that are no command line ({error})") from None
    if reserved := sorted({word.partition("=")[0] for word in words} & RESERVED):
        raise _PlanError(f"{name} gives {reserved[0]}, which is not for a plan to give")
    return words


def _check_names(runs: list[PlannedRun]) -> None:
    if not runs:
        raise _PlanError("it has no run")
    seen = set[str]()
    for run in runs:
        if not NAME.fullmatch(run.name):
            raise _PlanError(f"{run.name!r} is no name of letters, digits, '.', '_' and '-'")
        if run.name in seen:
            raise _PlanError(f"two runs are called {run.name}")
        seen.add(run.name)


def _check_arguments(run: PlannedRun) -> None:
    if "--data" not in run.arguments and not any(word.startswith("--data=") for word in run.arguments):
        raise _PlanError(f"{run.name} has no --data")
    try:
        run.configs()
    except DmanError as error:
        raise _PlanError(f"{run.name}: {error.cause}", error.remedy) from None
