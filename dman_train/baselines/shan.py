"""SHAN: Ying et al., "Sequential Recommender System based on Hierarchical Attention Network", IJCAI 2018.

The embedding u of the user is the query of two attention layers. The first one pools the items of earlier sessions into
a long-term vector, the second one pools that vector and the items of the current session into the user embedding:

    energy_i(x) = u . ReLU(W_i x + b_i),    weights = softmax of the energies

Items are scored with the input embeddings. The order of the events in a session has no effect.

The authors published no code. A third-party one (uctoronto/SHAN) replaces ReLU by a sigmoid and uses the long-term
vector as the second query, predicts one random item of a session from all others, and learns by BPR with L2 penalties.
Here: the equations of the paper, our loss, and dropout of the item embeddings instead of the penalties. A session is a
segment of `segment_length` events, counted from the left end of a window. Of the current one, only the events so far
are used. Repeated items in the past count each time. With only one segment, there is no long-term vector and no first
layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.config import BaselineConfig


class SHAN(Baseline):
    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        width, several = config.width, config.history > config.segment_length
        self.user_table = nn.Parameter(torch.randn(users, width) * 0.02)
        self.long_term = nn.Linear(width, width) if several else None
        self.short_term = nn.Linear(width, width)

    def encode(self, items: Tensor, users: Tensor) -> Tensor:
        x = self.embed(items)
        query = F.embedding(users, self.user_table) * self.input_scale  # (B, D)
        segments = cut_segments(x, self.config.segment_length)  # (B, S, T, D)
        batch, count, length, width = segments.shape
        longs = x.new_zeros(batch, count, width)
        if self.long_term is not None:
            energies = torch.einsum("bwd,bd->bw", F.relu(self.long_term(x)), query)
            longs = pool_earlier_segments(x, energies, length)
        sources = torch.cat([longs[:, :, None], segments], dim=2)  # (B, S, 1 + T, D)
        energies = torch.einsum("bsjd,bd->bsj", F.relu(self.short_term(sources)), query)
        hidden = torch.ones(count, length, 1 + length, dtype=torch.bool, device=x.device).triu(2)  # later events
        hidden[0, :, 0] = True  # nothing came before the first segment
        weights = torch.softmax(energies[:, :, None].masked_fill(hidden, float("-inf")), dim=-1)  # (B, S, T, 1 + T)
        return (weights @ sources).flatten(1, 2)[:, : items.shape[1]]  # a mean of what `item_table` holds


def cut_segments(x: Tensor, length: int) -> Tensor:
    """(B, W, D) events -> (B, S, T, D) segments of T = `length`, counted from the left; zeros pad the last."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % length)).view(x.shape[0], -1, length, x.shape[2])


def pool_earlier_segments(x: Tensor, energies: Tensor, length: int) -> Tensor:
    """(B, W, D) events and (B, W) energies -> (B, S, D): for each segment, the mean of all events before it.

    The weights are the softmax of the energies. Zeros for the first segment.
    """
    position = torch.arange(x.shape[1], device=x.device)
    unseen = position >= position[length::length, None]  # (S - 1, W): from the first event of the segment on
    weights = torch.softmax(energies[:, None].masked_fill(unseen, float("-inf")), dim=-1)  # (B, S - 1, W)
    return F.pad(weights @ x, (0, 0, 1, 0))
