"""Windows of histories: which positions each training step of a baseline sees."""

from __future__ import annotations

from typing import Any

import numpy as np

from dman_runtime.model.times import NO_GAP
from dman_train.checkpoint import whole_number
from dman_train.lanes import Batch, trainable_users


class Windows:
    """An endless iterator of `Batch` for models without a state: each piece of a history is seen on its own.

    In every epoch each user's history is cut into new pieces of at most `length` events, the first of random length,
    so that every event is an input once. Pieces of similar length share a batch of at most `positions` padded events.
    """

    def __init__(
        self, items: np.ndarray, offsets: np.ndarray, times: np.ndarray, *, length: int, positions: int, seed: int
    ) -> None:
        self._items, self._offsets, self._times = items, offsets, times
        self._users = trainable_users(offsets)
        self.events = int((np.diff(offsets)[self._users] - 1).sum())
        self._length, self._positions = length, max(positions, length)
        self._random = np.random.default_rng(seed)
        self._cut()

    def _cut(self) -> None:
        """Cuts all histories and groups the pieces into the batches of one epoch."""
        self._cut_from = self._random.bit_generator.state  # enough to cut them again
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
        position = np.arange(int(lengths.max()))
        real = position < lengths[:, None]
        index = np.where(real, rows[:, 1:2] + position, 0)
        items, targets = (np.where(real, self._items[index + shift * real], 0).astype(np.int64) for shift in (0, 1))
        users, first_events = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
        times, next_times = (np.where(real, self._times[index + shift * real], 0) for shift in (0, 1))
        since_last = np.maximum(np.diff(times, axis=1, prepend=times[:, :1]), 0)
        since_last[:, 0] = NO_GAP  # a piece is all that the model sees
        starts = np.ones(len(rows), bool)
        return Batch(
            items, targets, lengths.astype(np.int64), starts, users, first_events, times, next_times, since_last
        )

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._cut_from, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned for the same data. Raises ValueError for another state."""
        self._random.bit_generator.state = state["random"]
        self._cut()
        self._next = whole_number(state["next"], len(self._turn), "next")
