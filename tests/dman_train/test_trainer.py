"""The training loop: resuming, several processes, learning at all, and that every setting does something.

Run as a script under torchrun, this file is one rank of the tests of several processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import PAPER, RANKING_OF_SEEN_ITEMS, ROOT, TIMED, TINY
from network_hosts import INTERFACE, two_hosts

from dman_runtime.data.evaluation import RANKINGS, HeldOut, Ranking, metrics
from dman_train import distributed, train
from dman_train.config import BaselineConfig, ConfigError, ModelConfig, TrainConfig
from dman_train.data import TrainingData
from dman_train.model import DMAN
from dman_train.replay import replay
from dman_train.run import Run, RunError, open_run
from dman_train.tensor_files import read_tensors
from dman_train.trainer import Trainer

CPU = torch.device("cpu")
ITEMS = 40
CONFIG = TrainConfig(
    lanes=8,
    abstraction_loss="reads",
    abstraction_every=2,
    warmup_steps=3,
    epochs=3,
    learning_rate=5e-3,
    abstraction_learning_rate=5e-3,
)


def data_of(histories: list[np.ndarray], vocabulary: int) -> TrainingData:
    """The last event of each history is held out for validation."""
    training = [history[:-1] for history in histories]
    items = np.concatenate(training).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in training])]).astype(np.int64)
    targets = np.array([history[-1] for history in histories], np.int64)
    random = np.random.default_rng(1)
    times = [10**9 + np.cumsum(random.geometric(1e-4, len(history))) for history in histories]
    validation = HeldOut(
        np.arange(len(histories)),
        training,
        targets,
        [moments[:-1] for moments in times],
        np.array([moments[-1] for moments in times]),
    )
    counts = np.bincount(items, minlength=vocabulary)
    return TrainingData(items, offsets, np.concatenate(validation.times), counts, validation)


def random_data(items: int = ITEMS) -> TrainingData:
    random = np.random.default_rng(0)
    return data_of([random.integers(0, items, length) for length in random.integers(4, 40, 30)], items)


def trained(model: ModelConfig, config: TrainConfig, steps: int) -> Trainer:
    trainer = Trainer(model, config, random_data(), CPU)
    for _ in range(steps):
        trainer.train_step()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of the model that is trained and of the one that training gives."""
    models = {"model": trainer.model, "result": trainer.result}
    return {f"{of}.{name}": tensor.clone() for of, m in models.items() for name, tensor in m.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Resuming


class _Interrupt(Exception):
    pass


def _saving_at(trainer: Trainer, step: int, path: Path) -> Callable[[], None]:
    """An `on_step` that saves and stops in the middle of an epoch."""

    def on_step() -> None:
        if trainer.step == step:
            torch.save(trainer.state_dict(), path)
            raise _Interrupt

    return on_step


BY_ROWS = replace(CONFIG, item_updates="rows", loss="sampled", negatives=16, abstraction_loss="recall")
SETTINGS = {
    "full": CONFIG,
    "weights-themselves": replace(CONFIG, ema_decay=0.0),
    "sampled-joint": replace(CONFIG, loss="sampled", negatives=16, memory_training="joint", backprop_segments=2),
    "negatives": replace(CONFIG, loss="negatives", negatives=3, weight_decay=0.01),
}
RESUMED: dict[str, tuple[ModelConfig | BaselineConfig, TrainConfig]] = {
    name: (TINY, config) for name, config in SETTINGS.items()
} | {
    "times-and-returns": (TIMED, replace(CONFIG, seen_items="keep", request_dropout=0.3)),
    "recall": (TINY, replace(CONFIG, abstraction_loss="recall")),
    "rows": (TINY, BY_ROWS),
    "rows-times-and-returns": (TIMED, replace(BY_ROWS, seen_items="keep", ema_decay=0.0)),
}
BASELINE = BaselineConfig(history=12, width=16, time="request", returns="on")
RESUMED |= {
    f"times-and-returns-{system}": (
        replace(BASELINE, system=system),  # type: ignore[arg-type]
        replace(CONFIG, lanes=2, seen_items="keep", request_dropout=0.3),
    )
    for system in ("sasrec", "gru4rec", "hpmn")
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "config"), RESUMED.values(), ids=RESUMED.keys())
def test_trainer_resumed_from_a_checkpoint_gives_bit_identical_weights(
    model: ModelConfig | BaselineConfig, config: TrainConfig, tmp_path: Path
) -> None:
    data, file = random_data(), tmp_path / "checkpoint.pt"
    through = Trainer(model, config, data, CPU)
    expected = [through.train_epoch(on_step=lambda: None, progress=False) for _ in range(2)]

    first = Trainer(model, config, data, CPU)
    one_epoch = first.train_epoch(on_step=lambda: None, progress=False)
    with pytest.raises(_Interrupt):
        first.train_epoch(on_step=_saving_at(first, first.step + 5, file), progress=False)
    assert first.events < 2 * first.schedule.events, "interrupted within the second epoch"

    second = Trainer(model, replace(config, seed=99), data, CPU)  # nothing of its own start may survive
    second.config = config
    second.load_state_dict(read_tensors(file))
    found = [one_epoch, second.train_epoch(on_step=lambda: None, progress=False)]
    assert same_bits(weights(second), weights(through))
    for name in ("loss", "abstraction_loss", "valid/ndcg@10", "learning_rate"):
        assert [epoch[name] for epoch in found] == [epoch[name] for epoch in expected], name


@pytest.mark.slow
def test_trainer_with_one_seed_is_deterministic() -> None:
    assert same_bits(weights(trained(TINY, CONFIG, 6)), weights(trained(TINY, CONFIG, 6)))


def test_trainer_refuses_a_checkpoint_of_other_processes() -> None:
    trainer = trained(TINY, CONFIG, 1)
    state = trainer.state_dict()
    state["ranks"] = state["ranks"] * 2
    with pytest.raises(ConfigError, match="2 processes"):
        trainer.load_state_dict(state)


@pytest.mark.slow
def test_train_stopped_by_sigterm_and_resumed_gives_bit_identical_weights(small_log: Path, tmp_path: Path) -> None:
    options = ["--preset", "tiny", "--lanes", "8", "--epochs", "3", "--threads", "1"]
    options += ["--device", "cpu", "--data", str(small_log)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = [sys.executable, "-m", "dman_train.train", "--run", str(parts), *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("epoch 1:" in line for line in process.stderr), "the first epoch ended"
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "continue with --resume" in rest and "Traceback" not in rest
    assert (parts / "checkpoint.pt").exists() and not (parts / "metrics.json").exists()

    resume = ["--run", str(parts), "--data", str(small_log), "--resume", "--threads", "1", "--device", "cpu"]
    assert train.main(resume) == 0
    assert train.main(["--run", str(whole), *options]) == 0
    assert same_bits(*(torch.load(path / "best.pt", weights_only=True) for path in (whole, parts)))
    found, expected = Run(parts).epochs(), Run(whole).epochs()
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for timing in ("seconds", "events_per_second"):
            ours.pop(timing), theirs.pop(timing)
        assert ours == theirs
    assert Run(parts).metrics["test"] == Run(whole).metrics["test"]  # type: ignore[index]


def test_checkpoints_take_at_most_a_twentieth_of_the_time() -> None:
    assert not train.checkpoint_due(119, took=1) and train.checkpoint_due(121, took=1)
    assert not train.checkpoint_due(599, took=30) and train.checkpoint_due(601, took=30)


# Damaged runs


@pytest.mark.parametrize("content", ["3", "null", "[]", "{}", "{"])
def test_open_run_refuses_a_config_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json"):
        open_run(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "[]", "3", '{"items": 3}'])
def test_run_with_a_damaged_vocabulary_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(RunError, match=r"vocabulary\.json is damaged .*train again"):
        Run(tmp_path).vocabulary()


@pytest.mark.parametrize("weights", ["of three layers", "of nothing", "of a list"])
def test_run_with_weights_of_another_model_names_the_file(trained_run: Path, tmp_path: Path, weights: str) -> None:
    shutil.copy(trained_run / "config.json", tmp_path)
    other = DMAN(replace(Run(trained_run).model_config(), layers=3), ITEMS).state_dict()
    torch.save({"of three layers": other, "of nothing": {}, "of a list": []}[weights], tmp_path / "best.pt")
    with pytest.raises(RunError, match=r"best\.pt does not fit config\.json; .*train again") as error:
        Run(tmp_path).best_model()
    assert "\n" not in str(error.value)


# By rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "config"),
    [
        (TINY, BY_ROWS),
        (TINY, replace(BY_ROWS, ema_decay=0.0, gradient_clip=0.1)),
        (TINY, replace(BY_ROWS, loss="negatives", negatives=3, gradient_clip=0.0, abstraction_loss="reads")),
        (TIMED, replace(BY_ROWS, loss="negatives-softmax", negatives=3, seen_items="keep")),
    ],
    ids=["sampled", "clipped", "negatives", "returns"],
)
def test_trainer_by_rows_gives_the_weights_of_the_whole_table(model: ModelConfig, config: TrainConfig) -> None:
    """Of 900 items, a step uses up to 100, and the log 545: most rows are often left alone, and some always."""
    model = replace(model, dropout=0.0)
    trainers = [Trainer(model, replace(config, item_updates=kind), random_data(900), CPU) for kind in ("rows", "all")]
    first, moved = weights(trainers[0]), []
    for trainer in trainers:
        torch.manual_seed(1)  # of the times that are hidden
        for _ in range(12):
            trainer.train_step()
        after = weights(trainer)
        moved.append({name: (after[name] - first[name]).double() for name in first})
    assert moved[1]["model.items"].abs().amax(1).gt(1e-3).float().mean() > 0.3
    assert moved[1]["model.items"].abs().amax(1).eq(0).any()
    ours, theirs = moved
    for name in first:  # single weights with gradients of nearly zero may differ: Adam divides by their size
        assert (ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name
    ranks = [trainer.validate().seen_kept for trainer in trainers]
    assert np.array_equal(*ranks)


def test_trainer_by_rows_never_makes_a_gradient_of_the_whole_table() -> None:
    trainer = trained(TINY, BY_ROWS, 1)
    assert trainer.model.items.grad is None
    scored, read = trainer.model.table_in_training()(torch.tensor([3, 3])), trainer.model.embed(torch.tensor([7]))
    (scored.sum() + read.sum()).backward()
    assert trainer.model.items.grad.is_sparse
    assert trainer.model.items.grad.coalesce().indices().tolist() == [[3, 7]]


def test_trainer_refuses_rows_with_the_full_softmax() -> None:
    with pytest.raises(ConfigError, match="the full softmax uses all items"):
        Trainer(TINY, replace(CONFIG, item_updates="rows"), random_data(), CPU)


# Several processes

DISTRIBUTED = {
    "full": replace(CONFIG, memory_training="joint"),
    "sampled": replace(CONFIG, loss="sampled", negatives=16),
    "negatives": replace(CONFIG, loss="negatives", negatives=3),
    "rows": replace(BY_ROWS, abstraction_loss="reads"),  # recall is over the items of each process
    "xl": CONFIG,
}


def _distributed_results(names: Iterable[str]) -> dict[str, Any]:
    """Weights after 12 steps without dropout and ranks of the validation targets, by name of the setting."""
    results: dict[str, Any] = {}
    for name in names:
        model = replace(TINY, dropout=0.0, variant="xl" if name == "xl" else "dman")
        trainer = trained(model, DISTRIBUTED[name], 12)
        results[name] = {"weights": weights(trainer), "ranks": np.sort(trainer.validate().seen_kept)}
    return results


def _start_ranks(command: Sequence[str], directory: Path, names: Iterable[str], **variables: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [*command, __file__, str(directory), *names],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _check_ranks(launched: Sequence[subprocess.Popen], directory: Path, names: Iterable[str]) -> None:
    """Two processes end well, have the same weights to the bit, and those of one process."""
    try:
        for process in launched:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in launched:
            process.kill()
            process.wait()
    first, second = (torch.load(directory / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name, expected in _distributed_results(names).items():
        assert same_bits(first[name]["weights"], second[name]["weights"])
        for weight, value in expected["weights"].items():
            # Adam divides by the size of a gradient: where that is nearly zero, the order of sums shows. A weight has
            # moved by up to 12 steps of 5e-3.
            torch.testing.assert_close(first[name]["weights"][weight], value, rtol=0, atol=1e-4)
        assert np.array_equal(first[name]["ranks"], expected["ranks"])


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    _check_ranks([_start_ranks(command, tmp_path, DISTRIBUTED)], tmp_path, DISTRIBUTED)


@pytest.mark.slow
def test_two_hosts_give_the_weights_of_one_process(tmp_path: Path) -> None:
    """As docs/data.md says it is done; the hosts are network namespaces."""
    with two_hosts() as hosts:
        launched = []
        for number, host in enumerate(hosts):
            place = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
            meeting = ["--master-addr", hosts[0].address, "--master-port", "29500"]
            command = host.command(*TORCHRUN, *place, *meeting)
            launched.append(_start_ranks(command, tmp_path, ["full"], GLOO_SOCKET_IFNAME=INTERFACE))
        _check_ranks(launched, tmp_path, ["full"])


def test_training_refuses_hosts_that_read_different_logs(
    small_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, "of another log"])
    assert train.main(["--data", str(small_log), "--run", str(tmp_path / "run")]) == 2
    told = "is not the same log for all processes; give every host the same file (--data)"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_trainer_refuses_lanes_that_processes_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="lanes 8 cannot be shared among 3"):
        Trainer(TINY, CONFIG, random_data(), CPU)


# Learning


def cycle_data() -> TrainingData:
    """Every user walks the same cycle of 12 items from a place of their own: the next item follows from the last."""
    random = np.random.default_rng(0)
    starts, lengths = random.integers(0, 12, 40), random.integers(8, 40, 40)
    return data_of([(start + np.arange(length)) % 12 for start, length in zip(starts, lengths, strict=True)], 12)


ONE_LAYER_PAPER = replace(PAPER, layers=1, dropout=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "config"),
    [
        (TINY, replace(CONFIG, epochs=3)),
        (TINY, replace(CONFIG, epochs=3, loss="sampled", negatives=8, memory_training="joint")),
        (ONE_LAYER_PAPER, replace(CONFIG, epochs=8, loss="negatives-softmax", negatives=5)),
    ],
    ids=["full", "sampled", "paper"],
)
def test_trainer_learns_a_deterministic_sequence(model: ModelConfig, config: TrainConfig) -> None:
    trainer = Trainer(model, replace(config, learning_rate=1e-2, seen_items="keep"), cycle_data(), CPU)
    for _ in range(config.epochs):
        trainer.train_epoch(on_step=lambda: None, progress=False)
    assert (trainer.validate().seen_kept == 1).mean() > 0.95


def planted_histories(seed: int) -> list[np.ndarray]:
    """A key (0-3), eight events of noise, a question (12), and the answer that the key decides (4-7)."""
    random = np.random.default_rng(seed)
    keys, noise = random.integers(0, 4, 256), random.integers(8, 12, (256, 8))
    return [np.array([key, *events, 12, 4 + key]) for key, events in zip(keys, noise, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("dman", replace(CONFIG, memory_training="alternating")),
        ("dman", replace(CONFIG, memory_training="joint", backprop_segments=2)),
        ("xl", CONFIG),
    ],
    ids=["alternating", "joint-2", "xl"],
)
def test_memory_carries_what_left_the_context(variant: str, config: TrainConfig) -> None:
    """Segments of 4 and one layer: when the question comes, the key is out of every context. Chance is 1/4."""
    model = ModelConfig(width=32, heads=2, segment_length=4, memory_slots=2, layers=1, dropout=0.0, variant=variant)
    config = replace(config, lanes=32, abstraction_every=1, epochs=16, warmup_steps=20, random_first_segment=False)
    config = replace(config, learning_rate=5e-3, abstraction_learning_rate=5e-3, seen_items="keep")
    learned = [np.append(history, 0) for history in planted_histories(seed=0)]  # the last event is not trained on
    trainer = Trainer(model, config, data_of(learned, 13), CPU)
    while trainer.events < config.epochs * trainer.schedule.events:
        trainer.train_step()
    asked = planted_histories(seed=1)
    users, _ = replay(trainer.result.eval(), [history[:-1] for history in asked])
    answers = (users @ trainer.result.item_table().T)[:, 4:8].argmax(1) + 4
    right = float((answers.numpy() == [history[-1] for history in asked]).mean())
    assert right < 0.4 if variant == "xl" else right > 0.9


def test_trainer_reports_the_step_whose_loss_is_not_finite() -> None:
    trainer = trained(TINY, CONFIG, 2)
    with torch.no_grad():
        trainer.model.slot_bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at step 3; lower the learning rate"):
        trainer.train_epoch(on_step=lambda: None, progress=False)


def test_trainer_learning_rate_warms_up_then_falls_to_the_final_share() -> None:
    trainer = Trainer(TINY, replace(CONFIG, warmup_steps=4, final_learning_rate=0.2), random_data(), CPU)
    shares = [trainer.learning_rate_share()]
    for _ in range(3):
        trainer.train_step()
        shares.append(trainer.learning_rate_share())
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=0.05)
    trainer.events = 3 * trainer.schedule.events
    assert trainer.learning_rate_share() == pytest.approx(0.2)
    trainer.events = 3 * trainer.schedule.events // 2
    assert trainer.learning_rate_share() == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_trainer_gives_a_moving_average_that_forgets_the_first_weights(decay: float) -> None:
    trainer, averaged = trained(TINY, replace(CONFIG, ema_decay=decay), 0), None
    for step in range(5):
        trainer.train_step()
        now = trainer.model.items.detach().clone()
        kept = min(decay, (1 + step) / (10 + step))
        averaged = now if averaged is None else kept * averaged + (1 - kept) * now
    torch.testing.assert_close(trainer.result.items.detach(), averaged)
    assert not torch.equal(trainer.result.items, trainer.model.items)
    with torch.no_grad():
        trainer.model.items.zero_()
    assert metrics(trainer.validate().seen_kept)["hr@10"] > 0, "validation asks the average"


def test_trainer_without_averaging_gives_the_weights_themselves() -> None:
    trainer = trained(TINY, replace(CONFIG, ema_decay=0.0), 2)
    assert trainer.result is trainer.model


def test_trainer_optimisers_part_f_abs_from_the_rest() -> None:
    trainer = trained(TINY, CONFIG, 0)
    rest, f_abs = ({id(p) for p in o.param_groups[0]["params"]} for o in trainer.optimisers)
    assert f_abs == {id(p) for n, p in trainer.model.named_parameters() if n.startswith("abstraction.")}
    assert rest == {id(p) for p in trainer.model.parameters()} - f_abs


def test_trainer_validates_against_the_ranks_of_replay() -> None:
    trainer = trained(TINY, CONFIG, 3)
    data, ranks = trainer.data.validation, trainer.validate()
    assert len(ranks.seen_kept) == len(data.targets)
    assert 0 < metrics(ranks.seen_kept)["hr@10"] < 1
    assert trainer.model.training, "validation leaves the mode as it was"


# Every setting does something


OTHER: dict[str, tuple[TrainConfig, object]] = {
    "loss": (CONFIG, "sampled"),
    "negatives": (replace(CONFIG, loss="sampled", negatives=16), 17),
    "memory_training": (CONFIG, "alternating"),
    "backprop_segments": (CONFIG, 2),
    "abstraction_loss": (CONFIG, "recall"),
    "abstraction_weight": (CONFIG, 3.0),
    "abstraction_every": (CONFIG, 3),
    "lanes": (CONFIG, 9),
    "item_updates": (replace(CONFIG, loss="sampled", negatives=16), "rows"),
    "learning_rate": (CONFIG, 1e-3),
    "abstraction_learning_rate": (CONFIG, 1e-3),
    "warmup_steps": (CONFIG, 4),
    "final_learning_rate": (CONFIG, 0.9),
    "weight_decay": (CONFIG, 0.1),
    "ema_decay": (CONFIG, 0.0),
    "adam_beta2": (CONFIG, 0.9),
    "gradient_clip": (CONFIG, 0.01),
    "precision": (CONFIG, "bfloat16"),
    "epochs": (CONFIG, 9),
    "random_first_segment": (CONFIG, False),
    "request_dropout": (CONFIG, 0.9),
    "times_dropout": (CONFIG, 0.9),
    "seen_items": (CONFIG, "exclude-from-ranking"),
    "seed": (CONFIG, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER)
def test_train_config_field_changes_the_weights(name: str) -> None:
    base, value = OTHER[name]
    model = replace(TINY, time="request") if name in ("request_dropout", "times_dropout") else TINY
    assert not same_bits(weights(trained(model, base, 6)), weights(trained(model, replace(base, **{name: value}), 6)))


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "ranking"), RANKING_OF_SEEN_ITEMS.items())
def test_seen_items_decide_what_the_epoch_is_chosen_by(choice: str, ranking: Ranking) -> None:
    trainer = trained(TINY, replace(CONFIG, seen_items=choice), 3)  # type: ignore[arg-type]
    measured, ranks = trainer.train_epoch(on_step=lambda: None, progress=False), trainer.validate()
    each = {name: metrics(ranks.of(name)) for name in RANKINGS}
    assert each["seen_kept"] != each["seen_excluded"] != each["target_kept"] != each["seen_kept"]
    assert {
        name.removeprefix("valid/"): value for name, value in measured.items() if name.startswith("valid/")
    } == each[ranking]


def test_seen_items_stay_in_the_loss_unless_they_are_excluded_from_both() -> None:
    choices = ("exclude-from-ranking", "keep-target", "keep")
    first, *others = [weights(trained(TINY, replace(CONFIG, seen_items=choice), 3)) for choice in choices]
    assert all(same_bits(first, other) for other in others)


def test_train_config_evaluation_users_limits_the_validation() -> None:
    assert len(trained(TINY, replace(CONFIG, evaluation_users=7), 0).validate().seen_kept) == 7


@pytest.mark.slow
def test_train_config_patience_stops_training_that_does_not_improve(small_log: Path, tmp_path: Path) -> None:
    options = ["--preset", "tiny", "--learning-rate", "0", "--abstraction-learning-rate", "0", "--epochs", "5"]
    for patience in (1, 2):
        path = tmp_path / str(patience)
        command = ["--data", str(small_log), "--run", str(path), *options, "--patience", str(patience)]
        assert train.main(command) == 0
        assert len(Run(path).epochs()) == 1 + patience


def test_train_config_fields_are_all_tried() -> None:
    assert set(OTHER) | {"evaluation_users", "patience"} == {f.name for f in fields(TrainConfig)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join()
    torch.save(_distributed_results(sys.argv[2:]), Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    distributed.leave()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads  # an interpreter that ends beside them can abort
