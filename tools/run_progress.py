"""How far the runs of a plan are, from the records and the run directories."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dman_train.config import BaselineConfig, ConfigError, DataConfig, ModelConfig, TrainConfig, to_dict
from dman_train.data import load
from dman_train.presets import Preset, decided
from dman_train.run import Run, RunError, open_run
from dman_train.stored_config import from_dict, is_earlier_form
from dman_train.trainer import SELECTION_METRIC
from tools.record_file import Record
from tools.records import summary
from tools.report_rows import decisive
from tools.run_plan import PlannedRun
from tools.run_process import other_files

Kind = Literal["done", "trained", "under way", "missing", "blocked"]


@dataclass(frozen=True)
class Progress:
    """How far a run of the plan is."""

    kind: Kind  # trained: only the record is missing; blocked: its directory holds something else
    text: str
    remedy: str = ""  # if it is blocked

    def __str__(self) -> str:
        text = f"{self.text}; {self.remedy}" if self.remedy else self.text
        return f"{self.kind}: {text}" if text else self.kind


class LogFacts(NamedTuple):
    fingerprint: str
    has_times: bool
    events: int
    items: int


@cache
def facts_of(log: Path, config: DataConfig) -> LogFacts:
    """What decides runs on a log, as this config reads it. Raises InputError."""
    interactions = load(log, config)
    has_times, items = bool(interactions.timestamps.any()), len(interactions.item_ids)
    return LogFacts(interactions.fingerprint(), has_times, len(interactions), items)


def progress_of(planned: PlannedRun, records: dict[str, Record], directory: Path) -> Progress:
    """Raises InputError if the log cannot be read; RunError for a damaged run directory."""
    record, earlier = records.get(planned.name), ""
    if record is not None:
        if difference := _difference(planned, record.content):
            earlier = f"the record of that name has {difference}"
        else:
            return Progress("done", summary(record).partition(", ")[2])
    path = directory / planned.name
    if not (path / "config.json").exists():
        return _unless_blocked(Progress("missing", earlier), path)
    run = open_run(path)
    if difference := _difference(planned, run.config):
        return Progress("blocked", f"{path} is a run with {difference}", "remove it or use another directory")
    if run.metrics is not None:
        return Progress("trained", earlier)
    if not (path / "checkpoint.pt").exists():
        return _unless_blocked(Progress("missing", earlier), path)
    return Progress("under way", _epochs_so_far(run))


def _unless_blocked(missing: Progress, path: Path) -> Progress:
    """A run that must begin anew, which removes its directory: not if other files are there."""
    if others := other_files(path):
        return Progress("blocked", f"{path} holds {others[0]}, which is not of a run", "use another directory")
    return missing


def is_leftover(planned: PlannedRun, path: Path) -> bool:
    """Whether a directory is what a call left of this run that wrote its record and was killed then.

    Raises InputError.
    """
    if not (path / "config.json").exists():
        return path.exists() and not other_files(path)  # the call was removing it
    try:
        found = open_run(path).config
    except RunError:
        return False
    return not (path / "checkpoint.pt").exists() and not _difference(planned, found)


def _difference(planned: PlannedRun, found: dict[str, Any]) -> str:
    """What a record or a run has other than the plan: "" for nothing, else words for a message.

    Options that do not decide its result may differ. Those that it is too old to have count as their defaults, unless
    the system had other equations then.
    """
    if is_earlier_form(found["model"], found["train"]):
        return "the form of an earlier version"
    model, train, data = planned.configs()
    kind = BaselineConfig if "system" in found["model"] else ModelConfig
    try:
        stored = (from_dict(kind, found["model"], where="model"), from_dict(TrainConfig, found["train"], where="train"))
    except ConfigError:
        return "settings of another version"
    log = facts_of(planned.log, data)
    wanted = decided(Preset(model, train), has_times=log.has_times, events=log.events, items=log.items)
    if _deciding(*stored) != _deciding(wanted.model, wanted.train):
        return "other settings"
    if found["dataset"]["fingerprint"] != log.fingerprint:
        return "other data"
    return ""


def _deciding(model: ModelConfig | BaselineConfig, train: TrainConfig) -> dict[str, Any]:
    return decisive({"model": to_dict(model), "train": to_dict(train)}) | {"seed": train.seed}


def _epochs_so_far(run: Run) -> str:
    epochs, total = run.epochs(), run.train_config().epochs
    if not epochs:
        return f"0 of {total} epochs"
    best = max(epoch.get(f"valid/{SELECTION_METRIC}", 0.0) for epoch in epochs)
    return f"{len(epochs)} of {total} epochs, best validation NDCG@10 {best:.4f}"
