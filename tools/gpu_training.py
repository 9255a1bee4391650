"""What `tools.gpu_check` looks at in training: losses, checkpoints and speed on CUDA, beside the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast, get_args, get_type_hints

import numpy as np
import torch

from dman_runtime.data.interactions import Interactions
from dman_runtime.errors import DmanError, UsageError
from dman_train.config import BaselineConfig, DataConfig, ModelConfig, TrainConfig
from dman_train.data import TrainingData, load, training_data
from dman_train.presets import PRESETS, decided_by
from dman_train.tensor_files import read_tensors
from dman_train.trainer import Trainer
from tools.bench.blocks import Spread
from tools.bench.report import Claim, Section

# Relative, of the losses of STEPS steps. What trains f_abs alone moves them by 3e-5.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}
STEPS = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Training:
    """What is trained. The devices are compared with the CPU."""

    log: Path
    scratch: Path
    preset: str  # whose speed is measured
    rounds: int
    steps: int  # of a round

    @cached_property
    def interactions(self) -> Interactions:
        return load(self.log, DataConfig())

    @property
    def data(self) -> TrainingData:
        return training_data(self.interactions)


def cuda_device() -> torch.device:
    """Raises UsageError where PyTorch has no CUDA."""
    if not torch.cuda.is_available():
        raise UsageError(f"PyTorch {torch.__version__} finds no CUDA device")
    return torch.device("cuda")


def forms() -> dict[str, tuple[ModelConfig | BaselineConfig, TrainConfig]]:
    """Every way through the training code that may behave differently on a GPU, small and without dropout."""
    model = cast(ModelConfig, replace(PRESETS["tiny"].model, dropout=0.0))
    paper = replace(PRESETS["paper"].model, dropout=0.0, width=32)
    train = replace(PRESETS["tiny"].train, abstraction_every=2)
    paper_train = replace(PRESETS["paper"].train, lanes=64)
    found: dict[str, tuple[ModelConfig | BaselineConfig, TrainConfig]] = {
        "default": (model, train),
        # What is hidden from some users is drawn on the device, and a GPU draws otherwise than a CPU.
        "times and returns": (
            replace(model, time="request", returns="on"),
            replace(train, seen_items="keep", times_dropout=0.0, request_dropout=0.0),
        ),
        "paper": (paper, paper_train),
        "gated": (replace(model, long_term="gated"), train),
        "memory as a queue": (replace(model, variant="fifo"), train),
        "full routing": (replace(model, routing="full"), train),
        "sampled softmax": (model, replace(train, loss="sampled", negatives=64)),
        "binary loss": (model, replace(train, loss="negatives", negatives=5)),
        "seen items as negatives": (model, replace(train, seen_items="keep")),
        "f_abs by eq. 5 only": (model, replace(train, memory_training="alternating", abstraction_loss="reads")),
        "f_abs by recall only": (model, replace(train, memory_training="alternating")),
        "gradient across 3 borders": (model, replace(train, backprop_segments=3)),
        "bfloat16": (model, replace(train, precision="bfloat16")),
        "bfloat16, paper": (paper, replace(paper_train, precision="bfloat16")),
    }
    for system in get_args(get_type_hints(BaselineConfig)["system"]):
        config = BaselineConfig(system=system, width=32, heads=1, dropout=0.0, history=50)
        found[f"baseline {system}"] = (config, replace(train, lanes=8))
    return found


def every_form(training: Training, gpu: torch.device) -> Section:
    """Losses of the first steps on CUDA and on the CPU, from the same weights, for every form of training."""
    claims, rows, data = [], [], training.data
    for name, (model, train) in forms().items():
        title, tolerance = f"{name}: loss on CUDA", TOLERANCE[train.precision]
        try:
            on_gpu, on_cpu = (losses(Trainer(model, train, data, device), STEPS) for device in (gpu, CPU))
        except Exception as error:  # a form that breaks is a result, and must not hide the others
            claims.append(Claim(title, reason(error), "that of the CPU", False))
            continue
        claims.append(_close(title, on_gpu, on_cpu, tolerance))
        rows.append([name, f"{on_gpu[-1]:.5f}", f"{on_cpu[-1]:.5f}"])
    heads = ("form", f"loss of step {STEPS} on CUDA", "on the CPU")
    return Section("Every form of training", first_line(every_form), claims, heads, rows)


def resuming(training: Training, gpu: torch.device) -> Section:
    """A checkpoint written on CUDA continues there and on the CPU with the losses of the training that went on."""
    claims, data = [], training.data
    for precision, tolerance in TOLERANCE.items():
        model = replace(PRESETS["tiny"].model, dropout=0.0)
        train = replace(PRESETS["tiny"].train, precision=precision)  # type: ignore[arg-type]
        file, whole = training.scratch / f"{precision}.pt", Trainer(model, train, data, gpu)
        losses(whole, STEPS)
        torch.save(whole.state_dict(), file)
        expected = losses(whole, STEPS)
        for device in (gpu, CPU):
            again = Trainer(model, train, data, device)
            again.load_state_dict(read_tensors(file))
            title = f"{precision}: loss after resuming on {device.type}"
            claims.append(_close(title, losses(again, STEPS), expected, tolerance))
    return Section("Resuming", first_line(resuming), claims)


def speed(training: Training, gpu: torch.device) -> Section:
    """The same training on CUDA and on the CPU, in turns."""
    preset = decided_by(training.interactions, PRESETS[training.preset])
    data, kinds = training.data, {"CUDA": gpu, "CPU": CPU}
    trainers = {
        (kind, precision): Trainer(preset.model, replace(preset.train, precision=precision), data, device)  # type: ignore[arg-type]
        for precision in TOLERANCE
        for kind, device in kinds.items()
    }
    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in trainers}
    for turn in range(training.rounds + 1):  # the first does not count
        for key, trainer in trainers.items():
            began = time.perf_counter()
            losses(trainer, training.steps)  # reads every loss, as a real run does, so it waits for the device
            if turn:
                speeds[key].append(training.steps / (time.perf_counter() - began))
    claims = []
    for precision in TOLERANCE:
        pairs = zip(speeds["CUDA", precision], speeds["CPU", precision], strict=True)
        gain = Spread(tuple(on_gpu / on_cpu for on_gpu, on_cpu in pairs))
        claims.append(Claim(f"training steps/s on CUDA by CPU, {precision}", f"{gain} times the speed"))
    events = preset.train.lanes * preset.model.segment_length
    rows = [[*key, str(Spread(tuple(values)))] for key, values in speeds.items()]
    method = (
        f"{first_line(speed)} Preset {training.preset}, up to {events} events a step, rounds of {training.steps} "
        f"steps; the CPU with {torch.get_num_threads()} threads."
    )
    found = {", ".join(key): values for key, values in speeds.items()}
    return Section("Speed of training", method, claims, ("device", "precision", "steps/s"), rows, found)


def losses(trainer: Trainer, steps: int) -> np.ndarray:
    """(steps) sums of both losses."""
    found = []
    for _ in range(steps):
        _, likelihood, abstraction = trainer.train_step()
        found.append(float(likelihood + abstraction))
    return np.array(found)


def _close(title: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> Claim:
    error = float(np.max(np.abs(found / expected - 1)))
    return Claim(title, f"off by {error:.1e}", f"<= {tolerance:g}", error <= tolerance)


def reason(error: Exception) -> str:
    """One line about a failure."""
    if isinstance(error, DmanError):
        return error.cause[:300]
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").splitlines()[0]
