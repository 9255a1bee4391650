"""Imports over the real graphs and both stores: every event once, whatever interrupts or cuts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import STORES, assert_close, new_store
from histories import ONLY_UNKNOWN, UNKNOWN_ITEM, Histories, make_histories, write_csv
from log_files import import_log

from dman_runtime.engine import Engine
from dman_runtime.errors import ConflictError, InputError
from dman_runtime.jobs import importing, partitions
from dman_runtime.jobs.importing import ImportResult
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query, Update
from dman_runtime.store.base import StateStore, Write

EXACT = 1e-4  # relative, in root mean square


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[StateStore]:
    with new_store(request.param) as store:
        yield store


@pytest.fixture
def engine(exact: Generation, store: StateStore) -> Engine:
    return Engine(exact, store)


def stored_histories(store: StateStore) -> Histories:
    """All events of all users; every id of these tests is an integer."""
    found = {}
    for user_id in store.scan():
        numbers, times = store.history(user_id)
        found[int(user_id)] = list(zip(map(int, store.item_ids(numbers)), times.tolist(), strict=True))
    return found


def check_records(engine: Engine) -> None:
    """Every record covers its history, and is what a replay of the known events gives."""
    for user_id in engine.store.scan():
        (stored,) = engine.store.get_many([user_id], engine.number)
        assert stored is not None and stored.record is not None
        state = engine.generation.unpack(stored.record)
        assert state.history_count == stored.head.history_count
        history = engine.known_indices(engine.store.history(user_id)[0])
        (expected,) = engine.generation.replay([history])
        assert state.event_count == len(history)
        assert_close(state.memory, expected.memory, EXACT)
        assert_close(state.user_embedding, expected.user_embedding, EXACT)


class HookedStore:
    """The real store; `before` sees the number of each commit before it happens."""

    def __init__(self, store: StateStore, before: Callable[[int], None]) -> None:
        self._store, self._before, self.commits = store, before, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, writes: Sequence[Write]) -> list[str]:
        self.commits += 1
        self._before(self.commits)
        return self._store.commit(writes)


def test_import_stores_every_event_those_of_unknown_items_too(
    engine: Engine, log: Path, mixed_histories: Histories
) -> None:
    events = sum(map(len, mixed_histories.values()))
    unknown = len(mixed_histories) - 1 + 2
    assert import_log(log, engine) == ImportResult(25, events, 0, unknown)
    assert stored_histories(engine.store) == mixed_histories
    check_records(engine)
    assert engine.recommend([Query(str(ONLY_UNKNOWN))])[0].popular


def test_import_repeated_doubles_nothing(engine: Engine, log: Path, mixed_histories: Histories) -> None:
    import_log(log, engine)
    before = engine.store.get_many(list(engine.store.scan()), engine.number)
    assert import_log(log, engine) == ImportResult(0, 0, 25, 0)
    assert engine.store.get_many(list(engine.store.scan()), engine.number) == before
    assert stored_histories(engine.store) == mixed_histories


@pytest.mark.parametrize("existing", ["skip", "append"])
def test_import_into_a_store_that_has_some_of_the_users(
    engine: Engine, log: Path, mixed_histories: Histories, tmp_path: Path, existing: importing.Existing
) -> None:
    import_log(log, engine)
    more = {1: [(3, 90_000), (UNKNOWN_ITEM + 2, 90_001)], 200: [(5, 1), (6, 2), (7, 3)]}
    result = import_log(write_csv(tmp_path / "more.csv", more), engine, existing=existing)
    if existing == "skip":
        assert result == ImportResult(1, 3, 1, 0)
        assert stored_histories(engine.store) == {**mixed_histories, 200: more[200]}
    else:
        assert result == ImportResult(2, 5, 0, 1)
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
        import_log(log, Engine(engine.generation, HookedStore(engine.store, interrupt)))  # type: ignore[arg-type]
    assert len(list(engine.store.scan())) == 9
    result = import_log(log, engine)
    assert (result.users, result.skipped_users) == (16, 9)
    assert stored_histories(engine.store) == mixed_histories
    check_records(engine)


@pytest.mark.slow
def test_import_in_small_partitions_stores_the_same(
    engine: Engine, log: Path, mixed_histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "EVENTS_PER_PARTITION", 50)
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", 3)
    assert import_log(log, engine).events == sum(map(len, mixed_histories.values()))
    assert stored_histories(engine.store) == mixed_histories
    check_records(engine)


@pytest.mark.parametrize("existing", ["skip", "append"])
def test_import_keeps_what_a_server_adds_meanwhile(
    engine: Engine, log: Path, mixed_histories: Histories, existing: importing.Existing
) -> None:
    def add(commit: int) -> None:
        if commit == 1:
            engine.update([Update("1", ["7"], timestamps=[1])])

    import_log(log, Engine(engine.generation, HookedStore(engine.store, add)), existing=existing)  # type: ignore[arg-type]
    expected = [(7, 1)] if existing == "skip" else [(7, 1), *mixed_histories[1]]
    assert stored_histories(engine.store) == {**mixed_histories, 1: expected}
    check_records(engine)


@pytest.mark.slow
def test_import_gives_up_where_a_server_never_stops(engine: Engine, log: Path) -> None:
    store = HookedStore(engine.store, lambda commit: None)
    store.commit = lambda writes: [write.user_id for write in writes]  # type: ignore[method-assign]
    with pytest.raises(ConflictError, match="a server keeps updating users"):
        import_log(log, Engine(engine.generation, store), existing="append")  # type: ignore[arg-type]


@pytest.mark.slow
def test_import_for_another_bundle_adds_to_histories_that_are_there(
    engine: Engine, renamed: Generation, log: Path, mixed_histories: Histories, tmp_path: Path
) -> None:
    import_log(log, engine)
    newer = Engine(renamed, engine.store)
    more = make_histories(24, seed=6)
    import_log(write_csv(tmp_path / "more.csv", more), newer, existing="append")
    expected = {user: events + more.get(user, []) for user, events in mixed_histories.items()}
    assert stored_histories(engine.store) == expected
    newer.update([Update(str(ONLY_UNKNOWN), [])])  # not in the file: its record is made when it is asked for
    check_records(newer)


def test_import_of_a_log_with_a_bad_row_stores_no_part_of_its_partition(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("user_id,item_id,timestamp\n1,1,1\n2,2,never\n")
    with pytest.raises(InputError, match="never"):
        import_log(tmp_path / "bad.csv", engine)
    assert list(engine.store.scan()) == []
