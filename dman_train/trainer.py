"""The training loop: steps, epochs, validation, checkpoints. `dman_train.train` is its command line."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its functions, which DDP imports, keep the one they find
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from dman_runtime.data.evaluation import HeldOut, Ranks, metrics
from dman_train.baselines import build
from dman_train.baselines.base import Baseline
from dman_train.config import BaselineConfig, ConfigError, ModelConfig, TrainConfig
from dman_train.lanes import Batch, Lanes, Windows
from dman_train.model import DMAN
from dman_train.objective import LaneState, Losses, NextItemObjective, Objective, WindowObjective, draw_negatives
from dman_train.replay import all_ranks
from dman_train.run import DivergedError

logger = logging.getLogger(__name__)
Tensors = tuple[Tensor, ...] | list[Tensor]
SELECTION_METRIC = "ndcg@10"  # the validation metric that chooses the epoch


@dataclass(frozen=True)
class TrainingData:
    """Item indices only; ids stay with the run."""

    items: np.ndarray  # (N) int32 training events, user after user
    offsets: np.ndarray  # (U+1) int64
    item_counts: np.ndarray  # (V) int64 training events per item
    validation: HeldOut


class Trainer:
    """Trains one model. Every rank of a distributed run builds the same Trainer and keeps its share of the lanes.

    Everything that decides the weights is in `state_dict`: training continued from it on the same number of ranks
    gives, on a CPU, bit for bit the weights of a run that was never interrupted.
    """

    def __init__(
        self,
        model_config: ModelConfig | BaselineConfig,
        config: TrainConfig,
        data: TrainingData,
        device: torch.device,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if config.lanes % self.world:
            raise ConfigError(f"lanes {config.lanes} cannot be shared among {self.world} processes; choose a multiple")
        share = config.lanes // self.world
        self._my_lanes = slice(self.rank * share, (self.rank + 1) * share)
        torch.manual_seed(config.seed)
        counts = torch.from_numpy(data.item_counts)
        self.model: DMAN | Baseline
        self.objective: NextItemObjective
        self.schedule: Lanes | Windows
        self.state: LaneState | None
        if isinstance(model_config, BaselineConfig):
            if self.world > 1:
                raise ConfigError("baselines are trained by one process; start it without torchrun")
            self.model = build(model_config, len(counts), len(data.offsets) - 1).to(device)
            self.objective = WindowObjective(self.model, config, counts).to(device)
            self.schedule = Windows(
                data.items,
                data.offsets,
                length=model_config.history,
                positions=config.lanes * model_config.segment_length,
                seed=config.seed,
            )
            self._my_lanes, self.state = slice(None), None
        else:
            self.model = DMAN(model_config, len(counts)).to(device)
            self.objective = Objective(self.model, config, counts).to(device)
            self.schedule = Lanes(
                data.items,
                data.offsets,
                segment_length=model_config.segment_length,
                lanes=config.lanes,
                vary_first=config.random_first_segment,
                seed=config.seed,
            )
            self.state = LaneState.empty(self.model, share, config.backprop_segments)
        self._step_module = DistributedDataParallel(self.objective) if self.world > 1 else self.objective
        self.negatives = torch.Generator().manual_seed(config.seed)
        self.optimisers = self._build_optimisers()
        self._average = AveragedModel(self.model, multi_avg_fn=self._towards_weights)
        self.step = self.events = self.epoch = 0
        self.sums = torch.zeros(3)  # over the steps of this epoch: 1, loss of eq. 9, loss of eq. 5
        torch.manual_seed(config.seed + 1 + self.rank)  # dropout differs between ranks

    def _build_optimisers(self) -> list[torch.optim.Optimizer]:
        """Optimiser 1: everything but f_abs. Optimiser 2: f_abs."""
        config = self.config
        abstraction = self.model.abstraction_parameters() if isinstance(self.model, DMAN) else []
        chosen = {id(p) for p in abstraction}
        groups = [([p for p in self.model.parameters() if id(p) not in chosen], config.learning_rate)]
        if abstraction:
            groups.append((abstraction, config.abstraction_learning_rate))
        return [
            torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True)
            for parameters, rate in groups
        ]

    @property
    def result(self) -> DMAN | Baseline:
        """The model that training gives: with the moving average of the weights, if there is one."""
        return cast("DMAN | Baseline", self._average.module) if self.config.ema_decay else self.model

    def _towards_weights(self, averages: Tensors, weights: Tensors, steps: Tensor | int) -> None:
        """One step of the moving average; it covers a ninth of all steps at most, to forget the first, poor weights."""
        decay = min(self.config.ema_decay, (1 + float(steps)) / (10 + float(steps)))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def learning_rate_share(self) -> float:
        """Share of the full learning rate at this point: linear warm-up, then a cosine down to the final share."""
        warm = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        done = min(1.0, self.events / (self.config.epochs * self.schedule.events))
        final = self.config.final_learning_rate
        return warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))

    def train_step(self) -> tuple[Batch, Tensor, Tensor]:
        """One step of all lanes: the whole batch, and the mean losses of eq. 9 and eq. 5."""
        batch = next(self.schedule)
        negatives = draw_negatives(self.objective, batch.items.shape, self.negatives)
        mine = batch.lanes(self._my_lanes)
        if negatives is not None:
            negatives = (negatives[self._my_lanes] if negatives.dim() == 3 else negatives).to(self.device)
        tensors = [torch.from_numpy(getattr(mine, name)).to(self.device) for name in self.objective.inputs]
        before = None
        if self.config.seen_items == "exclude":
            before = [torch.from_numpy(had).to(self.device) for had in mine.before(self.data.items, self.data.offsets)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            losses, self.state = self._step_module(*tensors, self.state, negatives, before)
        likelihood, abstraction = self._means(losses)
        # DistributedDataParallel averages gradients over ranks; each rank's loss is a share of the global mean.
        loss = self.world * (likelihood + self.config.abstraction_weight * abstraction)
        loss.backward()  # type: ignore[no-untyped-call]
        share = self.learning_rate_share()
        for optimiser, rate in zip(self.optimisers, self._rates(), strict=False):
            parameters = optimiser.param_groups[0]["params"]
            if self.config.gradient_clip:
                torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
            optimiser.param_groups[0]["lr"] = rate * share
            optimiser.step()
            optimiser.zero_grad()
        if self.config.ema_decay:
            self._average.update_parameters(self.model)
        self.step += 1
        self.events += batch.positions
        return batch, likelihood.detach(), abstraction.detach()

    def _rates(self) -> tuple[float, float]:
        return self.config.learning_rate, self.config.abstraction_learning_rate

    def _means(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """This rank's share of the mean losses over all ranks."""
        counts = torch.stack([losses.likelihood_count, losses.abstraction_count]).float()
        if self.world > 1:
            dist.all_reduce(counts)
        counts = counts.clamp(min=1)
        return losses.likelihood / counts[0], losses.abstraction / counts[1]

    def train_epoch(self, *, on_step: Callable[[], None], progress: bool) -> dict[str, float]:
        """Steps until the next epoch border, then validation. Calls `on_step` after every step."""
        goal = (self.epoch + 1) * self.schedule.events
        began, first = time.perf_counter(), self.events
        description = f"epoch {self.epoch + 1}/{self.config.epochs}"
        with tqdm(total=goal, initial=first, unit="ev", desc=description, disable=None if progress else True) as bar:
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
        self.epoch += 1
        sums, self.sums = self.sums, torch.zeros(3)
        seconds = time.perf_counter() - began
        if self.world > 1:
            dist.all_reduce(sums)
        result = {
            "epoch": float(self.epoch),
            "loss": float(sums[1] / sums[0] * self.world),
            "abstraction_loss": float(sums[2] / sums[0] * self.world),
            "learning_rate": self.learning_rate_share() * self.config.learning_rate,
            "events_per_second": (self.events - first) / seconds,
            "seconds": seconds,
        }
        ranks = self.validate()
        chosen = ranks.seen_kept if self.config.seen_items == "keep" else ranks.seen_excluded
        return result | {f"valid/{name}": value for name, value in metrics(chosen).items()}

    def validate(self) -> Ranks:
        """Ranks of the validation targets; each rank of a distributed run does its share, all get all."""
        data = self.data.validation
        chosen = slice(None, self.config.evaluation_users or None)
        mine = slice(self.rank, None, self.world)
        share = HeldOut(data.users[chosen][mine], data.histories[chosen][mine], data.targets[chosen][mine])
        ranks = all_ranks(self.result, share)
        if self.world == 1:
            return ranks
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, ranks)
        return Ranks.concatenate(parts)

    def state_dict(self) -> dict[str, Any]:
        """Collective: every rank calls it, every rank gets the whole state."""
        lanes = self.state.state_dict() if self.state else None
        mine = {"lanes": lanes, "dropout": torch.get_rng_state(), "sums": self.sums.clone()}
        parts: list[Any] = [mine]
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, mine)
        return {
            "model": self.model.state_dict(),
            "average": self._average.state_dict() if self.config.ema_decay else None,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "schedule": self.schedule.state_dict(),
            "negatives": self.negatives.get_state(),
            "ranks": parts,
            "progress": {"step": self.step, "events": self.events, "epoch": self.epoch},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["ranks"]) != self.world:
            raise ConfigError(
                f"the checkpoint was written by {len(state['ranks'])} processes and this run has {self.world}; "
                "resume with the same number"
            )
        self.model.load_state_dict(state["model"])
        if self.config.ema_decay:
            self._average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.schedule.load_state_dict(state["schedule"])
        self.negatives.set_state(state["negatives"])
        mine = state["ranks"][self.rank]
        if mine["lanes"] is not None:
            self.state = LaneState(**{name: tensor.to(self.device) for name, tensor in mine["lanes"].items()})
        torch.set_rng_state(mine["dropout"])
        self.sums = mine.get("sums", self.sums).clone()  # checkpoints of earlier versions have none
        for name, value in state["progress"].items():
            setattr(self, name, value)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps; a second SIGINT stops at once."""
    asked: list[int] = []

    def remember(number: int, _frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def join_distributed() -> None:
    """Joins the process group that torchrun describes in the environment, if there is one."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave_distributed() -> None:
    """Leaves the process group, if there is one, once every rank has got here.

    A rank that goes while another still talks to it can take that one's connection threads down, and an interpreter
    that ends while gloo's threads run can abort. They end with the last reference to the group: the caller has dropped
    its Trainer by now, and the collector takes what hangs in cycles.
    """
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()
