"""Limits of jobs, and how they cut their work: logs into partitions of users, users into batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dman_runtime.data.grouping import longest_first

USERS_PER_BATCH = 256
MAX_UNKNOWN = 0.5  # share of the events that may be of items that the bundle does not know
EVENTS_PER_PARTITION = 5_000_000  # about 300 MB while a partition is read and sorted


def by_length(lengths: np.ndarray, user_ids: Sequence[str] | None = None) -> Iterator[np.ndarray]:
    """Batches of row numbers, longest histories first: the largest batch comes while memory is free.

    Equal ones come in the order of `user_ids`, so that batches, on which the last bits of a state depend, do not
    depend on how a log lies in its files.
    """
    order = np.argsort(-lengths, kind="stable") if user_ids is None else longest_first(lengths, user_ids)
    for start in range(0, len(order), USERS_PER_BATCH):
        yield order[start : start + USERS_PER_BATCH]
