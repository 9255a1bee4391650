"""Lanes and losses: what is seen in which order, what a lane remembers, and each loss against a hand computation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_ITEMS, random_model
from torch import Tensor

from dman_runtime.data.evaluation import held_out, training_events
from dman_runtime.data.interactions import Interactions
from dman_runtime.errors import InputError
from dman_train.config import ModelConfig, TrainConfig
from dman_train.lanes import Batch, Lanes, Windows
from dman_train.model import DMAN
from dman_train.objective import FULL_SOFTMAX_LIMIT, LaneState, Objective, Seen, _FullSoftmax, _had, draw_negatives
from dman_train.replay import replay

USER_EVENTS = (1, 2, 3, 6, 7, 11, 12, 26, 0, 40)  # around the borders of segments of 5; two users without a target
OFFSETS = np.concatenate([[0], np.cumsum(USER_EVENTS)]).astype(np.int64)
EVENTS = np.arange(OFFSETS[-1], dtype=np.int32)  # every event is an item of its own, so that each can be traced
WALKABLE = [user for user, events in enumerate(USER_EVENTS) if events >= 2]


def lanes_of(*, lanes: int, vary_first: bool = True, seed: int = 0) -> Lanes:
    return Lanes(EVENTS, OFFSETS, segment_length=5, lanes=lanes, vary_first=vary_first, seed=seed)


def user_of(event: int) -> int:
    return int(np.searchsorted(OFFSETS, event, side="right") - 1)


# Lanes


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
    passes = [order[i : i + len(WALKABLE)] for i in range(0, len(order) - len(WALKABLE), len(WALKABLE))]
    assert len(passes) >= 3, "the walk crosses epoch borders"
    assert all(sorted(users) == WALKABLE for users in passes)
    assert passes[0] != passes[1], "each pass is shuffled anew"
    assert schedule.events == sum(USER_EVENTS[user] - 1 for user in WALKABLE)


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
    inputs = {user: USER_EVENTS[user] - 1 for user in WALKABLE}
    assert pieces == {user: {math.ceil(inputs[user] / 5)} for user in WALKABLE}


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
    parts = [batch.lanes(slice(0, 2)), batch.lanes(slice(2, 4))]
    assert np.array_equal(np.concatenate([part.items for part in parts]), batch.items)
    assert sum(part.positions for part in parts) == batch.positions


def test_lanes_refuse_a_log_without_targets() -> None:
    with pytest.raises(InputError, match="nothing to learn from"):
        Lanes(EVENTS[:2], np.array([0, 1, 2]), segment_length=5, lanes=2, vary_first=True, seed=0)


def test_lanes_never_touch_held_out_items() -> None:
    ids = [str(i) for i in range(len(EVENTS))]
    users = [f"u{i}" for i in range(len(USER_EVENTS))]
    log = Interactions(users, ids, OFFSETS, EVENTS, np.zeros(len(EVENTS), np.int64), False, True)
    items, offsets = training_events(log)
    secret = {int(target) for split in ("valid", "test") for target in held_out(log, split).targets}
    assert len(secret) == 2 * sum(events >= 3 for events in USER_EVENTS)
    schedule, used = Lanes(items, offsets, segment_length=5, lanes=3, vary_first=True, seed=0), set()
    for _ in range(200):
        batch = next(schedule)
        real = np.arange(5) < batch.lengths[:, None]
        used |= set(batch.items[real].tolist()) | set(batch.targets[real].tolist())
    lonely = {int(items[offsets[user]]) for user in np.flatnonzero(np.diff(offsets) == 1)}  # without a target
    assert used == set(EVENTS.tolist()) - secret - lonely


# What a lane remembers

SETTINGS = {"alternating": TrainConfig(loss="full", memory_training="alternating")} | {
    f"joint-{n}": TrainConfig(loss="full", memory_training="joint", backprop_segments=n) for n in (1, 2, 3, 4)
}


def objective_of(model: DMAN, config: TrainConfig, counts: Tensor | None = None) -> Objective:
    return Objective(model, config, torch.ones(model.vocabulary, dtype=torch.int64) if counts is None else counts)


def run_step(objective: Objective, batch: Batch, state: LaneState) -> LaneState:
    return objective(*tensors_of(batch), state, None)[1]


def tensors_of(batch: Batch) -> list[Tensor]:
    return [torch.from_numpy(getattr(batch, name)) for name in Objective.inputs]


def settled_memory(model: DMAN, state: LaneState) -> Tensor:
    """(B, L, m, D) after every absorption that is still due."""
    memory = torch.where(state.initial[:, None, None, None], model.initial_memory, state.memory)
    for hidden, lengths in zip(state.absorbed, state.absorbed_lengths, strict=True):
        due = (lengths > 0)[:, None, None, None]
        memory = torch.where(due, model.abstract(memory, hidden, lengths), memory)
    return memory


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("variant", ["dman", "fifo", "xl", "nran"])
@torch.no_grad()
def test_lane_state_equals_replay_of_the_prefix(variant: str, config: TrainConfig) -> None:
    """Where a lane stands at a full segment: same memory, same context, hence the same user embeddings."""
    model = random_model(replace(TINY, variant=variant), int(OFFSETS[-1]))
    objective, schedule = objective_of(model, config), lanes_of(lanes=3, vary_first=False)
    state, seen, compared = LaneState.empty(model, 3, config.backprop_segments), [[], [], []], 0
    for _ in range(30):
        batch = next(schedule)
        state = run_step(objective, batch, state)
        for lane in range(3):
            inputs = batch.items[lane, : batch.lengths[lane]].tolist()
            seen[lane] = inputs if batch.starts[lane] else seen[lane] + inputs
            if len(seen[lane]) % 5 == 0:
                _assert_lane_equals_replay(model, state, lane, np.array(seen[lane]))
                compared += len(seen[lane]) > 15
    assert compared > 5, "histories of four segments and more were compared"


def _assert_lane_equals_replay(model: DMAN, state: LaneState, lane: int, prefix: np.ndarray) -> None:
    _, memory = replay(model, [prefix])
    torch.testing.assert_close(settled_memory(model, state)[lane], memory[0], rtol=1e-4, atol=2e-5)
    probe = np.array([1, 2, 3])
    visible = state.context_lengths[lane : lane + 1] if model.config.recurrent else torch.tensor([0])
    new = model.embed(torch.from_numpy(probe))[None]
    found = model.encode(new, state.context[lane : lane + 1], visible, memory)
    expected, _ = replay(model, [np.append(prefix, probe)])
    torch.testing.assert_close(found.user_embedding[0, -1], expected[0], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_lane_memory_absorbs_a_short_first_segment_by_its_real_rows() -> None:
    model = random_model(TINY, TINY_ITEMS)
    objective, state = objective_of(model, SETTINGS["alternating"]), LaneState.empty(model, 1, 1)
    items = torch.randint(TINY_ITEMS, (3, 1, 5), generator=torch.Generator().manual_seed(1))
    for step, length in enumerate((2, 5, 5)):
        start = torch.tensor([step == 0])
        _, state = objective(items[step], items[step], torch.tensor([length]), start, state, None)
    first = model.encode(
        model.embed(items[0, :, :2]), torch.zeros(1, 2, 0, 32), torch.tensor([0]), model.initial_memory[None]
    )
    memory = model.abstract(
        model.initial_memory[None], torch.nn.functional.pad(first.hidden, (0, 0, 3, 0)), torch.tensor([2])
    )
    second = model.encode(model.embed(items[1]), first.hidden, torch.tensor([2]), model.initial_memory[None])
    expected = model.abstract(memory, second.hidden)
    torch.testing.assert_close(settled_memory(model, state), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@torch.no_grad()
def test_lane_restart_forgets_everything(config: TrainConfig) -> None:
    model = random_model(TINY, int(OFFSETS[-1]))
    objective, schedule = objective_of(model, config), lanes_of(lanes=2)
    state = LaneState.empty(model, 2, config.backprop_segments)
    for _ in range(12):
        state = run_step(objective, next(schedule), state)
    batch = next(schedule)
    tensors = tensors_of(replace(batch, starts=np.array([True, True])))
    used, _ = objective(*tensors, state, None)
    fresh, _ = objective(*tensors, LaneState.empty(model, 2, config.backprop_segments), None)
    assert torch.equal(used.likelihood, fresh.likelihood)
    assert used.abstraction_count == fresh.abstraction_count == 0


def test_lane_state_carries_no_gradient() -> None:
    model = random_model(TINY, int(OFFSETS[-1])).train()
    objective, schedule = objective_of(model, SETTINGS["joint-3"]), lanes_of(lanes=2)
    state = LaneState.empty(model, 2, 3)
    for _ in range(8):
        state = run_step(objective, next(schedule), state)
        assert not any(tensor.requires_grad for tensor in state.state_dict().values())


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@torch.no_grad()
def test_lane_memory_follows_the_initial_slots_until_it_is_settled(config: TrainConfig) -> None:
    """While the absorptions that are due fit into the window, the chain starts from the learned slots of now."""
    model = random_model(TINY, TINY_ITEMS)
    state, window = LaneState.empty(model, 1, config.backprop_segments), config.backprop_segments
    objective, items = objective_of(model, config), torch.arange(5)[None]
    for step in range(window + 1):  # the first segment has now moved to the oldest place of the window
        _, state = objective(items, items, torch.tensor([5]), torch.tensor([step == 0]), state, None)
    assert state.absorbed_lengths[:, 0].tolist() == [5] * window
    assert state.initial.all()
    _, state = objective(items, items, torch.tensor([5]), torch.tensor([False]), state, None)
    assert not state.initial.any()


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@torch.no_grad()
def test_abstraction_loss_is_about_the_newest_absorption_and_real_positions(config: TrainConfig) -> None:
    """Old and new memory are those of replays that end a segment apart; the last segment has three events."""
    model, random = random_model(TINY, TINY_ITEMS), np.random.default_rng(0)
    objective, history = objective_of(model, config), random.integers(0, TINY_ITEMS, 28)
    state = LaneState.empty(model, 1, config.backprop_segments)
    for start in range(0, 28, 5):
        items, length = np.zeros((1, 5), np.int64), min(5, 28 - start)
        items[0, :length] = history[start : start + length]
        batch = Batch(items, items, *map(np.array, ([length], [start == 0], [0], [start])))
        losses, after = objective(*tensors_of(batch), state, None)
        before, state = state, after
    old, new = (replay(model, [history[:end]])[1] for end in (20, 25))
    last = model.embed(torch.from_numpy(history[25:]))[None]
    expected = model.abstraction_loss(
        old_memory=old,
        new_memory=new,
        hidden=before.absorbed[-1],
        lengths=torch.tensor([5]),
        pulled=model.encode(last, before.context, torch.tensor([5]), new).pulled,
        query_mask=torch.ones(1, 3, dtype=torch.bool),
    )
    assert losses.abstraction_count == 3
    torch.testing.assert_close(losses.abstraction, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
def test_abstraction_loss_of_every_nth_lane_is_that_of_these_lanes_alone(config: TrainConfig) -> None:
    model, schedule = random_model(TINY, int(OFFSETS[-1])), lanes_of(lanes=6, vary_first=False)
    every, third = (objective_of(model, replace(config, abstraction_every=n)) for n in (1, 3))
    state, compared = LaneState.empty(model, 6, config.backprop_segments), 0
    for _ in range(30):
        batch = next(schedule)
        losses, after = third(*tensors_of(batch), state, None)
        chosen = LaneState(
            **{name: x[:, ::3] if name.startswith("absorbed") else x[::3] for name, x in state.state_dict().items()}
        )
        expected, _ = every(*tensors_of(batch.lanes(slice(None, None, 3))), chosen, None)
        assert losses.abstraction_count == expected.abstraction_count
        torch.testing.assert_close(losses.abstraction, expected.abstraction, rtol=1e-5, atol=1e-6)
        _assert_same_f_abs_gradients(model, losses.abstraction, expected.abstraction)
        state, compared = after, compared + int(losses.abstraction_count > 0)
    assert compared > 5


def _assert_same_f_abs_gradients(model: DMAN, *losses: Tensor) -> None:
    weights = model.abstraction_parameters()
    found = [torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True) for loss in losses]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


# Losses


def scored(loss: str, *, users: Tensor, table: Tensor, counts: Tensor | None = None, negatives: int = 1) -> Objective:
    """An objective whose item table is `table` (V, D)."""
    model = DMAN(ModelConfig(width=users.shape[1], heads=1), len(table))
    with torch.no_grad():
        model.items.copy_(table / model.input_scale)
    return objective_of(model, TrainConfig(loss=loss, negatives=negatives), counts)


USERS = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.5, -1.0, 0.0, 1.0]])
TABLE = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [2, 0, -1, 0], [0, 0, 0, 1.5]])
TARGETS = torch.tensor([1, 2])
REAL = torch.ones(1, 2, dtype=torch.bool)  # one lane with two positions
ITEMS = torch.tensor([[0, 3]])  # their inputs
# scores of user 0: 1, 2, -1, 0, -1.5; of user 1: -.5, 0, 0, 1, 1.5


def full_losses() -> list[float]:
    scores = [[1, 2, -1, 0, -1.5], [-0.5, 0, 0, 1, 1.5]]
    return [math.log(sum(math.exp(s) for s in row)) - row[t] for row, t in zip(scores, (1, 2), strict=True)]


def test_full_softmax_equals_hand_computation() -> None:
    objective = scored("full", users=USERS, table=TABLE)
    found = objective._likelihood(USERS, TARGETS, None, ITEMS, REAL, None)
    assert found.item() == pytest.approx(sum(full_losses()), rel=1e-5)


@pytest.mark.parametrize("block", [1, 40, 250, 1 << 19])  # scores at a time: one position, one, several, all
def test_full_softmax_and_its_gradients_equal_cross_entropy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dman_train.objective.SOFTMAX_BLOCK", block)
    users, table, targets = torch.randn(23, 8), torch.randn(40, 8), torch.randint(40, (23,))
    found, expected = ([x.clone().requires_grad_() for x in (users, table)] for _ in range(2))
    loss = _FullSoftmax.apply(*found, targets, None)
    reference = torch.nn.functional.cross_entropy(expected[0] @ expected[1].T, targets, reduction="sum")
    (0.3 * loss).backward()
    (0.3 * reference).backward()
    torch.testing.assert_close(loss, reference)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_full_softmax_survives_large_scores() -> None:
    users, table = torch.full((1, 4), 50.0), torch.stack([torch.full((4,), 50.0), torch.full((4,), -50.0)])
    assert _FullSoftmax.apply(users, table, torch.tensor([1]), None).item() == pytest.approx(20_000)


def test_full_softmax_in_bfloat16_stays_near_float32() -> None:
    users, table, targets = torch.randn(50, 16), torch.randn(60, 16), torch.randint(60, (50,))
    exact, rounded = ([x.clone().requires_grad_() for x in (users, table)] for _ in range(2))
    reference = _FullSoftmax.apply(*exact, targets, None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _FullSoftmax.apply(*rounded, targets, None)
    reference.backward()
    loss.backward()
    assert loss.dtype == torch.float32 and loss != reference
    torch.testing.assert_close(loss, reference, rtol=1e-2, atol=0)
    for a, b in zip(rounded, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).abs().max() < 2e-2 * b.grad.abs().max()


def test_negatives_loss_equals_hand_computation_and_masks_accidental_hits() -> None:
    objective = scored("negatives", users=USERS, table=TABLE, negatives=3)
    negatives = torch.tensor([[[0, 3, 1], [4, 4, 0]]])  # (lanes, T, n); user 0 draws its target 1: no loss
    sigmoid = lambda s: 1 / (1 + math.exp(-s))  # noqa: E731
    first = -math.log(sigmoid(2)) - math.log(1 - sigmoid(1)) - math.log(1 - sigmoid(0))
    second = -math.log(sigmoid(0)) - 2 * math.log(1 - sigmoid(1.5)) - math.log(1 - sigmoid(-0.5))
    found = objective._likelihood(USERS, TARGETS, negatives, ITEMS, REAL, None)
    assert found.item() == pytest.approx(first + second, rel=1e-5)


def test_negatives_loss_ignores_draws_of_padded_positions() -> None:
    objective = scored("negatives", users=USERS, table=TABLE, negatives=1)
    real = torch.tensor([[True, False], [True, False]])
    draws = torch.tensor([[[0], [3]], [[4], [1]]])
    other = torch.tensor([[[0], [1]], [[4], [2]]])
    found = objective._likelihood(USERS, TARGETS, draws, ITEMS, real, None)
    assert found == objective._likelihood(USERS, TARGETS, other, ITEMS, real, None)


def test_sampled_softmax_over_all_items_equals_full_softmax() -> None:
    objective = scored("sampled", users=USERS, table=TABLE, negatives=5)
    found = objective._likelihood(USERS, TARGETS, torch.arange(5), ITEMS, REAL, None)  # the proposal is uniform
    assert found.item() == pytest.approx(sum(full_losses()), rel=1e-5)


def test_sampled_softmax_is_unbiased_under_a_skewed_proposal() -> None:
    """exp(loss) = 1 + sum of exp(s_j - s_target) / (n q_j), whose expectation is exp(full loss): all draws tried."""
    objective = scored("sampled", users=USERS, table=TABLE, counts=torch.tensor([1, 100, 10, 3, 40]))
    q = objective.proposal.tolist()
    for user, full in enumerate(full_losses()):
        one = slice(user, user + 1)
        losses = [
            objective._likelihood(USERS[one], TARGETS[one], torch.tensor([j]), ITEMS[:, :1], REAL[:, :1], None).item()
            for j in range(5)
        ]
        assert losses[int(TARGETS[user])] == 0, "an accidental hit counts for nothing"
        expected = sum(p * math.exp(loss) for p, loss in zip(q, losses, strict=True))
        assert expected == pytest.approx(math.exp(full), rel=1e-4)


def test_sampled_softmax_tends_to_full_softmax_with_many_negatives() -> None:
    torch.manual_seed(0)
    users, table, targets = torch.randn(20, 4), torch.randn(50, 4), torch.randint(50, (20,))
    objective = scored("sampled", users=users, table=table, counts=torch.arange(1, 51), negatives=100_000)
    negatives = draw_negatives(objective, (1, 20), torch.Generator().manual_seed(0))
    full = torch.nn.functional.cross_entropy(users @ table.T, targets, reduction="sum")
    real = torch.ones(1, 20, dtype=torch.bool)
    found = objective._likelihood(users, targets, negatives, real.long(), real, None)
    assert found.item() == pytest.approx(full.item(), rel=5e-3)


# Items that the user has had


@pytest.mark.parametrize("schedule", ["lanes", "windows"])
def test_schedule_knows_what_a_user_has_had_before(schedule: str) -> None:
    if schedule == "lanes":
        batches: Lanes | Windows = Lanes(EVENTS, OFFSETS, segment_length=5, lanes=3, vary_first=True, seed=0)
    else:
        batches = Windows(EVENTS, OFFSETS, length=6, positions=20, seed=0)
    later = 0
    for _ in range(60):
        batch = next(batches)
        pieces = zip(batch.before(EVENTS, OFFSETS), batch.users, batch.items, batch.lengths, batch.starts, strict=True)
        for before, user, inputs, length, starts in pieces:
            known = np.concatenate([before, inputs[:length]])
            assert np.array_equal(known, EVENTS[OFFSETS[user] :][: len(known)])
            assert len(before) == 0 or not starts or schedule == "windows"
            later += len(before) > 0
    assert later


def seen_by_hand(before: list[list[int]], items: Tensor, real: Tensor, vocabulary: int) -> Tensor:
    """(P, V) bool: what has been had up to and with each position."""
    rows = []
    for earlier, inputs, places in zip(before, items.tolist(), real.tolist(), strict=True):
        for place in range(sum(places)):
            rows.append([i in earlier or i in inputs[: place + 1] for i in range(vocabulary)])
    return torch.tensor(rows)


def random_pieces(vocabulary: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """Four pieces of up to seven inputs, 20 in all, with repetitions; one user has had nothing before."""
    items, lengths = torch.randint(vocabulary, (4, 7)), torch.tensor([7, 1, 7, 5])
    before = [torch.randint(vocabulary, (n,)).tolist() for n in (9, 0, 3, 30)]
    return before, items, torch.arange(7) < lengths[:, None]


@pytest.mark.parametrize("block", [1, 40, 250, 1 << 19])
def test_full_softmax_and_its_gradients_leave_seen_items_out(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dman_train.objective.SOFTMAX_BLOCK", block)
    torch.manual_seed(0)
    before, items, real = random_pieces(40)
    had = seen_by_hand(before, items, real, 40)
    users, table, targets = torch.randn(20, 8), torch.randn(40, 8), torch.randint(40, (20,))
    assert had[torch.arange(20), targets].any(), "some targets have been had: they stay in"
    found, expected = ([x.clone().requires_grad_() for x in (users, table)] for _ in range(2))
    seen = Seen.of([torch.tensor(x, dtype=torch.int32) for x in before], items, real)
    loss = _FullSoftmax.apply(*found, targets, seen)
    left_out = had.scatter(1, targets[:, None], False)
    scores = (expected[0] @ expected[1].T).masked_fill(left_out, float("-inf"))
    reference = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
    loss.backward()
    reference.backward()
    torch.testing.assert_close(loss, reference)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("shape", [(30,), (4, 7, 6)], ids=["shared", "of each position"])
def test_negatives_that_have_been_had_are_found(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    before, items, real = random_pieces(40)
    negatives = torch.randint(40, shape)  # with repetitions
    found = _had(negatives, [torch.tensor(x, dtype=torch.int32) for x in before], items)[real]
    drawn = negatives[real] if len(shape) == 3 else negatives.expand(20, -1)
    assert torch.equal(found, seen_by_hand(before, items, real, 40).gather(1, drawn))


HAD_BEFORE = [torch.tensor([4])]  # with ITEMS: user 0 has had 4 and 0, then 3 as well; the target 2 of position 1 not


def test_sampled_softmax_over_all_items_leaves_seen_items_out() -> None:
    objective = scored("sampled", users=USERS, table=TABLE, negatives=5)
    first = math.log(sum(math.exp(s) for s in (2, -1, 0))) - 2
    second = math.log(sum(math.exp(s) for s in (0, 0))) - 0
    found = objective._likelihood(USERS, TARGETS, torch.arange(5), ITEMS, REAL, HAD_BEFORE)
    assert found.item() == pytest.approx(first + second, rel=1e-5)


def test_negatives_loss_leaves_seen_items_out() -> None:
    objective = scored("negatives", users=USERS, table=TABLE, negatives=2)
    draws = torch.tensor([[[0, 3], [3, 0]]])
    sigmoid = lambda s: 1 / (1 + math.exp(-s))  # noqa: E731
    expected = -math.log(sigmoid(2)) - math.log(1 - sigmoid(0)) - math.log(sigmoid(0))
    found = objective._likelihood(USERS, TARGETS, draws, ITEMS, REAL, HAD_BEFORE)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_sampled_negatives_follow_the_flattened_unigram() -> None:
    counts = torch.tensor([0, 1, 16, 81, 256])  # ^ .75: 1 (unseen items can be drawn), 1, 8, 27, 64
    objective = scored("sampled", users=USERS, table=TABLE, counts=counts, negatives=200_000)
    expected = torch.tensor([1, 1, 8, 27, 64]) / 101
    torch.testing.assert_close(objective.proposal, expected)
    drawn = draw_negatives(objective, (3, 5), torch.Generator().manual_seed(0))
    assert drawn is not None and drawn.shape == (200_000,)
    torch.testing.assert_close(torch.bincount(drawn) / 200_000, expected, rtol=0.05, atol=5e-4)


def test_paper_negatives_are_uniform_per_position() -> None:
    objective = scored("negatives", users=USERS, table=TABLE, negatives=2000)
    drawn = draw_negatives(objective, (3, 5), torch.Generator().manual_seed(0))
    assert drawn is not None and drawn.shape == (3, 5, 2000)
    torch.testing.assert_close(torch.bincount(drawn.flatten()) / 30_000, torch.full((5,), 0.2), rtol=0.05, atol=0)


def test_auto_loss_is_full_up_to_the_limit_and_sampled_beyond() -> None:
    tiny = ModelConfig(width=4, heads=1, layers=1, memory_slots=1, segment_length=1)
    for vocabulary, expected in [(FULL_SOFTMAX_LIMIT, "full"), (FULL_SOFTMAX_LIMIT + 1, "sampled")]:
        assert objective_of(DMAN(tiny, vocabulary), TrainConfig()).loss == expected


@torch.no_grad()
def test_losses_count_real_positions_only() -> None:
    model = random_model(TINY, TINY_ITEMS)
    objective, lengths = objective_of(model, SETTINGS["alternating"]), torch.tensor([3, 5])
    items = torch.randint(TINY_ITEMS, (2, 5), generator=torch.Generator().manual_seed(0))
    state, starts = LaneState.empty(model, 2, 1), torch.tensor([True, True])
    losses, after = objective(items, items, lengths, starts, state, None)
    padded = items.clone()
    padded[0, 3:] = 9
    other, _ = objective(padded, padded, lengths, starts, state, None)
    assert losses.likelihood_count == 8
    torch.testing.assert_close(losses.likelihood, other.likelihood)
    for row, length in enumerate((3, 5)):
        assert torch.equal(after.context[row, 0, 5 - length :], model.embed(items[row, :length]))
        assert not after.context[row, :, : 5 - length].any()
