"""Replays whole histories through a DMAN: what evaluation, export and tests compare against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dman_train.model import DMAN, Encoding
from dman_train.returns import Returns, Sketch, follow
from dman_train.rounding import as_kept
from dman_train.timing import Timing, gap_buckets, left_aligned, moments_of, since_last_of, timing_of

OnSegment = Callable[[Tensor, Tensor, Encoding], None]


@torch.no_grad()
def replay(
    model: DMAN,
    histories: Sequence[np.ndarray],
    on_segment: OnSegment | None = None,
    *,
    times: Sequence[np.ndarray] | None = None,
    request_times: np.ndarray | None = None,
    rounds: bool = True,
) -> tuple[Tensor, Tensor]:
    """User embeddings (N, D) and memories (N, L, m, D) after N histories of item indices, none of them empty.

    It is fastest if neighbours have similar lengths: each segment is run for the histories that reach it. After each
    segment, `on_segment` gets the rows (A) of the histories that reach it, the memories (A, L, m, D) that it reads
    (overwritten after the call), and the Encoding of its last positions. Without `rounds`, hidden states of closed
    segments are never rounded.
    """
    if any(len(history) == 0 for history in histories):
        raise ValueError("an empty history has no user embedding")
    config, device = model.config, model.items.device
    T = config.segment_length
    padded, sorted_lengths, order = _by_length(histories, device)
    memory = model.initial_memory[None].repeat(len(histories), 1, 1, 1)
    context = torch.zeros(len(histories), config.layers, 0, config.width, device=device)
    users = torch.empty(len(histories), config.width, device=device)
    clock = _Clock.of(times, _asked_at(model, times, request_times), order) if config.sees_times else None
    for start in range(0, padded.shape[1], T):
        active = int((sorted_lengths > start).sum())
        context, memory_now = context[:active], memory[:active]
        new = padded[:active, start : start + T]
        last = (sorted_lengths[:active] - start).clamp(max=T) - 1
        visible = torch.full((active,), context.shape[2], device=device)
        gaps, timing = clock.at(start, new.shape[1], context.shape[2], active) if clock else (None, None)
        encoding = model.encode(model.embed(new, gaps), context, visible, memory_now, last, timing)
        users[:active] = encoding.user_embedding[:, 0]
        if on_segment is not None:
            on_segment(order[:active], memory_now, encoding)
        closed = int((sorted_lengths >= start + T + config.answers_read_states).sum())
        absorbed = context if config.recurrent else encoding.hidden
        if closed and absorbed.shape[2]:
            memory[:closed] = model.abstract(memory_now[:closed], absorbed[:closed])
        if config.recurrent:
            context = as_kept(encoding.hidden, config) if rounds else encoding.hidden
    unsort = torch.argsort(order)
    return users[unsort], memory[unsort]


@torch.no_grad()
def returned(
    model: DMAN,
    users: Tensor,
    histories: Sequence[np.ndarray],
    *,
    times: Sequence[np.ndarray] | None = None,
    request_times: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Items (N, K) and what is added to their scores (N, K), for (N, D) user embeddings; an item may come up again."""
    returns, device = _returns_of(model, histories, times), users.device
    last = np.zeros(len(histories), np.int64) if times is None else _last(times)
    asked = _asked_at(model, times, request_times)
    requests = None if asked is None else torch.from_numpy(asked)
    moments = moments_of(torch.from_numpy(last), requests)[:, None].to(device)
    return returns.items.clamp(min=0), model.returns(users[:, None], model.item_table(), returns, moments)[:, 0]


def _returns_of(model: DMAN, histories: Sequence[np.ndarray], times: Sequence[np.ndarray] | None) -> Returns:
    """What users may come back to after N histories, none of them empty: `Returns` of N segments, one position each."""
    T, device = model.config.segment_length, model.items.device
    padded, lengths, order = _by_length(histories, device)
    sketch = Sketch.empty(len(histories), model.config.sketch_items, device)
    moments = _in_order([np.zeros_like(history) for history in histories] if times is None else times, order)
    result: list[Tensor] = []
    for start in range(0, padded.shape[1], T):
        active = int((lengths > start).sum())
        new = padded[:active, start : start + T]
        here = (lengths[:active] - start).clamp(max=T)
        then = F.pad(moments[:active, start : start + T], (0, T - new.shape[1]))
        found, sketch = follow(Sketch(*(x[:active] for x in sketch)), F.pad(new, (0, T - new.shape[1])), here, then)
        at = torch.arange(active, device=device), here - 1
        last = found.items, *(x[at][:, None] for x in (found.counts, found.ages, found.times))
        for whole, part in zip(result, last, strict=True) if result else ():
            whole[:active] = part
        result = result or list(last)
    unsort = torch.argsort(order)
    return Returns(*(x[unsort] for x in result))


class _Clock(NamedTuple):
    """The times of the histories of a replay, longest first."""

    times: Tensor  # (N, longest) int64 seconds
    since_last: Tensor  # (N, longest) int64 seconds, NO_GAP for the first event
    requests: Tensor | None  # (N) int64 seconds

    @classmethod
    def of(cls, times: Sequence[np.ndarray] | None, requests: np.ndarray | None, order: Tensor) -> _Clock:
        if times is None:
            raise ValueError("this model sees the times of events")
        moments = _in_order(times, order)
        asked = None if requests is None else torch.from_numpy(requests).to(order.device)
        return cls(moments, since_last_of(moments), None if asked is None else asked[order])

    def at(self, start: int, new: int, context: int, active: int) -> tuple[Tensor, Timing]:
        """Buckets of the gaps (A, S), and the timing, of the positions from `start` on, for the A longest histories."""
        end = start + new
        times, keys = self.times[:active, start:end], self.times[:active, start - context : end]
        requests = None if self.requests is None else self.requests[:active, None].expand(-1, new)
        return gap_buckets(self.since_last[:active, start:end]), timing_of(times, keys, requests)


def _asked_at(model: DMAN, times: Sequence[np.ndarray] | None, request_times: np.ndarray | None) -> np.ndarray | None:
    """(N) seconds of the requests as the model sees them; None if it does not."""
    if times is None or request_times is None or model.config.time != "request":
        return None
    return np.minimum(request_times, _last(times) + model.longest_gap)


def _last(times: Sequence[np.ndarray]) -> np.ndarray:
    """(N) the last of each."""
    return np.array([int(seconds[-1]) for seconds in times], np.int64)


def _in_order(arrays: Sequence[np.ndarray], order: Tensor) -> Tensor:
    """(N, longest) the arrays in an order, padded with zeros."""
    return left_aligned([arrays[row] for row in order.tolist()], order.device)


def _by_length(histories: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Longest first: the padded histories (N, longest), their lengths (N), and which history (N) each row is."""
    lengths = torch.tensor([len(history) for history in histories], device=device)
    order = torch.argsort(lengths, descending=True)
    return _in_order(histories, order), lengths[order], order
