"""f_abs: how a memory absorbs a segment (eq. 4). By routing (eq. 6-8), or, for an ablation, as a queue.

Symbols as in `dman_train.model`; each module is the f_abs of one layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dman_train.config import ModelConfig

MASKED = -1e9  # added to the logit of what must not be read


class Squash(nn.Module):
    """Eq. 8: the direction of each vector (..., D), with length |s|^2 / (1 + |s|^2)."""

    def forward(self, s: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
        return s * (length / (1 + length.square()))


class RoutingAbstraction(nn.Module):
    """f_abs by dynamic routing (eq. 6-8): primaries x = M_old || H, interest capsules o = M_new.

    b_ij = o_j . W_ij x_i, a_ij = softmax_j(b_ij), s_j = sum_i a_ij W_ij x_i. The votes W_ij x_i are computed only
    for routing="full"; otherwise s_j = W_j sum_i a_ij x_i and b_ij = (W_j^T o_j) . x_i, which is the same. Capsules
    start from the old slots, so that slot j stays slot j. Architecture `paper`: o_j = squash(s_j), and nothing else.
    Architecture `plus`: LayerNorm on both sides instead of squash, logits are scaled and add up over the iterations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, slots = config.width, config.memory_slots
        self.full, self.literal = config.routing == "full", config.architecture == "paper"
        self.iterations, self.over_slots = config.routing_iterations, config.routing_softmax == "slots"
        leading = (slots + config.segment_length, slots) if self.full else (slots,)
        # Near the identity, so that an untrained f_abs clusters its input instead of destroying it.
        self.maps = nn.Parameter(torch.eye(width).repeat(*leading, 1, 1) + torch.randn(*leading, width, width) * 0.02)
        self.norm_primaries = nn.Identity() if self.literal else nn.LayerNorm(width)
        self.norm_capsules = Squash() if self.literal else nn.LayerNorm(width)

    def forward(self, memory: Tensor, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, m, D) memory and (B, T, D) hidden -> (B, m, D). Only the last `lengths` (B) rows of hidden count."""
        x = self.norm_primaries(torch.cat([memory, hidden], dim=1))  # (B, m+T, D)
        valid = None if lengths is None else valid_primaries(memory.shape[1], hidden.shape[1], lengths)
        votes = torch.einsum("bnd,njde->bjne", x, self.maps) if self.full else None  # (B, m, m+T, D)
        capsules, logits = memory if self.literal else self.norm_capsules(memory), x.new_zeros(())
        for _ in range(self.iterations):
            agreement = self._agreement(capsules, x, votes)  # (B, m, m+T)
            logits = agreement if self.literal else logits + agreement / math.sqrt(x.shape[-1])
            capsules = self.norm_capsules(self._combine(self._coupling(logits, valid), x, votes))
        return capsules

    def _agreement(self, capsules: Tensor, x: Tensor, votes: Tensor | None) -> Tensor:
        if votes is not None:
            return torch.einsum("bje,bjne->bjn", capsules, votes)
        mapped = (capsules.transpose(0, 1) @ self.maps.transpose(1, 2)).transpose(0, 1)  # W_j^T o_j: (B, m, D)
        return mapped @ x.transpose(1, 2)

    def _coupling(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        if self.over_slots:
            coupling = torch.softmax(logits, dim=1)
            return coupling if valid is None else coupling * valid[:, None, :]
        return torch.softmax(logits if valid is None else logits.masked_fill(~valid[:, None, :], MASKED), dim=2)

    def _combine(self, coupling: Tensor, x: Tensor, votes: Tensor | None) -> Tensor:
        if votes is not None:
            return torch.einsum("bjn,bjne->bje", coupling, votes)
        return ((coupling @ x).transpose(0, 1) @ self.maps).transpose(0, 1)  # (B, m, D)


class FifoAbstraction(nn.Module):
    """f_abs of the `fifo` variant: the memory is the last m hidden states."""

    def forward(self, memory: Tensor, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """As `RoutingAbstraction.forward`."""
        slots, segment = memory.shape[1], hidden.shape[1]
        if lengths is None:
            return torch.cat([memory, hidden], dim=1)[:, -slots:]
        position = lengths[:, None] + torch.arange(slots, device=lengths.device)  # (B, m) in the valid rows of M || H
        source = torch.where(position < slots, position, position + segment - lengths[:, None])
        return torch.cat([memory, hidden], dim=1).gather(1, source[..., None].expand(-1, -1, memory.shape[2]))


def valid_primaries(slots: int, segment: int, lengths: Tensor) -> Tensor:
    """(B, m+T) bool: all slots, and the last `lengths` of the hidden rows."""
    row = torch.arange(slots + segment, device=lengths.device)
    return (row < slots) | (row >= slots + segment - lengths[:, None])
