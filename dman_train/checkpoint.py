"""Checks of what a checkpoint holds before training continues from it. All raise ValueError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dman_runtime.data.untrusted import is_whole_number

LARGEST_COUNT = 1 << 62


def like(saved: object, current: Tensor, what: str, *, or_bfloat16: bool = False) -> Tensor:
    """`saved`, which must be a tensor of the shape and type of `current`, or in bfloat16 where that holds floats."""
    if not isinstance(saved, Tensor) or saved.shape != current.shape:
        raise ValueError(f"{what} is not a tensor {list(current.shape)}")
    rounded = or_bfloat16 and current.is_floating_point() and saved.dtype == torch.bfloat16
    if saved.dtype != current.dtype and not rounded:
        raise ValueError(f"{what} is not of {current.dtype}")
    return saved


def whole_number(saved: object, high: int, what: str) -> int:
    """`saved`, which must be an int from 0 to `high`."""
    if not is_whole_number(saved, 0, high):
        raise ValueError(f"{what} is not a whole number from 0 to {high}")
    return saved  # type: ignore[return-value]


def within(saved: Tensor, low: int, high: int, what: str) -> Tensor:
    """`saved` integers, which must be from `low` to `high`."""
    if saved.numel() and not low <= int(saved.min()) <= int(saved.max()) <= high:
        raise ValueError(f"{what} is not from {low} to {high}")
    return saved


def int64_array(saved: object, length: int, what: str) -> np.ndarray:
    """(length) int64: a copy of the values of a saved tensor."""
    return like(saved, torch.empty(length, dtype=torch.int64), what).numpy().copy()


def load_adam(optimiser: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Continues from the moments that AdamW saved. Its settings stay those of the config.

    The fused step of PyTorch does not check the sizes of the moments, so this does.
    """
    own = optimiser.state_dict()["param_groups"]
    parameters = optimiser.param_groups[0]["params"]
    for index, values in saved["state"].items():
        parameter = parameters[whole_number(index, len(parameters) - 1, "the number of a parameter")]
        if set(values) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError("the optimiser does not hold the moments of Adam")
        like(values["step"], torch.tensor(0.0), "step")
        for name in ("exp_avg", "exp_avg_sq"):
            if like(values[name], parameter, name).stride() != parameter.stride():
                raise ValueError(f"{name} is not laid out as its parameter")
    optimiser.load_state_dict({"state": dict(saved["state"]), "param_groups": own})
