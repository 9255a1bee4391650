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

NO_ITEM = -1


class Sketch(NamedTuple):
    items: Tensor  # (B, R) int64, NO_ITEM where empty
    counts: Tensor  # (B, R, H) float32, decayed up to the last event

    @classmethod
    def empty(cls, users: int, size: int, device: torch.device) -> Sketch:
        items = torch.full((users, size), NO_ITEM, device=device)
        return cls(items, torch.zeros(users, size, len(HALF_LIVES), device=device))

    def restarted(self, starts: Tensor) -> Sketch:
        """Forgets the rows where `starts` (B) is true."""
        return Sketch(
            self.items.masked_fill(starts[:, None], NO_ITEM), self.counts.masked_fill(starts[:, None, None], 0.0)
        )


class Returns(NamedTuple):
    """What users of B segments may come back to, at each of T positions."""

    items: Tensor  # (B, K) int64; NO_ITEM where there is none
    counts: Tensor  # (B, T, K, H) log(1 + decayed count) up to and including the position


def follow(sketch: Sketch, items: Tensor, lengths: Tensor) -> tuple[Returns, Sketch]:
    """Counts along a segment: (B, T) items, left-aligned, `lengths` (B) of them real; and the sketch after it."""
    (_, segment), size, device = items.shape, sketch.items.shape[1], items.device
    position = torch.arange(segment, device=device)
    events = items.masked_fill(position >= lengths[:, None], NO_ITEM)
    candidates = torch.cat([sketch.items, events], dim=1)  # (B, K)
    same = candidates[:, :, None] == candidates[:, None]
    candidates = candidates.masked_fill(same.tril(-1).any(-1), NO_ITEM)  # the first place of each item counts
    match = ((candidates[:, :, None] == events[:, None]) & (events >= 0)[:, None]).float()  # (B, K, T)
    rates = torch.from_numpy(RATES).to(device)  # (H)
    ages = position[:, None] - position  # (T, T) of event s at position t
    decay = torch.where(ages >= 0, rates[:, None, None] ** ages.clamp(min=0), 0.0)  # (H, T, T)
    counts = torch.einsum("bks,hts->btkh", match, decay)
    carried = rates ** (position[:, None] + 1.0)  # (T, H)
    counts[:, :, :size] += sketch.counts[:, None] * carried[:, None]
    last = counts[torch.arange(len(items), device=device), lengths - 1]  # (B, K, H)
    weight = last.log1p().sum(-1).masked_fill(candidates < 0, -1.0)
    kept = torch.sort(weight, dim=1, descending=True, stable=True).indices[:, :size]  # (B, R)
    after = Sketch(candidates.gather(1, kept), last.gather(1, kept[..., None].expand(-1, -1, len(HALF_LIVES))))
    return Returns(candidates, counts.log1p_()), after


class ReturnTerm(nn.Module):
    """counts . (A u + B x_j + c): what is added to the score of item j for the user embedding u."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.by_user, self.by_item = (nn.Linear(width, len(HALF_LIVES), bias=bias) for bias in (True, False))
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, users: Tensor, items: Tensor, counts: Tensor) -> Tensor:
        """(B, T, D) user embeddings, (B, K, D) items, (B, T, K, H) counts -> (B, T, K)."""
        weights = self.by_user(users)[:, :, None] + self.by_item(items)[:, None]  # (B, T, K, H)
        return (weights * counts).sum(-1)


def item_embeddings(table: Tensor, items: Tensor) -> Tensor:
    """(V, D) table, (B, K) items -> (B, K, D)."""
    return F.embedding(items.clamp(min=0), table)
