"""Windows: which events are seen in which order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from traced_log import EVENTS, OFFSETS, TIMES, TRAINABLE

from dman_runtime.errors import InputError
from dman_train.baselines.windows import Windows
from dman_train.lanes import Batch

INPUTS = sorted(event for user in TRAINABLE for event in range(OFFSETS[user], OFFSETS[user + 1] - 1))


def traceable(*, length: int = 5, positions: int = 20, seed: int = 0) -> Windows:
    return Windows(EVENTS, OFFSETS, TIMES, length=length, positions=positions, seed=seed)


def epoch_of(windows: Windows) -> list[Batch]:
    batches: list[Batch] = []
    while sum(batch.positions for batch in batches) < windows.events:
        batches.append(next(windows))
    return batches


def pieces_of(batches: list[Batch]) -> list[list[int]]:
    return [row[:length].tolist() for batch in batches for row, length in zip(batch.items, batch.lengths, strict=True)]


@pytest.mark.parametrize("positions", [1, 20, 1000])
@pytest.mark.parametrize("length", [1, 5, 100])
def test_windows_use_each_training_event_once_per_epoch(length: int, positions: int) -> None:
    windows = traceable(length=length, positions=positions)
    assert windows.events == len(INPUTS)
    for _ in range(3):
        batches = epoch_of(windows)
        assert sorted(event for piece in pieces_of(batches) for event in piece) == INPUTS
        for batch in batches:
            assert {a.dtype for a in (batch.items, batch.targets, batch.lengths, batch.users)} == {np.dtype(np.int64)}
            real = np.arange(batch.items.shape[1]) < batch.lengths[:, None]
            assert (batch.targets[real] == batch.items[real] + 1).all()
            assert (batch.users == np.searchsorted(OFFSETS, batch.items[:, 0], side="right") - 1).all()
            assert batch.starts.all()
            for padded in (batch.items[~real], batch.targets[~real]):
                assert not padded.any()


def test_windows_are_pieces_of_one_history_and_no_longer_than_asked() -> None:
    windows = traceable()
    for piece in pieces_of([next(windows) for _ in range(100)]):
        assert len(piece) <= 5
        assert all(after == before + 1 for before, after in pairwise(piece))


@pytest.mark.parametrize("positions", [1, 20, 33])
def test_windows_bound_the_padded_positions_of_a_batch(positions: int) -> None:
    windows = traceable(positions=positions)
    shapes = [batch.items.shape for _ in range(5) for batch in epoch_of(windows)]
    assert all(rows * width <= max(positions, 5) for rows, width in shapes)
    assert positions < 10 or any(rows > 1 for rows, _ in shapes)


def test_windows_cut_anew_in_every_epoch_but_leave_short_histories_whole() -> None:
    windows = traceable()
    epochs = [pieces_of(epoch_of(windows)) for _ in range(8)]
    starts = [{piece[0] for piece in pieces} for pieces in epochs]
    assert all(a != b for a, b in pairwise(starts)), "other borders"
    assert all(sorted(a) != a for a in epochs), "in another order than the log"
    for user in TRAINABLE:
        first, last = int(OFFSETS[user]), int(OFFSETS[user + 1]) - 1
        heads = {len(piece) for pieces in epochs for piece in pieces if piece[0] == first}
        assert heads == {last - first} if last - first <= 5 else len(heads) > 1
    assert {start % 5 for found in starts for start in found} == set(range(5))


@pytest.mark.parametrize("steps", [0, 3, "epoch", 60])
def test_windows_continue_exactly_where_a_state_was_taken(steps: int | str) -> None:
    windows = traceable()
    for _ in range(len(epoch_of(traceable())) if steps == "epoch" else int(steps)):
        next(windows)
    other = traceable(seed=9)
    next(other)
    other.load_state_dict(windows.state_dict())
    for _ in range(60):
        for ours, theirs in zip(vars(next(windows)).values(), vars(next(other)).values(), strict=True):
            assert np.array_equal(ours, theirs)


def test_windows_of_another_seed_differ() -> None:
    assert pieces_of(epoch_of(traceable())) == pieces_of(epoch_of(traceable()))
    assert pieces_of(epoch_of(traceable())) != pieces_of(epoch_of(traceable(seed=1)))


def test_windows_refuse_a_log_without_targets() -> None:
    with pytest.raises(InputError, match="two training events"):
        Windows(np.array([1, 2], np.int32), np.array([0, 1, 2]), np.array([5, 6]), length=5, positions=300, seed=0)
