"""Imports over the real graphs and both stores: every event once, whatever interrupts or cuts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import assert_close, new_store
from histories import ONLY_UNKNOWN, UNKNOWN_ITEM, Histories, make_histories, write_csv
from log_files import import_log
from record_checks import EXACT, HookedStore, check_records

from dman_runtime.data.ids import INTEGER, TEXT
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import LogOptions
from dman_runtime.engine import Engine
from dman_runtime.errors import ConflictError, InputError
from dman_runtime.jobs import partitions
from dman_runtime.jobs.importing import ImportResult, import_histories
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query, Update
from dman_runtime.store.base import UNKNOWN, IdTypes, StateStore


def stored_histories(store: StateStore) -> Histories:
    """All events of all users; every id of these tests is an integer."""
    found = {}
    for user_id in store.scan():
        numbers, times = store.history(user_id)
        found[int(user_id)] = list(zip(map(int, store.item_ids(numbers)), times.tolist(), strict=True))
    return found


def time_of(event: tuple[int, int]) -> int:
    return event[1]


def test_import_stores_every_event_those_of_unknown_items_too(
    engine: Engine, log: Path, mixed_histories: Histories
) -> None:
    events = sum(map(len, mixed_histories.values()))
    unknown = len(mixed_histories) - 1 + 2
    assert import_log(log, engine) == ImportResult(25, 25, events, 0, 0, unknown)
    assert stored_histories(engine.store) == mixed_histories
    check_records(engine)
    assert engine.recommend([Query(str(ONLY_UNKNOWN))])[0].popular


def test_import_repeated_doubles_nothing(engine: Engine, log: Path, mixed_histories: Histories) -> None:
    import_log(log, engine)
    before = engine.store.get_many(list(engine.store.scan()), engine.projection.number)
    events = sum(map(len, mixed_histories.values()))
    assert import_log(log, engine) == ImportResult(25, 0, 0, events, 0, 0)
    assert engine.store.get_many(list(engine.store.scan()), engine.projection.number) == before
    assert stored_histories(engine.store) == mixed_histories


def test_import_into_a_store_that_has_some_of_the_users(
    engine: Engine, log: Path, mixed_histories: Histories, tmp_path: Path
) -> None:
    import_log(log, engine)
    more = {1: [(3, 90_000), (UNKNOWN_ITEM + 2, 90_001)], 200: [(5, 1), (6, 2), (7, 3)]}
    result = import_log(write_csv(tmp_path / "more.csv", more), engine)
    assert result == ImportResult(2, 1, 5, 0, 0, 1)
    assert stored_histories(engine.store) == {**mixed_histories, 1: mixed_histories[1] + more[1], 200: more[200]}
    check_records(engine)


def test_import_interrupted_and_repeated_equals_one_import(
    engine: Engine, log: Path, mixed_histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", 3)

    def interrupt(commit: int) -> None:
        if commit == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_log(log, Engine(engine.projection.generation, HookedStore(engine.store, interrupt)))  # type: ignore[arg-type]
    assert len(list(engine.store.scan())) == 9
    result = import_log(log, engine)
    assert (result.users, result.new_users) == (25, 16)
    assert result.events + result.recognised_events == sum(map(len, mixed_histories.values()))
    assert stored_histories(engine.store) == mixed_histories
    check_records(engine)


@pytest.mark.slow
def test_import_in_small_partitions_stores_the_same(
    engine: Engine, log: Path, mixed_histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "EVENTS_PER_PARTITION", 50)
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", 3)
    for new_users in (25, 0):
        result = import_log(log, engine)
        assert (result.users, result.new_users) == (25, new_users)
        assert result.events + result.recognised_events == sum(map(len, mixed_histories.values()))
    assert stored_histories(engine.store) == mixed_histories
    check_records(engine)


def test_import_keeps_what_a_server_adds_meanwhile(engine: Engine, log: Path, mixed_histories: Histories) -> None:
    def add(commit: int) -> None:
        if commit == 1:
            engine.update([Update("1", ["7"], timestamps=[1])])

    import_log(log, Engine(engine.projection.generation, HookedStore(engine.store, add)))  # type: ignore[arg-type]
    assert stored_histories(engine.store) == {**mixed_histories, 1: [(7, 1), *mixed_histories[1]]}
    check_records(engine)


@pytest.mark.slow
def test_import_gives_up_where_a_server_never_stops(engine: Engine, log: Path) -> None:
    store = HookedStore(engine.store, lambda commit: None)
    store.commit = lambda writes: [write.user_id for write in writes]  # type: ignore[method-assign]
    with pytest.raises(ConflictError, match="a server keeps updating users"):
        import_log(log, Engine(engine.projection.generation, store))  # type: ignore[arg-type]


@pytest.mark.slow
def test_import_for_another_bundle_adds_to_histories_that_are_there(
    engine: Engine, renamed: Generation, log: Path, mixed_histories: Histories, tmp_path: Path
) -> None:
    import_log(log, engine)
    newer = Engine(renamed, engine.store)
    more = make_histories(24, seed=6)
    result = import_log(write_csv(tmp_path / "more.csv", more), newer)
    new = {user: [event for event in events if event not in mixed_histories[user]] for user, events in more.items()}
    expected = {user: sorted(events + new.get(user, []), key=time_of) for user, events in mixed_histories.items()}
    assert result.rebuilt_users == 24  # the times of both go over the same range
    assert stored_histories(engine.store) == expected
    newer.update([Update(str(ONLY_UNKNOWN), [])])  # not in the file: its record is made when it is asked for
    check_records(newer)
    engine.update([Update(str(user), []) for user in expected])  # the records of the earlier bundle were dropped
    check_records(engine)


def test_import_of_a_log_with_a_bad_row_stores_no_part_of_its_partition(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("user_id,item_id,timestamp\n1,1,1\n2,2,never\n")
    with pytest.raises(InputError, match="never"):
        import_log(tmp_path / "bad.csv", engine)
    assert list(engine.store.scan()) == []


# -- what it merges ----------------------------------------------------------------------------------------------------


def merged_log(*parts: Histories) -> Histories:
    """The events of several logs as one: by time, and each that they share once."""
    users = dict.fromkeys(user for part in parts for user in part)
    return {
        user: sorted(dict.fromkeys(event for part in parts for event in part.get(user, [])), key=time_of)
        for user in users
    }


def check_equals_one_import(engine: Engine, expected: Histories, path: Path) -> None:
    """The store holds what one import of the log with these histories gives; so do the states."""
    assert stored_histories(engine.store) == expected
    check_records(engine)
    with new_store("memory") as store:
        once = Engine(engine.projection.generation, store)
        import_log(write_csv(path, expected), once)
        assert stored_histories(store) == expected
        for user_id in store.scan():
            (one,), (other,) = (each.open_users([user_id]) for each in (engine, once))
            assert one.state.event_count == other.state.event_count
            assert_close(one.state.memory, other.state.memory, EXACT)
            assert_close(one.state.user_embedding, other.state.user_embedding, EXACT)


def live_update(engine: Engine, user: int, events: list[tuple[int, int]], request_id: str = "") -> None:
    update = Update(str(user), [str(item) for item, _ in events], [time for _, time in events], request_id)
    engine.update([update])


def test_backfill_after_live_events_equals_one_import_of_all(
    engine: Engine, histories: Histories, mixed_histories: Histories, tmp_path: Path
) -> None:
    live = {user: events[len(events) // 2 :] for user, events in histories.items()}
    for user, events in live.items():
        live_update(engine, user, events)
    log = write_csv(tmp_path / "log.csv", mixed_histories)  # holds the live events too
    live_events = sum(map(len, live.values()))
    result = import_log(log, engine)
    assert (result.new_users, result.rebuilt_users, result.recognised_events) == (1, 24, live_events)
    check_equals_one_import(engine, mixed_histories, tmp_path / "all.csv")
    assert import_log(log, engine).events == 0


def test_imports_of_parts_in_any_order_with_live_events_between_equal_one_import(
    engine: Engine, mixed_histories: Histories, tmp_path: Path
) -> None:
    early, middle, late = (
        {user: events[number::3] for user, events in mixed_histories.items() if events[number::3]}
        for number in range(3)
    )
    import_log(write_csv(tmp_path / "middle.csv", middle), engine)
    for user, events in late.items():
        live_update(engine, user, events, request_id=f"live-{user}")
    import_log(write_csv(tmp_path / "early.csv", early), engine)
    import_log(write_csv(tmp_path / "again.csv", merged_log(early, middle)), engine)
    check_equals_one_import(engine, merged_log(early, middle, late), tmp_path / "all.csv")
    for user, events in late.items():  # the retry of an update that was answered before the import
        live_update(engine, user, events, request_id=f"live-{user}")
    assert stored_histories(engine.store) == merged_log(early, middle, late)


def test_user_without_new_events_is_not_written(engine: Engine, tmp_path: Path) -> None:
    import_log(write_csv(tmp_path / "first.csv", {1: [(3, 10), (4, 11)], 2: [(5, 10)]}), engine)
    before = engine.store.get_many(["1", "2"], engine.projection.number)
    result = import_log(write_csv(tmp_path / "second.csv", {1: [(3, 10)], 2: [(5, 10), (6, 9)]}), engine)
    assert result == ImportResult(2, 0, 1, 2, 1, 0)
    after = engine.store.get_many(["1", "2"], engine.projection.number)
    assert after[0] == before[0] and after[1] != before[1]


def test_events_that_are_really_equal_are_counted(engine: Engine, tmp_path: Path) -> None:
    keep = LogOptions(exact_repeats="keep")
    live_update(engine, 1, [(3, 10)])
    three = write_csv(tmp_path / "three.csv", {1: [(3, 10)] * 3})
    assert import_log(three, engine, keep) == ImportResult(1, 0, 2, 1, 0, 0)
    assert import_log(three, engine, keep).events == 0
    assert stored_histories(engine.store) == {1: [(3, 10)] * 3}


def test_log_without_times_adds_what_is_new_to_the_end(engine: Engine, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id\n1,3\n1,4\n1,3\n")
    import_log(log, engine)
    live_update(engine, 1, [(9, 50)])
    log.write_text("user_id,item_id\n1,3\n1,4\n1,3\n1,3\n1,5\n")
    assert import_log(log, engine) == ImportResult(1, 0, 2, 3, 0, 0)
    assert stored_histories(engine.store) == {1: [(3, 0), (4, 0), (3, 0), (9, 50), (3, 0), (5, 0)]}
    check_records(engine)


def log_by_position(histories: Histories) -> Any:
    """A log whose events are in the order of their positions, whatever their times."""
    item_ids = sorted({str(item) for events in histories.values() for item, _ in events})
    every = [event for events in histories.values() for event in events]
    offsets = np.cumsum([0, *map(len, histories.values())])
    items = np.array([item_ids.index(str(item)) for item, _ in every], np.int32)
    times = np.array([time for _, time in every], np.int64)
    log = Interactions([str(user) for user in histories], item_ids, offsets, items, times, True, True)
    return SimpleNamespace(options=LogOptions(order_by="position"), parts=lambda: iter([log]))


def test_log_that_its_positions_order_keeps_that_order(engine: Engine) -> None:
    import_histories(log_by_position({1: [(3, 9), (4, 8), (5, 7)]}), engine)
    assert stored_histories(engine.store) == {1: [(3, 9), (4, 8), (5, 7)]}
    assert import_histories(log_by_position({1: [(3, 2), (4, 8), (5, 7)]}), engine).rebuilt_users == 1
    assert stored_histories(engine.store) == {1: [(3, 2), (3, 9), (4, 8), (5, 7)]}
    check_records(engine)


def test_import_tells_the_store_what_the_ids_are(engine: Engine, log: Path) -> None:
    import_log(log, engine)
    assert engine.store.id_types() == IdTypes(UNKNOWN, INTEGER)  # this bundle does not say what user ids are
    data = {"user_ids": "text"}
    bundle = replace(
        engine.projection.bundle, manifest=replace(engine.projection.bundle.manifest, data=data, integer_item_ids=False)
    )
    import_log(log, Engine(replace(engine.projection.generation, bundle=bundle), engine.store))
    assert engine.store.id_types() == IdTypes(TEXT, TEXT)
    import_log(log, engine)
    assert engine.store.id_types() == IdTypes(TEXT, INTEGER)
