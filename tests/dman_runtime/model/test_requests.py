"""What a state answers at the time of a request, against PyTorch over the whole history."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import PAPER, TIMED, TINY_ITEMS, assert_close, events_of, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_graphs import generation_of

from dman_runtime.model.answers import KeptAnswers, PersonalAnswer
from dman_runtime.model.events import KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.model.recurrence import Graphs, Last
from dman_runtime.model.state import State
from dman_runtime.model.times import NO_GAP, quantised, quantised_one
from dman_train.config import ModelConfig
from dman_train.graphs import state_shape
from dman_train.model import DMAN
from dman_train.replay import replay, returned

T, BEGIN = 5, 10**9
EXACT = 1e-4  # relative, in root mean square: float32 arithmetic in another order
ROUNDED = 3e-3  # the same, where one of some hundred values may be rounded to the next step
LENGTHS = range(1, 4 * T + 4)  # every place in a segment
MODELS: dict[str, ModelConfig] = {
    f"{layers}-{variant}-{time}": replace(TIMED, layers=layers, variant=variant, time=time)
    for layers in (1, 2, 3)
    for variant in ("dman", "xl", "nran", "fifo")
    for time in ("request", "events")
} | {
    "no returns": replace(TIMED, returns="off"),
    "returns only": replace(TIMED, time="none"),
    "returns only, nran": replace(TIMED, time="none", variant="nran"),
    "returns only, gated": replace(TIMED, time="none", long_term="gated"),
    "rounded": replace(TIMED, layers=3, closed_states="int8"),
    "rounded, no times": replace(TIMED, time="none", returns="off", closed_states="int8"),
    "rounded, nran": replace(TIMED, variant="nran", closed_states="int8"),
    "returns only, paper": replace(PAPER, time="none", returns="on", sketch_items=6),
}


def random_events(length: int, random: np.random.Generator) -> KnownEvents:
    """Seconds to years apart, some of them at once; items that come back."""
    gaps = random.geometric(2.0 ** -random.integers(0, 25, length)) - 1
    return events_of(random.integers(0, 20, length), BEGIN + np.cumsum(gaps))


def histories_and_moments() -> tuple[list[KnownEvents], np.ndarray]:
    random = np.random.default_rng(1)
    histories = [random_events(length, random) for length in LENGTHS]
    later = 2 ** random.integers(0, 25, len(histories)) - 1  # 0 for some: at the moment of the last event
    return histories, np.array([history.times[-1] for history in histories]) + later


def check_answers(model: DMAN, states: list[State], histories: list[KnownEvents], moments: np.ndarray | None) -> None:
    """The user embeddings, and what is added to scores, are those of PyTorch; `moments` None: unknown."""
    generation, exact = generation_of(model), ROUNDED if model.config.closed_states == "int8" else EXACT
    asked = [None] * len(states) if moments is None else moments.tolist()
    found, added = generation.asked(states, asked)
    items, times = [history.items for history in histories], [history.times for history in histories]
    expected, memories = replay(model, items, times=times, request_times=moments)
    for state, user, reference, memory in zip(states, found, expected.numpy(), memories.numpy(), strict=True):
        assert_close(user, reference, exact)
        assert_close(state.memory, memory, exact)
    if model.config.returns != "on":
        assert added == [None] * len(states)
        return
    candidates, scores = (x.numpy() for x in returned(model, expected, items, times=times, request_times=moments))
    for one, history, wanted, row in zip(added, items, candidates, scores, strict=True):
        reference = np.zeros(model.vocabulary)
        np.add.at(reference, wanted, row)  # places without an item add nothing to item 0
        assert one is not None and set(one.items.tolist()) <= set(history.tolist())
        found_scores = np.zeros(model.vocabulary)
        found_scores[one.items] = one.scores
        assert_close(found_scores, reference, exact)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_answers_at_known_and_unknown_moments_equal_pytorch(config: ModelConfig) -> None:
    model, (histories, moments) = random_model(config, TINY_ITEMS), histories_and_moments()
    states = generation_of(model).replay(histories)
    check_answers(model, states, histories, moments)
    check_answers(model, states, histories, None)
    check_answers(model, states, histories, np.array([history.times[-1] - 1 for history in histories]))


@pytest.mark.parametrize("config", [TIMED, MODELS["returns only"]], ids=["request", "returns only"])
def test_request_after_more_time_than_training_knew_counts_as_the_longest_gap(config: ModelConfig) -> None:
    model, (histories, moments) = random_model(config, TINY_ITEMS), histories_and_moments()
    last = np.array([history.times[-1] for history in histories])
    if config.time == "request":
        model.known_gap.fill_(5000)
    generation = generation_of(model)
    states = generation.replay(histories)
    assert (moments > last + 5000).any() and (moments < last + 5000).any()
    check_answers(model, states, histories, moments)
    (users, added), (clipped, again) = (
        generation.asked(states, at.tolist()) for at in (moments, np.minimum(moments, last + 5000))
    )
    np.testing.assert_array_equal(users, clipped)
    for one, other in zip(added, again, strict=True):
        assert one is not None and other is not None
        np.testing.assert_array_equal(one.scores, other.scores)


@pytest.fixture(
    scope="module",
    params=["2-dman-request", "3-nran-request", "1-xl-events", "returns only", "rounded", "rounded, no times"],
)
def model(request: pytest.FixtureRequest) -> DMAN:
    return random_model(MODELS[request.param], TINY_ITEMS)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(1, 30), seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 30), max_size=8))
def test_any_split_gives_the_answers_of_the_whole(model: DMAN, length: int, seed: int, cuts: list[int]) -> None:
    generation, history = generation_of(model), random_events(length, np.random.default_rng(seed))
    state = generation.unpack(None)
    for start, end in pairwise(sorted({0, length, *(min(cut, length) for cut in cuts)})):
        generation.advance([state], [history[start:end]])
        state.history_count = end
        state = generation.unpack(generation.pack(state))
    (whole,) = generation.replay([history])
    assert_same_times(state, whole)
    check_answers(model, [state], [history], history.times[-1:] + 77)


def assert_same_times(found: State, expected: State) -> None:
    count = expected.context_length
    assert (found.event_count, found.last_time) == (expected.event_count, expected.last_time)
    assert found.last_is_known == expected.last_is_known
    for name in ("recent", "times", "gaps"):
        assert getattr(found, name)[:count].tolist() == getattr(expected, name)[:count].tolist(), name
    for one, other in zip(found.sketch, expected.sketch, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def timed() -> Generation:
    return generation_of(random_model(TIMED, TINY_ITEMS))


def test_asking_changes_no_state(timed: Generation) -> None:
    histories, moments = histories_and_moments()
    states = timed.replay(histories)
    before = [timed.pack(state) for state in states]
    timed.asked(states, moments.tolist())
    assert [timed.pack(state) for state in states] == before


def test_moment_of_a_request_matters_and_that_of_the_last_event_is_not_an_unknown_one(timed: Generation) -> None:
    (state,) = timed.replay([random_events(13, np.random.default_rng(0))])
    moments = [None, *(state.last_time + later for later in (0, 60, 3600, 10**7))]
    users = timed.asked([state] * len(moments), moments)[0]
    np.testing.assert_array_equal(users[0], state.user_embedding)
    assert all(np.abs(one - other).max() > 1e-3 for one, other in pairwise(users))


def test_moments_of_one_bucket_give_one_answer(timed: Generation) -> None:
    (state,) = timed.replay([events_of([3, 4], [BEGIN, BEGIN + 10**6])])
    users = timed.asked([state] * 2, [state.last_time + 1500, state.last_time + 1501])[0]
    np.testing.assert_array_equal(users[0], users[1])


@pytest.mark.parametrize("moment", [None, BEGIN + 10**6])
def test_empty_history_answers_nothing_personal(timed: Generation, moment: int) -> None:
    users, (added,) = timed.asked([timed.unpack(None)], [moment])
    assert not users.any()
    assert added is not None and not len(added.items)


# Unknown times


def filled(history: KnownEvents) -> KnownEvents:
    """With the time of the event before in place of an unknown one."""
    times = history.times.copy()
    for place in range(1, len(times)):
        times[place] = times[place] or times[place - 1]
    return KnownEvents(history.items, times)


def with_unknown_times(length: int, seed: int) -> KnownEvents:
    random = np.random.default_rng(seed)
    history = random_events(length, random)
    return KnownEvents(history.items, np.where(random.random(length) < 0.4, 0, history.times))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(1, 25), seed=st.integers(0, 99), cut=st.integers(0, 25))
def test_event_at_an_unknown_time_stands_at_that_of_the_event_before(
    timed: Generation, length: int, seed: int, cut: int
) -> None:
    history, state = with_unknown_times(length, seed), timed.unpack(None)
    for part in (history[:cut], history[cut:]):
        timed.advance([state], [part])
    (expected,) = timed.replay([filled(history)])
    expected.last_is_known = bool(history.times[-1])
    assert_same_times(state, expected)
    assert_close(state.user_embedding, expected.user_embedding, EXACT)


def test_unknown_time_within_a_history_gives_what_pytorch_gives_for_the_event_before() -> None:
    model, random = random_model(TIMED, TINY_ITEMS), np.random.default_rng(3)
    histories = [random_events(length, random) for length in LENGTHS]
    for history in histories:
        history.times[1::3] = 0
    states = generation_of(model).replay(histories)
    known = [filled(history) for history in histories]
    later = np.array([500 if history.times[-1] else -1 for history in histories])  # the others are asked at no moment
    assert (later > 0).any() and (later < 0).any()
    check_answers(model, states, known, np.array([history.times[-1] for history in known]) + later)


def test_moment_after_an_event_without_a_time_is_unknown(timed: Generation) -> None:
    """Whatever the moment: nobody knows how long ago that event was."""
    state = timed.unpack(None)
    timed.advance([state], [events_of([1, 2, 3], [BEGIN, BEGIN + 60, 0])])
    state = timed.unpack(timed.pack(state))
    users = timed.asked([state] * 4, [None, BEGIN + 60, BEGIN + 90, BEGIN + 10**8])[0]
    assert (users == state.user_embedding).all()
    timed.advance([state], [events_of([4], [BEGIN + 70])])
    known = timed.asked([state] * 2, [None, BEGIN + 10**6])[0]
    assert np.abs(known[0] - known[1]).max() > 1e-3


def test_history_without_times_has_no_gaps_and_no_moment(timed: Generation) -> None:
    (state,) = timed.replay([events_of(range(8))])
    assert state.last_time == 0 and state.gaps[:8].tolist() == [NO_GAP] * 8
    users = timed.asked([state] * 2, [None, BEGIN])[0]
    np.testing.assert_array_equal(users[0], users[1])


def test_first_known_time_follows_no_gap(timed: Generation) -> None:
    (state,) = timed.replay([events_of(range(4), [0, 0, BEGIN, BEGIN + 1])])
    assert state.gaps[:4].tolist() == [NO_GAP, NO_GAP, NO_GAP, 1]


def test_time_that_goes_back_counts_as_at_once(timed: Generation) -> None:
    """Updates may come late: their events stand where they arrived."""
    found, expected = timed.replay(
        [events_of([1, 2, 3], [BEGIN, BEGIN - 50, BEGIN]), events_of([1, 2, 3], [BEGIN] * 3)]
    )
    assert found.gaps[1] == expected.gaps[1] == 0
    assert_close(found.hidden[:, :2], expected.hidden[:, :2], EXACT)


# Answers are kept


class CountingGraphs:
    def __init__(self, graphs: Graphs) -> None:
        self._graphs, self.runs = graphs, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graphs, name)

    def read_at_request(self, *arrays: np.ndarray) -> np.ndarray:
        self.runs += 1
        return self._graphs.read_at_request(*arrays)


@pytest.fixture
def counting(timed: Generation) -> Generation:
    return Generation.of(timed.bundle, CountingGraphs(timed.graphs))


def runs(generation: Generation) -> int:
    assert isinstance(generation.graphs, CountingGraphs)
    return generation.graphs.runs


def test_stored_state_runs_no_graph_again_before_the_next_bucket_or_event(counting: Generation) -> None:
    (state,) = counting.replay([random_events(13, np.random.default_rng(0))])
    record, last = counting.pack(state), state.last_time
    first = counting.asked([counting.read_for_answer(record)], [last + 1500])
    again = counting.asked([counting.read_for_answer(record)], [last + 1600])
    assert runs(counting) == 1
    np.testing.assert_array_equal(first[0], again[0])
    counting.asked([counting.read_for_answer(record)], [last + 3000])
    assert runs(counting) == 2
    counting.advance([state], [events_of([3], [last + 1])])
    (later,) = counting.asked([counting.read_for_answer(counting.pack(state))], [last + 1501])[0]
    assert runs(counting) == 3
    np.testing.assert_array_equal(later, counting.asked([state], [last + 1501])[0][0])


def test_kept_answer_is_found_by_the_head_of_a_record(counting: Generation) -> None:
    (state,) = counting.replay([random_events(13, np.random.default_rng(0))])
    record, last = counting.pack(state), state.last_time
    assert counting.asked_before(record, last + 1500) is None
    users, added = counting.asked([counting.read_for_answer(record)], [last + 1500])
    found = counting.asked_before(record, last + 1600)
    assert found is not None and added[0] is not None and found[1].added is not None
    assert (found[0].event_count, found[0].history_count) == (state.event_count, state.history_count)
    np.testing.assert_array_equal(found[1].embedding, users[0])
    np.testing.assert_array_equal(found[1].added.scores, added[0].scores)
    assert counting.asked_before(record, last + 3000) is None  # the next bucket
    assert counting.asked_before(record, None) is None
    counting.advance([state], [events_of([3], [last + 1])])
    assert counting.asked_before(counting.pack(state), last + 1500) is None
    damaged = bytes([*record[:40], record[40] ^ 1, *record[41:]])
    assert counting.asked_before(damaged, last + 1500) is None
    assert runs(counting) == 1


@given(st.integers(-(10**6), 2**40))
def test_one_moment_is_quantised_as_many_are(seconds: int) -> None:
    assert quantised_one(seconds) == quantised(np.array(seconds))


def test_kept_answers_and_new_ones_of_one_batch_stay_with_their_users(counting: Generation) -> None:
    histories, moments = histories_and_moments()
    states = counting.replay(histories)
    records = [counting.pack(state) for state in states]
    expected, added = counting.asked(states, moments.tolist())
    counting.asked([counting.read_for_answer(record) for record in records[::2]], moments[::2].tolist())
    users = [counting.read_for_answer(record) for record in records]
    found, again = counting.asked([*users, states[3]], [*moments.tolist(), int(moments[3])])
    np.testing.assert_allclose(found, [*expected, expected[3]], rtol=1e-5, atol=1e-6)
    for one, other in zip(again, [*added, added[3]], strict=True):
        assert one is not None and other is not None
        np.testing.assert_array_equal(one.items, other.items)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=1e-6)


def test_state_that_is_not_stored_is_read_anew(counting: Generation) -> None:
    (state,) = counting.replay([random_events(13, np.random.default_rng(0))])
    for expected in (1, 2):
        counting.asked([counting.unpack(counting.pack(state))], [state.last_time + 9])
        assert runs(counting) == expected


def test_oldest_answers_make_room() -> None:
    kept, answer = KeptAnswers(2), PersonalAnswer(np.zeros(1, np.float32), None)
    last = Last(state_shape(TIMED, "float16"), 7, True)
    kept.put(b"a", None, answer, last)
    kept.put(b"b", None, answer, last)
    assert kept.get(b"a", None) is answer
    kept.put(b"c", 3, answer, last)
    assert (kept.last(b"a"), kept.last(b"c")) == (None, last)
    assert (kept.get(b"b", None), kept.get(b"c", None), kept.get(b"c", 3)) == (None, None, answer)
    assert kept.get(b"a", None) is answer
