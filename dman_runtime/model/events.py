"""Events as a model sees them: those of items that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class KnownEvents:
    """Some events of a user, oldest first."""

    items: np.ndarray  # (n) int64 item indices
    times: np.ndarray  # (n) int64 seconds since 1970; 0 for unknown

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, part: slice) -> KnownEvents:
        return KnownEvents(self.items[part], self.times[part])

    def __add__(self, later: KnownEvents) -> KnownEvents:
        if not len(later):
            return self
        if not len(self):
            return later
        return KnownEvents(np.concatenate([self.items, later.items]), np.concatenate([self.times, later.times]))


NO_EVENTS = KnownEvents(np.zeros(0, np.int64), np.zeros(0, np.int64))


def without_times(histories: Sequence[np.ndarray]) -> list[KnownEvents]:
    """Histories of item indices as events at unknown times."""
    return [KnownEvents(items.astype(np.int64), np.zeros(len(items), np.int64)) for items in histories]
