"""The values that logs and item files become: events grouped by user, and what is known about an item."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

LIST_SEPARATOR = "|"  # between the values of an attribute of an item


@dataclass(frozen=True, eq=False)
class Interactions:
    """A log grouped by user: users in order of first appearance, and each user's events in order, oldest first."""

    user_ids: list[str]  # (U,) external ids
    item_ids: list[str]  # (V,) distinct external ids, in numeric order if all are integers, else sorted as text
    offsets: np.ndarray  # (U+1,) int64; the events of user u are [offsets[u], offsets[u+1])
    items: np.ndarray  # (N,) int32 indices into item_ids
    timestamps: np.ndarray  # (N,) int64 seconds since 1970; all 0 if the log has no times
    integer_user_ids: bool  # all user ids are integers, written without leading zeros
    integer_item_ids: bool

    def __len__(self) -> int:
        """The number of events."""
        return len(self.items)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    def history(self, user_index: int) -> np.ndarray:
        """The item indices of one user, oldest first: (n,) int32, a view."""
        return self.items[self.offsets[user_index] : self.offsets[user_index + 1]]

    def user_timestamps(self, user_index: int) -> np.ndarray:
        """The times of one user's events: (n,) int64 seconds, a view."""
        return self.timestamps[self.offsets[user_index] : self.offsets[user_index + 1]]

    def first_users(self, count: int) -> Interactions:
        """The first `count` users with their histories, as views; the items keep their indices."""
        end = self.offsets[min(count, self.num_users)]
        return replace(
            self,
            user_ids=self.user_ids[:count],
            offsets=self.offsets[: count + 1],
            items=self.items[:end],
            timestamps=self.timestamps[:end],
        )

    def repeated_share(self) -> float:
        """Share, from 0 to 1, of the events whose item the user has already seen."""
        users = np.repeat(np.arange(self.num_users), np.diff(self.offsets))
        pairs = np.sort(users * len(self.item_ids) + self.items)
        return float(np.count_nonzero(pairs[1:] == pairs[:-1])) / max(1, len(self))

    def fingerprint(self) -> str:
        """SHA-256 in hex of the ids, their order and all histories; the same on every platform."""
        digest = hashlib.sha256()
        for ids in (self.user_ids, self.item_ids):
            digest.update(f"{len(ids)}\n".encode())
            digest.update("\n".join(ids).encode())  # ids hold no control characters
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.items.astype("<i4").tobytes())
        return digest.hexdigest()

    def filtered(self, *, min_user_events: int, min_item_events: int) -> Interactions:
        """Without rare items, then without short histories, repeated until nothing changes. May end up empty.

        Items get new indices.
        """
        users = np.repeat(np.arange(self.num_users), np.diff(self.offsets))  # (N,)
        keep = np.ones(len(self), dtype=bool)
        while True:
            before = np.count_nonzero(keep)
            item_counts = np.bincount(self.items[keep], minlength=len(self.item_ids))
            keep &= (item_counts >= min_item_events)[self.items]
            user_counts = np.bincount(users[keep], minlength=self.num_users)
            keep &= (user_counts >= min_user_events)[users]
            if np.count_nonzero(keep) == before:
                break
        item_kept = np.bincount(self.items[keep], minlength=len(self.item_ids)) > 0
        lengths = np.bincount(users[keep], minlength=self.num_users)
        new_index = np.cumsum(item_kept, dtype=np.int32) - np.int32(1)
        return Interactions(
            user_ids=[self.user_ids[u] for u in np.flatnonzero(lengths)],
            item_ids=[self.item_ids[i] for i in np.flatnonzero(item_kept)],
            offsets=np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64),
            items=new_index[self.items[keep]].astype(np.int32),
            timestamps=self.timestamps[keep],
            integer_user_ids=self.integer_user_ids,
            integer_item_ids=self.integer_item_ids,
        )


@dataclass(frozen=True)
class ItemInfo:
    """What an item file says about one item. Empty attributes are left out; LIST_SEPARATOR joins several values."""

    title: str
    attributes: dict[str, str]
