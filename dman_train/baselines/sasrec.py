"""SASRec: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018.

The reference (kang205/SASRec, ported as pmixer/SASRec.pytorch) normalises only the queries, has a feed-forward block as
wide as the model with ReLU, learned absolute positions counted from the right end, one window of the last 200 events
per user and epoch, and one negative per event. Here: full pre-LayerNorm blocks, a feed-forward block four times as wide
with GELU, positions counted from the left end of windows that begin anywhere, and our loss (full softmax by default).
Recent replications found that these changes help.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.config import BaselineConfig
from dman_train.dropout import Dropout


class SASRec(Baseline):
    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        self.positions = nn.Parameter(torch.randn(config.history, config.width) * 0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def encode(self, items: Tensor, users: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(items) + self.positions[: items.shape[1]] * self.input_scale
        for block in self.blocks:
            x = block(x)
        return self.norm(x) * self.output_scale


class _Block(nn.Module):
    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        width, self.heads, self.rate = config.width, config.heads, config.dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        projected = self.project(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4)  # (B, H, W, D/H) each
        rate = self.rate if self.training else 0.0
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x = x + self.dropout(self.output(read.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))
