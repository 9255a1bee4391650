"""Hidden states of a closed segment as a server keeps them: `dman_runtime.model.rounding` in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dman_runtime.model.rounding import STEPS
from dman_train.config import ModelConfig


def as_kept(hidden: Tensor, config: ModelConfig) -> Tensor:
    """The layer inputs (B, L, T, D) of a segment that is full, as later segments see them. Layer 0 is never rounded:
    it is made anew from the items.
    """
    if config.closed_states == "full" or config.layers == 1:
        return hidden
    inner = hidden[:, 1:]
    step = inner.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(hidden.dtype).tiny) / STEPS
    return torch.cat([hidden[:, :1], (inner / step).round() * step], dim=1)
