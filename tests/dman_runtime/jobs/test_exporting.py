"""Logs of all histories: what they hold, and that they make the same histories and states again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import assert_close, new_store
from contract.processes import finish, start
from histories import Histories, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from log_files import histories as histories_of
from log_files import import_log

from dman_runtime.data.ids import INTEGER, TEXT
from dman_runtime.data.logs import read_interactions
from dman_runtime.engine import Engine
from dman_runtime.errors import InputError
from dman_runtime.jobs import exporting
from dman_runtime.jobs.exporting import ExportResult, export_log
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Update
from dman_runtime.store.base import UNKNOWN, IdTypes, StateStore, Write
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.memory import MemoryStore
from dman_train import export, train

EXACT = 1e-4  # relative, in root mean square
Stored = dict[str, list[tuple[str, int]]]  # item id and time by user


def put(store: StateStore, user_id: str, events: Sequence[tuple[str, int]]) -> None:
    numbers = store.add_items([item for item, _ in events])
    (found,) = store.get_many([user_id], 1)
    times = np.array([time for _, time in events], np.int64)
    assert store.commit([Write(user_id, found.head.version if found else 0, {}, numbers, times)]) == []


def stored(store: StateStore) -> Stored:
    found = {}
    for user_id in store.scan():
        numbers, times = store.history(user_id)
        found[user_id] = list(zip(store.item_ids(numbers), times.tolist(), strict=True))
    return found


def rows(path: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_export_writes_every_event_in_order_with_the_types_of_the_bundle(store: StateStore, tmp_path: Path) -> None:
    store.remember_id_types(IdTypes(TEXT, INTEGER))
    put(store, "7", [("30", 5), ("-4", 6), ("30", 6)])
    put(store, "8", [("4", -3)])
    store.add_items(["no integer"])  # of nobody
    put(store, "no events", [])
    result = export_log(store, tmp_path / "log.parquet")
    assert result == ExportResult(events=4, users=2, items=3, user_ids=TEXT, item_ids=INTEGER)
    table = pq.read_table(tmp_path / "log.parquet")
    assert table.schema.names == ["user_id", "item_id", "timestamp", "position"]
    assert table.schema.types == [pa.string(), pa.int64(), pa.int64(), pa.int64()]
    assert rows(tmp_path / "log.parquet") == [("7", 30, 5, 0), ("7", -4, 6, 1), ("7", 30, 6, 2), ("8", 4, -3, 0)]
    assert names_in(tmp_path) == ["log.parquet"]


@pytest.mark.parametrize(
    ("remembered", "users", "items", "expected", "warnings"),
    [
        (IdTypes(INTEGER, INTEGER), ["1", "-2"], ["0", str(2**63 - 1)], (INTEGER, INTEGER), []),
        (IdTypes(TEXT, TEXT), ["1", "2"], ["3"], (TEXT, TEXT), []),
        (IdTypes(UNKNOWN, UNKNOWN), ["1", "2"], ["3"], (INTEGER, INTEGER), []),
        (IdTypes(UNKNOWN, UNKNOWN), ["1", "007"], ["a"], (TEXT, TEXT), []),
        (IdTypes(INTEGER, INTEGER), ["1", "anna"], ["3"], (TEXT, INTEGER), ["user ids are written as text: 'anna'"]),
        (IdTypes(INTEGER, INTEGER), ["1"], [str(2**63)], (INTEGER, TEXT), [f"item ids are written as text: '{2**63}'"]),
        (IdTypes(INTEGER, INTEGER), ["1_0"], ["\u0661"], (TEXT, TEXT), ["user ids", "item ids"]),
    ],
)
def test_id_that_does_not_fit_makes_the_whole_column_text(
    store: StateStore,
    tmp_path: Path,
    remembered: IdTypes,
    users: list[str],
    items: list[str],
    expected: tuple[str, str],
    warnings: list[str],
) -> None:
    store.remember_id_types(remembered)
    for user in users:
        put(store, user, [(item, 1 + n) for n, item in enumerate(items)])
    result = export_log(store, tmp_path / "log.parquet")
    assert (result.user_ids, result.item_ids) == expected
    assert [any(warning in text for text in result.warnings) for warning in warnings] == [True] * len(result.warnings)
    kinds: list[Callable[[str], Any]] = [{INTEGER: int, TEXT: str}[kind] for kind in expected]
    written = {(user, item) for user, item, *_ in rows(tmp_path / "log.parquet")}
    assert written == {(kinds[0](user), kinds[1](item)) for user in users for item in items}


def test_unknown_times_are_those_of_the_event_before_and_counted(store: StateStore, tmp_path: Path) -> None:
    put(store, "some", [("a", 0), ("b", 7), ("c", 0), ("d", 0), ("e", 9)])
    put(store, "none", [("a", 0), ("b", 0), ("a", 0)])
    result = export_log(store, tmp_path / "log.parquet")
    times: dict[str, list[int]] = {"some": [], "none": []}
    for user, _, time, position in rows(tmp_path / "log.parquet"):
        assert position == len(times[user])
        times[user].append(time)
    assert times == {"some": [7, 7, 7, 7, 9], "none": [0, 0, 0]}
    assert result.filled_times == 3
    assert [text.partition(" events")[0] for text in result.warnings] == ["3"]


def test_log_without_any_time_has_no_time_column(store: StateStore, tmp_path: Path) -> None:
    put(store, "u", [("a", 0), ("b", 0), ("a", 0)])
    result = export_log(store, tmp_path / "log.parquet")
    assert rows(tmp_path / "log.parquet") == [("u", "a", 0), ("u", "b", 1), ("u", "a", 2)]
    assert pq.read_schema(tmp_path / "log.parquet").names == ["user_id", "item_id", "position"]
    assert (result.filled_times, result.warnings) == (0, [])


def test_events_that_are_really_equal_are_all_read_again(store: StateStore, tmp_path: Path) -> None:
    put(store, "u", [("a", 5), ("a", 5), ("b", 5), ("a", 5)])
    put(store, "v", [("a", 5)])
    assert export_log(store, tmp_path / "log.parquet").events == 5
    log = read_interactions(tmp_path / "log.parquet")  # their positions tell them from exact repeats
    assert histories_of(log) == {"u": [("a", 5), ("a", 5), ("b", 5), ("a", 5)], "v": [("a", 5)]}


def test_empty_store_gives_a_file_without_rows(store: StateStore, tmp_path: Path) -> None:
    result = export_log(store, tmp_path / "log.parquet")
    assert (result.events, result.users, result.items) == (0, 0, 0)
    assert pq.read_table(tmp_path / "log.parquet").num_rows == 0


def test_batches_of_any_size_give_the_same_rows(
    store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        put(store, str(number), [(str(n % 7), 100 + n) for n in range(number % 9)])
    whole = export_log(store, tmp_path / "whole.parquet")
    monkeypatch.setattr(exporting, "EVENTS_PER_TABLE", 5)
    monkeypatch.setattr(exporting, "_USERS_PER_SCAN", 3)
    monkeypatch.setattr(exporting, "_IDS_PER_LOOK", 2)
    assert export_log(store, tmp_path / "parts.parquet") == whole
    assert rows(tmp_path / "parts.parquet") == rows(tmp_path / "whole.parquet")


# -- while others write ----------------------------------------------------------------------------------------------


class ChangingStore(MemoryStore):
    """Calls `change` before its n-th reading of item ids. The first is the look at all ids, the others are for rows."""

    def __init__(self, change: Callable[[StateStore], None], *, at: int) -> None:
        super().__init__()
        self._change, self._calls_left = change, at

    def item_ids(self, numbers: Any) -> list[str]:
        self._calls_left -= 1
        if not self._calls_left:
            self._change(self)
        return super().item_ids(numbers)

    def scan(self, partition: int = 0, partitions: int = 1) -> Iterator[str]:
        last = ""
        while left := [user for user in super().scan() if user > last]:
            yield (last := min(left))


LATER: dict[str, tuple[tuple[str, int], tuple[str, str, bool]]] = {
    "another": (("1", 9), (TEXT, INTEGER, True)),
    "3": (("new", 0), (INTEGER, TEXT, False)),
    "4": (("1", 9), (INTEGER, INTEGER, True)),
}


@pytest.mark.parametrize("user", LATER)
def test_what_comes_while_the_file_is_written_widens_its_columns(
    tmp_path: Path, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, (users, items, times) = LATER[user]
    monkeypatch.setattr(exporting, "_USERS_PER_SCAN", 1)
    with ChangingStore(lambda store: put(store, user, [later]), at=2) as store:
        put(store, "1", [("1", 0), ("2", 0)])
        put(store, "3", [("2", 0)])
        result = export_log(store, tmp_path / "log.parquet")
        assert result.events == sum(map(len, stored(store).values())) == 4
        assert result.users == len(stored(store))
    assert (result.user_ids, result.item_ids) == (users, items)
    assert ("timestamp" in pq.read_schema(tmp_path / "log.parquet").names) == times
    assert {str(found) for found, *_ in rows(tmp_path / "log.parquet")} == {"1", "3", user}
    assert names_in(tmp_path) == ["log.parquet"]


BUSY = """
with LmdbStore.open(sys.argv[1], map_size=64 << 20) as store:
    items = store.add_items([str(number) for number in range(100)])
    print("ready", flush=True)
    number = 0
    while not os.path.exists(sys.argv[1] + "/stop"):
        user = f"busy-{number % 40}"
        (found,) = store.get_many([user], 1)
        if number % 97 == 96:
            store.delete(user)
        else:
            count = found.head.history_count if found else 0
            times = np.arange(count, count + 5) + 1
            store.commit([Write(user, found.head.version if found else 0, {}, items[times % 100], times)])
        number += 1
    print(number)
"""


@pytest.mark.slow
def test_export_while_a_server_writes_has_each_user_from_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "EVENTS_PER_TABLE", 50)
    monkeypatch.setattr(exporting, "_USERS_PER_SCAN", 7)
    process = start(BUSY, tmp_path / "state")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with LmdbStore.open(tmp_path / "state", readonly=True) as store:
        for _ in range(15):
            result = export_log(store, tmp_path / "log.parquet")
            users: dict[str, int] = {}
            for user, item, time, position in rows(tmp_path / "log.parquet"):
                assert position == users.get(user, 0)
                assert (time, item) == (position + 1, (position + 1) % 100)
                users[user] = position + 1
            assert all(count % 5 == 0 for count in users.values())
            assert (result.users, result.events) == (len(users), sum(users.values()))
    (tmp_path / "state" / "stop").touch()
    assert int(finish(process)) > 20


# -- the file --------------------------------------------------------------------------------------------------------


def test_file_that_cannot_be_written_is_refused(store: StateStore, tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    for name, cause in [
        ("log.csv", "is not named as a Parquet file"),
        ("folder.parquet", "it is a directory"),
        ("nowhere/log.parquet", "No such file"),
    ]:
        with pytest.raises(InputError, match=cause) as caught:
            export_log(store, tmp_path / name)
        assert caught.value.parameter == "output"
    assert names_in(tmp_path) == ["folder.parquet"]


def test_full_disk_is_an_error_in_one_line_and_keeps_the_old_file(
    store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "1", [("1", 5)])
    (tmp_path / "log.parquet").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(InputError, match="No space left"):
        export_log(store, tmp_path / "log.parquet")
    assert names_in(tmp_path) == ["log.parquet"] and (tmp_path / "log.parquet").read_text() == "old"


def test_interrupted_export_keeps_the_old_file_and_leaves_no_part(tmp_path: Path) -> None:
    def interrupt(_: StateStore) -> None:
        raise KeyboardInterrupt

    (tmp_path / "log.parquet").write_text("old")
    with ChangingStore(interrupt, at=2) as store:
        put(store, "1", [("1", 5)])
        with pytest.raises(KeyboardInterrupt):
            export_log(store, tmp_path / "log.parquet")
    assert names_in(tmp_path) == ["log.parquet"] and (tmp_path / "log.parquet").read_text() == "old"


# -- and back again --------------------------------------------------------------------------------------------------

one_event = st.tuples(st.sampled_from(["1", "2", "x"]), st.integers(1, 40))
some_histories = st.dictionaries(
    st.sampled_from(["7", "8", "u v"]), st.lists(one_event, min_size=1, max_size=12, unique=True), min_size=1
)


@settings(max_examples=30)
@given(some_histories)
def test_reading_an_export_gives_the_histories(tmp_path_factory: pytest.TempPathFactory, found: Stored) -> None:
    path = tmp_path_factory.mktemp("export") / "log.parquet"
    found = {user: sorted(events, key=lambda one: one[1]) for user, events in found.items()}
    with MemoryStore() as store:
        for user, events in found.items():
            put(store, user, events)
        export_log(store, path)
    assert histories_of(read_interactions(path)) == found


def with_live_events(engine: Engine, log: Path, histories: Histories, tmp_path: Path) -> Histories:
    """A store that imported a log and took live events; the histories that one log of it all has."""
    import_log(log, engine)
    every: Histories = {}
    for number, (user, events) in enumerate(histories.items()):
        live = [(1 + (7 * number + n) % 60, events[-1][1] + 5 + n // 2) for n in range(number % 11)]
        if live:
            items, times = [str(item) for item, _ in live], [time for _, time in live]
            engine.update([Update(str(user), items, times, request_id=f"r-{user}")])
        every[user] = events + live
    return every


def check_same_states(engine: Engine, other: Engine) -> None:
    assert stored(engine.store) == stored(other.store)
    for user_id in engine.store.scan():
        (one,), (two,) = (each.open_users([user_id]) for each in (engine, other))
        for each, user in ((engine, one), (other, two)):
            each.advance([user])
        assert one.state.event_count == two.state.event_count
        assert_close(one.state.memory, two.state.memory, EXACT)
        assert_close(one.state.user_embedding, two.state.user_embedding, EXACT)


def test_import_of_an_export_is_one_import_of_the_merged_log(
    exact: Generation, store: StateStore, log: Path, mixed_histories: Histories, tmp_path: Path
) -> None:
    engine = Engine(exact, store)
    every = with_live_events(engine, log, mixed_histories, tmp_path)
    result = export_log(store, tmp_path / "log.parquet")
    assert (result.events, result.users) == (sum(map(len, every.values())), len(every))
    assert (result.user_ids, result.item_ids, result.warnings) == (INTEGER, INTEGER, [])
    merged = {str(user): [(str(item), time) for item, time in events] for user, events in every.items()}
    assert histories_of(read_interactions(tmp_path / "log.parquet")) == merged
    with new_store("memory") as new, new_store("memory") as one:
        import_log(tmp_path / "log.parquet", again := Engine(exact, new))
        check_same_states(engine, again)
        import_log(write_csv(tmp_path / "merged.csv", every), once := Engine(exact, one))
        check_same_states(again, once)
    assert import_log(tmp_path / "log.parquet", engine).events == 0  # the store recognises all of it


def test_store_recognises_its_own_export_where_times_are_unknown(
    exact: Generation, store: StateStore, tmp_path: Path
) -> None:
    engine = Engine(exact, store)
    for items, times in ((["1", "2"], ()), (["3", "4"], (50, 60)), (["4", "5"], ()), (["6"], (60,))):
        engine.update([Update("u", items, times)])
    before = stored(store)
    assert export_log(store, tmp_path / "log.parquet").filled_times == 4
    result = import_log(tmp_path / "log.parquet", engine)
    assert (result.events, stored(store)) == (0, before)


@pytest.mark.slow
def test_training_on_an_export_and_serving_the_store_equals_one_import_of_it(
    exact: Generation, log: Path, mixed_histories: Histories, tmp_path: Path
) -> None:
    """The next model: trained on what the store holds, served over the same store."""
    exported, run, bundle = tmp_path / "log.parquet", tmp_path / "run", tmp_path / "bundle"
    with LmdbStore.open(tmp_path / "state", map_size=64 << 20) as store:
        with_live_events(Engine(exact, store), log, mixed_histories, tmp_path)
        export_log(store, exported)
        options = ["--preset", "tiny", "--epochs", "1", "--lanes", "8", "--threads", "1"]
        assert train.main(["--data", str(exported), "--run", str(run), *options]) == 0
        assert export.main(["--run", str(run), "--out", str(bundle), "--state-dtype", "float32"]) == 0
        next_generation = Generation.open(bundle, provider="cpu")
        with new_store("memory") as new:
            import_log(exported, once := Engine(next_generation, new))
            check_same_states(Engine(next_generation, store), once)
