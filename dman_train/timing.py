"""Times as the network sees them: buckets of the seconds between events, and from events to a request.

The buckets are those of `dman_runtime.model.times`. Symbols as in `dman_train.model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_runtime.model.times import BORDERS, FIRST_SECONDS, NO_GAP


class Timing(NamedTuple):
    """What a model that sees times knows of S new positions, in buckets of `dman_runtime.model.times`."""

    ages: Tensor  # (B, S, K) int64 from each event among the keys to each position
    request_ages: Tensor | None = None  # (B, S, K) the same, to the request; None: nobody asks
    request_gaps: Tensor | None = None  # (B, S) int64 from each position to the request; NO_GAP: unknown

    def at(self, last: Tensor) -> Timing:
        """Of the position `last` (B) of each row only."""
        asked = (None if x is None else at_position(x, last) for x in (self.request_ages, self.request_gaps))
        return Timing(at_position(self.ages, last), *asked)


def left_aligned(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """(N, longest) int64 the arrays, left-aligned, padded with zeros."""
    rows = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


def since_last_of(times: Tensor) -> Tensor:
    """(N, W) seconds from the event before, for events at `times` (N, W); NO_GAP for the first."""
    seconds = F.pad(times[:, 1:] - times[:, :-1], (1, 0)).clamp(min=0)
    seconds[:, 0] = NO_GAP
    return seconds


def buckets(seconds: Tensor) -> Tensor:
    """`dman_runtime.model.times.bucket` for int64 seconds (...) on any device."""
    borders = torch.from_numpy(BORDERS).to(seconds.device)
    return torch.bucketize(seconds.double().contiguous(), borders, right=True)


def gap_buckets(since_last: Tensor) -> Tensor:
    """(...) seconds since the event before, or NO_GAP -> (...) buckets, or NO_GAP."""
    return torch.where(since_last < 0, NO_GAP, buckets(since_last))


def timing_of(times: Tensor, key_times: Tensor, request_times: Tensor | None = None) -> Timing:
    """Of positions at `times` (B, S), keys at (B, K), and requests at (B, S); a request before its event is unknown."""
    ages = buckets(times[:, :, None] - key_times[:, None])
    if request_times is None:
        return Timing(ages, ages)
    at = moments_of(times, request_times)
    return Timing(ages, buckets(at[:, :, None] - key_times[:, None]), request_gaps(times, request_times))


def request_gaps(times: Tensor, request_times: Tensor) -> Tensor:
    """(B, S) buckets from positions at `times` to their requests, or NO_GAP."""
    return torch.where(request_times < times, NO_GAP, buckets(request_times - times))


def moments_of(times: Tensor, request_times: Tensor | None) -> Tensor:
    """(B, S) seconds that positions at `times` (B, S) are asked for: an unknown request stands at its event.

    As `dman_runtime.model.times.quantised` has them.
    """
    if request_times is None:
        return times
    return times + torch.from_numpy(FIRST_SECONDS).to(times.device)[buckets(request_times - times)]


def of_gaps(table: Tensor, gaps: Tensor) -> Tensor:
    """Rows (..., D) of `table` (BUCKETS, D) for buckets (...); zeros for NO_GAP."""
    return F.embedding(gaps.clamp(min=0), table) * (gaps >= 0)[..., None]


def at_position(x: Tensor, position: Tensor) -> Tensor:
    """(B, S, ...), (B) -> (B, 1, ...): the row at each position."""
    index = position.view(-1, *[1] * (x.dim() - 1)).expand(-1, 1, *x.shape[2:])
    return x.gather(1, index)
