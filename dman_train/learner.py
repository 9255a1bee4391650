"""What the training loop needs to know of a model: a learner joins it with its schedule, its loss and its state.

There are two: `dman_train.lane_learner` for DMAN, which walks users along lanes and carries their state, and
`dman_train.baselines.learner` for models that see windows and carry nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from dman_train.config import BaselineConfig, ModelConfig, TrainConfig
from dman_train.data import TrainingData
from dman_train.lanes import Batch
from dman_train.losses import Added, Losses, NextItemLoss, Table
from dman_train.returns import Returns, ReturnTerm
from dman_train.timing import moments_of

UNKNOWN_TIME = -(1 << 62)  # of a request: before any event


class Schedule(Protocol):
    """An endless iterator of batches. It depends on the seed and the data only, never on the weights."""

    events: int  # inputs in one epoch

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StepInputs(NamedTuple):
    """What one process gets of a step, as tensors on its device. B pieces of histories, T events each."""

    items: Tensor  # (B, T) int64, left-aligned, 0 where padded
    targets: Tensor  # (B, T) int64 the item that follows each input
    lengths: Tensor  # (B) int64 real positions
    starts: Tensor  # (B) bool, true where a lane begins a new user
    users: Tensor  # (B) int64
    negatives: Tensor | None  # as `NextItemLoss.draw_negatives` returns them
    seen_before: list[Tensor] | None  # B x (H) int64 items that must not be negatives, from before the piece
    times: Tensor  # (B, T) int64 seconds of the inputs
    next_times: Tensor  # (B, T) int64 seconds of the targets
    since_last: Tensor  # (B, T) int64 seconds from the event before; NO_GAP for a user's first
    absorbed_items: Tensor | None = None  # (B, K) int64 drawn from what a memory stands for; -1 where it is empty

    @property
    def real(self) -> Tensor:
        """(B, T) bool: the positions that are not padding."""
        return torch.arange(self.items.shape[1], device=self.items.device) < self.lengths[:, None]


class Learner(nn.Module):
    """A model in training. A module, so that DistributedDataParallel can wrap it. Subclasses define `forward`."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, data: TrainingData, schedule: Schedule, part: slice
    ) -> None:
        """`part`: the rows of each batch that are those of this process."""
        super().__init__()
        self.model, self.config, self.schedule = model, config, schedule
        self._items, self._offsets, self._part = data.items, data.offsets, part
        self.device = next(model.parameters()).device
        self.loss = NextItemLoss(config, torch.from_numpy(data.item_counts)).to(self.device)
        # Of negatives and of items to recall; the same in all processes.
        self.generator = torch.Generator().manual_seed(config.seed)

    def forward(self, inputs: StepInputs) -> Losses:
        """The losses of one step. Updates the carried state."""
        raise NotImplementedError

    def likelihood(
        self, user_embeddings: Tensor, item_table: Table, inputs: StepInputs, added: Added | None = None
    ) -> Tensor:
        """Eq. 9, summed over the real positions, for (B, T, D) user embeddings and (V, D) items.

        `added`: (B, T, K) scores and (B, T, K) items.
        """
        real = inputs.real
        return self.loss(
            user_embeddings[real],
            item_table,
            inputs.targets[real],
            negatives=inputs.negatives,
            items=inputs.items,
            real=real,
            seen_before=inputs.seen_before,
            added=None if added is None else Added(added.scores[real], added.items[real]),
        )

    def inputs(self, batch: Batch) -> StepInputs:
        """This process's part of a batch. Draws the negatives of the whole batch, as all processes do."""
        negatives = self.loss.draw_negatives(batch.items.shape, self.generator)
        if negatives is not None:
            negatives = (negatives[self._part] if negatives.dim() == 3 else negatives).to(self.device)
        mine, seen_before = batch.pieces(self._part), None
        if self.config.seen_items == "exclude":
            pieces = mine.seen_before(self._items, self._offsets)
            together = torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(self.device)  # one copy to a GPU
            seen_before = list(torch.split(together, [len(seen) for seen in pieces]))
        arrays = (mine.items, mine.targets, mine.lengths, mine.starts, mine.users)
        items, targets, lengths, starts, users = (torch.from_numpy(array).to(self.device) for array in arrays)
        moments = (torch.from_numpy(array).to(self.device) for array in (mine.times, mine.next_times, mine.since_last))
        return StepInputs(items, targets, lengths, starts, users, negatives, seen_before, *moments)

    def _requests(self, inputs: StepInputs) -> Tensor | None:
        """(B, T) seconds at which the positions are asked; None for a model that does not see requests.

        In training those of a share of the pieces are unknown, so that a model learns to do without.
        """
        if cast("ModelConfig | BaselineConfig", self.model.config).time != "request":
            return None
        if not self.training:
            return inputs.next_times
        unknown = torch.rand(len(inputs.times), 1, device=inputs.times.device) < self.config.request_dropout
        return torch.where(unknown, UNKNOWN_TIME, inputs.next_times)

    def _added(
        self, returns: Returns, users: Tensor, table: Table, inputs: StepInputs, requests: Tensor | None
    ) -> Added:
        """What the model's term for returns adds to scores; (B, T, D) users, (V, D) table, (B, T) requests."""
        scores = cast(ReturnTerm, self.model.returns)(users, table, returns, moments_of(inputs.times, requests))
        items = returns.items.clamp(min=0)[:, None].expand_as(scores)  # where there is none, 0 is added to item 0
        return Added(scores, items)

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters of each optimiser and its full learning rate."""
        return [(list(self.model.parameters()), self.config.learning_rate)]

    def carried_state(self) -> dict[str, Tensor] | None:
        """What is carried from step to step besides weights; None if nothing is."""
        return None

    def load_carried_state(self, state: dict[str, Tensor] | None) -> None:
        """Continues from what `carried_state` returned."""
