"""Rows of the reports: runs of one configuration, how they differ from a preset, and their numbers.

Runs that differ only in the seed are one row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dman_train.config import BaselineConfig, ModelConfig, TrainConfig, to_dict
from dman_train.presets import BASELINE_PRESETS, PRESETS, SHORT_HISTORY, Preset, decided
from dman_train.stored_config import FORMER_DEFAULTS, IF_ABSENT, is_earlier_form
from tools.bootstrap import paired_bootstrap
from tools.record_file import Record

METRICS = ("hr@10", "ndcg@10", "hr@50", "ndcg@100")
TRAINING_OF_F_ABS = {
    "memory_training", "backprop_segments", "abstraction_loss", "abstraction_weight", "abstraction_every",
    "abstraction_learning_rate",
}  # fmt: skip
# Options that decide a result as much as the system does: only rows that share them are compared.
RECIPE = ("seen_items", "ema_decay")
WORDS = {
    ("seen_items", "exclude-from-ranking"): "seen items as negatives",
    ("seen_items", "keep-target"): "seen items as negatives, seen targets ranked",
    ("ema_decay", 0.0): "weights not averaged",
    ("form", "earlier"): "earlier form",
    ("time", "none"): "no times",
    ("time", "events"): "times of events only",
    ("returns", "off"): "no returns",
}
# The default preset before three layers, as rows are compared with it that are nearer to it than to today's.
FORMER_DEFAULT = FORMER_DEFAULTS[ModelConfig] | FORMER_DEFAULTS[TrainConfig]
FORMER = "former default"
DEFAULTS = ("DMAN", "DMAN, no times")  # labels of the default, and of what it is on a log without times
ROUTING = {"routing", "routing_iterations", "routing_softmax"}
# Options that ModelConfig may no longer have, but stored runs do, with the value that needs no mention.
FORMER_OPTIONS = {"residual": "gated"}


@dataclass(frozen=True)
class Row:
    """Runs of one configuration on one dataset."""

    label: str
    records: tuple[Record, ...]

    @property
    def content(self) -> dict[str, Any]:
        return self.records[0].content

    @property
    def is_dman(self) -> bool:
        return "system" not in self.content["model"]

    def metric(self, name: str, split: str = "test") -> str:
        return mean_and_spread([record.metric(name, split=split) for record in self.records])

    def ranks(self) -> list[np.ndarray]:
        return [record.ranks for record in self.records]

    def ranks_of_long_histories(self) -> list[np.ndarray]:
        """Of the users in the last two groups, group by group."""
        return [np.concatenate([r.ranks[r.groups == group] for group in (2, 3)]) for r in self.records]

    def is_of_the_same_users_as(self, other: Row) -> bool:
        """Whether both are of one version of the log, so that they can be compared user by user."""
        return {len(ranks) for ranks in self.ranks()} == {len(ranks) for ranks in other.ranks()}

    def gain_over(self, other: Row, metric: str) -> str:
        """The mean difference over users, with its interval."""
        return str(paired_bootstrap(self.ranks(), other.ranks(), metric=metric))

    def gain_of_long_histories_over(self, other: Row, metric: str) -> str:
        """The same for users with long histories; "-" if there are none."""
        ours, theirs = self.ranks_of_long_histories(), other.ranks_of_long_histories()
        return str(paired_bootstrap(ours, theirs, metric=metric)) if len(ours[0]) else "-"

    def cells(self) -> list[str]:
        seconds = np.mean([record.content["metrics"]["training_seconds"] for record in self.records])
        state = f"{self.content['state_bytes']:,}" if self.content["state_bytes"] else "-"
        seeds = ", ".join(str(record.content["train"].get("seed", "-")) for record in self.records)
        numbers = [f"{self.metric('hr@10', 'valid')}", *(self.metric(name) for name in METRICS)]
        on_gpu = " (GPU)" if any("gpu" in record.content["versions"] for record in self.records) else ""
        return [self.label, seeds, *numbers, f"{self.content['parameters']:,}", state, f"{seconds:,.0f}{on_gpu}"]


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and ± half the distance between the lowest and the highest if there are several."""
    spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def preset_name(content: dict[str, Any]) -> Literal["paper", "default"]:
    """The preset that a run belongs to. A baseline is trained as in the paper if it has five negatives per event."""
    model, train = content["model"], content["train"]
    if "system" in model:
        few = str(train.get("loss")).startswith("negatives") and train["negatives"] == PRESETS["paper"].train.negatives
        return "paper" if few else "default"
    return "paper" if model["architecture"] == "paper" else "default"


def compared_preset(content: dict[str, Any]) -> Preset:
    """The preset that a run is compared with."""
    name, model = preset_name(content), content["model"]
    if "system" not in model:
        return PRESETS[name]
    return BASELINE_PRESETS[name].get(model["system"], BASELINE_PRESETS[name]["sasrec"])  # or one that only counts


def standard_options(content: dict[str, Any]) -> dict[str, Any]:
    """The options of the preset that a run is compared with."""
    return options_of(compared_preset(content), content["dataset"], seen_items=content["train"].get("seen_items"))


def options_of(preset: Preset, dataset: Mapping[str, Any], *, seen_items: str | None = None) -> dict[str, Any]:
    """The options of a preset, with what `decisive` adds to those of a run: on a log with times, of such a size.

    `seen_items`: of the run, which decides with the log whether returns are seen.
    """
    train = replace(preset.train, seen_items=seen_items or preset.train.seen_items)  # type: ignore[arg-type]
    found = decided(Preset(preset.model, train), has_times=True, events=dataset["events"], items=dataset["items"])
    options = to_dict(found.model) | to_dict(replace(found.train, seen_items=preset.train.seen_items))
    return FORMER_OPTIONS | options | {"form": "now"}


def changed_options(content: dict[str, Any], standard: Mapping[str, Any]) -> dict[str, Any]:
    """The decisive options of a run that differ from `standard`, but for those that name the system."""
    named = {"system", "history", "variant", "architecture"}
    if content["train"].get("seen_items") == "keep":  # a property of the log
        named.add("seen_items")
    return {
        key: value for key, value in decisive(content).items() if key not in named and standard.get(key, value) != value
    }


def label_of(content: dict[str, Any], *, but: Collection[str] = ()) -> str:
    """The system, and how it differs from its preset or the former default; the options `but` are not compared."""
    model, mark = content["model"], " `paper`" if preset_name(content) == "paper" else ""
    if "system" in model:
        name = model["system"] + mark
        if "history" in model:
            name += "*" if model["history"] <= SHORT_HISTORY else f", last {model['history']}"
    else:
        name = {"dman": "DMAN", "xl": "xl (no memory)"}.get(model["variant"], model["variant"]) + mark
    standard = standard_options(content)
    changed = changed_options(content, standard)
    if "system" not in model and preset_name(content) == "default":
        since = changed_options(content, standard | FORMER_DEFAULT)
        if len(since) < len(changed):
            name, changed = f"{name}, {FORMER}", since
    return ", ".join([name, *(WORDS.get((k, v), f"{k}={v}") for k, v in changed.items() if k not in but)])


def decisive(content: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that decide its result, without the seed.

    Training options and former options that the record lacks are added, with what its version did. Other options of the
    model are added only if that is not today's default. The precision of matrix products, and whether the item table is
    trained by rows, decide nothing but rounding: such runs are one row, as far as all else is equal.
    """
    model, train = content["model"], content["train"]
    if model.keys() == {"system"}:  # it only counts
        return model | train
    idle = {"seed", "precision", "item_updates"}
    if "system" in model:
        idle |= TRAINING_OF_F_ABS | {"random_first_segment"} | ({"hops"} if model["system"] != "hpmn" else set())
    elif model["variant"] in ("xl", "fifo"):
        idle |= TRAINING_OF_F_ABS | ROUTING
    if model.get("variant") == "xl":
        idle |= {"memory_slots", "long_term"}
    if model.get("architecture") == "paper":  # has one form of the memory, whatever older records call it
        idle |= {"long_term"}
    if model.get("returns", "off") == "off":
        idle |= {"sketch_items"}
    if model.get("time", "none") != "request":
        idle |= {"request_dropout"}
    kind: type = BaselineConfig if "system" in model else ModelConfig
    former = IF_ABSENT[kind] | ({} if "system" in model else FORMER_OPTIONS)
    options = former | model | to_dict(TrainConfig()) | IF_ABSENT[TrainConfig] | train
    options["form"] = "earlier" if is_earlier_form(model, train) else "now"
    return {key: value for key, value in options.items() if key not in idle}


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Records of one dataset, grouped over seeds, best validation first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(decisive(record.content), sort_keys=True), []).append(record)
    rows = [Row(label_of(group[0].content), tuple(group)) for group in groups.values()]
    return sorted(rows, key=lambda row: -np.mean([r.metric("hr@10", split="valid") for r in row.records]))
