"""SHAN: Ying et al., "Sequential Recommender System based on Hierarchical Attention Network", IJCAI 2018.

The embedding u of the user is the query of two attention layers. The first one pools the items of earlier sessions into
a long-term vector, the second one pools that vector and the items of the current session into the user embedding:

    energy_i(x) = u . ReLU(W_i x + b_i),    weights = softmax of the energies

Items are scored with the input embeddings. The order of the events in a session has no effect.

The authors published no code. A third-party one (uctoronto/SHAN) replaces ReLU by a sigmoid and uses the long-term
vector as the second query, predicts one random item of a session from all others, and learns by BPR with L2 penalties.
Here: the equations of the paper, our loss, and dropout of the item embeddings instead of the penalties. The paper cuts
sessions by days. Here the current session is the last `segment_length` events, at every position of a window, and all
events before them are in the long-term part. Repeated items in the past count each time. Up to `segment_length` events
there is no long-term vector, and no first layer if `history` allows no more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.baselines.latest import Moments
from dman_train.config import BaselineConfig


class SHAN(Baseline):
    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        width, several = config.width, config.history > config.segment_length
        self.user_table = nn.Parameter(torch.randn(users, width) * 0.02)
        self.long_term = nn.Linear(width, width) if several else None
        self.short_term = nn.Linear(width, width)

    def encode(self, items: Tensor, users: Tensor, lengths: Tensor, moments: Moments | None = None) -> Tensor:
        x = self.embed(items)
        query = F.embedding(users, self.user_table) * self.input_scale  # (B, D)
        position = torch.arange(x.shape[1], device=x.device)
        age = position[:, None] - position  # (W, W) of each event at each position
        elsewhere = (age < 0) | (age >= self.config.segment_length)
        energies = _energies(self.short_term, x, query)[:, None].masked_fill(elsewhere, float("-inf"))  # (B, W, W)
        if self.long_term is None:
            return torch.softmax(energies, dim=-1) @ x  # a mean of what `item_table` holds
        longs = self._pool_earlier(x, query)
        nothing = position < self.config.segment_length  # no event is old enough
        of_longs = _energies(self.short_term, longs, query).masked_fill(nothing, float("-inf"))
        weights = torch.softmax(torch.cat([of_longs[..., None], energies], dim=-1), dim=-1)  # (B, W, 1 + W)
        return weights[..., 1:] @ x + weights[..., :1] * longs

    def _pool_earlier(self, x: Tensor, query: Tensor) -> Tensor:
        """(B, W, D) events -> (B, W, D) long-term vectors of what was before each session; zeros if nothing."""
        assert self.long_term is not None
        count = max(0, x.shape[1] - self.config.segment_length)  # of positions with a long-term part
        earlier = x[:, :count]
        later = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        energies = _energies(self.long_term, earlier, query)[:, None].masked_fill(later, float("-inf"))
        return F.pad(torch.softmax(energies, dim=-1) @ earlier, (0, 0, x.shape[1] - count, 0))


def _energies(layer: nn.Linear, x: Tensor, query: Tensor) -> Tensor:
    """(B, W, D) vectors, (B, D) queries -> (B, W)."""
    return torch.einsum("bwd,bd->bw", F.relu(layer(x)), query)
