"""Configs: invalid values are refused by name, and files of earlier versions can be read."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from dman_train.config import BaselineConfig, ConfigError, DataConfig, ModelConfig, TrainConfig, to_dict
from dman_train.presets import PRESETS
from dman_train.stored_config import from_dict

INVALID: list[tuple[type, str, object]] = [
    (ModelConfig, "architecture", "plain"),
    (ModelConfig, "variant", "lstm"),
    (ModelConfig, "segment_length", 0),
    (ModelConfig, "memory_slots", 0),
    (ModelConfig, "layers", 17),
    (ModelConfig, "width", 3),
    (ModelConfig, "heads", 3),
    (ModelConfig, "heads", 0),
    (ModelConfig, "ffn_multiplier", -1),
    (ModelConfig, "long_term", "light"),
    (ModelConfig, "time", "sometimes"),
    (ModelConfig, "returns", "maybe"),
    (ModelConfig, "sketch_items", 0),
    (ModelConfig, "sketch_items", 513),
    (ModelConfig, "dropout", 1.0),
    (ModelConfig, "dropout", float("nan")),
    (ModelConfig, "routing", "shared"),
    (ModelConfig, "routing_iterations", 0),
    (ModelConfig, "routing_softmax", "both"),
    (ModelConfig, "closed_states", "int4"),
    (TrainConfig, "loss", "bce"),
    (TrainConfig, "negatives", 0),
    (TrainConfig, "memory_training", "off"),
    (TrainConfig, "backprop_segments", 5),
    (TrainConfig, "abstraction_every", 0),
    (TrainConfig, "abstraction_loss", "eq. 5"),
    (TrainConfig, "seen_items", "forget"),
    (TrainConfig, "abstraction_weight", -1.0),
    (TrainConfig, "item_updates", "some"),
    (TrainConfig, "lanes", -1),
    (TrainConfig, "lanes", 2.5),
    (TrainConfig, "learning_rate", -0.1),
    (TrainConfig, "learning_rate", "fast"),
    (TrainConfig, "abstraction_learning_rate", float("inf")),
    (TrainConfig, "warmup_steps", -1),
    (TrainConfig, "final_learning_rate", 1.5),
    (TrainConfig, "weight_decay", -1e-9),
    (TrainConfig, "gradient_clip", -1.0),
    (TrainConfig, "ema_decay", 1.0),
    (TrainConfig, "adam_beta2", 1.0),
    (TrainConfig, "precision", "float16"),
    (TrainConfig, "epochs", 0),
    (TrainConfig, "epochs", True),
    (TrainConfig, "patience", 0),
    (TrainConfig, "evaluation_users", -1),
    (TrainConfig, "request_dropout", 1.5),
    (TrainConfig, "times_dropout", -0.1),
    (TrainConfig, "request_dropout", float("nan")),
    (TrainConfig, "random_first_segment", "maybe"),
    (TrainConfig, "seed", -1),
    (DataConfig, "min_user_events", -1),
    (DataConfig, "min_item_events", -1),
]


@pytest.mark.parametrize(("config", "name", "value"), INVALID, ids=lambda x: getattr(x, "__name__", repr(x)))
def test_config_error_names_the_field(config: type, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        config(**{name: value})


def test_invalid_values_are_tried_for_every_field() -> None:
    known = {(c, f.name) for c in (ModelConfig, TrainConfig) for f in fields(c)}
    assert {(c, name) for c, name, _ in INVALID if c is not DataConfig} == known


def test_alternating_training_refuses_to_go_back_over_several_segments() -> None:
    with pytest.raises(ConfigError, match="needs memory_training 'joint'"):
        TrainConfig(memory_training="alternating", backprop_segments=2)


def test_paper_config_refuses_several_heads() -> None:
    with pytest.raises(ConfigError, match="heads to 1"):
        ModelConfig(architecture="paper", heads=2)


def test_paper_config_refuses_a_merged_memory() -> None:
    with pytest.raises(ConfigError, match="long_term to 'gated'"):
        ModelConfig(architecture="paper", heads=1, long_term="merged")


@pytest.mark.parametrize("time", ["request", "events"])
@pytest.mark.parametrize("options", [{"architecture": "paper", "heads": 1}, {}], ids=["paper", "plus"])
def test_config_with_a_branch_for_the_memory_sees_no_times(options: dict[str, Any], time: str) -> None:
    options = options | {"long_term": "gated"}
    with pytest.raises(ConfigError, match="'gated' sees no times; set time to 'none'"):
        ModelConfig(**options, time=time)  # type: ignore[arg-type]
    assert not ModelConfig(**options, time="none").sees_times


@pytest.mark.parametrize("preset", PRESETS)
def test_config_survives_json(preset: str) -> None:
    model, train = PRESETS[preset].model, PRESETS[preset].train
    assert from_dict(ModelConfig, to_dict(model), where="here") == model
    assert from_dict(TrainConfig, to_dict(train), where="here") == train


def test_config_from_dict_refuses_unknown_fields() -> None:
    with pytest.raises(ConfigError, match=r"config\.json: unknown ModelConfig field depth"):
        from_dict(ModelConfig, {"depth": 3}, where="config.json")


def test_config_of_an_earlier_version_is_read_if_it_means_the_same() -> None:
    assert from_dict(ModelConfig, to_dict(ModelConfig(layers=3)) | {"residual": "gated"}, where="here") == ModelConfig(
        layers=3
    )
    with pytest.raises(ConfigError, match=r"run/config\.json: residual 'plain' is no longer supported.*; train again"):
        from_dict(ModelConfig, {"residual": "plain"}, where="run/config.json")


@pytest.mark.parametrize("config", [ModelConfig(), BaselineConfig()], ids=["dman", "baseline"])
def test_config_of_a_version_without_times_and_returns_has_neither(config: ModelConfig | BaselineConfig) -> None:
    old = {name: value for name, value in to_dict(config).items() if name not in ("time", "returns")}
    assert from_dict(type(config), old, where="here") == replace(config, time="none", returns="off")
    kept = old | {"time": "request", "returns": "on"}
    assert from_dict(type(config), kept, where="here") == replace(config, time="request", returns="on")


def test_config_of_an_earlier_version_keeps_what_the_default_was_then() -> None:
    model = from_dict(ModelConfig, {}, where="here")
    assert (model.layers, model.memory_slots, model.closed_states) == (2, 10, "full")
    train = from_dict(TrainConfig, {}, where="here")
    assert (train.abstraction_loss, train.abstraction_every, train.item_updates) == ("reads", 8, "all")
    changed = {"layers": 4, "closed_states": "int8"}
    assert from_dict(ModelConfig, changed, where="here") == replace(model, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["paper", "paper-literal"])
def test_preset_of_the_paper_keeps_its_form_whatever_the_default_is(preset: str) -> None:
    model, train = PRESETS[preset].model, PRESETS[preset].train
    assert isinstance(model, ModelConfig)
    assert (model.layers, model.memory_slots, model.closed_states) == (2, 20, "full")
    assert (train.abstraction_loss, train.abstraction_every) == ("reads", 1)


@pytest.mark.parametrize("time", ["request", "events"])
@pytest.mark.parametrize("system", ["caser", "shan", "sdm"])
def test_config_of_a_baseline_that_knows_no_times_refuses_them(system: Any, time: Any) -> None:
    with pytest.raises(ConfigError, match=f"system '{system}' sees no times; set time to 'none'") as found:
        BaselineConfig(system, time=time)
    assert found.value.parameter == "time"
    assert not BaselineConfig(system, time="none").sees_times and not BaselineConfig(system).sees_times
