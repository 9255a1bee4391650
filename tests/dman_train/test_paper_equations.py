"""Architecture "paper" against the equations of the paper, number by number: states, losses, gradients, training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import PAPER, held_out_of, random_model
from torch import Tensor

from dman_train.config import ModelConfig, TrainConfig
from dman_train.data import TrainingData
from dman_train.lane_learner import LaneLearner, LaneState
from dman_train.learner import StepInputs
from dman_train.losses import Losses
from dman_train.model import DMAN, Encoding
from dman_train.presets import PRESETS
from dman_train.replay import replay
from dman_train.trainer import Trainer

from .paper_equations import Banks, PaperDMAN, PaperTraining, Rows, Segment, User

ITEMS = 12  # few, so that negatives often equal the target
DMAN_CONFIG = replace(PAPER, width=16, dropout=0.0, routing_iterations=3)
CONFIGS = {
    "dman": DMAN_CONFIG,
    "full": replace(DMAN_CONFIG, routing="full"),
    "primaries": replace(DMAN_CONFIG, routing_softmax="primaries"),
    "full-primaries": replace(DMAN_CONFIG, routing="full", routing_softmax="primaries"),
    "shallow": replace(DMAN_CONFIG, layers=1, memory_slots=2, routing_iterations=1),
    "deep": replace(DMAN_CONFIG, layers=3, memory_slots=7, routing_iterations=2),
    "nran": replace(DMAN_CONFIG, variant="nran"),
    "nran-full": replace(DMAN_CONFIG, variant="nran", routing="full"),
    "fifo": replace(DMAN_CONFIG, variant="fifo"),
    "fifo-long": replace(DMAN_CONFIG, variant="fifo", memory_slots=7),
    "xl": replace(DMAN_CONFIG, variant="xl"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # both in float64
ROUNDED = {"rtol": 1e-5, "atol": 1e-7}  # the product sums its losses in float32
LITERAL = replace(PRESETS["paper-literal"].train, lanes=2)
RANDOM_FIRST = replace(LITERAL, random_first_segment=True)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def equations_of(model: DMAN) -> PaperDMAN:
    return PaperDMAN(model.config, dict(model.named_parameters()))


def stacked(banks: Banks) -> Tensor:
    return torch.stack([torch.stack(rows) for rows in banks])


def walk(network: PaperDMAN, segments: list[list[int]]) -> Iterator[tuple[Tensor, Rows, Tensor]]:
    """Hidden states (L, S, D), V and the memory (L, m, D) that was read, segment by segment."""
    user = User()
    for items in segments:
        done = network.process(items, user)
        memory = stacked(done.memory) if done.memory else torch.zeros(network.config.layers, 0, network.D)
        yield stacked(done.hidden), done.V, memory
        user = done.user


def random_history(length: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, ITEMS, length)


def cut(history: np.ndarray, segment: int) -> list[list[int]]:
    return [history[start : start + segment].tolist() for start in range(0, len(history), segment)]


# States


def assert_replay_equals_the_equations(model: DMAN, history: np.ndarray) -> None:
    """Hidden states and memory of every segment, and the user embedding after every event."""
    found: list[tuple[Tensor, Tensor]] = []

    def on_segment(_: Tensor, memory: Tensor, encoding: Encoding) -> None:
        found.append((encoding.hidden[0], memory[0].clone()))

    replay(model, [history], on_segment)
    users, _ = replay(model, [history[: end + 1] for end in range(len(history))])
    V: Rows = []
    expected = walk(equations_of(model), cut(history, model.config.segment_length))
    for (hidden, memory), (expected_hidden, expected_V, expected_memory) in zip(found, expected, strict=True):
        torch.testing.assert_close(hidden, expected_hidden, **EXACT)
        torch.testing.assert_close(memory, expected_memory, **EXACT)
        V += expected_V
    torch.testing.assert_close(users * model.config.width**0.5, torch.stack(V), **EXACT)


@every_config
@torch.no_grad()
def test_states_equal_the_equations(config: ModelConfig) -> None:
    """Four whole segments and three events: memory is read as learned, after one absorption and after two or more."""
    assert_replay_equals_the_equations(random_model(config, ITEMS), random_history(23))


@pytest.mark.slow
@torch.no_grad()
def test_states_of_the_preset_equal_the_equations() -> None:
    assert replace(PRESETS["paper"].model, dropout=0.0) == PRESETS["paper-literal"].model
    assert_replay_equals_the_equations(random_model(PRESETS["paper"].model, ITEMS), random_history(67))


@torch.no_grad()
def test_scores_equal_the_equations() -> None:
    model, history = random_model(DMAN_CONFIG, ITEMS), random_history(13)
    network, (users, _) = equations_of(model), replay(model, [history])
    *_, (_, V, _) = walk(network, cut(history, 5))
    expected = torch.stack([network.score(item, V[-1]) for item in range(ITEMS)])
    torch.testing.assert_close(model.item_table() @ users[0], expected, **EXACT)


# Losses and gradients


def data_of(*lengths: int) -> TrainingData:
    """Users with so many training events each."""
    items = random_history(sum(lengths)).astype(np.int32)
    nothing_held_out = held_out_of([], np.zeros(0, np.int64))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    times = np.zeros(len(items), np.int64)
    return TrainingData(items, offsets, times, np.bincount(items, minlength=ITEMS), nothing_held_out)


def segments_of(inputs: StepInputs) -> list[Segment]:
    """The real positions of each lane."""
    segments = []
    for lane, length in enumerate(inputs.lengths.tolist()):
        drawn = [[]] * length if inputs.negatives is None else inputs.negatives[lane, :length].tolist()
        items, targets = (rows[lane, :length].tolist() for rows in (inputs.items, inputs.targets))
        segments.append(Segment(items, targets, drawn, first=bool(inputs.starts[lane])))
    return segments


def gradients_of(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(weight) for weight in weights]
    return list(torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True))


def means(losses: Losses) -> tuple[Tensor, Tensor]:
    return losses.likelihood / losses.likelihood_count, losses.abstraction / losses.abstraction_count.clamp(min=1)


USERS = (24, 13, 7, 2, 16)  # training events: five segments, the last one partial, to a single one of one position


class Compared(NamedTuple):
    """One loss of one step."""

    name: str
    product: Tensor
    equation: Tensor


def compared_losses(model: DMAN, network: PaperDMAN, train: TrainConfig) -> Iterator[Compared]:
    """Eight steps with fixed weights."""
    learner, state = LaneLearner(model, train, data_of(*USERS)), LaneState.empty(model, train.lanes, 1)
    training = PaperTraining(network, users=train.lanes, loss=train.loss, beta2=0.999, clip=0.0)
    for _ in range(8):
        inputs = learner.inputs(next(learner.schedule))
        losses, state = learner.step(inputs, state)
        for name, product, equation in zip(
            ("eq. 9", "eq. 5"), means(losses), training.losses(segments_of(inputs)), strict=True
        ):
            yield Compared(name, product, equation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "train"),
    [
        *((config, LITERAL) for config in CONFIGS.values()),
        *((CONFIGS[name], RANDOM_FIRST) for name in ("dman", "full-primaries", "nran-full", "fifo")),
        (DMAN_CONFIG, replace(LITERAL, loss="negatives")),
        (DMAN_CONFIG, replace(LITERAL, loss="full")),
    ],
    ids=[
        *CONFIGS,
        *(f"random-first-{name}" for name in ("dman", "full-primaries", "nran-full", "fifo")),
        "binary",
        "all-items",
    ],
)
def test_losses_and_gradients_equal_the_equations(config: ModelConfig, train: TrainConfig) -> None:
    """The gradient of each weight by each loss, so also: which weights a loss does not reach."""
    model = random_model(config, ITEMS).train()
    network = equations_of(model)
    names, product = zip(*model.named_parameters(), strict=True)
    equation = [network.weights[name] for name in names]
    reached: dict[str, set[str]] = {"eq. 9": set(), "eq. 5": set()}
    for found in compared_losses(model, network, train):
        torch.testing.assert_close(found.product.double(), found.equation, **ROUNDED)
        gradients = dict(zip(names, gradients_of(found.product, product), strict=True))
        expected = dict(zip(names, gradients_of(found.equation, equation), strict=True))
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)
        reached[found.name] |= {name for name, gradient in gradients.items() if bool(gradient.abs().any())}
    f_abs = {name for name in names if name.startswith("abstraction.")}
    assert reached == {"eq. 9": set(names) - f_abs, "eq. 5": f_abs}


@pytest.mark.parametrize("variant", ["dman", "nran"])
def test_abstraction_gradient_equals_a_numerical_derivative(variant: str) -> None:
    """While S_2 is processed, H_1 is absorbed into the learned slots."""
    model = random_model(replace(DMAN_CONFIG, variant=variant), ITEMS)
    learner, state = LaneLearner(model, replace(LITERAL, lanes=1), data_of(11)), LaneState.empty(model, 1, 1)
    segments = []
    for _ in range(2):
        inputs = learner.inputs(next(learner.schedule))
        segments.append(segments_of(inputs)[0].items)
        losses, state = learner.step(inputs, state)
    (gradient,) = torch.autograd.grad(losses.abstraction, model.get_parameter("abstraction.1.maps"))
    network = equations_of(model)
    first = network.process(segments[0], User())
    second = network.process(segments[1], first.user)
    maps, step = network.weights["abstraction.1.maps"].data, 1e-5
    for place in [(0, 0, 0), (1, 3, 2), (2, 15, 7), (3, 9, 9)]:
        moved = []
        for change in (step, -2 * step):
            maps[place] += change
            moved.append(network.abstraction_loss(first.memory, first.hidden, second.hidden).item())
        maps[place] += step
        assert gradient[place].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-4, abs=1e-6)


# Training

TRAINED = {
    "literal": LITERAL,
    "preset": replace(PRESETS["paper"].train, lanes=2, gradient_clip=0.05, warmup_steps=3, epochs=2),
    "full": replace(LITERAL, loss="full", adam_beta2=0.98),
    "random-first": replace(RANDOM_FIRST, lanes=3),
}


def compare_training(config: ModelConfig, train: TrainConfig, data: TrainingData, steps: int) -> None:
    """The losses of each step and all weights after it."""
    trainer = Trainer(config, train, data, torch.device("cpu"))
    model, learner = trainer.model, trainer.learner
    assert isinstance(model, DMAN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    network = equations_of(model)
    beta2, clip, rates = train.adam_beta2, train.gradient_clip, (train.learning_rate, train.abstraction_learning_rate)
    training = PaperTraining(network, users=train.lanes, loss=train.loss, beta2=beta2, clip=clip)
    for _ in range(steps):
        rate, abstraction_rate = (trainer.learning_rate_share() * full for full in rates)
        generator = learner.generator.get_state()
        batch, *found = trainer.train_step()
        learner.generator.set_state(generator)
        inputs = learner.inputs(batch)  # draws the negatives of this step again
        expected = training.step(segments_of(inputs), rate=rate, abstraction_rate=abstraction_rate)
        assert [loss.item() for loss in found] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.detach(), network.weights[name].detach(), rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("train", TRAINED.values(), ids=TRAINED.keys())
def test_steps_of_both_optimisers_equal_the_equations(train: TrainConfig) -> None:
    compare_training(DMAN_CONFIG, train, data_of(*USERS), steps=8)


@pytest.mark.slow
@every_config
def test_one_user_walked_through_equals_the_equations(config: ModelConfig) -> None:
    compare_training(config, replace(LITERAL, lanes=1), data_of(24), steps=5)


def test_a_user_of_two_segments_trains_f_abs() -> None:
    """The absorption of S_1 is judged by the only event of S_2."""
    trainer = Trainer(DMAN_CONFIG, replace(LITERAL, lanes=1), data_of(7), torch.device("cpu"))
    f_abs = trainer.model.get_parameter("abstraction.0.maps")
    before = f_abs.detach().clone()
    trainer.train_step()
    assert torch.equal(f_abs, before)
    _, _, abstraction = trainer.train_step()
    assert abstraction > 0
    assert not torch.equal(f_abs, before)
