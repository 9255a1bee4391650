"""Run directories and checkpoints made to harm: each is refused in one line, and nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, held_out_of, rewrite_manifest
from hostile_bundles import VALUES

from dman_runtime.errors import DmanError, InputError
from dman_train import evaluate, export, train
from dman_train.config import BaselineConfig, ConfigError, ModelConfig, TrainConfig
from dman_train.data import TrainingData
from dman_train.presets import BASELINE_PRESETS
from dman_train.run import Run, RunError
from dman_train.tensor_files import read_tensors
from dman_train.trainer import MISFITS, Trainer
from dman_train.vocabulary import Vocabulary

CPU = torch.device("cpu")


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    """A finished run to damage."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def read_all(path: Path) -> None:
    """Reads a run as export, evaluation and reports do."""
    run = Run(path)
    run.model_config(), run.train_config(), run.data_config()
    assert run.metrics is None or run.metrics["test"] is not None
    run.epochs(), run.vocabulary(), run.best_model(), run.test_ranks("target_kept")


def refusal(path: Path) -> str:
    with pytest.raises((RunError, ConfigError)) as caught:
        read_all(path)
    return one_line(caught.value)


def one_line(error: DmanError) -> str:
    text = str(error)
    assert len(text.splitlines()) == 1 and len(text) < 500
    return text


def resumed(log: Path, run: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """The one line with which `--resume` ends."""
    (run / "metrics.json").unlink(missing_ok=True)
    capsys.readouterr()
    assert train.main(["--data", str(log), "--run", str(run), "--resume", "--threads", "1"], **options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    return err


# --- Nothing is executed.


class Command:
    """Pickled, it is a call of `os.system`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_resume_does_not_run_the_command_in_a_checkpoint(
    small_log: Path, run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int
) -> None:
    ran = tmp_path / "ran"
    torch.save({"ranks": [Command(ran)]}, run_copy / "checkpoint.pt", pickle_protocol=protocol)
    message = resumed(small_log, run_copy, capsys)
    assert "checkpoint.pt holds more than values, and was not read: it could run commands" in message
    assert not ran.exists()
    pickle.loads(pickle.dumps(Command(ran)))  # the command would have worked
    assert ran.exists()


def test_weights_do_not_run_a_command(run_copy: Path, tmp_path: Path) -> None:
    torch.save({"items": Command(tmp_path / "ran")}, run_copy / "best.pt")
    assert "best.pt holds more than values" in refusal(run_copy)
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_is_no_checkpoint(
    small_log: Path, run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_copy / "checkpoint.pt").write_bytes(pickle.dumps(Command(tmp_path / "ran")))
    assert "checkpoint.pt cannot be read" in resumed(small_log, run_copy, capsys)
    torch.save({"a": Command(tmp_path / "ran")}, run_copy / "checkpoint.pt", _use_new_zipfile_serialization=False)
    assert "checkpoint.pt cannot be read" in resumed(small_log, run_copy, capsys)
    assert not (tmp_path / "ran").exists()


def test_resume_of_a_checkpoint_with_numpy_arrays_says_what_to_do(
    small_log: Path, run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions wrote them."""
    torch.save({"schedule": {"order": np.arange(5)}}, run_copy / "checkpoint.pt")
    message = resumed(small_log, run_copy, capsys)
    assert "was written by an earlier version, and cannot be read safely; resume with the version" in message
    assert "or start again in another directory" in message


def test_checkpoint_holds_nothing_but_tensors_and_plain_values(tmp_path: Path) -> None:
    trainer = trainer_of()
    torch.save(trainer.state_dict(), tmp_path / "checkpoint.pt")
    todo: list[Any] = [read_tensors(tmp_path / "checkpoint.pt")]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list | tuple):
            todo += value.values() if isinstance(value, dict) else value
        else:
            assert isinstance(value, torch.Tensor | str | int | float | bool | None), type(value)


# --- Nothing takes more memory than the file has.


class Call:
    """Pickled, it is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    "value",
    [Call(bytearray, 1 << 42), Call(torch.FloatTensor, 1 << 42), torch.zeros(1).expand(1 << 40), torch.nn.Linear(1, 1)],
    ids=["bytes", "tensor", "one value repeated", "module"],
)
def test_tensors_that_would_take_a_terabyte_are_refused(tmp_path: Path, value: object) -> None:
    torch.save({"a": value}, tmp_path / "best.pt")
    assert (tmp_path / "best.pt").stat().st_size < 10_000
    with pytest.raises(InputError) as caught:
        read_tensors(tmp_path / "best.pt")
    one_line(caught.value)


def test_archives_that_unpack_to_more_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(1 << 20)}, stream)
    with (
        zipfile.ZipFile(stream) as plain,
        zipfile.ZipFile(tmp_path / "best.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(InputError, match=r"is not a file of torch\.save"):
        read_tensors(tmp_path / "best.pt")


@pytest.mark.parametrize("name", ["users", "items"])
def test_sizes_in_a_config_take_no_memory(run_copy: Path, name: str) -> None:
    config = json.loads((run_copy / "config.json").read_text())
    config["dataset"][name] = 1 << 40
    (run_copy / "config.json").write_text(json.dumps(config))
    if name == "items":
        refusal(run_copy)
        with pytest.raises(RunError, match=r"best\.pt does not fit config\.json"):
            Run(run_copy).best_model()
    else:
        read_all(run_copy)  # a DMAN has no table of users


@pytest.mark.slow
def test_sizes_of_a_baseline_take_no_memory(small_log: Path, tmp_path: Path) -> None:
    options = ["--system", "caser", "--history", "5", "--width", "8", "--epochs", "1", "--threads", "1"]
    run = tmp_path / "run"
    assert train.main(["--data", str(small_log), "--run", str(run), *options], presets=BASELINE_PRESETS) == 0
    config = json.loads((run / "config.json").read_text())
    config["dataset"]["users"] = 1 << 38  # 8 TiB of user embeddings
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"best\.pt does not fit config\.json"):
        Run(run).best_model()


# --- What is no file.


@pytest.mark.parametrize(
    "name", ["config.json", "vocabulary.json", "metrics.json", "metrics.jsonl", "best.pt", "ranks.npz"]
)
def test_run_with_a_pipe_or_a_folder_does_not_hang(run_copy: Path, name: str) -> None:
    (run_copy / name).unlink()
    os.mkfifo(run_copy / name)
    assert f"{name} cannot be read: it is not a regular file" in refusal(run_copy)
    (run_copy / name).unlink()
    (run_copy / name).mkdir()
    assert f"{name} cannot be read: Is a directory" in refusal(run_copy)


def test_resume_from_a_pipe_does_not_hang(small_log: Path, run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(run_copy / "checkpoint.pt")
    assert "checkpoint.pt cannot be read: it is not a regular file" in resumed(small_log, run_copy, capsys)


# --- JSON.


EDITS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model that is no object": ("config.json", lambda c: c | {"model": 3}),
    "train that is no object": ("config.json", lambda c: c | {"train": []}),
    "data that is no object": ("config.json", lambda c: c | {"data": "x"}),
    "dataset that is no object": ("config.json", lambda c: c | {"dataset": None}),
    "width as text": ("config.json", lambda c: c | {"model": c["model"] | {"width": "32"}}),
    "width as list": ("config.json", lambda c: c | {"model": c["model"] | {"width": [32]}}),
    "architecture as list": ("config.json", lambda c: c | {"model": c["model"] | {"architecture": ["plus"]}}),
    "long value": ("config.json", lambda c: c | {"model": c["model"] | {"routing": "x\n" * 10_000}}),
    "long field": ("config.json", lambda c: c | {"model": c["model"] | {"x\n" * 10_000: 1}}),
    "huge width": ("config.json", lambda c: c | {"model": c["model"] | {"width": 10**12}}),
    "column as number": ("config.json", lambda c: c | {"data": c["data"] | {"user_column": 3}}),
    "path as number": ("config.json", lambda c: c | {"dataset": c["dataset"] | {"path": 3}}),
    "path with a zero": ("config.json", lambda c: c | {"dataset": c["dataset"] | {"path": "a\0b"}}),
    "users as text": ("config.json", lambda c: c | {"dataset": c["dataset"] | {"users": "5"}}),
    "no items": ("config.json", lambda c: c | {"dataset": c["dataset"] | {"items": 0}}),
    "metrics as list": ("metrics.json", lambda m: [m]),
    "metrics without a split": ("metrics.json", lambda m: {"test": m["test"]}),
    "metrics of text": ("metrics.json", lambda m: m | {"test": "good"}),
    "vocabulary as list": ("vocabulary.json", lambda v: [v]),
    "ids as object": ("vocabulary.json", lambda v: v | {"item_ids": {}}),
    "id as number": ("vocabulary.json", lambda v: v | {"item_ids": [5, *v["item_ids"][1:]]}),
    "empty id": ("vocabulary.json", lambda v: v | {"item_ids": ["", *v["item_ids"][1:]]}),
    "id twice": ("vocabulary.json", lambda v: v | {"item_ids": [v["item_ids"][1], *v["item_ids"][1:]]}),
    "fewer items": ("vocabulary.json", lambda v: v | {"item_ids": v["item_ids"][1:], "counts": v["counts"][1:]}),
    "fewer counts": ("vocabulary.json", lambda v: v | {"counts": v["counts"][1:]}),
    "counts as text": ("vocabulary.json", lambda v: v | {"counts": "x"}),
    "negative count": ("vocabulary.json", lambda v: v | {"counts": [-1, *v["counts"][1:]]}),
    "huge count": ("vocabulary.json", lambda v: v | {"counts": [10**30, *v["counts"][1:]]}),
    "switch as text": ("vocabulary.json", lambda v: v | {"integer_item_ids": "yes"}),
    "items as list": ("vocabulary.json", lambda v: v | {"items": []}),
    "title as number": ("vocabulary.json", lambda v: v | {"items": {"5": {"title": 3, "attributes": {}}}}),
    "attribute as number": ("vocabulary.json", lambda v: v | {"items": {"5": {"title": "", "attributes": {"a": 1}}}}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_run_with_a_malformed_value_names_the_file(run_copy: Path, edit: str) -> None:
    name, change = EDITS[edit]
    content = change(json.loads((run_copy / name).read_text()))
    (run_copy / name).write_text(json.dumps(content))
    assert f"{run_copy / name}" in refusal(run_copy)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": 1, "a": 2}', '{"model": NaN}', '{"model": 1e999}', '{"model": "\\ud800"}', "1" * 9999],
)
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "metrics.jsonl", "vocabulary.json"])
def test_run_with_json_that_is_a_trap_names_the_file(run_copy: Path, name: str, text: str) -> None:
    (run_copy / name).write_text(text)
    assert f"{run_copy / name} is damaged" in refusal(run_copy)


@pytest.mark.parametrize(
    "line", ["3", "{}", '{"epoch": 1}', "[", '{"epoch":1,"loss":"x","abstraction_loss":1,"seconds":1}']
)
def test_run_with_a_malformed_epoch_names_the_file(run_copy: Path, line: str) -> None:
    (run_copy / "metrics.jsonl").write_text(line + "\n")
    assert f"{run_copy / 'metrics.jsonl'} is damaged" in refusal(run_copy)


def test_run_whose_ranks_would_take_gigabytes_is_refused(run_copy: Path) -> None:
    with np.load(run_copy / "ranks.npz") as arrays:
        changed = {name: arrays[name] for name in arrays.files} | {"lengths": np.zeros(1 << 22, np.int64)}
    np.savez_compressed(run_copy / "ranks.npz", **changed)  # type: ignore[arg-type]
    assert "ranks.npz is damaged (would take" in refusal(run_copy)


def test_run_of_a_version_without_target_kept_ranks_has_the_others(run_copy: Path) -> None:
    with np.load(run_copy / "ranks.npz") as arrays:
        former = {name: arrays[name] for name in arrays.files if not name.endswith("target_kept")}
    expected, _ = Run(run_copy).test_ranks("seen_kept")
    np.savez_compressed(run_copy / "ranks.npz", **former)  # type: ignore[arg-type]
    found, lengths = Run(run_copy).test_ranks("seen_kept")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(lengths, former["lengths"])
    assert "ranks.npz has no ranks target_kept: an earlier version wrote it; train again" in refusal(run_copy)
    np.savez_compressed(run_copy / "ranks.npz", **former, other=lengths)  # type: ignore[arg-type]
    assert "ranks.npz is damaged (does not hold exactly the arrays" in refusal(run_copy)


def test_vocabulary_survives_its_file(run_copy: Path) -> None:
    vocabulary = Run(run_copy).vocabulary()
    copy = Vocabulary.from_json(vocabulary.to_json().encode())
    assert (copy.item_ids, copy.integer_item_ids, copy.items) == (
        vocabulary.item_ids,
        vocabulary.integer_item_ids,
        vocabulary.items,
    )
    np.testing.assert_array_equal(copy.counts, vocabulary.counts)


def test_export_of_a_vocabulary_of_another_run_is_refused(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = json.loads((run_copy / "vocabulary.json").read_text())
    vocabulary["item_ids"].pop(), vocabulary["counts"].pop()
    (run_copy / "vocabulary.json").write_text(json.dumps(vocabulary))
    assert export.main(["--run", str(run_copy), "--out", str(tmp_path / "bundle")]) == 2
    assert "vocabulary.json does not fit config.json" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"user_column": 3}, "user_column is 3"),
        ({"min_user_events": "many"}, "min_user_events is 'many'"),
        ({"path": ["a"]}, "does not record its training data"),
    ],
)
def test_evaluate_of_a_bundle_with_malformed_data_settings_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], words: str
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    rewrite_manifest(bundle, data=values)
    assert evaluate.main(["--bundle", str(bundle), "--provider", "cpu"]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


# --- States of a training that do not fit.


def trainer_of(model: ModelConfig | BaselineConfig = TINY, **options: Any) -> Trainer:
    """A trainer after two steps over random histories."""
    random = np.random.default_rng(0)
    histories = [random.integers(0, 40, length) for length in random.integers(4, 30, 20)]
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])])
    items = np.concatenate(histories).astype(np.int32)
    held = held_out_of(histories, np.zeros(20, np.int64))
    config = replace(TrainConfig(lanes=4, warmup_steps=3, epochs=3, abstraction_every=1), **options)
    data = TrainingData(items, offsets, np.zeros(len(items), np.int64), np.bincount(items, minlength=40), held)
    trainer = Trainer(model, config, data, CPU)
    for _ in range(2):
        trainer.train_step()
    return trainer


Change = Callable[[dict[str, Any]], object]
MISFITTING: dict[str, Change] = {
    "no object": lambda s: s.clear(),
    "weights of another shape": lambda s: s["model"].update(items=torch.zeros(3, 4)),
    "weights as list": lambda s: s.update(model=[]),
    "no average": lambda s: s.update(average=None),
    "one optimiser": lambda s: s.update(optimisers=s["optimisers"][:1]),
    "moments of another shape": lambda s: s["optimisers"][0]["state"][0].update(exp_avg=torch.zeros(3)),
    "moments of another type": lambda s: s["optimisers"][0]["state"][0].update(
        exp_avg=s["optimisers"][0]["state"][0]["exp_avg"].double()
    ),
    "moments laid out otherwise": lambda s: s["optimisers"][0]["state"][0].update(
        exp_avg=s["optimisers"][0]["state"][0]["exp_avg"].T.contiguous().T
    ),
    "moments as list": lambda s: s["optimisers"][0]["state"].update({0: []}),
    "moments of no parameter": lambda s: s["optimisers"][0]["state"].update({10**6: s["optimisers"][0]["state"][0]}),
    "step as number": lambda s: s["optimisers"][0]["state"][0].update(step=3),
    "order of other users": lambda s: s["schedule"].update(order=s["schedule"]["order"] + 1),
    "order that is short": lambda s: s["schedule"].update(order=s["schedule"]["order"][1:]),
    "order as list": lambda s: s["schedule"].update(order=s["schedule"]["order"].tolist()),
    "user that is none": lambda s: s["schedule"].update(user=torch.full((4,), 10**9)),
    "user below all": lambda s: s["schedule"].update(user=torch.full((4,), -2)),
    "position beyond the history": lambda s: s["schedule"].update(
        position=torch.full((4,), 1000), user=torch.zeros(4, dtype=torch.int64)
    ),
    "next beyond the users": lambda s: s["schedule"].update(next=10**9),
    "next as text": lambda s: s["schedule"].update(next="1"),
    "random numbers of another kind": lambda s: s["schedule"].update(random={"bit_generator": "MT19937"}),
    "random numbers as text": lambda s: s["schedule"].update(random="PCG64"),
    "negatives that are short": lambda s: s.update(negatives=torch.zeros(5, dtype=torch.uint8)),
    "negatives as number": lambda s: s.update(negatives=5),
    "no lanes": lambda s: s["ranks"][0].update(lanes=None),
    "lanes of another width": lambda s: s["ranks"][0]["lanes"].update(memory=torch.zeros(4, 2, 4, 31)),
    "context longer than a segment": lambda s: s["ranks"][0]["lanes"].update(context_lengths=torch.full((4,), 99)),
    "negative lengths": lambda s: s["ranks"][0]["lanes"].update(absorbed_lengths=torch.full((1, 4), -1)),
    "dropout that is short": lambda s: s["ranks"][0].update(dropout=torch.zeros(5, dtype=torch.uint8)),
    "sums of another shape": lambda s: s["ranks"][0].update(sums=torch.zeros(1000)),
    "step that is negative": lambda s: s["progress"].update(step=-1),
    "epoch as text": lambda s: s["progress"].update(epoch="1"),
    "progress as list": lambda s: s.update(progress=[1, 2, 3]),
}


@pytest.mark.parametrize("change", MISFITTING)
def test_trainer_refuses_a_state_that_does_not_fit(change: str, tmp_path: Path) -> None:
    trainer = trainer_of()
    torch.save(trainer.state_dict(), tmp_path / "checkpoint.pt")
    state = read_tensors(tmp_path / "checkpoint.pt")
    MISFITTING[change](state)
    with pytest.raises(MISFITS):
        trainer.load_state_dict(state)


def test_trainer_sets_nothing_else_from_its_progress(tmp_path: Path) -> None:
    trainer = trainer_of()
    state = trainer.state_dict()
    state["progress"] |= {"model": None, "config": None}
    trainer.load_state_dict(state)
    assert trainer.model is not None and trainer.config is not None


def test_trainer_keeps_the_settings_of_its_config(tmp_path: Path) -> None:
    trainer = trainer_of()
    state = trainer.state_dict()
    for saved in state["optimisers"]:
        saved["param_groups"] = [{"lr": "x", "betas": 7, "fused": "no", "params": []}]
    trainer.load_state_dict(state)
    trainer.train_step()
    assert trainer.optimisers[0].param_groups[0]["betas"] == (0.9, 0.98)


# --- Random damage.


SEEDS = 70


def damage(value: Any, random: np.random.Generator) -> None:
    """Replaces or changes one value somewhere in a state, in place."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = keys[int(random.integers(len(keys)))]
        if not isinstance(value[key], dict | list) or random.random() < 0.15:
            break
        value = value[key]
    old, choice = value[key], int(random.integers(5))
    if isinstance(old, torch.Tensor) and old.numel() and choice < 4:
        noise = torch.from_numpy(random.integers(-3, 1000, old.shape))
        value[key] = [old[..., :-1] if old.dim() else old[None], noise.to(old.dtype), noise, old.double()][choice]
    else:
        value[key] = VALUES[int(random.integers(len(VALUES)))]


@pytest.mark.slow
@pytest.mark.parametrize("model", [TINY, BaselineConfig(system="shan", width=8, history=12)], ids=["dman", "baseline"])
def test_random_damage_of_a_checkpoint_is_refused_or_harmless(model: Any, tmp_path: Path) -> None:
    trainer, refused, worked = trainer_of(model), 0, 0
    file = tmp_path / "checkpoint.pt"
    torch.save(trainer.state_dict(), file)
    whole = file.read_bytes()
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        try:
            if seed % 2:
                content = bytearray(whole)
                for _ in range(int(random.integers(1, 6))):
                    content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
                file.write_bytes(content[: int(random.integers(len(content))) if seed % 4 == 3 else None])
            else:
                file.write_bytes(whole)
                state = read_tensors(file)
                damage(state, random)
                torch.save(state, file)
            trainer.load_state_dict(read_tensors(file))
        except InputError as error:
            assert str(file) in one_line(error)
            refused += 1
        except (ConfigError, *MISFITS):
            refused += 1
        else:
            trainer.train_step()
            worked += 1
    assert refused > 30 and worked > 5


@pytest.mark.slow
def test_random_damage_of_a_run_is_refused_or_harmless(trained_run: Path, tmp_path: Path) -> None:
    copy, refused, worked = Path(shutil.copytree(trained_run, tmp_path / "run")), 0, 0
    names = ["config.json", "vocabulary.json", "metrics.json", "metrics.jsonl", "best.pt", "ranks.npz"]
    for seed in range(120):
        random = np.random.default_rng(seed)
        name = names[seed % len(names)]
        content = bytearray((trained_run / name).read_bytes())
        for _ in range(int(random.integers(1, 6))):
            content[int(random.integers(len(content)))] = int(random.integers(256))
        (copy / name).write_bytes(content[: int(random.integers(len(content))) if seed % 5 == 4 else None])
        try:
            read_all(copy)
            worked += 1
        except (RunError, ConfigError) as error:
            assert str(copy) in one_line(error)
            refused += 1
        shutil.copy(trained_run / name, copy / name)
    assert refused > 100 and worked > 5
