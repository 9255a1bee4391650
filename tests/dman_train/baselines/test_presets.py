"""Presets of the baselines: one for each system, and each can be trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import held_out_of

from dman_train import train
from dman_train.baselines import BASELINES
from dman_train.config import BaselineConfig, TrainConfig, to_dict
from dman_train.data import TrainingData
from dman_train.presets import BASELINE_PRESETS, preset_of
from dman_train.run import open_run
from dman_train.stored_config import from_dict
from dman_train.trainer import Trainer

every_preset = pytest.mark.parametrize("name", BASELINE_PRESETS)
every_system = pytest.mark.parametrize("system", BASELINES)
ITEMS = 30


def random_data() -> TrainingData:
    random = np.random.default_rng(0)
    histories = [random.integers(0, ITEMS, length).astype(np.int32) for length in (5, 30, 100)]
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64)
    held = held_out_of(histories, np.zeros(3, np.int64))
    items = np.concatenate(histories)
    return TrainingData(items, offsets, np.zeros(len(items), np.int64), np.bincount(items, minlength=ITEMS), held)


@every_preset
@every_system
def test_preset_of_each_system_trains(name: str, system: str) -> None:
    preset = preset_of(BASELINE_PRESETS, name, system=system)
    trainer = Trainer(
        replace(preset.model, width=8), replace(preset.train, lanes=4), random_data(), torch.device("cpu")
    )
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    _, likelihood, _ = trainer.train_step()
    assert torch.isfinite(likelihood)
    moved = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert "items" in moved and len(moved) > 1


@every_preset
@every_system
def test_preset_is_of_its_system_and_survives_json(name: str, system: str) -> None:
    preset = BASELINE_PRESETS[name][system]
    assert isinstance(preset.model, BaselineConfig) and preset.model.system == system
    assert from_dict(BaselineConfig, to_dict(preset.model), where="here") == preset.model
    assert from_dict(TrainConfig, to_dict(preset.train), where="here") == preset.train


def test_batches_of_a_baseline_do_not_depend_on_the_length_of_its_sessions() -> None:
    def shapes(length: int) -> list[tuple[int, ...]]:
        model, config = BaselineConfig("shan", history=20, segment_length=length, width=8), TrainConfig(lanes=2)
        trainer = Trainer(model, config, random_data(), torch.device("cpu"))
        return [next(trainer.learner.schedule).items.shape for _ in range(8)]

    assert shapes(2) == shapes(20) and max(rows * width for rows, width in shapes(2)) == 2 * 20


@every_system
def test_paper_preset_has_the_settings_that_the_paper_names_and_does_not_average_weights(system: str) -> None:
    model, training = (preset := BASELINE_PRESETS["paper"][system]).model, preset.train
    assert (model.width, training.loss, training.negatives, training.learning_rate) == (
        128,
        "negatives-softmax",
        5,
        1e-3,
    )
    assert training.ema_decay == 0.0


def test_hpmn_has_four_slots_and_three_hops_by_default() -> None:
    model = BASELINE_PRESETS["default"]["hpmn"].model
    assert isinstance(model, BaselineConfig) and (model.layers, model.hops) == (4, 3)


def test_config_of_a_run_without_hops_is_read() -> None:
    old = {name: value for name, value in to_dict(BaselineConfig("sasrec", history=50)).items() if name != "hops"}
    assert from_dict(BaselineConfig, old, where="here") == BaselineConfig("sasrec", history=50)


@pytest.mark.parametrize("given, system", [([], "sasrec"), (["--system", "hpmn"], "hpmn")])
@pytest.mark.slow
def test_command_starts_from_the_preset_of_its_system(
    small_log: Path, tmp_path: Path, given: list[str], system: str
) -> None:
    options = ["--preset", "paper", *given, "--width", "8", "--epochs", "1", "--history", "20"]
    command = ["--data", str(small_log), "--run", str(tmp_path / "run"), "--threads", "1", *options]
    assert train.main(command, presets=BASELINE_PRESETS) == 0
    run, preset = open_run(tmp_path / "run"), BASELINE_PRESETS["paper"][system]
    assert run.model_config() == replace(preset.model, width=8, history=20)
    assert run.train_config() == replace(preset.train, epochs=1, item_updates="all")
