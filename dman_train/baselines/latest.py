"""The latest events of users and their times: all that a system without a state knows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dman_train.returns import Returns, Sketch, follow
from dman_train.timing import left_aligned, since_last_of

PAIRS = 1 << 20  # pairs of events of one user that are held at a time; each takes up to a hundred bytes


class Moments(NamedTuple):
    """When the events of B windows came, and for when their positions are asked."""

    times: Tensor  # (B, W) int64 seconds
    since_last: Tensor  # (B, W) int64 seconds from the event before; NO_GAP for the first of a window
    requests: Tensor | None = None  # (B, W) int64 seconds; before its event: unknown; None: all unknown


class LatestEvents(NamedTuple):
    """The last events of N users, at most W."""

    items: Tensor  # (N, W) int64, left-aligned
    lengths: Tensor  # (N) int64 real events, none of them 0
    moments: Moments

    @classmethod
    def of(
        cls,
        histories: Sequence[np.ndarray],
        times: Sequence[np.ndarray] | None,
        requests: np.ndarray | None,
        *,
        window: int,
        device: torch.device,
    ) -> LatestEvents:
        """`times` as the histories; None: unknown. `requests` (N) seconds."""
        lengths = torch.tensor([min(len(history), window) for history in histories], device=device)
        items = left_aligned([history[-window:] for history in histories], device)
        seconds = torch.zeros_like(items) if times is None else left_aligned([of[-window:] for of in times], device)
        asked = None if requests is None else torch.from_numpy(requests).to(device)[:, None].expand_as(seconds)
        return cls(items, lengths, Moments(seconds, since_last_of(seconds), asked))

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """The index (N), (N) of the last event of each user."""
        return torch.arange(len(self.items), device=self.items.device), self.lengths - 1

    def parts(self) -> Iterator[tuple[slice, LatestEvents]]:
        """A few users at a time, so that the pairs of their events fit into memory, and which rows they are."""
        count = max(1, PAIRS // self.items.shape[1] ** 2)
        for start in range(0, len(self.items), count):
            rows = slice(start, start + count)
            times, since_last, asked = self.moments
            moments = Moments(times[rows], since_last[rows], None if asked is None else asked[rows])
            yield rows, LatestEvents(self.items[rows], self.lengths[rows], moments)


def returns_within(items: Tensor, lengths: Tensor, times: Tensor) -> Returns:
    """What users may come back to, at each position of B windows: items of the window only.

    `items`, `times` (B, W) left-aligned, `lengths` (B) real. The largest tensor has 5 B W W numbers.
    """
    return follow(Sketch.empty(len(items), 0, items.device), items, lengths, times)[0]
