"""Adam and the moving average for an item table of which a step uses few rows: what it costs depends on the rows only.

The result is that of `torch.optim.AdamW` and of `AveragedModel` over the whole table, up to rounding. Adam goes on
moving a row after its last gradient: both moments fade, and the row follows the first by

    w_i = w_(i-1) - c_i r^(i-s) m_s / sqrt(v_s),   c_i = rate_i sqrt(1 - beta2^i) / (1 - beta1^i)

at step i, if the last gradient came at step s, with r = beta1 / sqrt(beta2). The sum of these factors, and what the
average makes of them, is the same for all rows with one s. So three numbers for each s say where a row is now, and the
table keeps for a row what it was at s. `torch.optim.SparseAdam` leaves rows without a gradient where they are: rows
that seldom get one then move a tenth as far (docs/experiments.md).

The epsilon of Adam stands for that of all steps between: where gradients are as small, rows differ a little.
Symbols: V items, D width, R rows of a step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.checkpoint import LARGEST_COUNT, like, whole_number, within
from dman_train.config import BaselineConfig, ConfigError, ModelConfig, TrainConfig
from dman_train.losses import kind_of_loss

BETA1, EPSILON = 0.9, 1e-8  # Adam's defaults
BLOCK = 1 << 16  # rows that are brought up to date together


def refusal_of_rows(model: ModelConfig | BaselineConfig, train: TrainConfig, *, items: int) -> ConfigError | None:
    """Why a table of so many items cannot be trained by rows; None if it can."""
    if isinstance(model, BaselineConfig):
        problem, remedy = "baselines train the whole item table", "set item_updates to 'all'"
    elif kind_of_loss(train.loss, items) == "full":
        problem, remedy = "the full softmax uses all items", "set loss to 'sampled', or item_updates to 'all'"
    elif train.weight_decay:
        problem, remedy = "weight_decay moves all items", "set it to 0, or item_updates to 'all'"
    else:
        return None
    return ConfigError(f"item_updates is 'rows', but {problem}", remedy, parameter="item_updates")


class ItemRows:
    """The rows of one table in training.

    `weights` and `average` hold a row as it was at its last gradient; `settle` brings all up to date. A call gives
    rows as they are now.
    """

    def __init__(self, weights: nn.Parameter, average: Tensor | None, *, beta2: float) -> None:
        """`weights` (V, D); `average` (V, D) has the same values, and None stands for no averaging."""
        self.weights, self.average, self.beta2 = weights, average, beta2
        self.mean, self.square = torch.zeros_like(weights.data), torch.zeros_like(weights.data)  # Adam's moments
        self.steps = 0
        # By which step after the last `settle` a row had its last gradient; 0: before.
        self.since = torch.zeros(len(weights), dtype=torch.int32, device=weights.device)
        self._forget()

    def _forget(self) -> None:
        """Begins the factors anew, for a table of which all rows are up to date."""
        one = torch.ones(1, dtype=torch.float64, device=self.weights.device)
        # For each value of `since`: the way of a row in units of m / sqrt(v), that of its average behind the place
        # where the row was, and the share that the average keeps of what it was.
        self.moved, self.behind, self.kept = one * 0, one * 0, one

    def __call__(self, items: Tensor) -> Tensor:
        """(...) item indices -> (..., D) their rows now; the gradient of `weights` is sparse."""
        with torch.no_grad():
            way = self._direction(items) * self._of(self.moved, items)
        return F.embedding(items, self.weights, sparse=True) - way

    def _direction(self, rows: Tensor) -> Tensor:
        """(..., D) where Adam moves rows without a gradient."""
        small = EPSILON * math.sqrt(1 - self.beta2 ** max(1, self.steps))
        return F.embedding(rows, self.mean) / (F.embedding(rows, self.square).sqrt() + small)

    def _of(self, factors: Tensor, rows: Tensor) -> Tensor:
        """(..., 1) the factors of rows."""
        return factors[self.since[rows].long()].to(self.weights.dtype)[..., None]

    def gradient(self) -> Tensor:
        """The (V, D) sparse gradient of this step, coalesced. Removes it from `weights`."""
        gradient, self.weights.grad = self.weights.grad, None
        if gradient is None:
            raise RuntimeError("the step used no row of the item table")
        return gradient.coalesce()

    @torch.no_grad()
    def step(self, gradient: Tensor, *, rate: float, decay: float) -> None:
        """One step of Adam at a learning rate, and of the average: it keeps `decay` of what it was."""
        rows, values = gradient.indices()[0], gradient.values()
        weights, average, mean, square = self._now(rows)
        self.steps += 1
        corrections = (1 - BETA1**self.steps, 1 - self.beta2**self.steps)
        mean.lerp_(values, 1 - BETA1)
        square.mul_(self.beta2).addcmul_(values, values, value=1 - self.beta2)
        deviation = square.sqrt().div_(math.sqrt(corrections[1])).add_(EPSILON)
        weights.addcdiv_(mean, deviation, value=-rate / corrections[0])
        if average is not None:
            average.lerp_(weights, 1 - decay)
        self._store(rows, weights, average, mean, square)
        self._count(rate * math.sqrt(corrections[1]) / corrections[0], decay)
        self.since[rows] = len(self.moved) - 1

    def _now(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Weights, average and moments (R, D) of rows after the last step."""
        before, direction = self.weights.data[rows], self._direction(rows)
        weights = before - direction * self._of(self.moved, rows)
        average = None
        if self.average is not None:
            average = torch.lerp(before, self.average[rows], self._of(self.kept, rows))
            average -= direction * self._of(self.behind, rows)
        age = (len(self.moved) - 1 - self.since[rows]).double()
        mean, square = (
            moment[rows] * torch.pow(beta, age).to(moment.dtype)[:, None]
            for moment, beta in ((self.mean, BETA1), (self.square, self.beta2))
        )
        return weights, average, mean, square

    def _store(self, rows: Tensor, weights: Tensor, average: Tensor | None, mean: Tensor, square: Tensor) -> None:
        self.weights.data.index_copy_(0, rows, weights)
        self.mean.index_copy_(0, rows, mean)
        self.square.index_copy_(0, rows, square)
        if self.average is not None and average is not None:
            self.average.index_copy_(0, rows, average)

    def _count(self, size: float, decay: float) -> None:
        """Counts one step, of `size` c_i, in all factors."""
        age = torch.arange(len(self.moved), 0, -1, dtype=torch.float64, device=self.moved.device)
        moved = self.moved + size * torch.pow(BETA1 / math.sqrt(self.beta2), age)
        behind, kept = torch.lerp(moved, self.behind, decay), self.kept * decay
        self.moved, self.behind, self.kept = (
            torch.cat([factors, factors.new_full((1,), new)])
            for factors, new in ((moved, 0.0), (behind, 0.0), (kept, 1.0))
        )

    @torch.no_grad()
    def settle(self) -> None:
        """Brings all rows up to date. Twice in a row is as good as once, to the bit."""
        if len(self.moved) == 1:
            return
        for first in range(0, len(self.weights), BLOCK):
            rows = torch.arange(first, min(first + BLOCK, len(self.weights)), device=self.weights.device)
            self._store(rows, *self._now(rows))
        self.since.zero_()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """All but the weights and their average, which belong to models."""
        tensors = ("mean", "square", "since", "moved", "behind", "kept")
        return {name: getattr(self, name) for name in tensors} | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises ValueError for a state of another table."""
        steps = whole_number(state["steps"], LARGEST_COUNT, "steps")
        counted = whole_number(len(state["moved"]) - 1, steps, "the steps of the item table")
        for name in ("moved", "behind", "kept"):
            factors = like(state[name], torch.empty(counted + 1, dtype=torch.float64), name)
            setattr(self, name, factors.to(self.weights.device, copy=True))
        for name in ("mean", "square", "since"):
            own = getattr(self, name)
            own.copy_(like(state[name], own, name))
        within(self.since, 0, counted, "since")
        self.steps = steps
