"""GRU4Rec: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks", ICLR 2016; Hidasi and
Karatzoglou, "Recurrent Neural Networks with Top-k Gains for Session-based Recommendations", CIKM 2018.

The reference (hidasib/GRU4Rec_PyTorch_Official) processes sessions side by side, one event per step. It carries the
hidden state from step to step without gradient, ranks with cross-entropy or BPR-max among the targets of the batch and
some sampled negatives, applies dropout to the recurrent state, has a bias per item, and is trained with Adagrad. In its
best settings input and output items share a table ("constrained embeddings"). Here: the shared table, windows with a
gradient through all of their events, dropout between and after the layers but not on the recurrent state, no item
biases, and our loss and optimiser (full softmax by default). If it sees times, the gap to the event before is embedded
into each input, and the one from the last event to the request into the state that scores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.baselines.latest import Moments
from dman_train.config import BaselineConfig


class GRU4Rec(Baseline):
    """`layers` GRUs; the state of the last one is the user embedding."""

    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        between = config.dropout if config.layers > 1 else 0.0  # torch warns about dropout with one layer
        self.gru = nn.GRU(config.width, config.width, config.layers, batch_first=True, dropout=between)

    def encode(self, items: Tensor, users: Tensor, lengths: Tensor, moments: Moments | None = None) -> Tensor:
        states, _ = self.gru(self.embed(items, moments))  # (B, W, D)
        # States are small at first and never above 1, so they need no output_scale.
        return self.dropout(self.at_request(states, moments))

    def at_request(self, states: Tensor, moments: Moments | None) -> Tensor:
        """As a product, so that what the time means depends on the state (latent cross: Beutel et al., WSDM 2018)."""
        return states * (1 + super().at_request(torch.zeros_like(states), moments))
