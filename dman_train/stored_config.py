"""Configs as run directories hold them, those of earlier versions too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from dman_runtime.data.tables import quoted
from dman_runtime.data.untrusted import shown
from dman_train.config import BaselineConfig, ConfigError, ModelConfig, TrainConfig

# Fields of earlier versions, with the one value that still describes what happens.
REMOVED_FIELDS: dict[type, dict[str, Any]] = {ModelConfig: {"residual": "gated"}}

# What the default preset was before three layers.
FORMER_DEFAULTS: dict[type, dict[str, Any]] = {
    ModelConfig: {"layers": 2, "memory_slots": 10, "closed_states": "full"},
    TrainConfig: {"abstraction_loss": "reads", "abstraction_every": 8},
}

# What a config means that lacks a field, where that is not today's default: what its version did.
_WITHOUT_SIGNALS = {"time": "none", "returns": "off"}
IF_ABSENT: dict[type, dict[str, Any]] = {
    ModelConfig: _WITHOUT_SIGNALS | FORMER_DEFAULTS[ModelConfig],
    BaselineConfig: _WITHOUT_SIGNALS,
    TrainConfig: {"item_updates": "all"} | FORMER_DEFAULTS[TrainConfig],
}

# Baselines whose equations an earlier version had in another form, with the same names in the configuration.
_REPAIRED_BASELINES = ("caser", "shan", "hpmn", "sdm")


def is_earlier_form(model: Mapping[str, Any], train: Mapping[str, Any]) -> bool:
    """Whether a run with these values of `ModelConfig` or `BaselineConfig`, and of TrainConfig, is of an earlier form.

    The weights of such a run may fit the network of today, but give other numbers in it. The values are those that were
    written when the run began: a run of an earlier form lacks the options that came with the form of today.
    """
    if "system" in model:
        return model["system"] in _REPAIRED_BASELINES and "hops" not in model
    repaired = model.get("architecture") == "paper" or model.get("variant") == "nran"
    return repaired and "adam_beta2" not in train


def from_dict(config_class: type, values: dict[str, Any], *, where: str) -> Any:
    """Builds a config from a mapping that was read from the file `where`; one of an earlier version may lack fields.

    Raises ConfigError for unknown fields, and for values that this version does not have.
    """
    removed = REMOVED_FIELDS.get(config_class, {})
    for name, remaining in removed.items():
        if values.get(name, remaining) != remaining:
            raise ConfigError(
                f"{where}: {name} {quoted(values[name])} is no longer supported, only {remaining!r}",
                "train again without it",
            )
    if unknown := sorted(set(values) - {f.name for f in fields(config_class)} - set(removed)):
        raise ConfigError(
            f"{where}: unknown {config_class.__name__} field {shown(', '.join(unknown))}",
            "use the version of dman that wrote it, or train again",
        )
    known = {name: value for name, value in values.items() if name not in removed}
    try:
        return replace(config_class(), **IF_ABSENT.get(config_class, {}) | known)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.cause}", error.remedy) from None
