"""Small histories over the tiny bundles' items, and logs of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import TINY_ITEMS

Histories = dict[int, list[tuple[int, int]]]  # user id -> (item id, timestamp), oldest first
UNKNOWN_ITEM = 999
ONLY_UNKNOWN = 77  # a user of unknown items only


def make_histories(users: int, *, seed: int, longest: int = 40) -> Histories:
    random = np.random.default_rng(seed)
    histories = {}
    for user in range(1, users + 1):
        items = random.integers(1, TINY_ITEMS + 1, int(random.integers(3, longest + 1))).tolist()
        histories[user] = [(item, 1000 * user + 3 * n) for n, item in enumerate(items)]
    return histories


def with_unknown_items(histories: Histories) -> Histories:
    """The same with an unknown item as everybody's second event, and a user who has nothing else."""
    mixed = {user: [*events[:1], (UNKNOWN_ITEM, events[0][1] + 1), *events[1:]] for user, events in histories.items()}
    return {**mixed, ONLY_UNKNOWN: [(UNKNOWN_ITEM, 5), (UNKNOWN_ITEM + 1, 6)]}


def write_csv(path: Path, histories: Histories) -> Path:
    """The events of all users in one file, in a random order of users."""
    order = np.random.default_rng(0).permutation([user for user, events in histories.items() for _ in events])
    left = {user: iter(events) for user, events in histories.items()}
    rows = [f"{user},{item},{time}\n" for user in order.tolist() for item, time in [next(left[user])]]
    path.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    return path
