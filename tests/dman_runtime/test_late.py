"""Late events: by every policy the history is the one that was promised, and the state is that of a history.

With `place`, any order of arrival within the open segment gives the state of the sorted history, and any order at all
gives the sorted history, whose state is there after a rebuild.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import STORES, TIMED, TINY, TINY_ITEMS, assert_close, new_store, random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from record_checks import HookedStore
from torch_graphs import generation_of

from dman_runtime.batcher import Batcher
from dman_runtime.engine import Engine
from dman_runtime.jobs.generations import list_generations
from dman_runtime.jobs.rebuilding import rebuild
from dman_runtime.merging import BEFORE_ALL
from dman_runtime.metrics import Metrics
from dman_runtime.model.events import KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.model.state import State
from dman_runtime.requests import NOT_LATE, LateOutcome, Query, Update, UpdateOutcome
from dman_runtime.store.base import Events, StateStore, Write

T = 5  # the segment length of the models
EXACT, ROUNDED = 1e-4, 5e-2  # relative, in root mean square: arithmetic in another order; closed segments in steps
MODELS = {
    "plain": TINY,
    "times and returns": TIMED,
    "times": replace(TIMED, returns="off", time="events"),
    "returns": replace(TIMED, time="none"),
    "rounded": replace(TIMED, layers=3, closed_states="int8"),
    "rounded, closed early": replace(TINY, closed_states="int8"),
    "nran": replace(TINY, variant="nran"),
    "nran, times and returns": replace(TIMED, variant="nran"),
}


class Event(NamedTuple):
    item: int
    time: int  # 0: unknown


@pytest.fixture(scope="module")
def generations() -> Callable[[str], Generation]:
    made: dict[str, Generation] = {}

    def get(name: str) -> Generation:
        if name not in made:
            made[name] = generation_of(random_model(MODELS[name], TINY_ITEMS))
        return made[name]

    return get


def send(engine: Engine, *events: Event, user: str = "u", **options: Any) -> UpdateOutcome:
    items = [str(event.item) for event in events]
    return engine.update([Update(user, items, [event.time for event in events], **options)])[0]


def history(engine: Engine, user: str = "u") -> list[Event]:
    numbers, times = engine.store.history(user)
    return [Event(int(item), time) for item, time in zip(engine.store.item_ids(numbers), times.tolist(), strict=True)]


def known(engine: Engine, events: Sequence[Event]) -> KnownEvents:
    index = engine.projection.bundle.items.index
    chosen = [event for event in events if str(event.item) in index]
    items = [index[str(event.item)] for event in chosen]
    return KnownEvents(np.array(items, np.int64), np.array([event.time for event in chosen], np.int64))


def state_of(engine: Engine, user: str = "u") -> State:
    (stored,) = engine.store.get_many([user], engine.projection.number)
    assert stored is not None and stored.record is not None
    state = engine.projection.generation.unpack(stored.record)
    assert state.history_count == stored.head.history_count
    return state


def check_state(engine: Engine, seen: Sequence[Event], user: str = "u") -> None:
    """The record is what a replay of some events gives, to the last value that an answer or an update reads."""
    found, generation = state_of(engine, user), engine.projection.generation
    (expected,) = generation.replay([known(engine, seen)])
    tolerance = ROUNDED if found.shape.closed == "int8" else EXACT
    count = expected.context_length
    assert found.event_count == expected.event_count
    for name in ("recent", "times", "gaps"):
        if name == "recent" or found.shape.sees_times:
            assert getattr(found, name)[:count].tolist() == getattr(expected, name)[:count].tolist()
    if found.shape.sees_times:
        assert (found.last_time, found.last_is_known) == (expected.last_time, expected.last_is_known)
    assert_close(found.hidden[:, :count], expected.hidden[:, :count], tolerance)
    assert_close(found.memory, expected.memory, tolerance)
    assert_close(found.user_embedding, expected.user_embedding, tolerance)
    assert found.sketch.items.tolist() == expected.sketch.items.tolist()
    for one, other in zip(found.sketch[1:], expected.sketch[1:], strict=True):
        assert_close(one, other, EXACT)


def by_time(events: Sequence[Event]) -> list[Event]:
    """In order; those of one time as they came."""
    return sorted(events, key=lambda event: event.time)


# -- place: the invariants ---------------------------------------------------------------------------------------------

times = st.integers(1000, 1040)  # few, so that some are equal
items = st.integers(1, TINY_ITEMS + 5)  # the last five are unknown


@st.composite
def segments(draw: st.DrawFn) -> list[list[Event]]:
    """Events by segment, each in some order of arrival; no time of a segment is before those of the one before."""
    found, length = [], draw(st.integers(1, 22))
    moments = sorted(draw(st.lists(times, min_size=length, max_size=length)))
    for start in range(0, length, T):
        chosen = [Event(draw(st.integers(1, TINY_ITEMS)), time) for time in moments[start : start + T]]
        found.append(draw(st.permutations(chosen)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=25)
@given(arriving=segments(), cuts=st.sets(st.integers(0, 22)), data=st.data())
def test_any_order_within_the_open_segment_gives_the_state_of_the_sorted_history(
    generations: Callable[[str], Generation],
    name: str,
    arriving: list[list[Event]],
    cuts: set[int],
    data: st.DataObject,
) -> None:
    """However the events are split into updates and calls."""
    flat = [event for segment in arriving for event in segment]
    with new_store("memory") as store:
        engine = Engine(generations(name), store, late_events="place")
        updates, begin = list[list[Event]](), 0
        for end in [*sorted(cut for cut in cuts if cut < len(flat)), len(flat)]:
            updates.append(flat[begin:end])
            begin = end
        while updates:
            together = [updates.pop(0) for _ in range(min(len(updates), data.draw(st.integers(1, 3))))]
            outcomes = engine.update(
                [Update("u", [str(one.item) for one in part], [one.time for one in part]) for part in together]
            )
            assert all(outcome.late.deferred == outcome.late.dropped == 0 for outcome in outcomes)
        assert history(engine) == by_time(flat)
        check_state(engine, by_time(flat))
        assert state_of(engine).lacking == 0


class Reference:
    """Events that come one by one, each in a call of its own, as simply as it can be said."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._late = engine, engine.projection.bundle.manifest.state.answers_read_states
        self.events: list[Event] = []
        self.seen: list[bool] = []  # by the model

    def arrive(self, event: Event) -> LateOutcome:
        effective, last = list[int](), int(BEFORE_ALL)
        for one in self.events:
            last = one.time or last
            effective.append(last)
        late = bool(event.time and self.events and event.time < effective[-1])
        place = len(self.events)
        if late:
            place = max((row + 1 for row, time in enumerate(effective) if time <= event.time), default=0)
        knows = str(event.item) in self._engine.projection.bundle.items.index
        closed = max(0, sum(self.seen) - self._late) // T * T
        deferred = late and knows and sum(self.seen[:place]) < closed
        self.events.insert(place, event)
        self.seen.insert(place, knows and not deferred)
        return LateOutcome(0, int(late), int(deferred))

    @property
    def seen_events(self) -> list[Event]:
        return [event for event, seen in zip(self.events, self.seen, strict=True) if seen]


arriving = st.lists(st.builds(Event, items, st.one_of(st.just(0), times, times, times)), min_size=1, max_size=24)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "times and returns", "nran, times and returns"])
@pytest.mark.parametrize("kind", STORES)
@settings(deadline=None, max_examples=20)
@given(arriving=arriving)
@example(arriving=[Event(n, 1020) for n in range(1, 18)] + [Event(20, 1010), Event(21, 1020), Event(22, 1015)])
@example(arriving=[Event(n, 1000 + n) for n in range(1, 14)] + [Event(60, 1001), Event(61, 1002), Event(3, 1012)])
def test_any_order_at_all_gives_the_sorted_history_and_its_state_after_a_rebuild(
    generations: Callable[[str], Generation], name: str, kind: str, arriving: list[Event]
) -> None:
    """Before that, the record is the state of what it has seen, and says how much it lacks."""
    with new_store(kind) as store:
        engine = Engine(generations(name), store, late_events="place")
        reference, anew = Reference(engine), name.startswith("nran, times")
        for event in arriving:
            outcome, expected = send(engine, event), reference.arrive(event)
            if not anew:  # that record is made anew from all events
                assert outcome.late == expected
                assert outcome.applied == (str(event.item) in engine.projection.bundle.items.index) - expected.deferred
                assert outcome.event_count == sum(reference.seen)
            assert outcome.history_count == len(reference.events)
        assert history(engine) == reference.events
        if all(event.time for event in arriving):
            assert reference.events == by_time(arriving)
        complete, lacking = known(engine, reference.events), state_of(engine).lacking
        assert state_of(engine).event_count + lacking == len(complete)
        if not anew:
            check_state(engine, reference.seen_events)
        info = engine.user("u")
        assert info is not None and (info.deferred_events, info.event_count) == (lacking, len(complete) - lacking)
        assert rebuild(engine).rebuilt == (lacking > 0)
        check_state(engine, reference.events)
        assert state_of(engine).lacking == 0


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(arriving=arriving, cuts=st.sets(st.integers(0, 24)), policy=st.sampled_from(["drop", "place"]))
def test_history_does_not_depend_on_how_events_are_split_into_updates(
    generations: Callable[[str], Generation], arriving: list[Event], cuts: set[int], policy: Any
) -> None:
    with new_store("memory") as store:
        engine = Engine(generations("plain"), store, late_events=policy)
        begin, late = 0, LateOutcome()
        for end in [*sorted(cut for cut in cuts if cut < len(arriving)), len(arriving)]:
            send(engine, *arriving[begin:end], user="split")
            begin = end
        for event in arriving:
            one = send(engine, event, user="one by one").late
            late = LateOutcome(late.dropped + one.dropped, late.placed + one.placed, 0)
        assert history(engine, "split") == history(engine, "one by one")
        assert len(history(engine, "split")) == len(arriving) - late.dropped


# -- place: one case each ----------------------------------------------------------------------------------------------


@pytest.fixture
def engine(exact: Generation, store: StateStore) -> Engine:
    return Engine(exact, store, late_events="place")


def in_order(count: int, first: int = 0) -> list[Event]:
    return [Event(number % TINY_ITEMS + 1, 1000 + 10 * number) for number in range(first, first + count)]


def test_event_of_the_open_segment_takes_effect_at_once(engine: Engine) -> None:
    send(engine, *in_order(13))
    outcome = send(engine, Event(50, 1105), Event(51, 1104))
    assert (outcome.late, outcome.applied, outcome.event_count, outcome.history_count) == (
        LateOutcome(0, 2, 0), 2, 15, 15,
    )  # fmt: skip
    assert history(engine) == by_time([*in_order(13), Event(51, 1104), Event(50, 1105)])
    check_state(engine, history(engine))


def test_event_of_a_closed_segment_is_deferred_to_the_next_rebuild(engine: Engine) -> None:
    send(engine, *in_order(13))
    before = engine.recommend([Query("u")])[0]
    outcome = send(engine, Event(50, 1001), Event(99, 1002), Event(51, 1125))
    assert (outcome.late, outcome.applied, outcome.unknown_item_ids) == (LateOutcome(0, 2, 1), 1, ["99"])
    assert (outcome.event_count, outcome.history_count) == (14, 16)
    check_state(engine, [*in_order(13), Event(51, 1125)])
    assert state_of(engine).lacking == 1
    (found,) = list_generations(engine.store).generations
    assert (found.records, found.current) == (1, 0)
    again = engine.recommend([Query("u")])[0]
    assert again.event_count == 14 and before.event_count == 13  # nothing is caught up, or made anew, by a touch
    send(engine, Event(52, 1200))
    assert state_of(engine).lacking == 1
    assert rebuild(engine).rebuilt == 1 and rebuild(engine).rebuilt == 0
    check_state(engine, history(engine))
    assert list_generations(engine.store).generations[0].current == 1
    assert engine.recommend([Query("u")])[0].event_count == 16


def test_items_of_events_in_any_place_are_seen(engine: Engine) -> None:
    send(engine, *in_order(40))
    send(engine, Event(55, 1001), Event(56, 1391))
    best = engine.recommend([Query("u", k=TINY_ITEMS)])[0].item_indices.tolist()
    assert sorted(best) == [item for item in range(40, TINY_ITEMS) if item not in (54, 55)]


def test_late_event_in_a_long_history_reads_and_writes_its_end_only(
    exact: Generation, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(exact, store, late_events="place")
    send(engine, *in_order(1000))
    reads, writes = list[int](), list[Write]()
    reading, writing = store.history, store.commit

    def read(user_id: str, start: int, stop: int) -> Events:
        reads.append(stop - start)
        return reading(user_id, start, stop)

    def write(changed: Sequence[Write]) -> list[str]:
        writes.extend(changed)
        return writing(changed)

    monkeypatch.setattr(store, "history", read)
    monkeypatch.setattr(store, "commit", write)
    send(engine, Event(50, 10_985))
    assert sum(reads) < 100 and [(one.replace_from, len(one.items)) for one in writes] == [(999, 2)]
    send(engine, Event(50, 9_005))
    assert sum(reads) < 600 and [(one.replace_from, len(one.items)) for one in writes[1:]] == [(801, 201)]


def test_records_of_other_bundles_are_made_anew_from_the_new_history(
    engine: Engine, exact: Generation, renamed: Generation
) -> None:
    other = Engine(renamed, engine.store, late_events="place")
    send(engine, *in_order(33))
    other.update([Update("u", [])])
    send(engine, Event(60, 1005), Event(70, 1006))
    (stored,) = engine.store.get_many(["u"], other.projection.number)
    assert stored is not None and stored.record is None
    assert other.recommend([Query("u")])[0].event_count == len(known(other, history(engine)))
    other.update([Update("u", [])])
    check_state(other, history(engine))
    assert state_of(other).lacking == 0 and state_of(engine).lacking == 1


def test_record_that_lags_is_caught_up_by_the_events_in_their_places(
    engine: Engine, exact: Generation, renamed: Generation
) -> None:
    send(engine, *in_order(8))
    Engine(renamed, engine.store).update([Update("u", [str(n) for n in range(30, 43)], [1080 + n for n in range(13)])])
    assert state_of_covered(engine) == 8
    outcome = send(engine, Event(50, 1081), Event(51, 1075))
    assert outcome.late == LateOutcome(0, 2, 0)
    check_state(engine, history(engine))


def state_of_covered(engine: Engine) -> int:
    (stored,) = engine.store.get_many(["u"], engine.projection.number)
    assert stored is not None
    return engine.projection.generation.unpack(stored.record).history_count


def test_workers_that_place_events_of_one_user_at_once_lose_none(exact: Generation) -> None:
    events, barrier = in_order(30), threading.Barrier(3)
    with new_store("lmdb") as store:
        engines = [Engine(exact, store, late_events="place") for _ in range(3)]

        def worker(number: int) -> None:
            barrier.wait()
            for event in events[number::3]:
                send(engines[number], event)

        threads = [threading.Thread(target=worker, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert history(engines[0]) == events
        rebuild(engines[0])
        check_state(engines[0], events)


@pytest.mark.parametrize("change", ["deleted", "replaced", "grown"])
def test_history_that_changes_while_an_event_is_placed_is_read_again(engine: Engine, change: str) -> None:
    send(engine, *in_order(40))

    def interfere(commits: int) -> None:
        if commits > 1:
            return
        if change != "grown":
            engine.delete("u")
        if change != "deleted":
            Engine(engine.projection.generation, engine.store).update([Update("u", ["7"], [1234])])

    busy = Engine(engine.projection.generation, HookedStore(engine.store, interfere), late_events="place")  # type: ignore[arg-type]
    send(busy, Event(50, 1385))
    found = {"deleted": [], "replaced": [Event(7, 1234)], "grown": [*in_order(40), Event(7, 1234)]}[change]
    expected = Reference(engine)
    for event in found:
        expected.events.append(event)
        expected.seen.append(True)
    expected.arrive(Event(50, 1385))
    assert history(engine) == expected.events


def test_history_that_is_gone_while_an_event_is_placed_ends_in_no_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(engine, *in_order(40))
    reading, calls = engine.store.history, []

    def read(*positions: Any) -> Any:
        if not calls:
            engine.delete("u")
        calls.append(positions)
        return reading(*positions)

    monkeypatch.setattr(engine.store, "history", read)
    assert send(engine, Event(50, 1005)).history_count == 1
    monkeypatch.undo()
    assert history(engine) == [Event(50, 1005)]


def test_rebuild_of_a_record_that_lacks_events_goes_on_while_more_come(engine: Engine) -> None:
    send(engine, *in_order(33))
    send(engine, Event(50, 1005))

    def interfere(commits: int) -> None:
        if commits == 1:
            send(engine, Event(51, 1400))
        if commits == 2:
            send(engine, Event(52, 1006))

    store = HookedStore(engine.store, interfere)
    result = rebuild(Engine(engine.projection.generation, store))  # type: ignore[arg-type]
    assert result.users == 1 and store.commits == 3
    check_state(engine, history(engine))
    assert state_of(engine).lacking == 0 and len(history(engine)) == 36


# -- drop, arrival -----------------------------------------------------------------------------------------------------


def test_dropped_events_are_counted_and_not_stored(exact: Generation, store: StateStore) -> None:
    engine = Engine(exact, store, late_events="drop")
    outcome = send(engine, *in_order(3), Event(50, 1015), Event(99, 1001), Event(51, 0), Event(52, 1020))
    assert (outcome.late, outcome.applied, outcome.history_count) == (LateOutcome(2, 0, 0), 5, 5)
    assert outcome.unknown_item_ids == [] and engine.store.find_items(["99"]).tolist() == [-1]
    assert history(engine) == [*in_order(3), Event(51, 0), Event(52, 1020)]
    check_state(engine, history(engine))


def test_update_whose_events_are_all_dropped_is_remembered(exact: Generation, store: StateStore) -> None:
    engine = Engine(exact, store, late_events="drop")
    send(engine, *in_order(3))
    for options in ({"request_id": "r"}, {"producer": "p", "sequence": 4}):
        first, again = (send(engine, Event(50, 1), **options) for _ in range(2))
        assert (first.late, first.duplicate) == (LateOutcome(1, 0, 0), False)
        assert (again.late, again.duplicate) == (NOT_LATE, True)
    engine.delete("u")  # what was dropped brings nobody back
    assert send(engine, Event(50, 1), producer="p", sequence=4).duplicate
    assert list(store.scan()) == []


@pytest.mark.parametrize("policy", ["arrival", "drop", "place"])
def test_event_without_a_time_is_never_late_and_a_history_without_times_has_no_end(
    exact: Generation, store: StateStore, policy: Any
) -> None:
    engine = Engine(exact, store, late_events=policy)
    untimed = [Event(number % TINY_ITEMS + 1, 0) for number in range(70)]
    send(engine, *untimed)
    assert send(engine, Event(1, 5)).late == NOT_LATE
    send(engine, *untimed)
    assert history(engine) == [*untimed, Event(1, 5), *untimed]
    if policy == "place":
        assert send(engine, Event(2, 4)).late.placed == 1
        assert history(engine) == [*untimed, Event(2, 4), Event(1, 5), *untimed]


def test_arrival_keeps_the_order_of_arrival_and_reports_nothing(exact: Generation, store: StateStore) -> None:
    engine, events = Engine(exact, store), [Event(1, 50), Event(2, 40), Event(3, 60), Event(4, 40)]
    assert all(send(engine, event).late == NOT_LATE for event in events)
    assert history(engine) == events


def test_history_out_of_order_stays_so_and_new_events_go_behind_the_last_that_is_not_later(
    exact: Generation, store: StateStore
) -> None:
    before = [Event(1, 50), Event(2, 20), Event(3, 60), Event(4, 30)]
    for event in before:
        send(Engine(exact, store), event)
    engine = Engine(exact, store, late_events="place")
    send(engine, Event(5, 25))
    send(engine, Event(6, 55))
    assert history(engine) == [before[0], before[1], Event(5, 25), *before[2:], Event(6, 55)]


def test_metrics_count_late_events_by_what_became_of_them(exact: Generation) -> None:
    counted = []

    class Counting(Metrics):
        def late(self, dropped: int, placed: int, deferred: int) -> None:
            counted.append((dropped, placed, deferred))

    for policy in ("arrival", "drop", "place"):
        with new_store("memory") as store:
            batcher = Batcher(Engine(exact, store, late_events=policy), metrics=Counting())  # type: ignore[arg-type]
            for events in (in_order(13), [Event(50, 1001), Event(51, 1115)], in_order(2, 20)):
                batcher.update([Update("u", [str(one.item) for one in events], [one.time for one in events])])
            batcher.close()
    assert counted == [(2, 0, 0), (0, 2, 1)]
