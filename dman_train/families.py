"""The two kinds of model that can be trained and evaluated: DMAN, and the baselines to compare it with.

Everything else that trains, opens or ranks a model asks its family and does not need to know which one it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dman_runtime.data.evaluation import HeldOut
from dman_train import baselines
from dman_train.baselines.base import Baseline
from dman_train.baselines.learner import WindowLearner
from dman_train.config import BaselineConfig, ModelConfig
from dman_train.lane_learner import LaneLearner
from dman_train.learner import Learner
from dman_train.model import DMAN
from dman_train.replay import replay, returned

Model = DMAN | Baseline


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    name: str  # in messages
    command: str  # the module that trains it
    config: type[ModelConfig] | type[BaselineConfig]
    build: Callable[[Any, int, int], Model]  # config, V items, U users of the training log -> a fresh model
    learner: Callable[..., Learner]  # model, TrainConfig, TrainingData -> how it is trained
    scores: Callable[[Any, Tensor, HeldOut], Tensor]  # items (D, V), the histories of N users, none empty -> (N, V)
    has_state: bool  # can be exported, served and interpreted


def _build_dman(config: ModelConfig, vocabulary: int, _users: int) -> DMAN:
    return DMAN(config, vocabulary)


def _dman_scores(model: DMAN, table: Tensor, data: HeldOut) -> Tensor:
    moments = _moments(data)
    users, _ = replay(model, data.histories, **moments)
    scores = users @ table
    if model.config.returns == "on":
        scores.scatter_add_(1, *returned(model, users, data.histories, **moments))
    return scores


def _baseline_scores(model: Baseline, table: Tensor, data: HeldOut) -> Tensor:
    moments = _moments(data)
    users = model.user_embeddings(data.histories, data.users, **moments)
    scores = users @ table
    if model.config.returns == "on":
        scores.scatter_add_(1, *model.returned(users, data.histories, **moments))
    return scores


def _moments(data: HeldOut) -> dict[str, Any]:
    """When the events of the histories came, and for when the targets are asked."""
    return {"times": data.times, "request_times": data.target_times}


_DMAN = Family(
    name="DMAN",
    command="dman_train.train",
    config=ModelConfig,
    build=_build_dman,
    learner=LaneLearner,
    scores=_dman_scores,
    has_state=True,
)
_BASELINE = Family(
    name="baseline",
    command="dman_train.baselines",
    config=BaselineConfig,
    build=baselines.build,
    learner=WindowLearner,
    scores=_baseline_scores,
    has_state=False,
)
_BY_CONFIG = {family.config: family for family in (_DMAN, _BASELINE)}


def family_of(config: ModelConfig | BaselineConfig) -> Family:
    """The family of the models with this config."""
    return _BY_CONFIG[type(config)]


def family_of_fields(fields: dict[str, Any]) -> Family:
    """The family of a config that was read as a mapping: only the config of a baseline has a `system`."""
    return _BASELINE if "system" in fields else _DMAN
