"""What all baselines share: the item table, times, returns, and user embeddings of whole histories."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_runtime.model.times import BUCKETS
from dman_train.baselines.latest import LatestEvents, Moments, returns_within
from dman_train.config import BaselineConfig
from dman_train.dropout import Dropout
from dman_train.model import SCORE_SCALE
from dman_train.returns import Returns, ReturnTerm
from dman_train.timing import gap_buckets, moments_of, of_gaps, request_gaps


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
        if config.sees_times:
            self.gaps = nn.Parameter(torch.zeros(BUCKETS, config.width))  # by the time since the event before
        if config.time == "request":
            self.request_gaps = nn.Parameter(torch.zeros(BUCKETS, config.width))  # by the time since the last event
        if config.returns == "on":
            self.returns = ReturnTerm(self.score_width, sees_times=config.sees_times)

    @property
    def score_width(self) -> int:
        """D' of `item_table`."""
        return self.config.width

    def item_table(self) -> Tensor:
        """(V, D') item embeddings for scores; the input embeddings, unless a subclass has others."""
        return self.items * self.input_scale

    def embed(self, item_indices: Tensor, moments: Moments | None = None) -> Tensor:
        """(...) item indices -> (..., D), with dropout. A model that sees times needs the moments."""
        x = F.embedding(item_indices, self.items)
        if self.config.sees_times:
            assert moments is not None
            x = x + of_gaps(self.gaps, gap_buckets(moments.since_last))
        return self.dropout(x * self.input_scale)

    def at_request(self, states: Tensor, moments: Moments | None) -> Tensor:
        """(B, W, D) states after each event -> the same at the time of its request, as far as the model sees one."""
        if self.config.time != "request" or moments is None or moments.requests is None:
            return states
        return states + of_gaps(self.request_gaps, request_gaps(moments.times, moments.requests)) * self.input_scale

    def encode(self, items: Tensor, users: Tensor, lengths: Tensor, moments: Moments | None = None) -> Tensor:
        """(B, W) item indices, left-aligned, (B) users, (B) events of each row -> (B, W, D') user embeddings.

        The one after event t may depend only on the events up to t, on its request, and on the length. Values after the
        end of a shorter row do not matter. Untrained scores should have a standard deviation of about one.
        """
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """A term of the mean loss for the last `encode`; 0 for most models."""
        return self.items.new_zeros(())

    @torch.no_grad()
    def user_embeddings(
        self,
        histories: Sequence[np.ndarray],
        users: np.ndarray,
        *,
        times: Sequence[np.ndarray] | None = None,
        request_times: np.ndarray | None = None,
    ) -> Tensor:
        """(N, D') after N histories of item indices, none of them empty; `users` (N) are rows of the training log.

        `times`: N arrays of seconds, `request_times` (N) seconds, as `Moments` has them.
        """
        rows, found = torch.from_numpy(users).to(self.items.device), []
        latest = self._latest(histories, times, request_times)
        for part, events in latest.parts() if self.config.sees_times else [(slice(None), latest)]:
            encoded = self.encode(events.items, rows[part], events.lengths, events.moments)
            found.append(encoded[events.last])
        return torch.cat(found)

    @torch.no_grad()
    def returned(
        self,
        users: Tensor,
        histories: Sequence[np.ndarray],
        *,
        times: Sequence[np.ndarray] | None = None,
        request_times: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(N, W) items and what is added to their scores, for (N, D') user embeddings; an item may come up again."""
        table, found = self.item_table(), []
        for part, events in self._latest(histories, times, request_times).parts():
            returns, at = returns_within(events.items, events.lengths, events.moments.times), events.last
            now = Returns(returns.items, *(x[at][:, None] for x in (returns.counts, returns.ages, returns.times)))
            asked = moments_of(events.moments.times, events.moments.requests)[at][:, None]
            found.append((now.items.clamp(min=0), self.returns(users[part, None], table, now, asked)[:, 0]))
        items, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        return items, scores

    def _latest(
        self, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None, requests: np.ndarray | None
    ) -> LatestEvents:
        """What the model sees of N histories. Raises ValueError if it lacks their times."""
        if times is None and self.config.sees_times:
            raise ValueError("this model sees the times of events")
        asked = requests if self.config.time == "request" else None
        return LatestEvents.of(histories, times, asked, window=self.config.history, device=self.items.device)
