"""What all baselines share: the item table, and user embeddings of whole histories."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.config import BaselineConfig
from dman_train.dropout import Dropout
from dman_train.model import SCORE_SCALE


class Baseline(nn.Module):
    """A model that sees only the last `history` events of a user.

    Symbols: B users, W events (at most `history`), D width, V items, U users of the training log.
    A subclass defines `encode` and may replace `item_table`.
    """

    def __init__(self, config: BaselineConfig, vocabulary: int, users: int) -> None:
        super().__init__()
        self.config, self.vocabulary, self.users = config, vocabulary, users
        self.items = nn.Parameter(torch.randn(vocabulary, config.width) * 0.02)
        self.input_scale = math.sqrt(config.width)
        self.output_scale = SCORE_SCALE / math.sqrt(config.width)  # of LayerNormed outputs, as in a DMAN
        self.dropout = Dropout(config.dropout)

    def item_table(self) -> Tensor:
        """(V, D') item embeddings for scores; the input embeddings, unless a subclass has others."""
        return self.items * self.input_scale

    def embed(self, item_indices: Tensor) -> Tensor:
        """(...) item indices -> (..., D), with dropout."""
        return self.dropout(F.embedding(item_indices, self.items) * self.input_scale)

    def encode(self, items: Tensor, users: Tensor, lengths: Tensor) -> Tensor:
        """(B, W) item indices, left-aligned, (B) users, (B) events of each row -> (B, W, D') user embeddings.

        The one after event t may depend only on the events up to t, and on the length. Values after the end of a
        shorter row do not matter. Untrained scores should have a standard deviation of about one.
        """
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """A term of the mean loss for the last `encode`; 0 for most models."""
        return self.items.new_zeros(())

    @torch.no_grad()
    def user_embeddings(self, histories: Sequence[np.ndarray], users: np.ndarray) -> Tensor:
        """(N, D') after N histories of item indices, none of them empty; `users` (N) are rows of the training log."""
        device, window = self.items.device, self.config.history
        recent = [torch.from_numpy(history[-window:].astype(np.int64)) for history in histories]
        lengths = torch.tensor([len(history) for history in recent], device=device)
        items = nn.utils.rnn.pad_sequence(recent, batch_first=True).to(device)
        encoded = self.encode(items, torch.from_numpy(users).to(device), lengths)
        return encoded[torch.arange(len(recent), device=device), lengths - 1]
