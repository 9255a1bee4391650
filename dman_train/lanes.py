"""Endless lanes: which positions each training step of a DMAN sees.

Each of B lanes walks through one user segment by segment and then takes the next user of a reshuffled list, also
across epoch borders. So no step consists of the few longest users alone. The schedule depends on the seed and the data
only, never on the weights: each process of a distributed run computes all of it and uses its own lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from dman_runtime.errors import InputError
from dman_runtime.model.times import NO_GAP
from dman_train.checkpoint import int64_array, whole_number

WINDOW_EVENTS = 20  # of one lane of a baseline in a batch: as many as with DMAN's default segments


@dataclass(frozen=True)
class Batch:
    """One step: B pieces of histories, of at most T events each."""

    items: np.ndarray  # (B, T) int64 inputs, left-aligned, 0 where padded
    targets: np.ndarray  # (B, T) int64 the item that follows each input
    lengths: np.ndarray  # (B) int64 real positions, 1..T
    starts: np.ndarray  # (B) bool, true where a lane begins a new user
    users: np.ndarray  # (B) int64 the users of the pieces, as in the offsets
    first_events: np.ndarray  # (B) int64 index of each piece's first input in the log
    times: np.ndarray  # (B, T) int64 seconds of the inputs
    next_times: np.ndarray  # (B, T) int64 seconds of the targets
    since_last: np.ndarray  # (B, T) int64 seconds from the event before each input; NO_GAP for a user's first

    @property
    def positions(self) -> int:
        """Real positions in all."""
        return int(self.lengths.sum())

    def seen_before(self, items: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
        """B x (H) items that the user of each piece has seen before it. `items` and `offsets` are those of the log."""
        starts = offsets[self.users]
        return [items[start:first] for start, first in zip(starts, self.first_events, strict=True)]

    def pieces(self, part: slice) -> Batch:
        """The same step for some of the pieces."""
        return Batch(*(getattr(self, field.name)[part] for field in fields(self)))


class Lanes:
    """An endless iterator of `Batch`; `state_dict` holds its whole state."""

    def __init__(
        self,
        items: np.ndarray,
        offsets: np.ndarray,
        times: np.ndarray,
        *,
        segment_length: int,
        lanes: int,
        vary_first: bool,
        seed: int,
    ) -> None:
        """`items[offsets[u]:offsets[u+1]]` are user u's training events; users with fewer than two are skipped.

        Raises InputError if that leaves no user.
        """
        self._items, self._offsets, self._times = items, offsets, times
        self._users = trainable_users(offsets)
        self.events = int((np.diff(offsets)[self._users] - 1).sum())  # inputs in one pass over all users
        self._segment, self._vary_first = segment_length, vary_first
        self._random = np.random.default_rng(seed)
        self._order, self._next = self._random.permutation(self._users), 0
        self._user = np.full(lanes, -1, np.int64)
        self._position = np.zeros(lanes, np.int64)

    def __iter__(self) -> Lanes:
        return self

    def __next__(self) -> Batch:
        count, segment = len(self._user), self._segment
        items, targets = np.zeros((count, segment), np.int64), np.zeros((count, segment), np.int64)
        times, next_times, since_last = (np.zeros((count, segment), np.int64) for _ in range(3))
        lengths, users, first_events = (np.zeros(count, np.int64) for _ in range(3))
        starts = np.zeros(count, bool)
        for lane in range(count):
            if self._user[lane] < 0:
                self._user[lane], self._position[lane], starts[lane] = self._take_user(), 0, True
            first = self._offsets[self._user[lane]] + self._position[lane]
            last = self._offsets[self._user[lane] + 1] - 1  # the final event is a target only
            limit = self._first_length(last - first) if starts[lane] else segment
            length = int(min(limit, last - first))
            items[lane, :length] = self._items[first : first + length]
            targets[lane, :length] = self._items[first + 1 : first + length + 1]
            moments = self._times[max(first - 1, 0) : first + length + 1]
            times[lane, :length], next_times[lane, :length] = moments[-length - 1 : -1], moments[-length:]
            since_last[lane, :length] = np.maximum(np.diff(moments[:-1], prepend=moments[0]), 0)[-length:]
            if starts[lane]:
                since_last[lane, 0] = NO_GAP
            lengths[lane], users[lane], first_events[lane] = length, self._user[lane], first
            self._position[lane] += length
            if first + length == last:
                self._user[lane] = -1
        return Batch(items, targets, lengths, starts, users, first_events, times, next_times, since_last)

    def _first_length(self, inputs: int) -> int:
        """A random length of the first segment that does not add a segment to the user: padding costs time."""
        if not self._vary_first:
            return self._segment
        return int(self._random.integers((inputs - 1) % self._segment + 1, self._segment + 1))

    def _take_user(self) -> int:
        if self._next == len(self._order):
            self._order, self._next = self._random.permutation(self._users), 0
        self._next += 1
        return int(self._order[self._next - 1])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, as a file may hold them."""
        return {
            "random": self._random.bit_generator.state,
            "order": torch.from_numpy(self._order.copy()),
            "next": self._next,
            "user": torch.from_numpy(self._user.copy()),
            "position": torch.from_numpy(self._position.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned for the same data. Raises ValueError for another state."""
        order = int64_array(state["order"], len(self._users), "order")
        user, position = (int64_array(state[name], len(self._user), name) for name in ("user", "position"))
        busy = np.flatnonzero(user >= 0)
        if not np.array_equal(np.sort(order), self._users) or not np.isin(user[busy], self._users).all():
            raise ValueError("the lanes are those of other users")
        inputs = np.diff(self._offsets)[user[busy]] - 1
        if user.min() < -1 or (position[busy] < 0).any() or (position[busy] >= inputs).any():
            raise ValueError("a lane is not within the history of its user")
        self._next = whole_number(state["next"], len(order), "next")
        self._random.bit_generator.state = state["random"]
        self._order, self._user, self._position = order, user, position


def trainable_users(offsets: np.ndarray) -> np.ndarray:
    """Users with an input and a target. Raises InputError if there are none."""
    users = np.flatnonzero(np.diff(offsets) >= 2)
    if len(users) == 0:
        raise InputError(
            "no user has two training events (all but a user's last two), so there is nothing to learn from",
            "give a longer log",
            parameter="data",
        )
    return users
