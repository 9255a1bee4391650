"""Caser: Tang and Wang, "Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding", WSDM 2018.

The last MARKOV events are an image of MARKOV x D. Horizontal filters of every height slide over it and keep their
largest response, vertical filters weight its rows, a dense layer mixes both into D values, and the embedding of the
user is appended. Items are scored with a separate table, 2D wide, and a bias. Here the bias is column 2D + 1, in which
the user embedding is 1.

The reference (graytowne/caser_pytorch) has the same numbers of filters for MovieLens-1M and the same order MARKOV. It
predicts each of the next three events, with three negatives each in a binary loss, drops out half of the filters'
responses, and learns an embedding for positions before the first event. Here: only the next event, our loss and dropout
rate, also dropout of the item embeddings, and zeros before the first event. The convolutions run once over a window for
all of its positions. `history` decides only how histories are cut for training: a user embedding depends on the last
MARKOV events.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.config import BaselineConfig

MARKOV = 5  # L: events that a user embedding depends on
HORIZONTAL, VERTICAL = 16, 4  # filters: per height, in all


class Caser(Baseline):
    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        width = config.width
        self.user_table = nn.Parameter(torch.randn(users, width) * 0.02)
        self.output_table = nn.Parameter(torch.randn(vocabulary, 2 * width + 1) * 0.02)
        with torch.no_grad():
            self.output_table[:, -1] = 0.0
        self.horizontal = nn.ModuleList(nn.Conv1d(width, HORIZONTAL, height) for height in range(1, MARKOV + 1))
        self.vertical = nn.Linear(MARKOV, VERTICAL)  # of each column of the image
        self.mix = nn.Linear(VERTICAL * width + HORIZONTAL * MARKOV, width)

    def item_table(self) -> Tensor:
        """(V, 2D + 1): weights and a bias."""
        return self.output_table * self.input_scale

    def encode(self, items: Tensor, users: Tensor) -> Tensor:
        z = F.relu(self.mix(self.dropout(self._responses(self.embed(items)))))  # (B, W, D)
        user = F.embedding(users, self.user_table)[:, None].expand_as(z)
        return torch.cat([z / self.input_scale, user, torch.ones_like(z[..., :1])], dim=-1)

    def _responses(self, x: Tensor) -> Tensor:
        """(B, W, D) events -> (B, W, VERTICAL*D + HORIZONTAL*MARKOV) responses to the image of each event."""
        padded = F.pad(x.transpose(1, 2), (MARKOV - 1, 0))  # (B, D, W + 4): the image of event t begins at t
        responses = [self.vertical(padded.unfold(2, MARKOV, 1)).permute(0, 2, 3, 1).flatten(2)]
        for height, convolution in enumerate(self.horizontal, start=1):
            found = F.relu(convolution(padded))  # (B, HORIZONTAL, W + MARKOV - height)
            best = F.max_pool1d(found, MARKOV + 1 - height, stride=1)  # over the image: (B, HORIZONTAL, W)
            responses.append(best.transpose(1, 2))
        return torch.cat(responses, dim=-1)
