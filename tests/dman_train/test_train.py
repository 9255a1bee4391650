"""The commands of dman_train: one path through all of them, and errors of one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAPER, TINY

from dman_runtime.model.bundle import read_manifest
from dman_train import evaluate, export, train
from dman_train.config import BaselineConfig, ConfigError, DataConfig, ModelConfig, TrainConfig, to_dict
from dman_train.data import load_log
from dman_train.families import family_of
from dman_train.presets import BASELINE_PRESETS, PRESETS, Preset, decided
from dman_train.run import Run, RunError, describe, open_run
from dman_train.signals import stop_requests

Main = Callable[[list[str]], int]
QUICK = ["--preset", "tiny", "--epochs", "1", "--lanes", "16", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained_bundle(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "bundle"
    assert export.main(["--run", str(trained_run), "--out", str(out)]) == 0
    return out


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of `trained_run` to damage."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def last_json(capsys: pytest.CaptureFixture[str], main: Main, *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# One path through all commands


def test_train_writes_a_run_that_describes_itself(trained_run: Path) -> None:
    run = open_run(trained_run)
    expected = {
        "config.json",
        "vocabulary.json",
        "metrics.jsonl",
        "metrics.json",
        "ranks.npz",
        "best.pt",
        "curves.png",
        "tensorboard",
    }
    assert {p.name for p in trained_run.iterdir()} == expected
    assert run.model_config() == replace(PRESETS["tiny"].model, time="request", returns="off"), "auto is decided"
    assert run.train_config() == replace(PRESETS["tiny"].train, epochs=1, lanes=16, item_updates="all")
    found = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp", "order_by": "time"}
    assert {name: run.config["data"][name] for name in found} == found
    assert (run.config["data"]["user_ids"], run.config["data"]["item_ids"]) == ("text", "integer")
    assert (run.data_config().min_user_events, run.data_config().min_item_events) == (5, 5)
    assert len(run.epochs()) == 1
    assert run.best_model().vocabulary == len(run.vocabulary().item_ids) == run.config["dataset"]["items"]


def test_train_metrics_are_those_of_the_best_epoch(trained_run: Path) -> None:
    run = open_run(trained_run)
    assert run.metrics is not None
    assert run.metrics["valid"]["ndcg@10"] == pytest.approx(run.epochs()[0]["valid/ndcg@10"])


@pytest.mark.slow
@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluate_of_run_and_bundle_agree_with_training(
    trained_run: Path, trained_bundle: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    trained = open_run(trained_run).metrics
    assert trained is not None
    of_run = last_json(capsys, evaluate.main, "--run", trained_run, "--split", split)
    of_bundle = last_json(capsys, evaluate.main, "--bundle", trained_bundle, "--split", split, "--provider", "cpu")
    assert of_run["users"] == of_bundle["users"] == trained[split]["users"] > 50
    names = [name for name in trained[split] if "@" in name]
    assert len(names) == 8
    for name in names:
        for column in (lambda result: result, lambda result: result["seen_kept"], lambda result: result["target_kept"]):
            assert column(of_run)[name] == pytest.approx(column(trained[split])[name], abs=1e-6)
            # float16 states may move one of these few users across a cut-off
            one_user = 1 / trained[split]["users"]
            assert column(of_bundle)[name] == pytest.approx(column(trained[split])[name], abs=one_user)


def test_evaluate_without_json_prints_the_table(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--run", str(trained_run)]) == 0
    out = capsys.readouterr().out
    assert "hr@10" in out and "seen excluded" in out and "{" not in out


@pytest.mark.slow
def test_export_records_data_and_metrics_of_the_run(trained_run: Path, trained_bundle: Path) -> None:
    manifest, run = read_manifest(trained_bundle), open_run(trained_run)
    assert manifest.metrics == run.metrics
    assert manifest.data == run.config["data"] | run.config["dataset"] | {"input": run.config["input"]}
    assert (manifest.data["user_ids"], manifest.data["item_ids"]) == ("text", "integer")
    assert manifest.data["input"]["events"] >= manifest.data["events"] > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("items", "choice", "warned"), [(3, "exclude", True), (3, "keep", False), (30, "exclude", False)]
)
def test_training_says_when_users_come_back_to_items(
    items: int, choice: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.csv"
    rows = [f"u{user},{(user + position) % items},{position}" for user in range(12) for position in range(12)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    assert train.main(["--data", str(log), "--run", str(tmp_path / "run"), "--seen-items", choice, *QUICK]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    cause = "75 % of the events are of items that the user has already seen"
    assert any(cause in line and "(--seen-items)" in line for line in warnings) is warned


def test_train_prints_what_it_understood_and_stores_it(
    small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    found = last_json(capsys, train.main, "--data", small_log, "--run", run, *QUICK, "--min-item-events", "30")["input"]
    assert open_run(run).config["input"] == found
    assert found["filters"]["items"] > 0 and (found["user_ids"], found["item_ids"]) == ("text", "integer")


def test_dry_run_prints_the_report_with_its_warnings_and_leaves_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, items, run = tmp_path / "log.csv", tmp_path / "items.csv", tmp_path / "run"
    rows = [f"u{user},i{(user + n) % 40},{n}" for user in range(60) for n in range(8)] + [
        f"once,i1,{n}" for n in range(100)
    ]
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows, *(f"v{n},i1,{n}" for n in range(90))]) + "\n")
    items.write_text("item_id,title\n1.0,One\n")
    command = ["--data", str(log), "--items", str(items), "--run", str(run), "--dry-run"]
    assert train.main(command) == 0
    out = capsys.readouterr().out
    assert "removed 90 users" in out
    assert "warning: filters remove 90 of 151 users" in out
    assert "warning: 0 of 40 items have a title" in out and "(--items)" in out
    found = last_json(capsys, train.main, *command)
    assert (found["path"], found["filters"]["users"]) == (str(log), 90)
    assert any("0 of 40 items have a title" in line for line in found["warnings"])
    assert not run.exists()


@pytest.mark.slow
def test_run_reads_its_log_again_as_it_was_found_although_the_columns_were_named(
    small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, run = tmp_path / "log.csv", tmp_path / "run"
    log.write_text(small_log.read_text().replace("user_id,item_id,timestamp", "who,what,when", 1))
    names = ["--user-column", "who", "--item-column", "what", "--time-column", "when"]
    trained = last_json(capsys, train.main, "--data", log, "--run", run, *QUICK, *names)
    assert open_run(run).config["data"] | {"user_column": "who", "order_by": "time"} == open_run(run).config["data"]
    found = last_json(capsys, evaluate.main, "--run", run)
    assert (found["log"], found["min_user_events"]) == ("training log", 5)
    assert {name: found[name] for name in found if "@" in name} == pytest.approx(
        {name: trained["test"][name] for name in found if "@" in name}
    )


@pytest.fixture
def older_run(run_copy: Path) -> Path:
    """A run as earlier versions wrote it: defaults as they were, and no report."""
    config = json.loads((run_copy / "config.json").read_text())
    del config["input"]
    names = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"}
    config["data"] = names | {"position_column": "position", "min_user_events": 5, "min_item_events": 5}
    (run_copy / "config.json").write_text(json.dumps(config))
    return run_copy


@pytest.mark.slow
def test_older_run_can_be_evaluated_and_exported(
    older_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_run(older_run).data_config() == DataConfig()
    metrics = open_run(older_run).metrics
    found = last_json(capsys, evaluate.main, "--run", older_run)
    assert metrics is not None and found["log"] == "training log"
    assert found["hr@10"] == pytest.approx(metrics["test"]["hr@10"], abs=1e-6)
    assert export.main(["--run", str(older_run), "--out", str(tmp_path / "bundle")]) == 0
    found = last_json(capsys, evaluate.main, "--bundle", tmp_path / "bundle", "--provider", "cpu")
    assert found["log"] == "training log"


@pytest.mark.slow
def test_older_run_resumes_on_its_log(older_run: Path, small_log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (older_run / "metrics.json").unlink()
    message = assert_one_line_error(capsys, train.main, "--data", small_log, "--run", older_run, "--resume")
    assert "has no checkpoint" in message  # so data and configuration were accepted


def run_of_before(run: Path, model: ModelConfig | BaselineConfig, *, form: str) -> None:
    """Makes `run` one of this model, and with form "earlier" one without the options that came with today's form."""
    config = json.loads((run / "config.json").read_text())
    config["model"] = to_dict(model)
    if form == "earlier":
        for option in ("hops", "time", "returns"):
            config["model"].pop(option, None)
        del config["train"]["adam_beta2"]
    (run / "config.json").write_text(json.dumps(config))
    sizes = (config["dataset"]["items"], config["dataset"]["users"])
    torch.save(family_of(model).build(model, *sizes).state_dict(), run / "best.pt")


REPAIRED: dict[str, ModelConfig | BaselineConfig] = {
    "nran": ModelConfig(variant="nran", width=8),
    "architecture 'paper'": replace(PRESETS["paper"].model, width=8),
} | {system: BaselineConfig(system, width=8, history=12) for system in ("caser", "shan", "hpmn", "sdm")}  # type: ignore[arg-type]
UNCHANGED: dict[str, ModelConfig | BaselineConfig] = {
    "dman": ModelConfig(width=8),
    "xl": ModelConfig(variant="xl", width=8),
    "gru4rec": BaselineConfig("gru4rec", width=8),
    "sasrec": BaselineConfig("sasrec", width=8),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_run_of_an_earlier_form_is_refused(
    run_copy: Path, small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run_of_before(run_copy, model := REPAIRED[name], form="now")
    assert open_run(run_copy).best_model().config == model
    run_of_before(run_copy, model, form="earlier")
    words = f"{run_copy} was trained with an earlier form of {name}, which this version does not have; train again"
    with pytest.raises(RunError, match=re.escape(words)):
        open_run(run_copy).best_model()
    assert words in assert_one_line_error(capsys, evaluate.main, "--run", run_copy)
    if isinstance(model, ModelConfig):
        assert words in assert_one_line_error(capsys, export.main, "--run", run_copy, "--out", tmp_path / "bundle")
    (run_copy / "metrics.json").unlink()
    resume = partial(train.main, presets=PRESETS if isinstance(model, ModelConfig) else BASELINE_PRESETS)
    message = assert_one_line_error(capsys, resume, "--data", small_log, "--run", run_copy, "--resume")
    assert words in message and "(--run)" in message


@pytest.mark.parametrize("name", UNCHANGED)
def test_run_of_before_is_evaluated_if_its_form_is_that_of_today(
    run_copy: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run_of_before(run_copy, UNCHANGED[name], form="earlier")
    assert open_run(run_copy).model_config() == replace(UNCHANGED[name], time="none", returns="off")
    assert last_json(capsys, evaluate.main, "--run", run_copy)["users"] > 50


def test_evaluate_on_another_log_counts_unknown_targets_and_does_not_filter(
    small_log: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = small_log.read_text().splitlines()
    users = sorted({line.split(",")[0] for line in lines[1:]})
    new = [f"{user},{100_000 + n},{1_750_000_000 + n}" for n, user in enumerate(users)]
    (tmp_path / "log.csv").write_text("\n".join([*lines, *new]) + "\n")
    found = last_json(capsys, evaluate.main, "--run", trained_run, "--data", tmp_path / "log.csv")
    assert (found["log"], found["min_user_events"]) == ("another log", 0)
    assert found["unknown_targets"] == found["users"] == len(users)
    assert found["hr@200"] == found["seen_kept"]["hr@200"] == 0.0
    assert found["input"]["unknown_items"] >= len(users)
    found = last_json(
        capsys, evaluate.main, "--run", trained_run, "--data", tmp_path / "log.csv", "--min-item-events", "5"
    )
    assert (found["log"], found["unknown_targets"], found["min_item_events"]) == ("another log", 0, 5)


def test_run_that_is_unfinished_can_be_evaluated(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_copy / "metrics.json").unlink()
    assert last_json(capsys, evaluate.main, "--run", run_copy)["users"] > 50


# Baselines


@pytest.fixture(scope="module")
def baseline_run(small_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baseline") / "run"
    assert train.main(baseline_command(small_log, path), presets=BASELINE_PRESETS) == 0
    return path


def baseline_command(log: Path, run: Path) -> list[str]:
    options = ["--system", "shan", "--history", "12", "--segment-length", "4", "--width", "8", "--lanes", "16"]
    return ["--data", str(log), "--run", str(run), "--epochs", "2", "--threads", "1", *options]


def test_baseline_run_is_a_run_like_any_other(baseline_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(baseline_run)
    config = run.model_config()
    assert isinstance(config, BaselineConfig) and (config.system, config.history) == ("shan", 12)
    assert run.metrics is not None
    found = last_json(capsys, evaluate.main, "--run", baseline_run)
    assert found["hr@10"] == pytest.approx(run.metrics["test"]["hr@10"]) and found["users"] > 50


@pytest.mark.slow
def test_baseline_resumes_to_the_weights_of_one_run(
    baseline_run: Path, small_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter(range(1, 10_000))
    monkeypatch.setattr(train, "stop_requests", lambda: nullcontext(lambda: next(asked) == 7))
    command = baseline_command(small_log, tmp_path / "run")
    assert train.main(command, presets=BASELINE_PRESETS) == 130
    monkeypatch.undo()
    assert train.main(["--resume", "--run", str(tmp_path / "run")]) == 2, "that is the other command's"
    assert train.main(["--resume", "--run", str(tmp_path / "run")], presets=BASELINE_PRESETS) == 0
    resumed, whole = (open_run(path).best_model().state_dict() for path in (tmp_path / "run", baseline_run))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("system", ["sasrec", "gru4rec", "hpmn"])
def test_baseline_run_with_times_and_returns_is_evaluated_as_it_was_ranked(
    small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    options = ["--system", system, "--history", "12", "--width", "8", "--lanes", "16", "--seen-items", "keep"]
    command = ["--data", str(small_log), "--run", str(tmp_path / "run"), "--epochs", "1", "--threads", "1", *options]
    assert train.main(command, presets=BASELINE_PRESETS) == 0
    run = open_run(tmp_path / "run")
    assert (run.config["model"]["time"], run.config["model"]["returns"]) == ("request", "on"), "auto is decided"
    assert run.metrics is not None and {"request_gaps", "returns.by_gap"} <= run.best_model().state_dict().keys()
    found = last_json(capsys, evaluate.main, "--run", run.path)
    assert found["seen_kept"]["hr@10"] == pytest.approx(run.metrics["test"]["seen_kept"]["hr@10"])


def test_baseline_with_vectors_of_users_ranks_for_no_other_log(
    baseline_run: Path, small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.csv"
    log.write_text("\n".join(small_log.read_text().splitlines()[:-50]))
    for other in (["--data", str(log)], ["--min-user-events", "1"]):
        assert evaluate.main(["--run", str(baseline_run), *other]) == 2
        assert "holds a vector for each user of its training log" in capsys.readouterr().err


def test_baseline_cannot_be_exported_or_interpreted(
    baseline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, option in ((export.main, "--out"), (evaluate.main, "--interpret")):
        assert main(["--run", str(baseline_run), option, str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.strip().count("\n") == 0
        assert not (tmp_path / "out").exists()


# Stopping and resuming


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", ["first step", "last step of an epoch"])
def test_train_stopped_at_any_step_resumes_from_the_run_alone(
    small_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--data", str(small_log), *QUICK, "--epochs", "2"]
    steps: list[int] = []
    monkeypatch.setattr(train, "stop_requests", lambda: nullcontext(lambda: bool(steps.append(1))))
    assert train.main(["--run", str(whole), *options]) == 0
    stop = 1 if stop_at == "first step" else len(steps) // 2
    asked = iter(range(1, len(steps) + 1))
    monkeypatch.setattr(train, "stop_requests", lambda: nullcontext(lambda: next(asked) == stop))
    assert train.main(["--run", str(parts), *options]) == 130
    assert (parts / "checkpoint.pt").exists()
    monkeypatch.undo()

    monkeypatch.chdir(tmp_path)  # where there is no data/log.csv, and none may be generated
    assert train.main(["--resume", "--run", str(parts)]) == 0
    assert not (tmp_path / "data").exists()
    assert not (parts / "checkpoint.pt").exists()
    expected, found = open_run(whole), open_run(parts)
    resumed = found.best_model().state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.best_model().state_dict().items())
    timings = ("seconds", "events_per_second")
    records = [[{k: v for k, v in e.items() if k not in timings} for e in run.epochs()] for run in (expected, found)]
    assert records[0] == records[1]


def test_train_stops_at_once_when_interrupted_twice() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# Errors of one line


def assert_one_line_error(capsys: pytest.CaptureFixture[str], main: Main, *arguments: str | Path) -> str:
    """Runs a command that must fail and returns its message."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    return err


BAD_OPTIONS = [
    (["--epochs", "0"], "epochs"),
    (["--epochs", "many"], "epochs"),
    (["--width", "30", "--heads", "4"], "heads"),
    (["--dropout", "1.5"], "dropout"),
    (["--learning-rate", "nan"], "learning_rate"),
    (["--loss", "hinge"], "--loss"),
    (["--memory-training", "alternating", "--backprop-segments", "3"], "backprop_segments"),
    (["--architecture", "paper", "--heads", "2"], "heads"),
    (["--seed", "-1"], "seed"),
    (["--threads", "-1"], "--threads"),
    (["--preset", "huge"], "--preset"),
    (["--no-such-option"], "--no-such-option"),
    (["--user-column", "customer"], "customer"),
    (["--item-column", "product"], "product"),
    (["--time-column", "when"], "when"),
    (["--position-column", "place"], "place"),
    (["--min-user-events", "100000"], "100000"),
    (["--min-item-events", "-1"], "min_item_events"),
]


@pytest.mark.parametrize(("options", "named"), BAD_OPTIONS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_train_names_the_bad_option_and_leaves_no_run(
    small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    run = tmp_path / "run"
    message = assert_one_line_error(capsys, train.main, "--data", small_log, "--run", run, *QUICK, *options)
    assert named in message
    assert not run.exists()


@pytest.mark.parametrize("content", [None, b"", b"user_id,item_id\n", b"\xff\xfe\x00", b"user_id,item_id\na,1\n"])
def test_train_refuses_a_log_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    log, run = tmp_path / "log.csv", tmp_path / "run"
    if content is not None:
        log.write_bytes(content)
    assert str(log) in assert_one_line_error(capsys, train.main, "--data", log, "--run", run, *QUICK)
    assert not run.exists()


def test_train_refuses_a_log_without_anything_to_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, run = tmp_path / "log.csv", tmp_path / "run"
    log.write_text("user_id,item_id,timestamp\n" + "".join(f"u{u},{i},{i}\n" for u in range(4) for i in range(3)))
    options = [*QUICK, "--min-user-events", "0", "--min-item-events", "0"]
    assert "longer log" in assert_one_line_error(capsys, train.main, "--data", log, "--run", run, *options)
    assert not run.exists()


def test_train_refuses_missing_titles(small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--data", small_log, "--items", tmp_path / "none.csv", "--run", tmp_path / "run", *QUICK]
    assert "none.csv" in assert_one_line_error(capsys, train.main, *command)


def test_run_says_on_which_card_it_was_trained(small_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, interactions = load_log(small_log, DataConfig())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    described = partial(
        describe, ModelConfig(), TrainConfig(), DataConfig(), path=small_log, interactions=interactions,
        input_report=log.report, command=[],
    )  # fmt: skip
    assert described(device=torch.device("cuda"))["versions"]["gpu"] == "NVIDIA H200"
    assert "gpu" not in described(device=torch.device("cpu"))["versions"]


def test_train_keeps_an_existing_run(small_log: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in trained_run.rglob("*")}
    message = assert_one_line_error(capsys, train.main, "--data", small_log, "--run", trained_run, *QUICK)
    assert "holds a run already" in message
    assert {p: p.stat().st_mtime_ns for p in trained_run.rglob("*")} == before


def test_train_keeps_a_foreign_directory(small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        message = assert_one_line_error(capsys, train.main, "--data", small_log, "--run", path, *QUICK)
        assert "is not a run" in message
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_train_without_the_asked_device_leaves_no_run(
    small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", small_log, "--run", tmp_path / "run", *QUICK, "--device", "cuda"]
    assert "choose auto or cpu (--device)" in assert_one_line_error(capsys, train.main, *command)
    assert not (tmp_path / "run").exists()


def test_resume_of_a_finished_run_is_refused(
    small_log: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", small_log, "--run", trained_run, "--resume"]
    assert "is finished" in assert_one_line_error(capsys, train.main, *command)


def test_resume_of_no_run_is_refused(small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--data", small_log, "--run", tmp_path / "none", "--resume"]
    assert "is not a run" in assert_one_line_error(capsys, train.main, *command)


def test_resume_with_other_options_or_data_is_refused(
    small_log: Path, run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_copy / "metrics.json").unlink()
    command = ["--data", small_log, "--run", run_copy, "--resume"]
    assert "own configuration" in assert_one_line_error(capsys, train.main, *command, "--epochs", "9")
    assert "has no checkpoint" in assert_one_line_error(capsys, train.main, *command)
    other = tmp_path / "other.csv"
    other.write_text("\n".join(small_log.read_text().splitlines()[:-50]))
    assert "is not the data" in assert_one_line_error(capsys, train.main, *command, "--data", other)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04" + bytes(100)])
def test_resume_from_a_damaged_checkpoint_is_refused(
    small_log: Path, run_copy: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (run_copy / "metrics.json").unlink()
    (run_copy / "checkpoint.pt").write_bytes(content)
    command = ["--data", small_log, "--run", run_copy, "--resume"]
    assert "checkpoint.pt cannot be read" in assert_one_line_error(capsys, train.main, *command)


@pytest.mark.parametrize(
    "state", [{}, {"ranks": [None], "model": {"items": torch.zeros(3, 4)}}], ids=["empty", "other"]
)
def test_resume_from_a_checkpoint_of_another_model_is_refused(
    small_log: Path, run_copy: Path, capsys: pytest.CaptureFixture[str], state: dict[str, Any]
) -> None:
    (run_copy / "metrics.json").unlink()
    torch.save(state, run_copy / "checkpoint.pt")
    command = ["--data", small_log, "--run", run_copy, "--resume"]
    assert "checkpoint.pt does not fit config.json" in assert_one_line_error(capsys, train.main, *command)


@pytest.mark.parametrize("main", [evaluate.main, export.main], ids=["evaluate", "export"])
def test_commands_refuse_what_is_no_run(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        assert "is not a run" in assert_one_line_error(capsys, main, "--run", path)


DAMAGES: dict[str, tuple[str, bytes | None]] = {
    "config that is no JSON": ("config.json", b"{"),
    "config that is no object": ("config.json", b"3"),
    "config without model": ("config.json", b"{}"),
    "config that is no text": ("config.json", b"\xff\xfe"),
    "no vocabulary": ("vocabulary.json", None),
    "vocabulary that is no JSON": ("vocabulary.json", b"{"),
    "vocabulary without ids": ("vocabulary.json", b"{}"),
    "no weights": ("best.pt", None),
    "empty weights": ("best.pt", b""),
    "weights that are text": ("best.pt", b"weights"),
    "weights that are cut": ("best.pt", b"PK\x03\x04" + bytes(100)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_export_of_a_damaged_run_names_the_file(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    name, content = DAMAGES[damage]
    (run_copy / name).unlink()
    if content is not None:
        (run_copy / name).write_bytes(content)
    message = assert_one_line_error(capsys, export.main, "--run", run_copy, "--out", tmp_path / "bundle")
    assert str(run_copy) in message
    assert not (tmp_path / "bundle").exists()


def test_export_of_weights_of_another_model_is_refused(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run_copy / "config.json").read_text())
    config["model"]["layers"] = 3
    (run_copy / "config.json").write_text(json.dumps(config))
    assert str(run_copy) in assert_one_line_error(capsys, export.main, "--run", run_copy, "--out", tmp_path / "bundle")


def test_export_keeps_a_foreign_directory(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    message = assert_one_line_error(capsys, export.main, "--run", trained_run, "--out", tmp_path)
    assert "is not a bundle" in message
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_evaluate_refuses_run_and_bundle_together(
    trained_run: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line_error(capsys, evaluate.main, "--run", trained_run, "--bundle", tiny_bundle)


def test_evaluate_refuses_what_is_no_bundle_and_a_missing_log(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a bundle" in assert_one_line_error(capsys, evaluate.main, "--bundle", tmp_path)
    command = ["--bundle", tiny_bundle, "--data", tmp_path / "none.csv"]
    assert "none.csv" in assert_one_line_error(capsys, evaluate.main, *command)


def test_evaluate_of_a_bundle_without_data_asks_for_it(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data" in assert_one_line_error(capsys, evaluate.main, "--bundle", tiny_bundle)


def test_open_run_errors_carry_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"train one with python -m dman_train\.train") as error:
        open_run(tmp_path)
    assert error.value.parameter == "run"
    with pytest.raises(RunError, match="finish an epoch of training first"):
        Run(tmp_path).best_model()


# Options and variables


def configs(*options: str) -> dict[str, Any]:
    """All config fields that a command line and the environment give, by name."""
    arguments = train.parser().parse_args(list(options))
    parts = train._configs(arguments, PRESETS[arguments.preset])
    return {f.name: getattr(part, f.name) for part in parts for f in fields(part)}


OTHER: dict[str, Any] = {
    "architecture": "paper", "variant": "xl", "routing": "full", "routing_softmax": "primaries",
    "loss": "sampled", "memory_training": "alternating", "random_first_segment": False, "long_term": "gated",
    "abstraction_every": 1, "epochs": 9, "seen_items": "keep",
    "backprop_segments": 2, "dropout": 0.5, "abstraction_weight": 0.25, "learning_rate": 0.5,
    "abstraction_learning_rate": 0.5, "precision": "bfloat16", "final_learning_rate": 0.5, "weight_decay": 0.5,
    "gradient_clip": 0.5, "user_column": "u", "item_column": "i", "time_column": "t", "position_column": "p",
    "heads": 1, "ema_decay": 0.5, "adam_beta2": 0.5, "order_by": "file", "time_unit": "ms", "user_ids": "text",
    "item_ids": "text", "exact_repeats": "keep", "format": "jsonl", "separator": ";", "quote": "none", "header": False,
    "encoding": "latin-1", "bad_rows": "skip", "time": "events", "returns": "on", "request_dropout": 0.5,
    "times_dropout": 0.5, "abstraction_loss": "reads", "closed_states": "full", "item_updates": "rows",
}  # fmt: skip
NEEDS = {"architecture": {"heads": 1, "long_term": "gated"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.name for c in (ModelConfig, TrainConfig, DataConfig) for f in fields(c)])
def test_option_and_variable_reach_the_field(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = OTHER.get(name, 8)
    before = configs()
    assert before[name] != value
    expected = before | NEEDS.get(name, {}) | {name: value}
    given = NEEDS.get(name, {}) | {name: value}
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in given.items() if not isinstance(v, bool)]
    flags += [f"--{'' if v else 'no-'}{n.replace('_', '-')}" for n, v in given.items() if isinstance(v, bool)]
    assert configs(*flags) == expected
    for n, v in given.items():
        monkeypatch.setenv(f"DMAN_{n.upper()}", str(v).lower() if isinstance(v, bool) else str(v))
    assert configs() == expected


@pytest.mark.parametrize(
    ("model", "seen_items", "timed", "expected"),
    [
        (TINY, "keep", True, ("request", "on")),
        (TINY, "keep", False, ("none", "on")),
        (TINY, "exclude", True, ("request", "off")),
        (TINY, "keep-target", True, ("request", "off")),
        (replace(TINY, long_term="gated"), "keep", True, ("none", "on")),
        (PAPER, "keep", True, ("none", "off")),
        (replace(TINY, time="events", returns="off"), "keep", True, ("events", "off")),
        (replace(TINY, time="none", returns="on"), "exclude", True, ("none", "on")),
        (BaselineConfig("sasrec"), "keep", True, ("request", "on")),
        (BaselineConfig("gru4rec"), "exclude", True, ("request", "off")),
        (BaselineConfig("hpmn"), "keep", False, ("none", "on")),
        (BaselineConfig("caser"), "keep", True, ("none", "off")),
        (BaselineConfig("shan"), "keep", True, ("none", "off")),
        (BaselineConfig("sdm"), "keep", True, ("none", "off")),
        (BaselineConfig("sdm", returns="on"), "exclude", True, ("none", "on")),
        (BaselineConfig("hpmn", time="events", returns="off"), "keep", True, ("events", "off")),
        (BASELINE_PRESETS["paper"]["sasrec"].model, "keep", True, ("none", "off")),
        (PRESETS["paper"].model, "keep", True, ("none", "off")),
    ],
)
def test_log_and_ranking_decide_whether_times_and_returns_are_seen(
    model: ModelConfig | BaselineConfig, seen_items: Any, timed: bool, expected: tuple[str, str]
) -> None:
    found = decided(Preset(model, TrainConfig(seen_items=seen_items)), has_times=timed, events=1, items=1).model
    assert (found.time, found.returns) == expected
    assert replace(found, time=model.time, returns=model.returns) == model, "nothing else changes"


@pytest.mark.parametrize(
    ("events", "model", "lanes"),
    [
        (1, ModelConfig(), 8),
        (50_000, ModelConfig(), 24),
        (100_000, ModelConfig(segment_length=10), 96),
        (10**9, ModelConfig(), 128),
        (50_000, BaselineConfig("shan", segment_length=2), 24),
    ],
)
def test_size_of_the_log_decides_lanes_unless_they_are_given(
    events: int, model: ModelConfig | BaselineConfig, lanes: int
) -> None:
    for given, expected in ((0, lanes), (5, 5)):
        found = decided(Preset(model, TrainConfig(lanes=given)), has_times=True, events=events, items=100).train
        assert found == TrainConfig(lanes=expected, item_updates="all")


@pytest.mark.parametrize(
    ("items", "model", "train", "expected"),
    [
        (50_000, ModelConfig(), TrainConfig(loss="sampled"), "all"),
        (50_001, ModelConfig(), TrainConfig(), "rows"),
        (10**6, ModelConfig(), TrainConfig(loss="negatives"), "rows"),
        (10**6, ModelConfig(), TrainConfig(loss="full"), "all"),
        (10**6, ModelConfig(), TrainConfig(weight_decay=0.1), "all"),
        (10**6, ModelConfig(), TrainConfig(item_updates="all"), "all"),
        (100, ModelConfig(), TrainConfig(loss="sampled", item_updates="rows"), "rows"),
        (10**6, BaselineConfig(), TrainConfig(), "all"),
    ],
)
def test_size_of_the_catalogue_decides_how_the_item_table_is_trained(
    items: int, model: ModelConfig | BaselineConfig, train: TrainConfig, expected: str
) -> None:
    assert decided(Preset(model, train), has_times=True, events=10, items=items).train.item_updates == expected


def test_option_wins_over_variable_and_variable_over_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs("--preset", "tiny")["epochs"] == 8 and configs("--preset", "paper")["epochs"] == 30
    monkeypatch.setenv("DMAN_EPOCHS", "3")
    assert configs("--preset", "tiny")["epochs"] == 3
    assert configs("--preset", "tiny", "--epochs", "5")["epochs"] == 5
    monkeypatch.setenv("DMAN_PRESET", "tiny")
    assert configs()["width"] == 32


@pytest.mark.slow
def test_variables_train_a_run(small_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"PRESET": "tiny", "EPOCHS": "2", "LANES": "32", "DATA": str(small_log), "RUN": str(tmp_path / "run")}
    for name, value in values.items():
        monkeypatch.setenv(f"DMAN_{name}", value)
    assert train.main(["--threads", "1"]) == 0
    run = open_run(tmp_path / "run")
    assert (len(run.epochs()), run.train_config().lanes) == (2, 32)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DMAN_EPOCHS", "many"),
        ("DMAN_EPOCHS", "0"),
        ("DMAN_LOSS", "hinge"),
        ("DMAN_RANDOM_FIRST_SEGMENT", "perhaps"),
        ("DMAN_PRESET", "huge"),
        ("DMAN_THREADS", "few"),
    ],
)
def test_bad_variable_is_named(
    small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    variable: str, value: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    message = assert_one_line_error(capsys, train.main, "--data", small_log, "--run", tmp_path / "run")
    assert variable.removeprefix("DMAN_") in message.upper() and value in message


def test_bad_config_values_raise_config_error_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="epochs"):
        configs("--epochs", "0")
