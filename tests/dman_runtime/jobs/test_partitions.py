"""How jobs cut their work."""

from __future__ import annotations

import numpy as np

from dman_runtime.jobs.partitions import USERS_PER_BATCH, by_length


def test_by_length_gives_every_row_once_longest_first() -> None:
    lengths = np.random.default_rng(0).integers(0, 50, 2 * USERS_PER_BATCH + 3)
    batches = list(by_length(lengths))
    assert [len(batch) for batch in batches] == [USERS_PER_BATCH, USERS_PER_BATCH, 3]
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[order]) <= 0).all()


def test_batches_do_not_depend_on_the_order_of_the_users() -> None:
    random = np.random.default_rng(0)
    lengths, user_ids = (
        random.integers(0, 9, 3 * USERS_PER_BATCH),
        np.array([f"ü{n}" for n in range(3 * USERS_PER_BATCH)]),
    )
    shuffled = random.permutation(len(lengths))
    batches = by_length(lengths, user_ids.tolist())
    again = by_length(lengths[shuffled], user_ids[shuffled].tolist())
    for one, other in zip(batches, again, strict=True):
        assert user_ids[one].tolist() == user_ids[shuffled][other].tolist()


def test_by_length_of_nobody_is_nothing() -> None:
    assert list(by_length(np.zeros(0, np.int64))) == []
