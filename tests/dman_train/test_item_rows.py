"""An item table that is trained by rows, against AdamW and a moving average over the whole table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dman_train.config import BaselineConfig, ConfigError, ModelConfig, TrainConfig
from dman_train.item_rows import ItemRows, refusal_of_rows

ITEMS, WIDTH, BETA2 = 40, 3, 0.98
Step = tuple[Tensor, Tensor, float, float]  # the items that are used, their gradients, learning rate, decay


def steps(count: int, *, used: int, seed: int = 0) -> Iterator[Step]:
    """Random ones: some items come up twice in a step, half of them never, and rates and decays change."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        items = torch.randint(ITEMS // 2, (used,), generator=generator)
        signs = torch.randint(2, (used, WIDTH), generator=generator) * 2 - 1
        gradients = signs * (0.1 + torch.rand(used, WIDTH, generator=generator)) * 10.0 ** -(step % 4)
        decay = 0.0 if step == 0 else min(0.97, (1 + step) / (10 + step))
        yield items, gradients, 0.01 * (1 + step % 3), decay


class Whole:
    """The reference: torch's AdamW, and an average of which every row moves in every step."""

    def __init__(self, table: Tensor) -> None:
        self.weights, self.average = nn.Parameter(table.clone()), table.clone()
        self.optimiser = torch.optim.AdamW([self.weights], betas=(0.9, BETA2), weight_decay=0.0)

    def step(self, items: Tensor, gradients: Tensor, rate: float, decay: float) -> None:
        self.weights.grad = torch.zeros(ITEMS, WIDTH).index_add_(0, items, gradients)
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()
        self.average.lerp_(self.weights.data, 1 - decay)


def rows_of(table: Tensor) -> ItemRows:
    return ItemRows(nn.Parameter(table.clone()), table.clone(), beta2=BETA2)


def take(rows: ItemRows, items: Tensor, gradients: Tensor, rate: float, decay: float) -> None:
    (rows(items) * gradients).sum().backward()  # type: ignore[no-untyped-call]
    rows.step(rows.gradient(), rate=rate, decay=decay)


def table() -> Tensor:
    return torch.randn(ITEMS, WIDTH, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("used", [2, 15], ids=["rarely", "often"])
@pytest.mark.parametrize("settled_every", [1, 7, 1000], ids=["each-step", "each-epoch", "never"])
def test_rows_move_as_the_whole_table_does(used: int, settled_every: int) -> None:
    expected, found = Whole(table()), rows_of(table())
    for number, step in enumerate(steps(60, used=used)):
        expected.step(*step)
        take(found, *step)
        everything = torch.arange(ITEMS)
        torch.testing.assert_close(found(everything).detach(), expected.weights.data, rtol=1e-4, atol=1e-5)
        if number % settled_every == settled_every - 1:
            found.settle()
    found.settle()
    torch.testing.assert_close(found.weights.data, expected.weights.data, rtol=1e-4, atol=1e-5)
    assert found.average is not None
    torch.testing.assert_close(found.average, expected.average, rtol=1e-4, atol=1e-5)
    moved = (found.weights.data - table()).abs().amax(1) > 1e-3
    assert moved[: ITEMS // 2].float().mean() > 0.8, "more than the tolerance"
    untouched = torch.arange(ITEMS) >= ITEMS // 2
    assert torch.equal(found.weights.data[untouched], table()[untouched])
    assert torch.equal(found.average[untouched], table()[untouched])


def test_rows_without_an_average_move_alike() -> None:
    averaged, plain = rows_of(table()), ItemRows(nn.Parameter(table()), None, beta2=BETA2)
    for step in steps(20, used=4):
        take(averaged, *step), take(plain, *step)
    averaged.settle(), plain.settle()
    assert torch.equal(averaged.weights.data, plain.weights.data)


def test_rows_settled_twice_keep_every_bit() -> None:
    rows = rows_of(table())
    for step in steps(12, used=4):
        take(rows, *step)
    rows.settle()
    assert rows.average is not None
    before = [tensor.clone() for tensor in (rows.weights.data, rows.average, rows.mean, rows.square)]
    rows.settle()
    rows._store(torch.arange(ITEMS), *rows._now(torch.arange(ITEMS)))
    after = [rows.weights.data, rows.average, rows.mean, rows.square]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_rows_without_a_gradient_fail_rather_than_stand_still() -> None:
    with pytest.raises(RuntimeError, match="used no row"):
        rows_of(table()).gradient()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"steps": -1}, "steps is not a whole number"),
        ({"steps": 2}, "the steps of the item table"),
        ({"mean": torch.zeros(ITEMS, 2)}, "mean is not a tensor"),
        ({"since": torch.full((ITEMS,), 99, dtype=torch.int32)}, "since is not from 0 to 5"),
        ({"kept": torch.ones(3, dtype=torch.float64)}, "kept is not a tensor"),
    ],
)
def test_rows_refuse_the_state_of_another_table(damage: dict[str, object], message: str) -> None:
    rows = rows_of(table())
    for step in steps(5, used=4):
        take(rows, *step)
    with pytest.raises(ValueError, match=message):
        rows_of(table()).load_state_dict(rows.state_dict() | damage)


ROWS = TrainConfig(item_updates="rows", loss="sampled")


@pytest.mark.parametrize(
    ("model", "train", "items", "message"),
    [
        (ModelConfig(), TrainConfig(loss="full"), 10**6, "the full softmax uses all items; set loss to 'sampled'"),
        (ModelConfig(), TrainConfig(), 50_000, "the full softmax uses all items"),
        (ModelConfig(), TrainConfig(weight_decay=0.1), 10**6, "weight_decay moves all items; set it to 0"),
        (BaselineConfig(), ROWS, 10**6, "baselines train the whole item table; set item_updates to 'all'"),
    ],
)
def test_rows_are_refused_where_a_step_uses_all(
    model: ModelConfig | BaselineConfig, train: TrainConfig, items: int, message: str
) -> None:
    refusal = refusal_of_rows(model, train, items=items)
    assert isinstance(refusal, ConfigError) and refusal.parameter == "item_updates"
    assert message in str(refusal)


@pytest.mark.parametrize("loss", ["sampled", "negatives", "negatives-softmax"])
def test_rows_serve_every_loss_that_samples(loss: str) -> None:
    config = TrainConfig(loss=loss)  # type: ignore[arg-type]
    assert refusal_of_rows(ModelConfig(), config, items=np.iinfo(np.int32).max) is None
