"""SASRec: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018.

The reference (kang205/SASRec, ported as pmixer/SASRec.pytorch) normalises only the queries, has a feed-forward block as
wide as the model with ReLU, learned absolute positions counted from the right end, one window of the last 200 events
per user and epoch, and one negative per event. Here: full pre-LayerNorm blocks, a feed-forward block four times as wide
with GELU, positions counted from the left end of windows that begin anywhere, and our loss (full softmax by default).
Recent replications found that these changes help.

If it sees times, it gets what a DMAN gets: an embedding of the gap to the event before in each input, and in each block
a bias per head by the time from key to query. In the last block the query stands at the time of the request.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_runtime.model.times import BUCKETS
from dman_train.baselines.base import Baseline
from dman_train.baselines.latest import Moments
from dman_train.config import BaselineConfig
from dman_train.dropout import Dropout
from dman_train.timing import timing_of


class SASRec(Baseline):
    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        self.positions = nn.Parameter(torch.randn(config.history, config.width) * 0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        if config.sees_times:
            self.age_bias = nn.Parameter(torch.zeros(config.layers, BUCKETS, config.heads))

    def encode(self, items: Tensor, users: Tensor, lengths: Tensor, moments: Moments | None = None) -> Tensor:
        x = self.embed(items, moments) + self.positions[: items.shape[1]] * self.input_scale
        biases = self._age_biases(moments)
        for block, bias in zip(self.blocks[:-1], biases[:-1], strict=True):
            x = block(x, x, bias)
        x = self.blocks[-1](x, self.at_request(x, moments), biases[-1])
        return self.norm(x) * self.output_scale

    def _age_biases(self, moments: Moments | None) -> list[Tensor | None]:
        """What each block adds to its attention, (B, H, W, W): a bias by age, and minus infinity for later events."""
        if not self.config.sees_times:
            return [None] * self.config.layers
        assert moments is not None
        timing = timing_of(moments.times, moments.times, moments.requests)
        assert timing.request_ages is not None
        later = torch.ones_like(timing.ages[0], dtype=torch.bool).triu(1)
        ages = [timing.ages] * (self.config.layers - 1) + [timing.request_ages]
        biases = [F.embedding(of, table) for of, table in zip(ages, self.age_bias, strict=True)]  # (B, W, W, H)
        return [bias.permute(0, 3, 1, 2).masked_fill(later, float("-inf")) for bias in biases]


class _Block(nn.Module):
    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        width, self.heads, self.rate = config.width, config.heads, config.dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.dropout = Dropout(config.dropout)

    def forward(self, sources: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, W, D) events, (B, W, D) queries, which may be the same, (B, H, W, W) or causal -> (B, W, D)."""
        batch, length, width = x.shape
        normed = self.norm_attention(sources)
        projected = self.project(normed).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4)  # (B, H, W, D/H) each
        if x is not sources:
            queries = F.linear(self.norm_attention(x), self.project.weight[:width])
            q = queries.view(batch, length, self.heads, -1).transpose(1, 2)
        rate = self.rate if self.training else 0.0
        read = F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, dropout_p=rate)
        x = x + self.dropout(self.output(read.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))
