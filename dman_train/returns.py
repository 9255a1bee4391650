"""Return: which items a user comes back to. A bounded sketch of a history, and a learned term of the scores.

The sketch holds the R items with the largest decayed counts, and their counts at several half-lives. It changes at the
end of a segment only: until then the items of the open segment are beside it. So it is the same for any split of a
history. Symbols as in `dman_train.model`; R sketch items, K = R + T candidates, H half-lives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_runtime.model.sketch import HALF_LIVES, RATES
from dman_runtime.model.times import BUCKETS, NO_GAP
from dman_train.losses import Table, rows_of
from dman_train.timing import buckets, gap_buckets

NO_ITEM = -1


class Sketch(NamedTuple):
    items: Tensor  # (B, R) int64, NO_ITEM where empty
    counts: Tensor  # (B, R, H) float32, decayed up to the last event
    ages: Tensor  # (B, R) int64 events that came after the last one of the item
    times: Tensor  # (B, R) int64 seconds of the last one of the item

    @classmethod
    def empty(cls, users: int, size: int, device: torch.device) -> Sketch:
        items = torch.full((users, size), NO_ITEM, device=device)
        counts = torch.zeros(users, size, len(HALF_LIVES), device=device)
        return cls(items, counts, torch.zeros_like(items), torch.zeros_like(items))

    def restarted(self, starts: Tensor) -> Sketch:
        """Forgets the rows where `starts` (B) is true."""
        return self._replace(items=self.items.masked_fill(starts[:, None], NO_ITEM))


class Returns(NamedTuple):
    """What users of B segments may come back to, at each of T positions."""

    items: Tensor  # (B, K) int64; NO_ITEM where there is none
    counts: Tensor  # (B, T, K, H) log(1 + decayed count) up to and including the position
    ages: Tensor  # (B, T, K) int64 buckets of the events since the last one of the item; NO_GAP: none so far
    times: Tensor  # (B, T, K) int64 seconds of the last one of the item


def follow(sketch: Sketch, items: Tensor, lengths: Tensor, times: Tensor) -> tuple[Returns, Sketch]:
    """Counts along a segment: (B, T) items and seconds, left-aligned, `lengths` (B) real; the sketch after it."""
    (_, segment), size, device = items.shape, sketch.items.shape[1], items.device
    position = torch.arange(segment, device=device)
    events = items.masked_fill(position >= lengths[:, None], NO_ITEM)
    candidates = torch.cat([sketch.items, events], dim=1)  # (B, K)
    same = candidates[:, :, None] == candidates[:, None]
    candidates = candidates.masked_fill(same.tril(-1).any(-1), NO_ITEM)  # the first place of each item counts
    match = (candidates[:, :, None] == events[:, None]) & (events >= 0)[:, None]  # (B, K, T)
    counts = _counts(sketch, candidates, match)
    ages, moments = _last(sketch, candidates, match, times)
    row, end = torch.arange(len(items), device=device), lengths - 1
    weight = counts[row, end].log1p().sum(-1).masked_fill(candidates < 0, -1.0)
    kept = torch.sort(weight, dim=1, descending=True, stable=True).indices[:, :size]  # (B, R)
    after = Sketch(
        candidates.gather(1, kept),
        counts[row, end].gather(1, kept[..., None].expand(-1, -1, len(HALF_LIVES))),
        ages[row, end].gather(1, kept),
        moments[row, end].gather(1, kept),
    )
    return Returns(candidates, counts.log1p_(), gap_buckets(ages), moments), after


def _counts(sketch: Sketch, candidates: Tensor, match: Tensor) -> Tensor:
    """(B, T, K, H) decayed counts of the candidates (B, K); `match` (B, K, T): which events they are."""
    position, size = torch.arange(match.shape[2], device=match.device), sketch.items.shape[1]
    rates = torch.from_numpy(RATES).to(match.device)  # (H)
    since = position[:, None] - position  # (T, T) from event s to position t
    decay = torch.where(since >= 0, rates[:, None, None] ** since.clamp(min=0), 0.0)  # (H, T, T)
    counts = torch.einsum("bks,hts->btkh", match.float(), decay)
    known = sketch.counts.masked_fill((sketch.items < 0)[..., None], 0.0)
    counts[:, :, :size] += known[:, None] * (rates ** (position[:, None] + 1.0))[:, None]
    return counts


def _last(sketch: Sketch, candidates: Tensor, match: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, K) events since the last one of each candidate, NO_GAP if none came so far; and (B, T, K) its seconds."""
    position = torch.arange(match.shape[2], device=match.device)
    last = torch.where(match, position, -1).cummax(dim=2).values.transpose(1, 2)  # (B, T, K)
    here = last >= 0
    known = F.pad(sketch.items >= 0, (0, len(position)))[:, None]  # (B, 1, K)
    before = F.pad(sketch.ages, (0, len(position)))[:, None] + position[:, None] + 1  # (B, T, K)
    ages = torch.where(here, position[:, None] - last, torch.where(known, before, NO_GAP))
    moments = times.gather(1, last.clamp(min=0).flatten(1)).view_as(last)
    return ages, torch.where(here, moments, F.pad(sketch.times, (0, len(position)))[:, None])


class ReturnTerm(nn.Module):
    """What is added to the score of item j for the user embedding u: counts . (A u + B x_j + c) + a_age + b_gap.

    The age is in events, the gap in the time from the last event of the item to the request, both in buckets.
    """

    def __init__(self, width: int, *, sees_times: bool) -> None:
        super().__init__()
        self.sees_times = sees_times
        self.by_user, self.by_item = (nn.Linear(width, len(HALF_LIVES), bias=bias) for bias in (True, False))
        self.by_age = nn.Parameter(torch.empty(BUCKETS))
        if sees_times:
            self.by_gap = nn.Parameter(torch.empty(BUCKETS))
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, users: Tensor, table: Table, returns: Returns, moments: Tensor) -> Tensor:
        """What is added to the scores of the candidates of `returns`, (B, T, K).

        Args:
            users, table: (B, T, D) user embeddings, (V, D) item embeddings.
            moments: (B, T) seconds of the requests.
        """
        items = rows_of(table, returns.items.clamp(min=0))  # (B, K, D)
        weights = self.by_user(users)[:, :, None] + self.by_item(items)[:, None]  # (B, T, K, H)
        scores = (weights * returns.counts).sum(-1) + _weights_of(self.by_age, returns.ages)
        return scores + _weights_of(self.by_gap, gaps_to(returns, moments)) if self.sees_times else scores


def _weights_of(table: Tensor, buckets: Tensor) -> Tensor:
    """Weights (...) from (BUCKETS) for buckets (...); 0 for NO_GAP."""
    return torch.cat([table, table.new_zeros(1)])[buckets]  # NO_GAP is the last one


def gaps_to(returns: Returns, moments: Tensor) -> Tensor:
    """(B, T, K) buckets of the time from the last event of each candidate to the moments (B, T); NO_GAP: unknown."""
    unknown = (returns.ages < 0) | (returns.times == 0) | (moments == 0)[..., None]
    return torch.where(unknown, NO_GAP, buckets(moments[..., None] - returns.times))
