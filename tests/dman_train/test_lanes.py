"""Lanes: which events are seen in which order, and what was seen before them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from traced_log import EVENTS, OFFSETS, TIMES, TRAINABLE, USER_EVENTS, user_of

from dman_runtime.data.evaluation import held_out, training_events
from dman_runtime.data.interactions import Interactions
from dman_runtime.errors import InputError
from dman_runtime.model.times import NO_GAP
from dman_train.baselines.windows import Windows
from dman_train.lanes import Lanes


def lanes_of(*, lanes: int, vary_first: bool = True, seed: int = 0) -> Lanes:
    return Lanes(EVENTS, OFFSETS, TIMES, segment_length=5, lanes=lanes, vary_first=vary_first, seed=seed)


@pytest.mark.parametrize("lanes", [1, 3, 16])
@pytest.mark.parametrize("vary_first", [True, False])
def test_lanes_use_each_training_event_once_per_pass(lanes: int, vary_first: bool) -> None:
    schedule, order = lanes_of(lanes=lanes, vary_first=vary_first), []
    walks: dict[int, list[int]] = {}  # lane -> inputs of the user it is walking
    for _ in range(200):
        batch = next(schedule)
        for lane in range(lanes):
            inputs = batch.items[lane, : batch.lengths[lane]].tolist()
            if batch.starts[lane]:
                _assert_walked_to_the_end(walks.pop(lane, []))
                order.append(user_of(inputs[0]))
            walks.setdefault(lane, []).extend(inputs)
    passes = [order[i : i + len(TRAINABLE)] for i in range(0, len(order) - len(TRAINABLE), len(TRAINABLE))]
    assert len(passes) >= 3, "the walk crosses epoch borders"
    assert all(sorted(users) == TRAINABLE for users in passes)
    assert passes[0] != passes[1], "each pass is shuffled anew"
    assert schedule.events == sum(USER_EVENTS[user] - 1 for user in TRAINABLE)


def _assert_walked_to_the_end(inputs: list[int]) -> None:
    """A finished walk is one user's events in order, each once, without the last."""
    if inputs:
        user = user_of(inputs[0])
        assert inputs == list(range(OFFSETS[user], OFFSETS[user + 1] - 1))


def test_lanes_targets_are_the_following_events() -> None:
    schedule = lanes_of(lanes=3)
    for _ in range(60):
        batch = next(schedule)
        real = np.arange(5) < batch.lengths[:, None]
        assert np.array_equal(batch.targets[real], batch.items[real] + 1)
        assert not batch.items[~real].any() and not batch.targets[~real].any()
        assert np.array_equal(batch.times[real], TIMES[batch.items[real]])
        assert np.array_equal(batch.next_times[real], TIMES[batch.targets[real]])
        assert (batch.lengths >= 1).all() and batch.positions == real.sum()


def test_lanes_vary_the_first_segment_only() -> None:
    first: set[int] = set()
    schedule = lanes_of(lanes=4)
    for _ in range(300):
        batch = next(schedule)
        for lane in range(4):
            last = batch.items[lane, batch.lengths[lane] - 1]
            ends_user = last + 2 == OFFSETS[user_of(last) + 1]
            if batch.starts[lane]:
                first.add(int(batch.lengths[lane]))
            assert batch.starts[lane] or ends_user or batch.lengths[lane] == 5
    assert first == {1, 2, 3, 4, 5}


def test_lanes_cut_a_user_into_as_few_segments_as_any_first_length_gives() -> None:
    schedule, pieces = lanes_of(lanes=1), dict[int, set[int]]()
    walk: list[int] = []
    for _ in range(300):
        batch = next(schedule)
        if batch.starts[0] and walk:
            pieces.setdefault(user_of(walk[0]), set()).add(len(walk))
            walk = []
        walk.append(int(batch.items[0, 0]))
    inputs = {user: USER_EVENTS[user] - 1 for user in TRAINABLE}
    assert pieces == {user: {math.ceil(inputs[user] / 5)} for user in TRAINABLE}


@pytest.mark.parametrize("steps", [0, 7, 40])
def test_lanes_continue_exactly_from_their_state(steps: int) -> None:
    original, copy = lanes_of(lanes=3), lanes_of(lanes=3, seed=9)
    for _ in range(steps):
        next(original)
    copy.load_state_dict(original.state_dict())
    for _ in range(40):
        a, b = next(original), next(copy)
        assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_lanes_of_ranks_are_parts_of_one_batch() -> None:
    batch = next(lanes_of(lanes=4))
    parts = [batch.pieces(slice(0, 2)), batch.pieces(slice(2, 4))]
    assert np.array_equal(np.concatenate([part.items for part in parts]), batch.items)
    assert sum(part.positions for part in parts) == batch.positions


def test_lanes_refuse_a_log_without_targets() -> None:
    with pytest.raises(InputError, match="nothing to learn from"):
        Lanes(EVENTS[:2], np.array([0, 1, 2]), TIMES[:2], segment_length=5, lanes=2, vary_first=True, seed=0)


def test_lanes_never_touch_held_out_items() -> None:
    ids = [str(i) for i in range(len(EVENTS))]
    users = [f"u{i}" for i in range(len(USER_EVENTS))]
    log = Interactions(users, ids, OFFSETS, EVENTS, np.zeros(len(EVENTS), np.int64), False, True)
    items, offsets, times = training_events(log)
    secret = {int(target) for split in ("valid", "test") for target in held_out(log, split).targets}
    assert len(secret) == 2 * sum(events >= 3 for events in USER_EVENTS)
    schedule, used = Lanes(items, offsets, times, segment_length=5, lanes=3, vary_first=True, seed=0), set()
    for _ in range(200):
        batch = next(schedule)
        real = np.arange(5) < batch.lengths[:, None]
        used |= set(batch.items[real].tolist()) | set(batch.targets[real].tolist())
    lonely = {int(items[offsets[user]]) for user in np.flatnonzero(np.diff(offsets) == 1)}  # without a target
    assert used == set(EVENTS.tolist()) - secret - lonely


@pytest.mark.parametrize("schedule", ["lanes", "windows"])
def test_schedule_knows_the_time_since_the_event_before(schedule: str) -> None:
    """Over the borders of segments, but not over those of windows: a window is all that a baseline sees."""
    batches = (
        lanes_of(lanes=3) if schedule == "lanes" else Windows(EVENTS, OFFSETS, TIMES, length=6, positions=20, seed=0)
    )
    for _ in range(60):
        batch = next(batches)
        for inputs, length, start, since_last in zip(
            batch.items, batch.lengths, batch.starts, batch.since_last, strict=True
        ):
            first = NO_GAP if start else TIMES[inputs[0]] - TIMES[inputs[0] - 1]
            assert since_last[0] == first
            assert since_last[1:length].tolist() == np.diff(TIMES[inputs[:length]]).tolist()


def test_lanes_count_no_time_back_when_a_log_is_not_in_order_of_time() -> None:
    batch = next(
        Lanes(
            EVENTS[:4],
            np.array([0, 4]),
            np.array([50, 40, 45, 45]),
            segment_length=5,
            lanes=1,
            vary_first=False,
            seed=0,
        )
    )
    assert batch.since_last[0, :3].tolist() == [NO_GAP, 0, 5]


@pytest.mark.parametrize("schedule", ["lanes", "windows"])
def test_schedule_knows_what_a_user_has_seen_before(schedule: str) -> None:
    if schedule == "lanes":
        batches: Lanes | Windows = Lanes(EVENTS, OFFSETS, TIMES, segment_length=5, lanes=3, vary_first=True, seed=0)
    else:
        batches = Windows(EVENTS, OFFSETS, TIMES, length=6, positions=20, seed=0)
    later = 0
    for _ in range(60):
        batch = next(batches)
        pieces = zip(
            batch.seen_before(EVENTS, OFFSETS), batch.users, batch.items, batch.lengths, batch.starts, strict=True
        )
        for before, user, inputs, length, starts in pieces:
            known = np.concatenate([before, inputs[:length]])
            assert np.array_equal(known, EVENTS[OFFSETS[user] :][: len(known)])
            assert len(before) == 0 or not starts or schedule == "windows"
            later += len(before) > 0
    assert later
