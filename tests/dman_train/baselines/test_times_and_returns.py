"""Times and returns of the baselines: against literal computations, and training against ranking."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import held_out_of
from torch import Tensor

from dman_runtime.data.evaluation import HeldOut
from dman_runtime.model.sketch import HALF_LIVES
from dman_runtime.model.times import NO_GAP, bucket, quantised
from dman_train.baselines import build, latest
from dman_train.baselines.base import Baseline
from dman_train.baselines.gru4rec import GRU4Rec
from dman_train.baselines.hpmn import HPMN
from dman_train.baselines.latest import Moments, returns_within
from dman_train.baselines.learner import WindowLearner
from dman_train.baselines.sasrec import SASRec
from dman_train.config import BaselineConfig, TrainConfig
from dman_train.data import TrainingData
from dman_train.families import family_of
from dman_train.lanes import Batch
from dman_train.learner import UNKNOWN_TIME, StepInputs
from dman_train.model import SCORE_SCALE
from dman_train.returns import NO_ITEM

ITEMS, USERS, WINDOW = 14, 12, 8
FORM = BaselineConfig(history=WINDOW, width=16, layers=2, heads=2, dropout=0.2, segment_length=4)
PLAIN = {system: replace(FORM, system=system) for system in ("sasrec", "gru4rec", "hpmn")}  # type: ignore[arg-type]
TIMED = {system: replace(config, time="request", returns="on") for system, config in PLAIN.items()}
FORMS = (
    TIMED
    | {f"{system}, events": replace(config, time="events") for system, config in TIMED.items()}
    | {f"{system}, times only": replace(config, returns="off") for system, config in TIMED.items()}
    | {f"{system}, returns only": replace(config, time="none") for system, config in TIMED.items()}
    | {"sasrec, one block": replace(TIMED["sasrec"], layers=1)}
    | {f"{system}, returns": replace(FORM, system=system, returns="on") for system in ("caser", "shan")}  # type: ignore[arg-type]
)
every_system = pytest.mark.parametrize("system", PLAIN)
every_form = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())


def random_baseline(config: BaselineConfig) -> Baseline:
    """A model whose every part matters, in double precision: random weights, biases and norms of ordinary size."""
    torch.manual_seed(0)
    model = build(config, ITEMS, USERS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double().eval()


def repeating_log() -> TrainingData:
    """Users who come back to few items, seconds to weeks apart; some events are at once, and some histories long."""
    random = np.random.default_rng(2)
    lengths = random.integers(2, 3 * WINDOW, USERS)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = random.integers(0, ITEMS, offsets[-1]).astype(np.int32)
    gaps = [random.geometric(2.0 ** -random.integers(0, 20, length)) - 1 for length in lengths]
    times = np.concatenate([10**9 + np.cumsum(of) for of in gaps])
    return TrainingData(items, offsets, times, np.ones(ITEMS, np.int64), held_out_of([], np.zeros(0, np.int64)))


def learner_of(model: Baseline, **options: Any) -> WindowLearner:
    return WindowLearner(model, TrainConfig(loss="full", seen_items="keep", lanes=3, **options), repeating_log())


def full_window() -> tuple[Tensor, Tensor, Tensor, Moments]:
    """Items, users and lengths of windows without padding, and their moments; the fourth request is unknown."""
    random = np.random.default_rng(3)
    items = torch.from_numpy(random.integers(0, ITEMS, (USERS, WINDOW)))
    gaps = torch.from_numpy(2 ** random.integers(0, 20, (USERS, WINDOW + 1)) - 1)
    times = 10**9 + gaps.cumsum(1)
    since_last = gaps[:, :-1].clone()
    since_last[:, 0] = NO_GAP
    requests = times[:, 1:].clone()
    requests[:, 3] = UNKNOWN_TIME
    return items, torch.arange(USERS), torch.full((USERS,), WINDOW), Moments(times[:, :-1], since_last, requests)


def bucket_of(seconds: int) -> int:
    return int(bucket(np.array(seconds)))


# Each system against one that is written position by position


def literal_inputs(model: Baseline, items: Tensor, moments: Moments, row: int) -> Tensor:
    """(W, D) what the model reads of each event of a row: its item, and how long after the one before it came."""
    x = model.items[items[row]].clone()
    for t in range(1, WINDOW):
        x[t] += model.gaps[bucket_of(int(moments.times[row, t] - moments.times[row, t - 1]))]
    return x * math.sqrt(16)


def literal_request(model: Baseline, moments: Moments, row: int, t: int) -> Tensor:
    """(D) what is added at the request of a position; nothing if it is unknown."""
    assert moments.requests is not None
    if moments.requests[row, t] < moments.times[row, t]:
        return torch.zeros(16)
    return model.request_gaps[bucket_of(int(moments.requests[row, t] - moments.times[row, t]))] * math.sqrt(16)


def literal_block(model: SASRec, layer: int, sources: Tensor, query: Tensor, ages: list[int]) -> Tensor:
    """(n, D) events up to a position, (D) its query, n ages of the events -> (D)."""
    block, read = model.blocks[layer], []
    of_query, of_key, of_value = block.project.weight.chunk(3)
    for head in range(2):
        of = slice(8 * head, 8 * head + 8)
        q = of_query[of] @ block.norm_attention(query)
        energies, values = [], []
        for source, age in zip(sources, ages, strict=True):
            k = of_key[of] @ block.norm_attention(source)
            energies.append(q @ k / math.sqrt(8) + model.age_bias[layer, bucket_of(age), head])
            values.append(of_value[of] @ block.norm_attention(source))
        read.append(torch.softmax(torch.stack(energies), 0) @ torch.stack(values))
    y = query + block.output(torch.cat(read))
    return y + block.ffn(block.norm_ffn(y))


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_sasrec_with_times_equals_attention_computed_event_by_event(layers: int) -> None:
    """Ages to the event, but in the last block to the request, which is embedded into the query and into no key."""
    model, (items, users, lengths, moments) = random_baseline(replace(TIMED["sasrec"], layers=layers)), full_window()
    assert isinstance(model, SASRec) and moments.requests is not None
    for row in range(2):
        times, requests = moments.times[row].tolist(), moments.requests[row].tolist()
        x = literal_inputs(model, items, moments, row) + model.positions * math.sqrt(16)
        if layers == 2:
            earlier = [[now - before for before in times[: t + 1]] for t, now in enumerate(times)]
            x = torch.stack([literal_block(model, 0, x[: t + 1], x[t], earlier[t]) for t in range(WINDOW)])
        expected = []
        for t in range(WINDOW):
            moment = times[t] + int(quantised(np.array(requests[t] - times[t])))
            query = x[t] + literal_request(model, moments, row, t)
            ages = [moment - before for before in times[: t + 1]]
            last = literal_block(model, layers - 1, x[: t + 1], query, ages)
            expected.append(model.norm(last) * SCORE_SCALE / math.sqrt(16))
        found = model.encode(items, users, lengths, moments)[row]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_gru4rec_with_times_reads_gaps_and_scales_its_state_by_the_request() -> None:
    model, (items, users, lengths, moments) = random_baseline(TIMED["gru4rec"]), full_window()
    assert isinstance(model, GRU4Rec)
    states, _ = model.gru(literal_inputs(model, items, moments, 5)[None])
    expected = [states[0, t] * (1 + literal_request(model, moments, 5, t)) for t in range(WINDOW)]
    found = model.encode(items, users, lengths, moments)[5]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_hpmn_with_times_keeps_the_request_out_of_its_slots() -> None:
    model, (items, users, lengths, moments) = random_baseline(TIMED["hpmn"]), full_window()
    assert isinstance(model, HPMN)
    events = literal_inputs(model, items, moments, 5)[None]
    asked = events + torch.stack([literal_request(model, moments, 5, t) for t in range(WINDOW)])
    read = model._read(model._memory(events), model.query(asked))
    expected = model.output(torch.cat([read, asked], dim=-1))[0]
    torch.testing.assert_close(model.encode(items, users, lengths, moments)[5], expected, rtol=1e-9, atol=1e-12)


def test_returns_within_a_window_are_those_of_its_events_so_far() -> None:
    items = torch.tensor([[3, 5, 3, 3, 7, 5], [2, 2, 9, 4, 0, 0]])
    lengths, times = torch.tensor([6, 4]), torch.arange(12).view(2, 6) * 10 + 1000
    found = returns_within(items, lengths, times)
    for row, length in enumerate(lengths.tolist()):
        history = items[row, :length].tolist()
        assert set(found.items[row].tolist()) == {*history, NO_ITEM}
        for candidate, item in enumerate(found.items[row].tolist()):
            for t in range(length):
                places = [place for place in range(t + 1) if history[place] == item]
                counts = [sum(2.0 ** -((t - place) / life) for place in places) for life in HALF_LIVES]
                np.testing.assert_allclose(found.counts[row, t, candidate], np.log1p(counts), rtol=1e-5, atol=1e-7)
                expected = bucket_of(t - places[-1]) if places else NO_GAP
                assert found.ages[row, t, candidate] == expected
                if places:
                    assert found.times[row, t, candidate] == times[row, places[-1]]


# A position in training is a user who is ranked


def histories_of(batch: Batch) -> HeldOut:
    """The inputs of each position of a batch up to it, and its target."""
    ends = [(row, end) for row, length in enumerate(batch.lengths) for end in range(1, length + 1)]
    return HeldOut(
        np.array([batch.users[row] for row, _ in ends]),
        [batch.items[row, :end] for row, end in ends],
        np.array([batch.targets[row, end - 1] for row, end in ends]),
        [batch.times[row, :end] for row, end in ends],
        np.array([batch.next_times[row, end - 1] for row, end in ends]),
    )


def ranking_loss(model: Baseline, batch: Batch, *, asked: bool = True) -> Tensor:
    """The cross-entropy of all targets of a batch, with scores as a ranking has them."""
    data = histories_of(batch)
    if not asked:
        data = replace(data, target_times=np.full(len(data.targets), UNKNOWN_TIME))
    scores = family_of(model.config).scores(model, model.item_table().T, data)
    return torch.nn.functional.cross_entropy(scores, torch.from_numpy(data.targets), reduction="sum")


@every_form
@torch.no_grad()
def test_scores_of_a_window_in_training_are_those_of_a_ranking(config: BaselineConfig) -> None:
    learner = learner_of(random_baseline(config)).eval()
    for _ in range(4):
        batch = next(learner.schedule)
        losses = learner(learner.inputs(batch))
        torch.testing.assert_close(losses.likelihood.double(), ranking_loss(learner.model, batch), rtol=1e-5, atol=1e-4)


@every_form
@torch.no_grad()
def test_scores_of_a_ranking_depend_on_the_latest_events_only(
    config: BaselineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, random = random_baseline(config), np.random.default_rng(0)
    lengths = [WINDOW, WINDOW + 1, 3 * WINDOW, 2, 1]
    histories = [random.integers(0, ITEMS, length) for length in lengths]
    times = [10**9 + random.integers(0, 10**6, length).cumsum() for length in lengths]
    asked = np.array([of[-1] + 3600 for of in times])
    data = HeldOut(np.arange(len(lengths)), histories, np.zeros(len(lengths), np.int64), times, asked)
    recent = replace(data, histories=[h[-WINDOW:] for h in histories], times=[of[-WINDOW:] for of in times])

    def scores(of: HeldOut) -> Tensor:
        return family_of(config).scores(model, model.item_table().T, of)

    expected = scores(recent)
    torch.testing.assert_close(scores(data), expected)
    monkeypatch.setattr(latest, "PAIRS", 2 * WINDOW**2)  # two users at a time
    torch.testing.assert_close(scores(data), expected)
    for row in range(len(lengths)):
        torch.testing.assert_close(scores(data.rows(np.array([row])))[0], expected[row])


# Nothing comes from the future


def all_scores(learner: WindowLearner, inputs: StepInputs) -> Tensor:
    """(B, W, V) the scores of a step, as its loss has them."""
    model, requests, table = learner.model, learner._requests(inputs), learner.model.item_table()
    moments = Moments(inputs.times, inputs.since_last, requests)
    embeddings = model.encode(inputs.items, inputs.users, inputs.lengths, moments)
    scores, added = embeddings @ table.T, learner._returns(inputs, requests, embeddings, table)
    return scores if added is None else scores.scatter_add(2, added.items, added.scores)


def later_changed(inputs: StepInputs, end: int) -> dict[str, StepInputs]:
    """The inputs with other events, times or requests from the position `end` on."""
    items, times, requests, since = (
        x.clone() for x in (inputs.items, inputs.times, inputs.next_times, inputs.since_last)
    )
    items[:, end:] = (items[:, end:] + 5) % ITEMS
    times[:, end:] += 10**7
    since[:, end] += 10**7
    requests[:, end:] += 3 * 10**7
    return {
        "item": inputs._replace(items=items),
        "time": inputs._replace(times=times, since_last=since, next_times=requests),
        "request": inputs._replace(next_times=requests),
    }


@every_form
@torch.no_grad()
def test_scores_of_a_position_depend_on_no_later_event_time_or_request(config: BaselineConfig) -> None:
    learner = learner_of(random_baseline(config)).eval()
    items, users, lengths, (times, since, _) = full_window()
    following = times + 500
    inputs = StepInputs(items, items, lengths, lengths > 0, users, None, None, times, following, since)
    scores = all_scores(learner, inputs)
    for end in range(1, WINDOW):
        for what, other in later_changed(inputs, end).items():
            changed = all_scores(learner, other)
            torch.testing.assert_close(changed[:, :end], scores[:, :end], rtol=1e-6, atol=1e-9)
            sees = {"item": True, "time": config.sees_times, "request": config.time == "request"}[what]
            assert torch.allclose(changed[:, end], scores[:, end]) != sees, f"{what}: but on its own"


@every_form
@torch.no_grad()
def test_scores_of_a_row_do_not_depend_on_its_padding(config: BaselineConfig) -> None:
    learner = learner_of(random_baseline(config)).eval()
    items, users, _, (times, since, _) = full_window()
    lengths = torch.arange(USERS) % WINDOW + 1
    real = torch.arange(WINDOW) < lengths[:, None]
    inputs = StepInputs(items, items, lengths, lengths > 0, users, None, None, times, times + 500, since)
    padded = {
        name: torch.where(real, getattr(inputs, name), 0) for name in ("items", "times", "next_times", "since_last")
    }
    found, expected = all_scores(learner, inputs._replace(**padded)), all_scores(learner, inputs)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-6, atol=1e-9)


# Requests that are unknown


@every_system
@torch.no_grad()
def test_unknown_request_stands_at_the_last_event_and_has_no_gap(system: str) -> None:
    model, (items, users, lengths, moments) = random_baseline(TIMED[system]), full_window()
    assert moments.requests is not None
    known = model.encode(items, users, lengths, moments._replace(requests=moments.times + 500))
    unknown = model.encode(items, users, lengths, moments._replace(requests=None))
    before = model.encode(items, users, lengths, moments._replace(requests=moments.times - 1))
    torch.testing.assert_close(before, unknown)
    assert not torch.allclose(known, unknown)
    mixed = model.encode(items, users, lengths, moments)  # the fourth one is unknown
    torch.testing.assert_close(mixed[:, 3], unknown[:, 3])
    histories, times = list(items.numpy()), list(moments.times.numpy())
    found = model.user_embeddings(histories, users.numpy(), times=times)
    torch.testing.assert_close(found, unknown[:, -1])


@every_system
@torch.no_grad()
def test_request_dropout_hides_the_request_in_training_only(system: str) -> None:
    model = random_baseline(replace(TIMED[system], dropout=0.0))
    batch = next(learner_of(model).schedule)
    known, unknown = (ranking_loss(model, batch, asked=asked) for asked in (True, False))
    assert abs(known - unknown) > 0.1
    for share, training, expected in ((0.0, True, known), (1.0, True, unknown), (1.0, False, known)):
        learner = learner_of(model, request_dropout=share).train(training)
        found = learner(learner.inputs(batch)).likelihood
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@every_system
@torch.no_grad()
def test_model_of_event_times_does_not_see_the_request(system: str) -> None:
    model = random_baseline(replace(TIMED[system], time="events"))
    batch = next(learner_of(model).schedule)
    torch.testing.assert_close(ranking_loss(model, batch), ranking_loss(model, batch, asked=False))


def test_model_that_sees_times_ranks_no_histories_without_them() -> None:
    model = random_baseline(TIMED["sasrec"])
    with pytest.raises(ValueError, match="sees the times"):
        model.user_embeddings([np.array([1, 2])], np.array([0]))


# Without times and returns nothing changes, and with them everything is trained


@every_system
@torch.no_grad()
def test_fresh_model_with_times_scores_like_the_one_without(system: str) -> None:
    """Its tables begin at zero and take no random number: a seed gives the same other weights."""
    torch.manual_seed(3)
    plain = build(PLAIN[system], ITEMS, USERS).eval()
    torch.manual_seed(3)
    timed = build(replace(TIMED[system], returns="off"), ITEMS, USERS).eval()
    old, new = plain.state_dict(), timed.state_dict()
    added = {"gaps", "request_gaps", *(["age_bias"] if system == "sasrec" else [])}
    assert new.keys() - old.keys() == added and not any(new[name].any() for name in added)
    assert all(torch.equal(new[name], weight) for name, weight in old.items())
    items, users, lengths, moments = full_window()
    torch.testing.assert_close(timed.encode(items, users, lengths, moments), plain.encode(items, users, lengths))


@pytest.mark.parametrize("system", ["sasrec", "gru4rec", "hpmn", "caser", "shan", "sdm"])
@torch.no_grad()
def test_model_without_times_and_returns_does_not_read_any(system: Any) -> None:
    torch.manual_seed(3)
    undecided = build(replace(FORM, system=system), ITEMS, USERS).eval()
    torch.manual_seed(3)
    without = build(replace(FORM, system=system, time="none", returns="off"), ITEMS, USERS).eval()
    assert undecided.state_dict().keys() == without.state_dict().keys()
    assert not {"gaps", "request_gaps", "age_bias", "returns.by_age"} & without.state_dict().keys()
    items, users, lengths, moments = full_window()
    assert torch.equal(without.encode(items, users, lengths, moments), undecided.encode(items, users, lengths))
    data = histories_of(next(learner_of(without).schedule))
    expected = undecided.user_embeddings(data.histories, data.users) @ undecided.item_table().T
    assert torch.equal(family_of(without.config).scores(without, without.item_table().T, data), expected)


@every_form
def test_times_and_returns_are_trained(config: BaselineConfig) -> None:
    learner = learner_of(random_baseline(replace(config, dropout=0.0)).train())
    for _ in range(3):
        learner(learner.inputs(next(learner.schedule))).likelihood.backward()
    for name, parameter in learner.model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().any()), name


@every_form
def test_model_with_times_and_returns_trains_in_bfloat16(config: BaselineConfig) -> None:
    learner = learner_of(random_baseline(config).float().train())
    with torch.autocast("cpu", torch.bfloat16):
        losses = learner(learner.inputs(next(learner.schedule)))
    losses.likelihood.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in learner.model.parameters())


@pytest.mark.parametrize("loss", ["sampled", "negatives", "negatives-softmax"])
def test_returns_are_trained_by_every_loss(loss: Any) -> None:
    model = random_baseline(TIMED["sasrec"]).float().train()
    config = TrainConfig(loss=loss, negatives=6, seen_items="keep", lanes=3)
    learner = WindowLearner(model, config, repeating_log())
    learner(learner.inputs(next(learner.schedule))).likelihood.backward()
    assert all(bool(parameter.grad.abs().any()) for parameter in model.returns.parameters())  # type: ignore[union-attr]
