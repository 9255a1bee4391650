"""GRU4Rec: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks", ICLR 2016; Hidasi and
Karatzoglou, "Recurrent Neural Networks with Top-k Gains for Session-based Recommendations", CIKM 2018.

The reference (hidasib/GRU4Rec_PyTorch_Official) walks sessions side by side, one event a step, carries the hidden
state from step to step without a gradient through it, ranks with cross-entropy or BPR-max among the targets of the
batch and some sampled negatives, drops out the state that recurs, has a bias for each item, and is trained by Adagrad.
Input and output items share a table in its best settings ("constrained embeddings"). Here: the shared table, windows
with a gradient through all of their events, dropout between and behind the layers but never on the way through time,
no item biases, and the loss and optimiser of the harness (full softmax by default).
"""

from __future__ import annotations

from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.config import BaselineConfig


class GRU4Rec(Baseline):
    """`layers` GRUs; the state of the last one is the user embedding."""

    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        between = config.dropout if config.layers > 1 else 0.0  # torch warns of dropout between the layers of one
        self.gru = nn.GRU(config.width, config.width, config.layers, batch_first=True, dropout=between)

    def encode(self, items: Tensor, users: Tensor) -> Tensor:
        states, _ = self.gru(self.embed(items))  # (B, W, D)
        return self.dropout(states)  # small at first and never above 1, so that no scale is taken off
