"""What a lane carries between segments, against replays of whole histories, and eq. 5 as a step computes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PAPER, TIMED, TINY, TINY_ITEMS, held_out_of, random_model
from torch import Tensor
from torch_graphs import generation_of
from traced_log import EVENTS, OFFSETS, TIMES

from dman_runtime.model.events import without_times
from dman_runtime.model.times import ANY_GAP, NO_GAP
from dman_train.config import ModelConfig, TrainConfig
from dman_train.data import TrainingData
from dman_train.lane_learner import LaneLearner, LaneState, _Judged
from dman_train.lanes import Batch, Lanes
from dman_train.learner import StepInputs
from dman_train.losses import NextItemLoss
from dman_train.model import DMAN
from dman_train.replay import replay, returned


def lanes_of(lanes: int, *, vary_first: bool = True) -> Lanes:
    return Lanes(EVENTS, OFFSETS, TIMES, segment_length=5, lanes=lanes, vary_first=vary_first, seed=0)


READS = TrainConfig(loss="full", abstraction_loss="reads")
SETTINGS = {"alternating": replace(READS, memory_training="alternating")} | {
    f"joint-{n}": replace(READS, memory_training="joint", backprop_segments=n) for n in (1, 2, 3, 4)
}


def learner_of(model: DMAN, config: TrainConfig) -> LaneLearner:
    """Of any data: the tests give batches and states themselves."""
    nothing_held_out = held_out_of([], np.zeros(0, np.int64))
    data = TrainingData(EVENTS, OFFSETS, TIMES, np.ones(model.vocabulary, np.int64), nothing_held_out)
    return LaneLearner(model, replace(config, lanes=1), data)


def inputs_of(batch: Batch) -> StepInputs:
    arrays = (batch.items, batch.targets, batch.lengths, batch.starts, batch.users)
    moments = (batch.times, batch.next_times, batch.since_last)
    return StepInputs(*map(torch.from_numpy, arrays), None, None, *map(torch.from_numpy, moments))


def step_inputs(items: Tensor, targets: Tensor, lengths: Tensor, starts: Tensor, users: Tensor) -> StepInputs:
    """Inputs without times."""
    times = torch.zeros_like(items)
    return StepInputs(items, targets, lengths, starts, users, None, None, times, times, times)


def one_lane(items: Tensor, length: int, *, start: bool) -> StepInputs:
    """Inputs that are their own targets, in one lane or, with one length and start for all, in several."""
    lanes = len(items)
    lengths, starts = torch.full((lanes,), length), torch.full((lanes,), start)
    return step_inputs(items, items, lengths, starts, torch.zeros(lanes, dtype=torch.int64))


def settled_memory(model: DMAN, state: LaneState) -> Tensor:
    """(B, L, m, D) after every absorption that is still due."""
    memory = torch.where(state.initial[:, None, None, None], model.initial_memory, state.memory)
    for hidden, lengths in zip(state.absorbed, state.absorbed_lengths, strict=True):
        due = (lengths > 0)[:, None, None, None]
        memory = torch.where(due, model.abstract(memory, hidden, lengths), memory)
    return memory


@pytest.mark.slow
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("variant", ["dman", "fifo", "xl", "nran"])
@torch.no_grad()
def test_lane_state_equals_replay_of_the_prefix(variant: str, config: TrainConfig) -> None:
    """After each full segment of a lane: same memory, same context, hence the same user embeddings."""
    model = random_model(replace(TINY, variant=variant), int(OFFSETS[-1]))
    learner, schedule = learner_of(model, config), lanes_of(3, vary_first=False)
    state, seen = LaneState.empty(model, 3, config.backprop_segments), [[], [], []]
    prefixes, found = [], []  # and what the lane held after each: memory, context, context length
    for _ in range(30):
        batch = next(schedule)
        _, state = learner.step(inputs_of(batch), state)
        memory = settled_memory(model, state)
        for lane in range(3):
            inputs = batch.items[lane, : batch.lengths[lane]].tolist()
            seen[lane] = inputs if batch.starts[lane] else seen[lane] + inputs
            if len(seen[lane]) % 5 == 0:
                prefixes.append(np.array(seen[lane]))
                found.append((memory[lane], state.context[lane], state.context_lengths[lane]))
    assert sum(len(prefix) > 15 for prefix in prefixes) > 5, "histories of four segments and more are compared"
    memories, contexts, context_lengths = (torch.stack(tensors) for tensors in zip(*found, strict=True))
    expected = replay(model, prefixes)[1]
    torch.testing.assert_close(memories, expected, rtol=1e-4, atol=2e-5)
    probe = np.array([1, 2, 3])
    visible = context_lengths if model.config.recurrent else torch.zeros_like(context_lengths)
    new = model.embed(torch.from_numpy(probe)).expand(len(prefixes), -1, -1)
    users = model.encode(new, contexts, visible, expected).user_embedding[:, -1]
    of_replay, _ = replay(model, [np.append(prefix, probe) for prefix in prefixes])
    torch.testing.assert_close(users, of_replay, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_lane_memory_absorbs_a_short_first_segment_by_its_real_rows() -> None:
    model = random_model(TINY, TINY_ITEMS)
    learner, state = learner_of(model, SETTINGS["alternating"]), LaneState.empty(model, 1, 1)
    items = torch.randint(TINY_ITEMS, (3, 1, 5), generator=torch.Generator().manual_seed(1))
    for step, length in enumerate((2, 5, 5)):
        _, state = learner.step(one_lane(items[step], length, start=step == 0), state)
    first = model.encode(
        model.embed(items[0, :, :2]), torch.zeros(1, 2, 0, 32), torch.tensor([0]), model.initial_memory[None]
    )
    memory = model.abstract(
        model.initial_memory[None], torch.nn.functional.pad(first.hidden, (0, 0, 3, 0)), torch.tensor([2])
    )
    second = model.encode(model.embed(items[1]), first.hidden, torch.tensor([2]), model.initial_memory[None])
    expected = model.abstract(memory, second.hidden)
    torch.testing.assert_close(settled_memory(model, state), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@torch.no_grad()
def test_lane_restart_forgets_everything(config: TrainConfig) -> None:
    model = random_model(TINY, int(OFFSETS[-1]))
    learner, schedule = learner_of(model, config), lanes_of(2)
    state = LaneState.empty(model, 2, config.backprop_segments)
    for _ in range(12):
        _, state = learner.step(inputs_of(next(schedule)), state)
    batch = next(schedule)
    inputs = inputs_of(replace(batch, starts=np.array([True, True])))
    used, _ = learner.step(inputs, state)
    fresh, _ = learner.step(inputs, LaneState.empty(model, 2, config.backprop_segments))
    assert torch.equal(used.likelihood, fresh.likelihood)
    assert used.abstraction_count == fresh.abstraction_count == 0


def test_lane_state_carries_no_gradient() -> None:
    model = random_model(TINY, int(OFFSETS[-1])).train()
    learner, schedule = learner_of(model, SETTINGS["joint-3"]), lanes_of(2)
    state = LaneState.empty(model, 2, 3)
    for _ in range(8):
        _, state = learner.step(inputs_of(next(schedule)), state)
        assert not any(tensor.requires_grad for tensor in state.state_dict().values())


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@torch.no_grad()
def test_lane_memory_follows_the_initial_slots_until_it_is_settled(config: TrainConfig) -> None:
    """While the absorptions that are due fit into the window, the chain starts from the learned slots of now."""
    model = random_model(TINY, TINY_ITEMS)
    state, window = LaneState.empty(model, 1, config.backprop_segments), config.backprop_segments
    learner, items = learner_of(model, config), torch.arange(5)[None]
    for step in range(window + 1):  # the first segment is now the oldest of the window
        _, state = learner.step(one_lane(items, 5, start=step == 0), state)
    assert state.absorbed_lengths[:, 0].tolist() == [5] * window
    assert state.initial.all()
    _, state = learner.step(one_lane(items, 5, start=False), state)
    assert not state.initial.any()


@pytest.mark.slow
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(
    ("architecture", "old_end", "new_end"),
    [
        (TINY, 20, 25),
        (replace(TINY, variant="nran"), 20, 25),
        (PAPER, 25, 30),
        (replace(PAPER, variant="nran"), 20, 25),
    ],
    ids=["plus", "plus-nran", "paper", "paper-nran"],
)
@torch.no_grad()
def test_abstraction_loss_is_about_one_absorption_and_real_positions(
    architecture: ModelConfig, old_end: int, new_end: int, config: TrainConfig
) -> None:
    """Old and new memory are those of replays that end a segment apart; the last segment, the sixth, has three events.

    `plus` judges the absorption that this segment is the first to read. `paper` judges that of the segment before it,
    which follows; without recurrence, these are the same.
    """
    model, random = random_model(architecture, TINY_ITEMS), np.random.default_rng(0)
    learner, history = learner_of(model, config), random.integers(0, TINY_ITEMS, 30)
    state = LaneState.empty(model, 1, config.backprop_segments)
    for start in range(0, 28, 5):
        items, length = np.zeros((1, 5), np.int64), min(5, 28 - start)
        items[0, :length] = history[start : start + length]
        batch = Batch(items, items, *map(np.array, ([length], [start == 0], [0], [start])), *[np.zeros_like(items)] * 3)
        losses, after = learner.step(inputs_of(batch), state)
        before, state = state, after
    old, new = (replay(model, [history[:end]])[1] for end in (old_end, new_end))
    read = replay(model, [history[:25]])[1]
    last = model.embed(torch.from_numpy(history[25:28]))[None]
    visible = torch.tensor([5 if model.config.recurrent else 0])
    expected = model.abstraction_loss(
        old_memory=old,
        new_memory=new,
        hidden=before.context if architecture == PAPER else before.absorbed[-1],
        lengths=torch.tensor([5]),
        queries=model.abstraction_queries(model.encode(last, before.context, visible, read)),
        query_mask=torch.ones(1, 3, dtype=torch.bool),
    )
    assert losses.abstraction_count == 3
    torch.testing.assert_close(losses.abstraction, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "calls"),
    [
        (TINY, 2),
        (PAPER, 2),
        *((replace(base, variant=variant), 1) for base in (TINY, PAPER) for variant in ("fifo", "xl")),
    ],
)
def test_memory_is_absorbed_again_for_eq_5_only_if_f_abs_has_parameters(
    config: ModelConfig, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, called = random_model(config, TINY_ITEMS), []
    learner, abstract = learner_of(model, SETTINGS["alternating"]), model.abstract
    monkeypatch.setattr(model, "abstract", lambda *arguments: called.append(1) or abstract(*arguments))
    _, state = learner.step(one_lane(torch.arange(5)[None], 5, start=True), LaneState.empty(model, 1, 1))
    called.clear()
    losses, _ = learner.step(one_lane(torch.arange(5)[None], 5, start=False), state)
    assert len(called) == calls
    assert calls == 2 or losses.abstraction == 0


@pytest.mark.parametrize(("architecture", "segments"), [(TINY, 3), (PAPER, 2)], ids=["plus", "paper"])
def test_first_segment_whose_step_trains_f_abs(architecture: ModelConfig, segments: int) -> None:
    """`paper`: users of two segments train f_abs, as the absorption of the first is judged by the second."""
    learner, items = learner_of(random_model(architecture, TINY_ITEMS), SETTINGS["alternating"]), torch.arange(5)[None]
    state, counts = LaneState.empty(learner.model, 1, 1), []
    for step in range(3):
        losses, state = learner.step(one_lane(items, 5, start=step == 0), state)
        counts.append(int(losses.abstraction_count))
    assert [bool(count) for count in counts] == [step >= segments for step in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
def test_abstraction_loss_of_every_nth_lane_is_that_of_these_lanes_alone(config: TrainConfig) -> None:
    model, schedule = random_model(TINY, int(OFFSETS[-1])), lanes_of(6, vary_first=False)
    every, third = (learner_of(model, replace(config, abstraction_every=n)) for n in (1, 3))
    state, compared = LaneState.empty(model, 6, config.backprop_segments), 0
    for _ in range(30):
        batch = next(schedule)
        losses, after = third.step(inputs_of(batch), state)
        chosen = LaneState(
            **{name: x[:, ::3] if name.startswith("absorbed") else x[::3] for name, x in state.state_dict().items()}
        )
        expected, _ = every.step(inputs_of(batch.pieces(slice(None, None, 3))), chosen)
        assert losses.abstraction_count == expected.abstraction_count
        torch.testing.assert_close(losses.abstraction, expected.abstraction, rtol=1e-5, atol=1e-6)
        _assert_same_f_abs_gradients(model, losses.abstraction, expected.abstraction)
        state, compared = after, compared + int(losses.abstraction_count > 0)
    assert compared > 5


def _assert_same_f_abs_gradients(model: DMAN, *losses: Tensor) -> None:
    weights = model.abstraction_parameters()
    found = [torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True) for loss in losses]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_losses_count_real_positions_only() -> None:
    model = random_model(TINY, TINY_ITEMS)
    learner, lengths = learner_of(model, SETTINGS["alternating"]), torch.tensor([3, 5])
    items = torch.randint(TINY_ITEMS, (2, 5), generator=torch.Generator().manual_seed(0))
    state, starts = LaneState.empty(model, 2, 1), torch.tensor([True, True])
    users = torch.zeros(2, dtype=torch.int64)
    losses, after = learner.step(step_inputs(items, items, lengths, starts, users), state)
    padded = items.clone()
    padded[0, 3:] = 9
    other, _ = learner.step(step_inputs(padded, padded, lengths, starts, users), state)
    assert losses.likelihood_count == 8
    torch.testing.assert_close(losses.likelihood, other.likelihood)
    for row, length in enumerate((3, 5)):
        assert torch.equal(after.context[row, 0, 5 - length :], model.embed(items[row, :length]))
        assert not after.context[row, :, : 5 - length].any()


# Times and returns

UNCHANGED = replace(TIMED, dropout=0.0)  # by training mode
TIMED_MODELS = {
    "request": TIMED,
    "events": replace(TIMED, time="events"),
    "returns only": replace(TIMED, time="none"),
    "times only, xl": replace(TIMED, returns="off", variant="xl", layers=3),
    "nran": replace(TIMED, variant="nran", layers=1),
    "rounded": replace(TIMED, layers=3, closed_states="int8"),
}


def repeating_log() -> TrainingData:
    """Users who come back to few items, seconds to weeks apart; some events are at once."""
    random = np.random.default_rng(2)
    lengths = random.integers(2, 33, 12)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = random.integers(0, 14, offsets[-1]).astype(np.int32)
    gaps = [random.geometric(2.0 ** -random.integers(0, 20, length)) - 1 for length in lengths]
    times = np.concatenate([10**9 + np.cumsum(of) for of in gaps])
    return TrainingData(items, offsets, times, np.ones(TINY_ITEMS, np.int64), held_out_of([], np.zeros(0, np.int64)))


def ends_of(batch: Batch, data: TrainingData) -> list[tuple[int, int]]:
    """Where the user of each position of a batch begins in the log, and the position itself."""
    return [
        (int(data.offsets[user]), first + place)
        for user, first, length in zip(batch.users, batch.first_events.tolist(), batch.lengths, strict=True)
        for place in range(length)
    ]


def histories_of(batch: Batch, data: TrainingData) -> tuple[list[np.ndarray], list[np.ndarray], Tensor]:
    """Of each position of a batch: the items and times up to it, and its target."""
    ends = ends_of(batch, data)
    histories, times = ([values[start : end + 1] for start, end in ends] for values in (data.items, data.times))
    return histories, times, torch.tensor([int(data.items[end + 1]) for _, end in ends])


def loss_of_replays(model: DMAN, batch: Batch, data: TrainingData, *, asked: bool = True) -> Tensor:
    """The cross-entropy of all targets of a batch, each by a replay of all that came before it."""
    histories, times, targets = histories_of(batch, data)
    ends = [end for _, end in ends_of(batch, data)]
    moments = np.array([data.times[end + 1] for end in ends]) if asked else None
    users, _ = replay(model, histories, times=times, request_times=moments)
    scores = users @ model.item_table().T
    if model.config.returns == "on":
        items, added = returned(model, users, histories, times=times, request_times=moments)
        scores.scatter_add_(1, items, added)
    return torch.nn.functional.cross_entropy(scores, targets, reduction="sum")


def timed_learner(model: DMAN, data: TrainingData, **options: Any) -> LaneLearner:
    config = TrainConfig(loss="full", seen_items="keep", lanes=3, random_first_segment=False, **options)
    return LaneLearner(model, config, data)


@pytest.mark.slow
@pytest.mark.parametrize("config", TIMED_MODELS.values(), ids=TIMED_MODELS.keys())
@torch.no_grad()
def test_lane_loss_with_times_and_returns_is_that_of_replays(config: ModelConfig) -> None:
    """Every position of every segment: its user embedding at the time of the target, and what is added to scores."""
    data = repeating_log()
    learner = timed_learner(random_model(config, TINY_ITEMS), data).eval()
    state, later = learner.state, 0
    for _ in range(24):
        batch = next(learner.schedule)
        losses, state = learner.step(learner.inputs(batch), state)
        torch.testing.assert_close(losses.likelihood, loss_of_replays(learner.model, batch, data), rtol=1e-4, atol=1e-3)
        later += int((batch.first_events - data.offsets[batch.users] >= 15).sum())
    assert later > 5, "users with an absorbed segment and items that left the sketch are compared"


@torch.no_grad()
def test_request_dropout_hides_the_time_of_the_request_in_training_only() -> None:
    data = repeating_log()
    model = random_model(UNCHANGED, TINY_ITEMS)
    learners = [timed_learner(model, data, request_dropout=share, times_dropout=0.0) for share in (0.0, 1.0, 1.0)]
    batch = next(learners[0].schedule)
    known, unknown = (loss_of_replays(model, batch, data, asked=asked) for asked in (True, False))
    assert abs(known - unknown) > 0.1
    for learner, training, expected in zip(learners, (True, True, False), (known, unknown, known), strict=True):
        losses, _ = learner.train(training).step(learner.inputs(batch), learner.state)
        torch.testing.assert_close(losses.likelihood, expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_users_without_times_in_training_are_served_alike() -> None:
    data, model = repeating_log(), random_model(UNCHANGED, TINY_ITEMS)
    learner, generation = timed_learner(model, data, times_dropout=1.0).train(), generation_of(model)
    state, table = learner.state, model.item_table()
    for _ in range(6):
        batch = next(learner.schedule)
        losses, state = learner.step(learner.inputs(batch), state)
        histories, _, targets = histories_of(batch, data)
        users, added = generation.asked(generation.replay(without_times(histories)), [None] * len(histories))
        scores = torch.from_numpy(users) @ table.T
        for row, more in enumerate(added):
            assert more is not None
            scores[row, torch.from_numpy(more.items)] += torch.from_numpy(more.scores)
        expected = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
        torch.testing.assert_close(losses.likelihood, expected, rtol=1e-4, atol=1e-3)


def test_share_of_users_without_times_is_drawn_at_their_start_and_kept() -> None:
    data = repeating_log()
    config = TrainConfig(loss="full", lanes=300, times_dropout=0.5, random_first_segment=False)
    learner = LaneLearner(random_model(UNCHANGED, TINY_ITEMS).train(), config, data)
    before = learner.state.timeless
    for _ in range(6):
        inputs = learner.inputs(next(learner.schedule))
        learner(inputs)
        now = learner.state.timeless
        assert torch.equal(now[~inputs.starts], before[~inputs.starts])
        assert 0.3 < float(now.float().mean()) < 0.7
        before = now


@pytest.mark.parametrize("many", [1, 150])
def test_longest_gap_of_a_model_is_one_that_training_knows_well(many: int) -> None:
    """Two users of 102 events; the gaps are 1 s but for `many` of a day, and the time between users is none."""
    gaps = np.ones(204, np.int64)
    gaps[5 : 5 + many] = 86_400
    times = 10**9 + np.cumsum(gaps)
    times[102:] += 10**8
    data = TrainingData(
        np.zeros(204, np.int32),
        np.array([0, 102, 204]),
        times,
        np.ones(TINY_ITEMS, np.int64),
        held_out_of([], np.zeros(0, np.int64)),
    )
    model = random_model(UNCHANGED, TINY_ITEMS)
    assert model.longest_gap == ANY_GAP
    timed_learner(model, data)
    assert model.longest_gap == (1 if many == 1 else 86_400)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_request_dropout_hides_whole_segments_of_a_share_of_lanes(share: float) -> None:
    data, lanes = repeating_log(), 400
    config = TrainConfig(loss="full", lanes=lanes, request_dropout=share)
    learner = LaneLearner(random_model(UNCHANGED, TINY_ITEMS).train(), config, data)
    inputs = learner.inputs(next(learner.schedule))
    torch.manual_seed(0)
    _, timing = learner._timing(inputs, learner.state, learner._requests(inputs))
    assert timing is not None and timing.request_gaps is not None
    hidden = (timing.request_gaps == NO_GAP) & inputs.real
    assert ((hidden.sum(1) == 0) | (hidden.sum(1) == inputs.lengths)).all()
    assert float(hidden.any(1).float().mean()) == pytest.approx(share, abs=0.08)


def test_times_and_returns_are_trained() -> None:
    """Every table of times, and the weights of the term for items that come back, get a gradient from eq. 9."""
    data = repeating_log()
    learner = timed_learner(random_model(UNCHANGED, TINY_ITEMS).train(), data)
    state = learner.state
    for _ in range(3):
        losses, state = learner.step(learner.inputs(next(learner.schedule)), state)
    losses.likelihood.backward()
    gradients = {name: p.grad for name, p in learner.model.named_parameters()}
    new = {"gaps", "age_bias", "request_gaps", *(name for name in gradients if name.startswith("returns."))}
    assert len(new) == 8
    for name in new:
        assert gradients[name] is not None and bool(gradients[name].abs().any()), name


# Gradients

GATED = replace(TINY, long_term="gated")


def gradients(model: DMAN, config: TrainConfig, *, abstraction: bool) -> set[str]:
    """Parameters that eq. 5 (or eq. 9) gives a gradient in any of 5 steps of one lane."""
    learner = learner_of(model, config)
    state, random = LaneState.empty(model, 2, config.backprop_segments), np.random.default_rng(0)
    reached: set[str] = set()
    for step in range(5):
        items = torch.from_numpy(random.integers(0, TINY_ITEMS, (2, 5)))
        lengths, starts = torch.tensor([5, 5 if step else 2]), torch.tensor([step == 0] * 2)
        inputs = step_inputs(items, items.roll(1, 1), lengths, starts, lengths)
        if config.abstraction_loss == "recall":
            inputs = inputs._replace(absorbed_items=items)
        losses, state = learner.step(inputs, state)
        loss = losses.abstraction if abstraction else losses.likelihood
        if loss.requires_grad:
            model.zero_grad()
            loss.backward()
            reached |= {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().any())}
    return reached


def names(model: DMAN, *, abstraction: bool) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith("abstraction.") is abstraction}


ALTERNATING = replace(READS, memory_training="alternating", abstraction_every=1)
JOINT = [replace(ALTERNATING, memory_training="joint", backprop_segments=n) for n in (1, 2, 3, 4)]


RECALLING = [replace(config, abstraction_loss="recall") for config in (ALTERNATING, JOINT[1])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [ALTERNATING, *JOINT, *RECALLING], ids=["alternating", "1", "2", "3", "4", "recall", "recall, joint"]
)
@pytest.mark.parametrize("architecture", [TINY, GATED, PAPER], ids=["merged", "gated", "paper"])
def test_abstraction_loss_reaches_f_abs_only(architecture: ModelConfig, config: TrainConfig) -> None:
    model = random_model(architecture, TINY_ITEMS).train()
    assert gradients(model, config, abstraction=True) == names(model, abstraction=True)


@pytest.mark.parametrize("architecture", [TINY, GATED], ids=["merged", "gated"])
def test_likelihood_reaches_everything_but_f_abs_when_alternating(architecture: ModelConfig) -> None:
    model = random_model(architecture, TINY_ITEMS).train()
    assert gradients(model, ALTERNATING, abstraction=False) == names(model, abstraction=False)
    assert "initial_memory" in names(model, abstraction=False)


@pytest.mark.slow
@pytest.mark.parametrize("config", JOINT, ids=["1", "2", "3", "4"])
def test_likelihood_reaches_f_abs_when_joint(config: TrainConfig) -> None:
    model = random_model(TINY, TINY_ITEMS).train()
    assert gradients(model, config, abstraction=False) == {n for n, _ in model.named_parameters()}


# Recall


@pytest.mark.parametrize("vary_first", [True, False])
def test_items_to_recall_are_of_the_user_and_more_than_a_segment_back(vary_first: bool) -> None:
    model, recalled = random_model(TINY, int(OFFSETS[-1])), 0
    learner = learner_of(model, TrainConfig(loss="full", abstraction_loss="recall"))
    schedule = lanes_of(6, vary_first=vary_first)
    learner._part = slice(0, 6)
    drawn = set()
    for _ in range(60):
        batch = next(schedule)
        items = learner.inputs(batch).absorbed_items
        assert items is not None
        for user, first, found in zip(batch.users, batch.first_events, items.tolist(), strict=True):
            old = EVENTS[OFFSETS[user] : max(OFFSETS[user], first - 5)].tolist()
            assert set(found) <= set(old) if old else set(found) == {-1}
            recalled += bool(old)
            drawn |= {(user, item) for item in found if old}
    assert recalled > 20 and len(drawn) > 40


def recalling_step(model: DMAN, items: list[list[int]], lengths: list[int]) -> tuple[float, int, Tensor]:
    """Loss and count of a second step after these lengths of the first, and the memories (B, L, m, D) it read."""
    learner = learner_of(model, TrainConfig(loss="full", abstraction_loss="recall", abstraction_every=1))
    state, lanes = LaneState.empty(model, len(items), 1), len(items)
    inputs = one_lane(torch.arange(5).repeat(lanes, 1), 5, start=True)
    _, state = learner.step(inputs._replace(lengths=torch.tensor(lengths)), state)
    state = replace(state, absorbed_lengths=torch.tensor(lengths)[None], absorbed=state.context[None])
    read = settled_memory(model, state)
    following = one_lane(torch.arange(5).repeat(lanes, 1), 5, start=False)
    losses, _ = learner.step(following._replace(absorbed_items=torch.tensor(items)), state)
    return float(losses.abstraction), int(losses.abstraction_count), read


@torch.no_grad()
def test_recall_loss_is_the_cross_entropy_of_the_best_slots() -> None:
    model = random_model(TINY, TINY_ITEMS)
    loss, count, read = recalling_step(model, [[1, 3], [2, 2], [-1, -1]], [5, 4, 5])
    expected, table = 0.0, model.item_table().double() * model.output_scale
    for slots, items in zip(read.double(), [[1, 3], [2, 2]], strict=False):
        for layer in slots:
            chance = torch.exp(layer @ table.T).sum(0)  # (V)
            expected -= sum(float(torch.log(chance[item] / chance.sum())) for item in items) / len(slots)
    assert count == 4
    assert loss == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_recall_counts_no_lane_that_absorbs_nothing() -> None:
    model = random_model(TINY, TINY_ITEMS)
    alone, count, _ = recalling_step(model, [[1, 3]], [5])
    both, counted, _ = recalling_step(model, [[1, 3], [2, 2]], [5, 0])
    assert (count, counted) == (2, 2)
    assert both == pytest.approx(alone, rel=1e-5)
    for variant in ("xl", "fifo"):
        assert recalling_step(random_model(replace(TINY, variant=variant), TINY_ITEMS), [[1, 3]], [5])[:2] == (0, 0)


def test_recall_of_a_large_catalogue_compares_the_items_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NextItemLoss, "forward", lambda *_, **__: torch.zeros(()))
    model = random_model(TINY, TINY_ITEMS)
    learner = learner_of(model, TrainConfig(loss="sampled", abstraction_loss="recall", abstraction_every=1))
    judged = _Judged(*[torch.randn(2, 2, 4, 32)] * 2, torch.zeros(2, 2, 5, 32), torch.tensor([5, 5]))
    items, table = torch.tensor([[7, 3], [3, 9]]), model.item_table().detach()
    loss, count = learner._recall_loss(judged, items, table)
    expected = model.recall_loss(judged.new, torch.tensor([[1, 0], [0, 2]]), table[[3, 7, 9]])
    assert count == 4
    torch.testing.assert_close(loss, expected)
