"""Endless lanes: which positions each training step sees.

Each of B lanes walks one user segment by segment and then takes the next user of a reshuffled list, across epoch
borders, so that no step is ever made of the few longest users alone. The schedule depends on the seed and the data
only, never on the weights: every rank of a distributed run computes it and keeps its own lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dman_runtime.interactions import InputError


@dataclass(frozen=True)
class Batch:
    """One step of all lanes."""

    items: np.ndarray  # (B, T) int64 inputs, left-aligned, 0 where padded
    targets: np.ndarray  # (B, T) int64 the item that follows each input
    lengths: np.ndarray  # (B) int64 real positions, 1..T
    starts: np.ndarray  # (B) bool, true where a lane begins a new user

    @property
    def positions(self) -> int:
        return int(self.lengths.sum())

    def lanes(self, part: slice) -> Batch:
        """The same step for some of the lanes."""
        return Batch(self.items[part], self.targets[part], self.lengths[part], self.starts[part])


class Lanes:
    """An endless iterator of `Batch`; its whole position is in `state_dict`."""

    def __init__(
        self, items: np.ndarray, offsets: np.ndarray, *, segment_length: int, lanes: int, vary_first: bool, seed: int
    ) -> None:
        """`items[offsets[u]:offsets[u+1]]` are user u's training events; users with fewer than two are skipped."""
        self._items, self._offsets = items, offsets
        self._users = np.flatnonzero(np.diff(offsets) >= 2)
        if len(self._users) == 0:
            raise InputError(
                "no user has two training events (all but a user's last two); nothing to learn from. Give a longer log"
            )
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
        lengths, starts = np.zeros(count, np.int64), np.zeros(count, bool)
        for lane in range(count):
            limit = segment
            if self._user[lane] < 0:
                self._user[lane], self._position[lane], starts[lane] = self._take_user(), 0, True
                limit = int(self._random.integers(1, segment + 1)) if self._vary_first else segment
            first = self._offsets[self._user[lane]] + self._position[lane]
            last = self._offsets[self._user[lane] + 1] - 1  # the final event is a target only
            length = int(min(limit, last - first))
            items[lane, :length] = self._items[first : first + length]
            targets[lane, :length] = self._items[first + 1 : first + length + 1]
            lengths[lane] = length
            self._position[lane] += length
            if first + length == last:
                self._user[lane] = -1
        return Batch(items, targets, lengths, starts)

    def _take_user(self) -> int:
        if self._next == len(self._order):
            self._order, self._next = self._random.permutation(self._users), 0
        self._next += 1
        return int(self._order[self._next - 1])

    def state_dict(self) -> dict[str, Any]:
        return {
            "random": self._random.bit_generator.state,
            "order": self._order.copy(),
            "next": self._next,
            "user": self._user.copy(),
            "position": self._position.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state["random"]
        self._order, self._next = state["order"].copy(), state["next"]
        self._user, self._position = state["user"].copy(), state["position"].copy()
