"""SDM: Lv et al., "SDM: Sequential Deep Matching Model for Online Large-scale Recommender System", CIKM 2019
(arXiv 1909.00385).

Short-term part: an LSTM over the current session, causal self-attention over its states, and attention of the user
over the result. Long-term part: attention of the user over the items of earlier sessions, and a dense layer with tanh.
A gate computed from both and the user embedding u mixes them: g * short + (1 - g) * long.

The reference (alicogintel/SDM; shenweichen/DeepMatch has another) adds shop, brand and category of the items and the
profile of the user, and pools each in a separate long-term part that spans a week. It splits sessions by time, and
learns by sampled softmax with a separate output table. Its default has one LSTM layer, and one attention block with a
residual and LayerNorm. The attention of the user also has a residual in the code, though not in the paper. Here: only
item and user ids, the input embeddings as output table, and our loss. A session is a segment of `segment_length`
events; the LSTM restarts in each. Segments are counted from the end of a window, and the first one is the short one: so
a user who is ranked has a full current session. In training a position has seen 1 to `segment_length` events of its
own. With only one segment, there is no long-term part and no gate.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.baselines.base import Baseline
from dman_train.baselines.latest import Moments
from dman_train.config import BaselineConfig


class SDM(Baseline):
    """Symbols: S segments of T = `segment_length` events hold a window."""

    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__(config, vocabulary, users)
        width, several = config.width, config.history > config.segment_length
        self.user_table = nn.Parameter(torch.randn(users, width) * 0.02)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.long_output = nn.Linear(width, width) if several else None
        self.gate = nn.Linear(3 * width, width) if several else None

    def encode(self, items: Tensor, users: Tensor, lengths: Tensor, moments: Moments | None = None) -> Tensor:
        user = F.embedding(users, self.user_table) * self.input_scale  # (B, D)
        place, event = _cut_from_the_end(lengths, items.shape[1], self.config.segment_length)
        x = self.embed(items.gather(1, event.clamp(min=0)))  # (B, S * T, D), anything in places without an event
        segments = x.view(len(x), -1, self.config.segment_length, x.shape[2])  # (B, S, T, D)
        states = self._self_attention(self._run_lstm(segments.flatten(0, 1))).view_as(segments)
        mixed = self._short_term(states, user)
        if self.gate is not None:
            longs = self._long_term(x, event < 0, user)[:, :, None].expand_as(mixed)
            gate = torch.sigmoid(self.gate(torch.cat([mixed, longs, user[:, None, None].expand_as(mixed)], dim=-1)))
            mixed = gate * mixed + (1 - gate) * longs
        found = mixed.flatten(1, 2).gather(1, place[..., None].expand(-1, -1, x.shape[2]))  # (B, W, D)
        return found * self.output_scale

    def _run_lstm(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D). In float32 on CPUs whose oneDNN has no LSTM in bfloat16."""
        device = x.device.type
        supported = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and supported):
            return self.lstm(x)[0]

    def _self_attention(self, states: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        heads = self.project(states).unflatten(2, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads  # (N, H, T, D/H) each
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout.p * self.training)
        return self.norm(states + self.dropout(self.attended(read.transpose(1, 2).flatten(2))))

    def _short_term(self, states: Tensor, user: Tensor) -> Tensor:
        """(B, S, T, D) states, (B, D) users -> (B, S, T, D): what the user attends to in the segment so far."""
        energies = torch.einsum("bstd,bd->bst", states, torch.tanh(self.query(user))) / math.sqrt(user.shape[1])
        later = torch.ones(states.shape[2], states.shape[2], dtype=torch.bool, device=user.device).triu(1)
        weights = torch.softmax(energies[:, :, None].masked_fill(later, float("-inf")), dim=-1)  # (B, S, T, T)
        return states + self.dropout(weights) @ states

    def _long_term(self, x: Tensor, empty: Tensor, user: Tensor) -> Tensor:
        """(B, S * T, D) events, places without one, (B, D) users -> (B, S, D): what the user attends to before.

        Zeros, through `long_output`, for the first segment.
        """
        assert self.long_output is not None
        energies = torch.einsum("bwd,bd->bw", x, user) / math.sqrt(user.shape[1])
        place = torch.arange(x.shape[1], device=x.device)
        starts = place[:: self.config.segment_length]
        unseen = (place >= starts[1:, None]) | empty[:, None]  # (B, S - 1, S * T)
        weights = torch.softmax(energies[:, None].masked_fill(unseen, float("-inf")), dim=-1)
        return torch.tanh(self.long_output(F.pad(weights @ x, (0, 0, 1, 0))))


def _cut_from_the_end(lengths: Tensor, window: int, size: int) -> tuple[Tensor, Tensor]:
    """Segments of T = `size` events, counted from the end of each row: the first has 1 to T events.

    Returns (B, W) the place of each event among S * T places, and (B, S * T) the event in each place, -1 if none. The
    places of the first segment are filled from its beginning.
    """
    first = (lengths - 1)[:, None] % size + 1  # (B, 1) events of the first segment
    event = torch.arange(window, device=lengths.device)
    places = -(-window // size) * size
    place = (event + (event >= first) * (size - first)).clamp(max=places - 1)  # those after the end of a row: anywhere
    held = torch.arange(places, device=lengths.device)
    held = torch.where(held < size, torch.where(held < first, held, -1), held - (size - first))
    return place, torch.where(held < lengths[:, None], held, -1)
