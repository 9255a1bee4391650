"""Endless lanes: which positions each training step sees.

Each of B lanes walks one user segment by segment and then takes the next user of a reshuffled list, across epoch
borders, so that no step is ever made of the few longest users alone. The schedule depends on the seed and the data
only, never on the weights: every rank of a distributed run computes it and keeps its own lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from dman_runtime.errors import InputError


@dataclass(frozen=True)
class Batch:
    """One step: B pieces of histories, of at most T events each."""

    items: np.ndarray  # (B, T) int64 inputs, left-aligned, 0 where padded
    targets: np.ndarray  # (B, T) int64 the item that follows each input
    lengths: np.ndarray  # (B) int64 real positions, 1..T
    starts: np.ndarray  # (B) bool, true where a lane begins a new user
    users: np.ndarray  # (B) int64 whose events they are, as in the offsets
    firsts: np.ndarray  # (B) int64 where the first input stands in the log

    @property
    def positions(self) -> int:
        return int(self.lengths.sum())

    def before(self, items: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
        """B x (H) item indices that the user of each piece has had before it, given the log that the batch is of."""
        starts = offsets[self.users]
        return [items[start:first] for start, first in zip(starts, self.firsts, strict=True)]

    def lanes(self, part: slice) -> Batch:
        """The same step for some of the lanes."""
        return Batch(*(getattr(self, field.name)[part] for field in fields(self)))


class Lanes:
    """An endless iterator of `Batch`; its whole position is in `state_dict`."""

    def __init__(
        self, items: np.ndarray, offsets: np.ndarray, *, segment_length: int, lanes: int, vary_first: bool, seed: int
    ) -> None:
        """`items[offsets[u]:offsets[u+1]]` are user u's training events; users with fewer than two are skipped."""
        self._items, self._offsets = items, offsets
        self._users = _trainable_users(offsets)
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
        lengths, users, firsts = (np.zeros(count, np.int64) for _ in range(3))
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
            lengths[lane], users[lane], firsts[lane] = length, self._user[lane], first
            self._position[lane] += length
            if first + length == last:
                self._user[lane] = -1
        return Batch(items, targets, lengths, starts, users, firsts)

    def _first_length(self, inputs: int) -> int:
        """A random length of the first segment that leaves the user with as few segments as any: padding is work."""
        if not self._vary_first:
            return self._segment
        return int(self._random.integers((inputs - 1) % self._segment + 1, self._segment + 1))

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


def _trainable_users(offsets: np.ndarray) -> np.ndarray:
    """Users with an input and a target. Raises InputError when there is none."""
    users = np.flatnonzero(np.diff(offsets) >= 2)
    if len(users) == 0:
        raise InputError(
            "no user has two training events (all but a user's last two); nothing to learn from. Give a longer log"
        )
    return users


class Windows:
    """An endless iterator of `Batch` for models without a state: each piece of a history stands for itself.

    In every epoch each user's history is cut anew into pieces of at most `length` events, the first of random length,
    so that every event is an input once. Pieces of similar length share a batch of at most `positions` padded events.
    """

    def __init__(self, items: np.ndarray, offsets: np.ndarray, *, length: int, positions: int, seed: int) -> None:
        self._items, self._offsets, self._users = items, offsets, _trainable_users(offsets)
        self.events = int((np.diff(offsets)[self._users] - 1).sum())
        self._length, self._positions = length, max(positions, length)
        self._random = np.random.default_rng(seed)
        self._cut()

    def _cut(self) -> None:
        """Cuts all histories and groups the pieces into the batches of one epoch."""
        self._before = self._random.bit_generator.state  # enough to cut them again
        self._next, users, starts, ends = 0, [], [], []
        for user in self._users:
            first, last = self._offsets[user], self._offsets[user + 1] - 1  # the final event is a target only
            head = int(self._random.integers(1, self._length + 1)) if last - first > self._length else self._length
            borders = np.concatenate([[first], np.arange(first + head, last, self._length), [last]])
            users.append(np.full(len(borders) - 1, user))
            starts.append(borders[:-1])
            ends.append(borders[1:])
        self._pieces = np.stack([np.concatenate(x) for x in (users, starts, ends)], axis=1)  # (P, 3)
        lengths = self._pieces[:, 2] - self._pieces[:, 1]
        order = np.argsort(lengths + self._random.random(len(lengths)), kind="stable")[::-1]
        self._batches, row = [], 0
        while row < len(order):
            size = max(1, self._positions // int(lengths[order[row]]))  # the first is the longest
            self._batches.append(order[row : row + size])
            row += size
        self._turn = self._random.permutation(len(self._batches))

    def __iter__(self) -> Windows:
        return self

    def __next__(self) -> Batch:
        if self._next == len(self._turn):
            self._cut()
        rows = self._pieces[self._batches[self._turn[self._next]]]
        self._next += 1
        lengths = rows[:, 2] - rows[:, 1]
        place = np.arange(int(lengths.max()))
        real = place < lengths[:, None]
        index = np.where(real, rows[:, 1:2] + place, 0)
        items, targets = (np.where(real, self._items[index + shift * real], 0).astype(np.int64) for shift in (0, 1))
        users, firsts = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
        return Batch(items, targets, lengths.astype(np.int64), np.ones(len(rows), bool), users, firsts)

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._before, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state["random"]
        self._cut()
        self._next = state["next"]
