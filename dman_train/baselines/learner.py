"""The comparison systems in training: one step over windows."""

from __future__ import annotations

from dman_train import distributed
from dman_train.baselines.base import Baseline
from dman_train.baselines.windows import Windows
from dman_train.config import ConfigError, TrainConfig
from dman_train.data import TrainingData
from dman_train.learner import Learner, StepInputs
from dman_train.losses import Losses

LANE_EVENTS = 20  # of one lane in a batch: as many as with DMAN's default segments, whatever a system calls a session


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
            positions=config.lanes * LANE_EVENTS,
            seed=config.seed,
        )
        super().__init__(model, config, data, schedule, part=slice(None))

    def forward(self, inputs: StepInputs) -> Losses:
        """Eq. 9, and the penalty of the model where a DMAN has eq. 5."""
        real = inputs.real
        embeddings = self.model.encode(inputs.items, inputs.users, inputs.lengths)
        likelihood = self.likelihood(embeddings, self.model.item_table(), inputs)
        return Losses(likelihood, real.sum(), self.model.penalty() * real.sum(), real.sum())
