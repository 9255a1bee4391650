"""Caser: Tang and Wang, "Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding", WSDM 2018.

The last L events are an image of L x D. Horizontal filters of several heights slide over it and keep their largest
response, vertical filters weight its rows, a dense layer mixes both into D values, and the embedding of the user is
appended. Items are scored with a separate table, 2D wide, and a bias. Here the bias is column 2D + 1, in which the user
embedding is 1.

The reference (graytowne/caser_pytorch) has the same numbers of filters for MovieLens-1M, there with L = 5. It has
horizontal filters of every height up to L. It predicts each of the next three events, with three negatives each in a
binary loss, drops out half of the filters' responses, and learns an embedding for positions before the first event.
Here:

- L is `history`, so the image holds all events that the model sees. `--history 5` gives the order of the reference.
- Horizontal filters have the heights of HEIGHTS, up to L. All heights up to 200 would cost 280 times as much.
- Vertical filters begin as means that favour recent events, at VERTICAL time scales, instead of at random. At random,
  the newest of 200 events weighs no more than the oldest, and learning is slower (MovieLens-100K after five epochs,
  validation HR@10: .174 at random, .193 like this).
- Only the next event is predicted, with our loss and dropout rate; item embeddings are dropped out too. There are zeros
  before the first event.
- Both kinds of filter run once over a window for all of its positions: the image of event t is all of the window up to
  t. A largest response so far is a running maximum, and a vertical filter a causal convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.baselines.latest import Moments
from dman_train.config import BaselineConfig

HEIGHTS = (1, 2, 3, 4, 5, 8, 12, 16, 20)  # of horizontal filters
HORIZONTAL, VERTICAL = 16, 4  # filters: per height, in all


class Caser(Baseline):
    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        width = config.width
        self.heights = [height for height in HEIGHTS if height <= config.history]
        self.user_table = nn.Parameter(torch.randn(users, width) * 0.02)
        self.output_table = nn.Parameter(torch.randn(vocabulary, self.score_width) * 0.02)
        with torch.no_grad():
            self.output_table[:, -1] = 0.0
        self.horizontal = nn.ModuleList(nn.Conv1d(width, HORIZONTAL, height) for height in self.heights)
        self.vertical = nn.Parameter(_recent_means(config.history))  # (VERTICAL, L), of the newest event first
        self.vertical_bias = nn.Parameter(torch.zeros(VERTICAL))
        self.mix = nn.Linear(VERTICAL * width + HORIZONTAL * len(self.heights), width)

    @property
    def score_width(self) -> int:
        return 2 * self.config.width + 1

    def item_table(self) -> Tensor:
        """(V, 2D + 1): weights and a bias."""
        return self.output_table * self.input_scale

    def encode(self, items: Tensor, users: Tensor, lengths: Tensor, moments: Moments | None = None) -> Tensor:
        x = self.embed(items)
        responses = torch.cat([self._vertical_responses(x), *self._horizontal_responses(x)], dim=-1)
        z = F.relu(self.mix(self.dropout(responses)))  # (B, W, D)
        user = F.embedding(users, self.user_table)[:, None].expand_as(z)
        return torch.cat([z / self.input_scale, user, torch.ones_like(z[..., :1])], dim=-1)

    def _vertical_responses(self, x: Tensor) -> Tensor:
        """(B, W, D) events -> (B, W, VERTICAL * D)."""
        position = torch.arange(x.shape[1], device=x.device)
        age = position[:, None] - position  # (W, W) of each event at each position
        weights = self.vertical[:, age.clamp(min=0)].masked_fill(age < 0, 0.0)  # (VERTICAL, W, W)
        weighted = torch.einsum("ftj,bjd->btfd", weights, x)
        return (weighted + self.vertical_bias[:, None]).flatten(2)

    def _horizontal_responses(self, x: Tensor) -> list[Tensor]:
        """(B, W, D) events -> for each height (B, W, HORIZONTAL) the largest response so far."""
        events = x.transpose(1, 2)  # (B, D, W)
        pairs = zip(self.heights, self.horizontal, strict=True)
        found = [filters(F.pad(events, (height - 1, 0))) for height, filters in pairs]
        return [F.relu(torch.cummax(response, dim=2).values).transpose(1, 2) for response in found]


def _recent_means(history: int) -> Tensor:
    """(VERTICAL, L) weights that fall with the age of an event and sum to one, at time scales from 1 to below L."""
    scales = float(history) ** (torch.arange(VERTICAL) / VERTICAL)
    return torch.softmax(-torch.arange(history) / scales[:, None], dim=1)
