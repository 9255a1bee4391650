"""Times as the model sees them: buckets, their borders, and the same in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dman_runtime.model.times import BORDERS, BUCKETS, NO_GAP, bucket
from dman_train.timing import buckets, gap_buckets, timing_of

DAY = 86_400


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (5, 5), (6, 6), (60, 12), (3600, 24), (DAY, 33), (365 * DAY, 50)],
)
def test_bucket_of_seconds(seconds: int, expected: int) -> None:
    """By hand: 1 + 2 log2(seconds), rounded down; 0 for 0."""
    assert bucket(np.array([seconds])).tolist() == [expected]


def test_buckets_begin_at_their_borders() -> None:
    powers = 1 << np.arange(31)
    assert bucket(powers).tolist() == [1 + 2 * n for n in range(31)]
    assert bucket(powers[2:] - 1).tolist() == [2 * n for n in range(2, 31)]
    halves = np.ceil(BORDERS[1::2]).astype(np.int64)  # the first whole second of the buckets between
    assert bucket(halves[4:]).tolist() == [2 + 2 * n for n in range(4, 31)]
    assert bucket(halves[4:] - 1).tolist() == [1 + 2 * n for n in range(4, 31)]


def test_last_bucket_has_no_end_and_none_is_beyond() -> None:
    assert len(BORDERS) == BUCKETS - 1
    assert bucket(np.array([1 << 31, 1 << 40, 1 << 62])).tolist() == [BUCKETS - 1] * 3
    assert bucket(np.array([(1 << 31) - 1])).tolist() == [BUCKETS - 2]


def test_future_is_now() -> None:
    assert bucket(np.array([-1, -DAY, -(1 << 62)])).tolist() == [0, 0, 0]


def test_bucket_keeps_the_shape_and_is_a_whole_number() -> None:
    found = bucket(np.arange(6).reshape(1, 2, 3))
    assert (found.shape, found.dtype) == ((1, 2, 3), np.int64)


def test_training_and_serving_have_the_same_buckets() -> None:
    random = np.random.default_rng(0)
    near = np.floor(BORDERS).astype(np.int64)[:, None] + np.arange(-2, 3)
    seconds = np.concatenate([near.ravel(), random.geometric(1e-6, 1000), -random.integers(0, 1 << 62, 100)])
    found = buckets(torch.from_numpy(seconds))
    assert found.dtype == torch.int64
    assert found.tolist() == bucket(seconds).tolist()


def test_gap_buckets_tell_no_gap_from_no_time() -> None:
    assert gap_buckets(torch.tensor([NO_GAP, 0, 1, DAY])).tolist() == [NO_GAP, 0, 1, 33]


def test_timing_without_requests_measures_from_each_position() -> None:
    timing = timing_of(torch.tensor([[100, 160]]), torch.tensor([[96, 100, 160]]))
    assert timing.ages.tolist() == [[[5, 0, 0], [13, 12, 0]]]  # what comes later is now; the attention masks it
    assert torch.equal(timing.request_ages, timing.ages) and timing.request_gaps is None


def test_timing_of_requests_measures_from_the_request_unless_it_is_before_the_event() -> None:
    times, keys = torch.tensor([[100, 160, 160]]), torch.tensor([[96, 100, 160]])
    timing = timing_of(times, keys, torch.tensor([[164, 159, 160]]))
    assert timing.ages.tolist() == timing_of(times, keys).ages.tolist(), "keys do not depend on the request"
    assert timing.request_ages.tolist() == [[[13, 13, 5], [13, 12, 0], [13, 12, 0]]]
    assert timing.request_gaps.tolist() == [[13, NO_GAP, 0]]


def test_timing_at_the_last_positions_is_theirs() -> None:
    times, keys = torch.tensor([[5, 9, 60], [7, 8, 20]]), torch.tensor([[1, 5, 9, 60], [1, 7, 8, 20]])
    whole, last = timing_of(times, keys, times + 30), torch.tensor([1, 2])
    for name, part in whole.at(last)._asdict().items():
        assert part.tolist() == [[getattr(whole, name)[row, at].tolist()] for row, at in enumerate(last.tolist())]
