"""The training loop: steps, epochs, validation, checkpoints. It works for any `Learner`.

`dman_train.train` is its command line.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from dman_runtime.data.evaluation import Ranks, metrics, ranking_for
from dman_runtime.errors import DmanError
from dman_train import checkpoint, distributed
from dman_train.config import BaselineConfig, ConfigError, ModelConfig, TrainConfig
from dman_train.data import TrainingData
from dman_train.families import Model, family_of
from dman_train.item_rows import ItemRows, refusal_of_rows
from dman_train.lanes import Batch
from dman_train.losses import Losses
from dman_train.model import DMAN
from dman_train.ranking import all_ranks

logger = logging.getLogger(__name__)
Tensors = tuple[Tensor, ...] | list[Tensor]
# What `Trainer.load_state_dict` raises, itself and through PyTorch and numpy, for a state of another shape or type.
MISFITS = (RuntimeError, KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError)
SELECTION_METRIC = "ndcg@10"  # the validation metric that chooses the epoch


class DivergedError(DmanError, FloatingPointError):
    """The loss is no longer finite."""


class Trainer:
    """Trains one model. Every process of a distributed run builds the same Trainer and uses its share of each batch.

    `state_dict` holds all that decides the weights: training continued from it with the same number of processes
    gives, on a CPU, bit for bit the weights of a run that was never interrupted.
    """

    def __init__(
        self, model_config: ModelConfig | BaselineConfig, config: TrainConfig, data: TrainingData, device: torch.device
    ) -> None:
        """Raises ConfigError for a model that the processes cannot train, InputError for data without any target."""
        self.config, self.data, self.device = config, data, device
        self.rank, self.world = distributed.rank(), distributed.world()
        torch.manual_seed(config.seed)
        family = family_of(model_config)
        self.model = family.build(model_config, len(data.item_counts), len(data.offsets) - 1).to(device)
        self.learner = family.learner(self.model, config, data)
        self._average = AveragedModel(self.model, multi_avg_fn=self._towards_weights)
        self._rows = self._item_rows(model_config) if config.item_updates == "rows" else None
        self._step_module = DistributedDataParallel(self.learner) if self.world > 1 else self.learner
        by_rows = None if self._rows is None else self._rows.weights
        self.schedule, groups = self.learner.schedule, self.learner.parameter_groups()
        groups = [([p for p in parameters if p is not by_rows], rate) for parameters, rate in groups]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                parameters, lr=rate, betas=(0.9, config.adam_beta2), fused=True, weight_decay=config.weight_decay
            )
            for parameters, rate in groups
        ]
        self._rates = [rate for _, rate in groups]
        self.step = self.events = self.epoch = 0
        self.sums = torch.zeros(3)  # over the steps of this epoch: 1, loss of eq. 9, loss of eq. 5
        torch.manual_seed(config.seed + 1 + self.rank)  # dropout differs between processes

    @property
    def result(self) -> Model:
        """The model that training gives: with the moving average of the weights, if there is one."""
        if self._rows is not None:
            self._rows.settle()
        return cast("Model", self._average.module) if self.config.ema_decay else self.model

    def _item_rows(self, model_config: ModelConfig | BaselineConfig) -> ItemRows:
        """What trains the item table by rows, in place of optimiser, average and DistributedDataParallel."""
        if refusal := refusal_of_rows(model_config, self.config, items=len(self.data.item_counts)):
            raise refusal
        model, averaged = cast(DMAN, self.model), cast(DMAN, self._average.module)
        average = averaged.items.data if self.config.ema_decay else None
        model.item_rows = ItemRows(model.items, average, beta2=self.config.adam_beta2)
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(self.learner, ["model.items"])  # type: ignore[no-untyped-call]
        return model.item_rows

    def _towards_weights(self, averages: Tensors, weights: Tensors, steps: Tensor | int) -> None:
        """One step of the moving average."""
        if self._rows is not None:
            table = self._rows.weights.data_ptr()
            others = [pair for pair in zip(averages, weights, strict=True) if pair[1].data_ptr() != table]
            averages, weights = map(list, zip(*others, strict=True))
        torch._foreach_lerp_(averages, weights, 1 - self._decay(float(steps)))

    def _decay(self, steps: float) -> float:
        """Of the average, after so many. Early on it is low, so that the first, poor weights are forgotten."""
        return min(self.config.ema_decay, (1 + steps) / (10 + steps))

    def learning_rate_share(self) -> float:
        """Share of the full learning rate at this point: linear warm-up, then a cosine down to the final share."""
        warm = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        done = min(1.0, self.events / (self.config.epochs * self.schedule.events))
        final = self.config.final_learning_rate
        return warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))

    def train_step(self) -> tuple[Batch, Tensor, Tensor]:
        """One step: the whole batch, and this process's share of the mean losses of eq. 9 and eq. 5."""
        batch = next(self.schedule)
        inputs = self.learner.inputs(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            losses = self._step_module(inputs)
        likelihood, abstraction = self._means(losses)
        # DistributedDataParallel averages gradients over processes; the loss of each is a share of the global mean.
        loss = self.world * (likelihood + self.config.abstraction_weight * abstraction)
        loss.backward()  # type: ignore[no-untyped-call]
        self._update_weights()
        self.step += 1
        self.events += batch.positions
        return batch, likelihood.detach(), abstraction.detach()

    def _means(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """This process's share of the mean losses over all processes."""
        counts = torch.stack([losses.likelihood_count, losses.abstraction_count]).float()
        counts = distributed.sum_over_processes(counts).clamp(min=1)
        return losses.likelihood / counts[0], losses.abstraction / counts[1]

    def _update_weights(self) -> None:
        share = self.learning_rate_share()
        rows = None if self._rows is None else distributed.mean_of_rows(self._rows.gradient())
        for optimiser, rate in zip(self.optimisers, self._rates, strict=True):
            of_rows = rows.values() if rows is not None and optimiser is self.optimisers[0] else None
            self._clip(optimiser.param_groups[0]["params"], of_rows)
            optimiser.param_groups[0]["lr"] = rate * share
            optimiser.step()
            optimiser.zero_grad()
        if self._rows is not None and rows is not None:
            averaged = int(self._average.n_averaged)  # of the first weights, nothing is kept
            decay = self._decay(averaged) if averaged else 0.0
            self._rows.step(rows, rate=self._rates[0] * share, decay=decay)
        if self.config.ema_decay:
            self._average.update_parameters(self.model)

    def _clip(self, parameters: list[Tensor], of_rows: Tensor | None) -> None:
        """Limits the norm of the gradients of one optimiser, `of_rows` (R, D) among them."""
        limit = self.config.gradient_clip
        if not limit:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients if of_rows is None else [*gradients, of_rows])
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        if of_rows is not None:
            of_rows.mul_((limit / (norm + 1e-6)).clamp(max=1.0))

    def train_epoch(self, *, on_step: Callable[[], None], progress: bool) -> dict[str, float]:
        """Steps until the next epoch border, then validation. Calls `on_step` after every step.

        Returns losses, speed and, as `valid/...`, the metrics. Raises DivergedError.
        """
        began, first = time.perf_counter(), self.events
        self._steps_of_epoch(on_step, progress=progress)
        self.epoch += 1
        sums, self.sums = distributed.sum_over_processes(self.sums), torch.zeros(3)
        seconds = time.perf_counter() - began
        result = {
            "epoch": float(self.epoch),
            "loss": float(sums[1] / sums[0] * self.world),
            "abstraction_loss": float(sums[2] / sums[0] * self.world),
            "learning_rate": self.learning_rate_share() * self.config.learning_rate,
            "events_per_second": (self.events - first) / seconds,
            "seconds": seconds,
        }
        ranks = self.validate().of(ranking_for(self.config.seen_items))
        return result | {f"valid/{name}": value for name, value in metrics(ranks).items()}

    def _steps_of_epoch(self, on_step: Callable[[], None], *, progress: bool) -> None:
        goal = (self.epoch + 1) * self.schedule.events
        description = f"epoch {self.epoch + 1}/{self.config.epochs}"
        hidden = None if progress else True  # None: hidden unless stderr is a terminal
        with tqdm(total=goal, initial=self.events, unit="ev", desc=description, disable=hidden) as bar:
            while self.events < goal:
                batch, likelihood, abstraction = self.train_step()
                if not torch.isfinite(likelihood + abstraction):
                    raise DivergedError(
                        f"the loss is not finite at step {self.step}",
                        "lower the learning rate",
                        parameter="learning_rate",
                    )
                self.sums += torch.tensor([1.0, likelihood.item(), abstraction.item()])
                bar.update(batch.positions)
                if self.step % 20 == 0:
                    bar.set_postfix(loss=f"{self.sums[1] / self.sums[0]:.3f}")
                on_step()

    def validate(self) -> Ranks:
        """Ranks of the validation targets. Each process computes its share, and all get all."""
        data = self.data.validation
        chosen = slice(None, self.config.evaluation_users or None)
        mine = slice(self.rank, None, self.world)
        share = data.rows(np.arange(len(data.users))[chosen][mine])
        ranks = all_ranks(self.result, share)
        return ranks if self.world == 1 else Ranks.concatenate(distributed.gather(ranks))

    def state_dict(self) -> dict[str, Any]:
        """Collective: every process calls it, and every process gets the whole state."""
        mine = {
            "lanes": self.learner.carried_state(),
            "dropout": torch.get_rng_state(),
            "sums": self.sums.clone(),
        }
        return {
            "model": self.model.state_dict(),
            "average": self._average.state_dict() if self.config.ema_decay else None,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "rows": None if self._rows is None else self._rows.state_dict(),
            "schedule": self.schedule.state_dict(),
            "negatives": self.learner.generator.get_state(),
            "ranks": distributed.gather(mine),
            "progress": {"step": self.step, "events": self.events, "epoch": self.epoch},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned, or from what a file claims to be that.

        Raises ConfigError if the number of processes is another one, and one of MISFITS for a state of something else.
        """
        if len(state["ranks"]) != self.world:
            raise ConfigError(
                f"the checkpoint was written by {len(state['ranks'])} processes and this run has {self.world}",
                "resume with the same number",
            )
        self.model.load_state_dict(state["model"])
        if self.config.ema_decay:
            self._average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            checkpoint.load_adam(optimiser, saved)
        if self._rows is not None:
            self._rows.load_state_dict(state["rows"])
        self.schedule.load_state_dict(state["schedule"])
        self.learner.generator.set_state(state["negatives"])
        mine = state["ranks"][self.rank]
        self.learner.load_carried_state(mine["lanes"])
        torch.set_rng_state(mine["dropout"])
        # Checkpoints of earlier versions have no sums.
        self.sums = checkpoint.like(mine.get("sums", self.sums), self.sums, "sums").clone()
        self.step, self.events, self.epoch = (
            checkpoint.whole_number(state["progress"][name], checkpoint.LARGEST_COUNT, name)
            for name in ("step", "events", "epoch")
        )
