"""What a layer is made of: attention over unprojected sources, and the two forms of a block.

Symbols as in `dman_train.model`.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from dman_train.config import ModelConfig
from dman_train.dropout import Dropout


class Attention(nn.Module):
    """softmax(q W_q (s W_k)^T / sqrt(d) + bias) (s W_v) W_o over sources s, per head (eq. 1 and 2).

    W_o exists in the `plus` architecture only. Sources stay as they are: W_q W_k^T and W_v W_o are multiplied first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, width = config.heads, config.width
        self.heads, self.head_width = heads, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Parameter(torch.empty(heads, self.head_width, width))
        self.value = nn.Parameter(torch.empty(heads, width, self.head_width))
        self.output = nn.Identity() if config.architecture == "paper" else nn.Linear(width, width, bias=False)
        self.dropout = Dropout(config.dropout)
        bound = math.sqrt(3 / width)
        for weight in (self.query.weight, self.key, self.value):
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, source_queries: Tensor, sources: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, Q*H, D) queries in source space, (B, K, D) sources -> (B, Q, D); bias broadcasts to (B, Q, H, K)."""
        return self.project(self.mix(source_queries, sources, bias))

    def queries_in_source_space(self, queries: Tensor) -> Tensor:
        """(B, Q, D) queries -> (B, Q*H, D): q W_q W_k^T / sqrt(d) of every head."""
        by_head = self.query.weight.view(self.heads, self.head_width, -1)
        weight = (by_head.transpose(1, 2) @ self.key).transpose(0, 1) / math.sqrt(self.head_width)  # (D, H, D)
        batch, count, width = queries.shape
        return (queries @ weight.reshape(width, -1)).view(batch, count * self.heads, width)

    def mix(self, source_queries: Tensor, sources: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, Q*H, D) queries in source space, (B, K, D) sources -> (B, Q, H*D) weighted means of the sources."""
        (batch, rows, width), heads = source_queries.shape, self.heads
        sources = sources.to(source_queries.dtype)  # under autocast: once for both products
        logits = source_queries @ sources.transpose(1, 2)
        logits = logits.view(batch, rows // heads, heads, sources.shape[1])  # (B, Q, H, K)
        weights = self.dropout(torch.softmax(logits if bias is None else logits + bias, dim=-1))
        mixed = weights.view(batch, rows, sources.shape[1]) @ sources  # (B, Q*H, D)
        return mixed.view(batch, rows // heads, heads * width)

    def project(self, mixed: Tensor) -> Tensor:
        """(B, Q, H*D) -> (B, Q, D): W_v W_o. Linear."""
        if isinstance(self.output, nn.Identity):  # one head
            return mixed @ self.value[0]
        weight = self.value @ self.output.weight.T.view(self.heads, self.head_width, -1)  # (H, D, D)
        return mixed @ weight.view(-1, weight.shape[-1])


class GatedResidual(nn.Module):
    """x + sigmoid(W x) * y (LiGR)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.dropout(y)
        return x + torch.sigmoid(self.gate(x)) * y


class PaperBlock(nn.Module):
    """One layer of one branch as in the equations: attention and nothing else."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.norm = self.norm_memory = nn.Identity()

    def add(self, x: Tensor, read: Tensor) -> Tensor:
        return read


class PlusBlock(nn.Module):
    """One layer: pre-LayerNorm attention, then a feed-forward block, each with a gated residual."""

    def __init__(self, config: ModelConfig, *, reads_memory: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.norm = nn.LayerNorm(config.width)  # of queries and events
        if reads_memory:
            self.norm_memory = nn.LayerNorm(config.width)  # slots have a different scale
        self.residual_attention, self.residual_ffn = GatedResidual(config), GatedResidual(config)
        self.norm_ffn = nn.LayerNorm(config.width)
        self.ffn = nn.Sequential(
            nn.Linear(config.width, config.ffn_multiplier * config.width),
            nn.ReLU(),
            nn.Linear(config.ffn_multiplier * config.width, config.width),
        )

    def add(self, x: Tensor, read: Tensor) -> Tensor:
        """(B, Q, D) layer inputs and what the attention read for them -> (B, Q, D) layer outputs."""
        x = self.residual_attention(x, read)
        return self.residual_ffn(x, self.ffn(self.norm_ffn(x)))


def blocks_of(branch: nn.ModuleList) -> list[PaperBlock | PlusBlock]:
    return cast("list[PaperBlock | PlusBlock]", list(branch))
