"""Several processes that train one model together (torchrun). Every function also works in a single process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # must be imported before a group exists: DDP uses its functions, which bind the group
from torch import Tensor

from dman_train.config import ConfigError


def join() -> None:
    """Joins the process group that torchrun describes in the environment, if there is one."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Leaves the process group, if there is one, after all processes have arrived here.

    A process that exits while another still talks to it can break the other's connection threads, and an interpreter
    that exits while gloo's threads run can abort. The threads end with the last reference to the group, so the caller
    must have dropped its Trainer; the collector frees reference cycles.
    """
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 is the first, which writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def barrier() -> None:
    """Waits until all processes have arrived here."""
    if dist.is_initialized():
        dist.barrier()


def any_process(value: bool) -> bool:
    """Whether the value is true in any process. Collective."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor(float(value))
    dist.all_reduce(flag)
    return bool(flag > 0)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The tensor, summed in place over all processes. Collective."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_of_rows(gradient: Tensor) -> Tensor:
    """The mean over all processes of a coalesced sparse tensor, which is coalesced too. Collective."""
    if not dist.is_initialized():
        return gradient
    total = gradient.cpu()  # NCCL has no sums of sparse tensors
    dist.all_reduce(total)
    total = total.to(gradient.device).coalesce()
    total.values().div_(world())
    return total


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def is_the_same_everywhere(value: Callable[[], Any]) -> bool:
    """Whether all processes get the same value, which is asked for only where there are several. Collective."""
    return world() == 1 or len(set(gather(value()))) == 1


def share_of_lanes(lanes: int) -> slice:
    """The lanes of this process. Raises ConfigError if the processes cannot share them evenly."""
    if lanes % world():
        raise ConfigError(
            f"lanes {lanes} cannot be shared among {world()} processes", "choose a multiple", parameter="lanes"
        )
    share = lanes // world()
    return slice(rank() * share, (rank() + 1) * share)
