"""The comparison systems in training: one step over windows."""

from __future__ import annotations

import torch
from torch import Tensor

from dman_train import distributed
from dman_train.baselines.base import Baseline
from dman_train.baselines.latest import Moments, returns_within
from dman_train.baselines.windows import Windows
from dman_train.config import ConfigError, TrainConfig
from dman_train.data import TrainingData
from dman_train.lanes import WINDOW_EVENTS
from dman_train.learner import Learner, StepInputs
from dman_train.losses import Added, Losses


class WindowLearner(Learner):
    """Trains a Baseline. Raises ConfigError if there are several processes."""

    model: Baseline

    def __init__(self, model: Baseline, config: TrainConfig, data: TrainingData) -> None:
        if distributed.world() > 1:
            raise ConfigError("baselines are trained by one process", "start it without torchrun")
        schedule = Windows(
            data.items,
            data.offsets,
            data.times,
            length=model.config.history,
            positions=config.lanes * WINDOW_EVENTS,
            seed=config.seed,
        )
        super().__init__(model, config, data, schedule, part=slice(None))

    def forward(self, inputs: StepInputs) -> Losses:
        """Eq. 9, and the penalty of the model where a DMAN has eq. 5."""
        real, requests, table = inputs.real, self._requests(inputs), self.model.item_table()
        moments = Moments(inputs.times, inputs.since_last, requests)
        embeddings = self.model.encode(inputs.items, inputs.users, inputs.lengths, moments)
        added = self._returns(inputs, requests, embeddings, table)
        likelihood = self.likelihood(embeddings, table, inputs, added)
        return Losses(likelihood, real.sum(), self.model.penalty() * real.sum(), real.sum())

    def _returns(self, inputs: StepInputs, requests: Tensor | None, embeddings: Tensor, table: Tensor) -> Added | None:
        """What is added to the scores for items that users come back to within their window.

        B windows of T events have (B, T, T) candidates with 5 counts each: 10 MB for 2,560 positions and T = 200.
        """
        if self.model.config.returns != "on":
            return None
        with torch.no_grad():
            returns = returns_within(inputs.items, inputs.lengths, inputs.times)
        return self._added(returns, embeddings, table, inputs, requests)
