"""The search for training options: what may be varied, what a study keeps, and how it goes on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from dman_runtime.errors import UsageError
from dman_train.presets import BASELINE_PRESETS, PRESETS, Preset
from tools import tune

FAST = ["--width", "16", "--segment-length", "10", "--lanes", "32", "--epochs", "2", "--heads", "1"]


def run(log: Path, study: Path, *options: str) -> int:
    return tune.main(["--data", str(log), "--study", str(study), *FAST, *options])


@pytest.mark.slow
def test_study_keeps_every_trial_and_goes_on_where_it_was(
    small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, space = (
        tmp_path / "trials" / "dman",
        ["--space", "dropout=0.0:0.5", "--space", "learning_rate=1e-4:1e-2:log"],
    )
    assert run(small_log, study, *space, "--trials", "2") == 0
    first = _trials(study)
    assert run(small_log, study, *space, "--trials", "3") == 0
    trials = _trials(study)
    assert len(first) == 2 and [t.params for t in trials[:2]] == [t.params for t in first]
    assert len({t.params["dropout"] for t in trials}) == 3, "no trial is drawn twice"
    for trial in trials:
        assert 0 <= trial.params["dropout"] <= 0.5 and 1e-4 <= trial.params["learning_rate"] <= 1e-2
        assert trial.value == max(trial.intermediate_values.values()) > 0 and len(trial.intermediate_values) == 2
    best = max(trials, key=lambda t: t.value or 0)
    assert f"{best.value:.4f}, of 3 trials" in capsys.readouterr().out
    rows = [line for line in study.with_suffix(".md").read_text().splitlines() if line.startswith("| ")][2:]
    assert [int(row.split("|")[1]) for row in rows] == [
        t.number for t in sorted(trials, key=lambda t: t.value or 0, reverse=True)
    ]
    assert run(small_log, study, *space, "--trials", "3") == 0 and len(_trials(study)) == 3


@pytest.mark.slow
def test_trial_trains_with_what_was_drawn(small_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watched(tune.Trainer):
        def __init__(self, *arguments: object) -> None:
            seen.append(arguments)
            super().__init__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tune, "Trainer", Watched)
    spaces = ["--space", "layers=1,2", "--space", "weight_decay=0.1:0.2", "--space", "history=12:20"]
    assert run(small_log, tmp_path / "s", "--system", "gru4rec", *spaces, "--trials", "2") == 0
    for (model, train, *_), trial in zip(seen, _trials(tmp_path / "s"), strict=True):
        assert (model.system, model.width, train.epochs) == ("gru4rec", 16, 2)
        assert (model.layers, model.history) == (trial.params["layers"], trial.params["history"])
        assert train.weight_decay == trial.params["weight_decay"]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["shan", "hpmn"])
def test_search_starts_from_the_preset_of_the_system(
    small_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    seen: list[Preset] = []
    monkeypatch.setattr(tune, "search", lambda study, trials, spaces, preset, data: seen.append(preset))
    options = ["--system", system, "--width", "16", "--space", "dropout=0.1,0.2"]
    assert tune.main(["--data", str(small_log), "--study", str(tmp_path / "s"), *options]) == 2, "no trial"
    preset = BASELINE_PRESETS["default"][system]
    assert seen == [Preset(replace(preset.model, width=16), preset.train)]


def test_trial_that_cannot_be_built_is_kept_as_failed(
    small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small_log, tmp_path / "s", "--space", "heads=3", "--trials", "1") == 2
    assert "no trial could be finished" in capsys.readouterr().err
    assert [t.state.name for t in _trials(tmp_path / "s")] == ["FAIL"]
    assert "| fail |" in (tmp_path / "s.md").read_text()


@pytest.mark.slow
def test_study_of_another_configuration_is_refused(
    small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small_log, tmp_path / "s", "--space", "dropout=0.1,0.2", "--trials", "1") == 0
    assert run(small_log, tmp_path / "s", "--space", "dropout=0.1,0.2", "--trials", "2", "--layers", "1") == 2
    assert "another configuration or log; choose another study (--study)" in capsys.readouterr().err
    assert len(_trials(tmp_path / "s")) == 1


@pytest.mark.parametrize(
    "space",
    ["dropout", "dropout=", "speed=1:2", "dropout=0.5:0.1", "dropout=a:b", "dropout=0:1:lin", "heads=1.5:2",
     "loss=full:sampled", "loss=full,hinge", "random_first_segment=maybe", "dropout=0:0.1:log:log"],
)  # fmt: skip
def test_space_that_means_nothing_is_refused(space: str) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(space))) as error:
        tune.parse_space(space, PRESETS["default"])
    assert error.value.parameter == "space"


def test_space_of_the_other_kind_of_model_is_refused() -> None:
    assert tune.parse_space("history=10:20", BASELINE_PRESETS["default"]["shan"])[0] == "history"
    with pytest.raises(UsageError, match="config field"):
        tune.parse_space("history=10:20", PRESETS["default"])


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("dropout=0.1:0.5", {"low": 0.1, "high": 0.5, "log": False}),
        ("--learning-rate=1e-4:1e-2:log", {"low": 1e-4, "high": 1e-2, "log": True}),
        ("layers=1:4", {"low": 1, "high": 4, "log": False}),
        ("loss=full,sampled", {"choices": ("full", "sampled")}),
        ("random_first_segment=true,false", {"choices": (True, False)}),
        ("heads=1, 2, 4", {"choices": (1, 2, 4)}),
    ],
)
def test_space_draws_from_what_was_given(space: str, expected: dict[str, object]) -> None:
    name, suggest = tune.parse_space(space, PRESETS["default"])
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).ask()
    drawn = suggest(trial)
    found = json.loads(optuna.distributions.distribution_to_json(trial.distributions[name]))["attributes"]
    wanted = {key: list(value) if isinstance(value, tuple) else value for key, value in expected.items()}
    assert {key: found[key] for key in wanted} == wanted
    assert drawn in expected["choices"] if "choices" in expected else expected["low"] <= drawn <= expected["high"]  # type: ignore[operator]


def _trials(study: Path) -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(study.with_suffix(".journal")))
    return optuna.load_study(study_name=study.name, storage=optuna.storages.JournalStorage(backend)).trials
