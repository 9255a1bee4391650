"""The loop of ingestion over both stores: each event once, whatever fails, comes twice or goes away meanwhile."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest
from conftest import new_store
from record_checks import HookedStore, check_records

from dman_runtime.data.ids import INTEGER
from dman_runtime.engine import Engine
from dman_runtime.errors import (
    InputError,
    SourceError,
    SourceUnavailableError,
    StoreDamagedError,
    StoreFullError,
    StoreUnavailableError,
)
from dman_runtime.ingest.base import Message, Rejected
from dman_runtime.ingest.events import EventReader, json_fields
from dman_runtime.ingest.options import IngestOptions
from dman_runtime.jobs import ingesting
from dman_runtime.jobs.ingesting import Ingester
from dman_runtime.metrics import IngestCounts
from dman_runtime.model.generation import Generation
from dman_runtime.store import checks

READER = EventReader(IngestOptions(), json_fields, user_ids=INTEGER, item_ids=INTEGER)
EVENTS = [(str(number % 5), str(1 + number % 60), 1_600_000_000 + number) for number in range(40)]


def event(number: int) -> bytes:
    user, item, time = EVENTS[number]
    return json.dumps({"user_id": user, "item_id": item, "timestamp": time}).encode()


class ListedSource:
    """A `Source` of two partitions, by turns; it ends with its messages. `hooks` run before the read of that number."""

    unit = "events"

    def __init__(self, values: Sequence[bytes], committed: Mapping[int, int] | None = None) -> None:
        self.committed = dict(committed or {})
        self.leaving: Callable[[Collection[int]], None] = lambda _partitions: None
        self.left = [
            Message(f"log/{number % 2}", number % 2, number // 2, number // 2 + 1, None, value)
            for number, value in enumerate(values)
            if number // 2 >= self.committed.get(number % 2, 0)
        ]
        self.hooks: dict[int, Callable[[], object]] = {}
        self.reads = self.waits = 0
        self.rejected: list[Rejected] = []
        self.fail_commit: SourceError | None = None

    def read(self, count: int, seconds: float) -> Sequence[Message]:
        self.reads += 1
        self.hooks.get(self.reads, lambda: None)()
        count = min(count, 4)
        found, self.left = self.left[:count], self.left[count:]
        return found

    def wait(self, seconds: float) -> None:
        self.waits += 1

    def reject(self, rejected: Sequence[Rejected]) -> None:
        self.rejected += rejected

    def commit(self, positions: Mapping[int, int]) -> None:
        if self.fail_commit is not None:
            raise self.fail_commit
        self.committed |= positions

    def place(self, message: Message) -> str:
        return f"partition {message.partition}, {message.sequence}"

    def lags(self) -> Mapping[str, int]:
        return {"0": len(self.left)}

    @property
    def ended(self) -> bool:
        return not self.left

    def close(self) -> None:
        pass


def ingest(engine: Engine, source: ListedSource, **options: Any) -> IngestCounts:
    return Ingester(engine, source, READER, **{"batch_events": 8, "batch_seconds": 60} | options).run()


def stored(engine: Engine) -> dict[str, list[tuple[str, int]]]:
    found = {}
    for user in engine.store.scan():
        numbers, times = engine.store.history(user)
        found[user] = list(zip(engine.store.item_ids(numbers), times.tolist(), strict=True))
    return found


def expected(events: Sequence[tuple[str, str, int]] = EVENTS) -> dict[str, list[tuple[str, int]]]:
    found = defaultdict(list)
    for user, item, time in events:
        found[user].append((item, time))
    return dict(found)


VALUES = [event(number) for number in range(len(EVENTS))]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingesting, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(ingesting, "LONGEST_PAUSE", 0.002)


def test_events_are_stored_and_positions_follow(engine: Engine) -> None:
    source = ListedSource(VALUES)
    counts = ingest(engine, source)
    assert (counts.events, counts.repeats, counts.rejected, counts.batches, counts.lag) == (40, 0, 0, 5, 0)
    assert source.committed == {0: 20, 1: 20}
    assert stored(engine) == expected()
    check_records(engine)


@pytest.mark.parametrize("committed", [{}, {0: 7, 1: 3}, {0: 20, 1: 20}])
@pytest.mark.parametrize("batch", [1, 7, 100])
def test_what_is_read_again_is_recognised_however_it_is_cut(
    engine: Engine, committed: dict[int, int], batch: int
) -> None:
    ingest(engine, ListedSource(VALUES[:25]))
    source = ListedSource(VALUES, committed)
    counts = ingest(engine, source, batch_events=batch)
    again = 25 - min(13, committed.get(0, 0)) - min(12, committed.get(1, 0))
    new = sum(number // 2 >= committed.get(number % 2, 0) for number in range(25, 40))
    assert (counts.events, counts.repeats) == (new, again)
    if committed.get(0) != 20:
        assert stored(engine) == expected()


def test_crash_between_state_and_position_loses_and_doubles_nothing(engine: Engine) -> None:
    source = ListedSource(VALUES)
    source.fail_commit = SourceError("died here")
    with pytest.raises(SourceError):
        ingest(engine, source)
    assert source.committed == {}
    counts = ingest(engine, ListedSource(VALUES, source.committed), batch_events=5)
    assert (counts.events, counts.repeats) == (32, 8) and stored(engine) == expected()
    check_records(engine)


def test_position_that_cannot_be_committed_now_is_with_the_next_batch(engine: Engine) -> None:
    source = ListedSource(VALUES)
    source.fail_commit = SourceUnavailableError("no broker")
    source.hooks[4] = lambda: setattr(source, "fail_commit", None)
    assert ingest(engine, source).events == 40 and source.committed == {0: 20, 1: 20}


@pytest.mark.parametrize("value", [b"no event", event(0).replace(b'"0"', b'"anna"'), b""])
def test_bad_event_ends_it_behind_everything_before(engine: Engine, value: bytes) -> None:
    source = ListedSource([*VALUES[:11], value, *VALUES[11:20]])
    with pytest.raises(InputError, match="partition 1, 5: ") as caught:
        ingest(engine, source)
    assert caught.value.parameter == "bad_events"
    assert stored(engine) == expected(EVENTS[:11]) and source.committed == {0: 6, 1: 5} and source.rejected == []
    with pytest.raises(InputError, match="partition 1, 5: "):  # until somebody helps
        ingest(engine, ListedSource([*VALUES[:11], value], source.committed))


def test_bad_events_go_to_the_source_with_their_reasons(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    source = ListedSource([b"no event", *VALUES[:9], b"{}", b"", *VALUES[9:]])
    counts = ingest(engine, source, stop_at_bad=False)
    assert (counts.events, counts.rejected) == (40, 3) and stored(engine) == expected()
    assert [one.message.sequence for one in source.rejected] == [0, 5, 5]
    assert "JSON" in source.rejected[0].reason and "partition 0, 0: " in caplog.text
    assert source.committed == {0: 22, 1: 21}


@pytest.mark.parametrize("stops", [True, False])
def test_user_with_too_many_producers_is_rejected_alone(
    engine: Engine, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(engine, ListedSource(VALUES[:10:2]))  # of users 0, 4 and 3 in partition 0, of 2 and 1 in partition 1
    monkeypatch.setattr(checks, "MAX_PRODUCERS", 1)
    before = stored(engine)
    source = ListedSource(VALUES, {0: 5, 1: 0})
    if stops:
        with pytest.raises(InputError, match=r"partition 1, 1: .* producers"):
            ingest(engine, source)
        assert source.committed == {0: 5, 1: 1}
    else:
        counts = ingest(engine, source, stop_at_bad=False)
        assert counts.rejected == len(source.rejected) > 0 and "producers" in source.rejected[0].reason
        assert source.committed == {0: 20, 1: 20}
        assert counts.events + counts.repeats + counts.rejected == 35
    assert all(stored(engine)[user][: len(events)] == events for user, events in before.items())


@pytest.mark.parametrize("error", [StoreFullError("full"), StoreUnavailableError("gone for now")])
def test_store_that_fails_for_now_is_waited_for(exact: Generation, error: Exception) -> None:
    def fail(commit: int) -> None:
        if commit in (2, 3, 5):
            raise error

    with new_store("memory") as store:
        engine = Engine(exact, HookedStore(store, fail))  # type: ignore[arg-type]
        source = ListedSource(VALUES)
        counts = ingest(engine, source)
        assert (counts.events, counts.retries) == (40, 3) and source.waits >= 3
        assert stored(engine) == expected() and source.committed == {0: 20, 1: 20}


def test_stop_asked_for_while_the_store_fails_ends_it_with_the_cause(exact: Generation) -> None:
    def fail(_commit: int) -> None:
        raise StoreFullError("no room")

    with new_store("memory") as store:
        engine = Engine(exact, HookedStore(store, fail))  # type: ignore[arg-type]
        source = ListedSource(VALUES)
        with pytest.raises(StoreFullError):
            ingest(engine, source, stopped=lambda: source.waits > 2)
        assert source.committed == {}


def test_store_that_is_damaged_ends_it(exact: Generation) -> None:
    def fail(_commit: int) -> None:
        raise StoreDamagedError("bytes")

    with new_store("memory") as store, pytest.raises(StoreDamagedError):
        ingest(Engine(exact, HookedStore(store, fail)), ListedSource(VALUES))  # type: ignore[arg-type]


def test_stop_settles_what_is_in_hand(engine: Engine) -> None:
    source = ListedSource(VALUES)
    counts = ingest(engine, source, batch_events=100, stopped=lambda: source.reads >= 3)
    assert counts.events == 12 and source.committed == {0: 6, 1: 6} and stored(engine) == expected(EVENTS[:12])


def test_partitions_that_go_away_are_settled_first(engine: Engine) -> None:
    source = ListedSource(VALUES)
    seen: list[dict[int, int]] = []

    def leave() -> None:
        source.leaving({1})
        seen.append(dict(source.committed))

    source.hooks[3] = leave
    assert ingest(engine, source, batch_events=100).events == 40
    assert seen == [{0: 4, 1: 4}] and stored(engine) == expected()


def test_partitions_that_go_away_while_the_store_fails_are_left_to_their_next_reader(exact: Generation) -> None:
    def fail(commit: int) -> None:
        if commit in failing:
            raise StoreFullError("no room")

    failing = {1}
    with new_store("memory") as store:
        engine = Engine(exact, HookedStore(store, fail))  # type: ignore[arg-type]
        source = ListedSource(VALUES[:16])
        source.hooks[3] = lambda: source.leaving({1})  # the first commit, which fails
        source.hooks[4] = lambda: setattr(source, "left", [one for one in source.left if one.partition == 0])
        counts = ingest(engine, source, batch_events=100)
        assert 1 not in source.committed or source.committed[1] > 4
        assert counts.events == sum(map(len, stored(engine).values()))
        own = [number for number in range(16) if number % 2 == 0 or 8 <= number < 12]
        assert stored(engine) == expected([EVENTS[number] for number in own])


def test_partitions_that_go_away_while_a_batch_is_tried_again_are_let_go(exact: Generation) -> None:
    def fail(commit: int) -> None:
        if commit == 1:
            raise StoreFullError("no room")

    with new_store("memory") as store:
        engine = Engine(exact, HookedStore(store, fail))  # type: ignore[arg-type]
        source = ListedSource(VALUES[:8])
        waited = source.wait
        source.wait = lambda seconds: (waited(seconds), source.leaving({1}))[0]  # type: ignore[method-assign]
        counts = ingest(engine, source)
        assert counts.events == 4 and source.committed == {0: 4}
        assert stored(engine) == expected(EVENTS[0:8:2])


def test_bad_event_met_when_partitions_go_away_ends_it_then(engine: Engine) -> None:
    source = ListedSource([*VALUES[:6], b"no event", *VALUES[6:]])
    source.hooks[3] = lambda: source.leaving({0})
    with pytest.raises(InputError, match="partition 0, 3"):
        ingest(engine, source, batch_events=100)
    assert stored(engine) == expected(EVENTS[:6])


def test_late_events_that_are_dropped_are_counted(exact: Generation) -> None:
    with new_store("memory") as store:
        counts = ingest(Engine(exact, store, late_events="drop"), ListedSource([*VALUES[5:10], *VALUES[:10]]))
        assert (counts.events, counts.dropped_late) == (10, 5)
        assert "5 dropped as late" in counts.summary()


def test_progress_and_another_bundle_of_servers_are_logged(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingesting, "REPORT_SECONDS", 0.0)
    rollout = engine.store.rollout()
    own = engine.projection.bundle.bundle_id
    set_now = rollout._replace(revision=rollout.revision + 1, active="other", bundles={"other": "", own: ""})
    assert engine.store.set_rollout(set_now)
    with caplog.at_level(logging.INFO):
        ingest(engine, ListedSource(VALUES))
    assert "8 events stored" in caplog.text and "events/s, lag 32 events" in caplog.text
    assert caplog.text.count("servers answer with bundle other") == 1
