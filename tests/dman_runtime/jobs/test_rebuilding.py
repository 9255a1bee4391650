"""Rebuilds over the real graphs and both stores: every record covers its history, whatever happens meanwhile."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from histories import Histories, make_histories, with_unknown_items
from record_checks import HookedStore, check_records

from dman_runtime.cli import main
from dman_runtime.engine import Engine
from dman_runtime.errors import StoreFullError, UsageError
from dman_runtime.jobs import rebuilding
from dman_runtime.jobs.encoding import Throttle
from dman_runtime.jobs.generations import drop_generation, format_generations, list_generations
from dman_runtime.jobs.rebuilding import RebuildResult, catch_up, rebuild
from dman_runtime.model.generation import Generation
from dman_runtime.model.recurrence import Graphs
from dman_runtime.presence import Present
from dman_runtime.requests import Update
from dman_runtime.store.base import StateStore, StoreStats, Write
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.memory import MemoryStore
from dman_runtime.store.rollout import Rollout

HISTORIES: Histories = with_unknown_items(make_histories(25, seed=3))
EVENTS = sum(map(len, HISTORIES.values()))


def filled(store: StateStore, generation: Generation) -> Engine:
    """An engine whose store has all histories, and their records."""
    engine = Engine(generation, store)
    for user, events in HISTORIES.items():
        item_ids, times = [str(item) for item, _ in events], [time for _, time in events]
        engine.update([Update(str(user), item_ids, times)])
    return engine


def known_events(engine: Engine) -> int:
    return sum(len(engine.projection.known_events(engine.store.history(user_id))) for user_id in engine.store.scan())


class CountingGraphs:
    """The real graphs; `encoded` counts events."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs, self.encoded = graphs, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._graphs, name)

    def encode(self, new: np.ndarray, lengths: np.ndarray, *others: np.ndarray) -> object:
        self.encoded += int(lengths.sum())
        return self._graphs.encode(new, lengths, *others)


def test_rebuild_makes_all_records_of_a_bundle_and_leaves_the_others(
    exact: Generation, renamed: Generation, store: StateStore
) -> None:
    old = filled(store, exact)
    before = store.get_many(list(HISTORIES_IDS), old.projection.number)
    new = Engine(renamed, store)
    assert rebuild(new) == RebuildResult(users=26, rebuilt=26, events=known_events(new))
    check_records(new)
    check_records(old)
    after = store.get_many(list(HISTORIES_IDS), old.projection.number)
    assert [user and user.record for user in before] == [user and user.record for user in after]
    assert rebuild(new) == RebuildResult(users=26)


HISTORIES_IDS = tuple(map(str, HISTORIES))


def test_without_a_terminal_the_log_says_how_much_is_done(
    exact: Generation, renamed: Generation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "BATCH_USERS", 10)
    clock = iter(range(0, 1000, 6))  # asked at the start, and for each line that there could be
    monkeypatch.setattr(rebuilding._ProgressLog, "clock", staticmethod(lambda: float(next(clock))))
    with MemoryStore() as store, caplog.at_level("INFO", "dman_runtime.jobs.rebuilding"):
        filled(store, exact)
        rebuild(Engine(renamed, store))
    lines = [record.getMessage() for record in caplog.records if "are encoded" in record.getMessage()]
    (done, total), (all_done, _) = [(int(line.split()[0]), int(line.split()[2])) for line in lines]
    assert 0 < done < total == all_done == sum(map(len, HISTORIES.values()))
    assert lines[0].endswith(f"events are encoded, about {12 * (total - done) / done:.0f} s left")
    assert lines[1].endswith("events are encoded, about 0 s left")


def test_rebuild_encodes_only_what_a_record_lacks(exact: Generation, renamed: Generation, store: StateStore) -> None:
    old = filled(store, exact)
    graphs = CountingGraphs(renamed.graphs)
    new = Engine(replace(renamed, graphs=graphs), store)
    rebuild(new)
    assert graphs.encoded == known_events(new)
    old.update([Update("3", ["40", "41", "unknown"])])
    graphs.encoded = 0
    assert rebuild(new) == RebuildResult(users=26, rebuilt=1, events=2)
    assert graphs.encoded == 2
    check_records(new)


@pytest.mark.parametrize("commits", [1, 3])
def test_interrupted_rebuild_goes_on_where_it_was(
    exact: Generation, renamed: Generation, store: StateStore, commits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "BATCH_USERS", 4)
    filled(store, exact)

    def interrupt(number: int) -> None:
        if number == commits + 1:
            raise KeyboardInterrupt

    graphs = CountingGraphs(renamed.graphs)
    generation = replace(renamed, graphs=graphs)
    with pytest.raises(KeyboardInterrupt):
        rebuild(Engine(generation, HookedStore(store, interrupt)))
    (info,) = [one for one in list_generations(store).generations if one.bundle_id == renamed.bundle_id]
    assert info.records == info.current == 4 * commits
    result = rebuild(new := Engine(generation, store))
    assert result.rebuilt == 26 - 4 * commits and result.lagging == 0
    check_records(new)


def test_events_that_come_meanwhile_are_encoded_too_and_nothing_twice(
    exact: Generation, renamed: Generation, store: StateStore
) -> None:
    """A user who is changed before each commit is encoded on from where it was, and found in the end."""
    old = filled(store, exact)
    attempts = 5

    def update(number: int) -> None:
        if number <= attempts:
            old.update([Update("5", ["33", "34"])])

    graphs = CountingGraphs(renamed.graphs)
    new = Engine(replace(renamed, graphs=graphs), HookedStore(store, update))
    assert rebuild(new).lagging == 0
    assert graphs.encoded == known_events(new)
    check_records(new)


def test_history_that_was_put_in_order_meanwhile_is_encoded_anew(
    exact: Generation, renamed: Generation, store: StateStore
) -> None:
    filled(store, exact)

    def reverse(number: int) -> None:
        if number == 1:
            (stored,) = store.get_many(["5"], 1)
            assert stored is not None
            items, times = store.history("5")
            assert store.commit([Write("5", stored.head.version, {}, items[::-1], times, replace_from=0)]) == []

    new = Engine(renamed, HookedStore(store, reverse))
    assert rebuild(new).lagging == 0
    check_records(new)


def test_user_deleted_meanwhile_stays_deleted(exact: Generation, renamed: Generation, store: StateStore) -> None:
    old = filled(store, exact)
    new = Engine(renamed, HookedStore(store, lambda number: number == 1 and old.delete("5")))
    assert rebuild(new).lagging == 0
    assert store.get_many(["5"], new.projection.number) == [None]
    check_records(new)


def test_user_who_never_rests_is_left_for_the_first_touch(
    exact: Generation, renamed: Generation, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "COMMIT_ATTEMPTS", 3)
    old = filled(store, exact)
    new = Engine(renamed, HookedStore(store, lambda _: old.update([Update("5", ["33"])])))
    result = rebuild(new)
    assert result.lagging == 26 and "26 of 26 users changed meanwhile" in result.summary()  # all were in its batch


def test_damaged_record_is_made_anew(exact: Generation, renamed: Generation, store: StateStore) -> None:
    filled(store, exact)
    rebuild(new := Engine(renamed, store))
    (stored,) = store.get_many(["5"], new.projection.number)
    assert stored is not None and stored.record is not None
    damaged = bytes([stored.record[0], *(byte ^ 1 for byte in stored.record[1:])])
    none = np.zeros(0, np.int64)
    store.commit([Write("5", stored.head.version, {new.projection.number: damaged}, none, none)])
    assert rebuild(new).rebuilt == 1
    check_records(new)


def test_long_history_is_encoded_in_a_batch_of_its_own(
    exact: Generation, renamed: Generation, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "BATCH_EVENTS", 60)
    sizes: list[int] = []

    class Seen(MemoryStore):
        def commit(self, writes: list[Write]) -> list[str]:  # type: ignore[override]
            sizes.append(sum(len(HISTORIES[int(write.user_id)]) for write in writes))
            return super().commit(writes)

    filled(seen := Seen(), exact)
    sizes.clear()
    rebuild(Engine(renamed, seen))
    assert sum(sizes) == EVENTS and max(sizes) <= 60


# -- room --------------------------------------------------------------------------------------------------------------


class SmallStore(HookedStore):
    """A store that has taken almost all of its map."""

    def stats(self) -> StoreStats:
        return StoreStats(26, 60, bytes_used=14 << 20, file_bytes=14 << 20, map_size=16 << 20)


def test_records_that_do_not_fit_into_the_map_are_refused_before_one_is_written(
    exact: Generation, renamed: Generation, store: StateStore
) -> None:
    filled(store, exact)
    with pytest.raises(StoreFullError, match="take about 0 MiB, and the state store has 0 left") as caught:
        rebuild(Engine(renamed, SmallStore(store, lambda _: None)))
    assert caught.value.parameter == "map_size_mib"
    assert [one.records for one in list_generations(store).generations] == [26, 0]


def test_records_that_would_fill_the_disk_are_refused(
    exact: Generation, renamed: Generation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 100 << 20))
    with LmdbStore.open(tmp_path / "state", map_size=1 << 30) as store:
        filled(store, exact)
        with pytest.raises(StoreFullError, match="has 100 free, of which servers need 256"):
            rebuild(Engine(renamed, store), path=tmp_path)


# -- the share of a core -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "slept"), [(1.0, 0.0), (0.5, 0.2), (0.25, 0.6)])
def test_throttle_rests_for_as_long_as_the_share_says(
    share: float, slept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = {"used": 0.0, "now": 0.0, "slept": 0.0}
    monkeypatch.setattr(time, "process_time", lambda: moments["used"])
    monkeypatch.setattr(time, "monotonic", lambda: moments["now"])
    monkeypatch.setattr(time, "sleep", lambda seconds: moments.update(slept=moments["slept"] + seconds))
    throttle = Throttle(share)
    moments.update(used=0.2, now=0.2)
    throttle.rest()
    assert moments["slept"] == pytest.approx(slept)
    moments.update(used=0.3, now=5.0)  # it waited for the disk
    throttle.rest()
    assert moments["slept"] == pytest.approx(slept)


# -- generations -------------------------------------------------------------------------------------------------------


def test_generations_are_listed_with_their_records(exact: Generation, renamed: Generation, store: StateStore) -> None:
    old = filled(store, exact)
    rebuild(new := Engine(renamed, store))
    old.update([Update("3", ["1"])])
    both = {exact.bundle_id: "", renamed.bundle_id: ""}
    assert store.set_rollout(Rollout(1, exact.bundle_id, renamed.bundle_id, 0.25, bundles=both))
    found = list_generations(store)
    assert found.users == 26
    sizes = Counter[int]()
    for record in store.records(0):
        sizes[record.generation] += record.size
    assert [vars(one) for one in found.generations] == [
        {
            "number": 1,
            "bundle_id": exact.bundle_id,
            "records": 26,
            "current": 26,
            "bytes": sizes[old.projection.number],
            "share": 0.75,
        },
        {
            "number": 2,
            "bundle_id": renamed.bundle_id,
            "records": 26,
            "current": 25,
            "bytes": sizes[new.projection.number],
            "share": 0.25,
        },
    ]
    assert f"2  {renamed.bundle_id}           26           25" in format_generations(found)
    assert [line.split()[-1] for line in format_generations(found).splitlines()[2:]] == ["75.00%", "25.00%"]


def test_drop_removes_the_records_of_one_bundle(exact: Generation, renamed: Generation, store: StateStore) -> None:
    old = filled(store, exact)
    rebuild(new := Engine(renamed, store))
    assert drop_generation(store, exact.bundle_id) == 26
    assert [one.records for one in list_generations(store).generations] == [0, 26]
    check_records(new)
    rebuild(old)
    check_records(old)
    for servers, rollout in (
        ([Present(1, exact.bundle_id, "")], Rollout(1)),
        ([], Rollout(2, exact.bundle_id, bundles={exact.bundle_id: ""})),
        ([Present(1, exact.bundle_id, "")], Rollout(3, renamed.bundle_id, bundles={renamed.bundle_id: ""})),
    ):
        assert store.set_rollout(rollout)
        with pytest.raises(UsageError, match="answers, or is about to"):
            drop_generation(store, exact.bundle_id, servers)
    both = {exact.bundle_id: "", renamed.bundle_id: ""}
    assert store.set_rollout(Rollout(4, renamed.bundle_id, bundles=both))
    assert drop_generation(store, exact.bundle_id, [Present(1, exact.bundle_id, "")]) == 26
    with pytest.raises(UsageError, match=f"name one of these: {exact.bundle_id}, {renamed.bundle_id}"):
        drop_generation(store, "0" * 16)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_commands_rebuild_list_and_drop(
    exact: Generation,
    renamed: Generation,
    renamed_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = str(tmp_path / "state")
    with LmdbStore.open(state) as store:
        filled(store, exact)
        events = known_events(Engine(renamed, store))
    command = ["rebuild", "--bundle", str(renamed_bundle), "--state", state, "--provider", "cpu", "--json"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = f"encoded {events} events for 26 records of bundle {renamed.bundle_id} in {state}; all records cover"
    assert lines[0].startswith(expected)
    result = {"users": 26, "rebuilt": 26, "events": events, "lagging": 0, "bundle_id": renamed.bundle_id}
    assert json.loads(lines[-1]) == result

    assert main(["drop", exact.bundle_id, "--state", state]) == 0
    assert capsys.readouterr().out.startswith(f"dropped 26 records of bundle {exact.bundle_id}")
    assert main(["generations", "--state", state, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["records"], one["current"]) for one in listed["generations"]] == [(0, 0), (26, 26)]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["rebuild", "--max-share", "0"], "max-share is 0.0"),
        (["rebuild", "--max-share", "1.5"], "max-share is 1.5"),
        (["rebuild", "--bundle", "missing"], "missing is not a bundle"),
        (["generations"], "does not exist"),
        (["drop", "0123456789abcdef"], "does not exist"),
    ],
)
def test_commands_refuse_what_cannot_work_in_one_line(
    arguments: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--state", str(tmp_path / "state")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and cause in error
    assert not (tmp_path / "state").exists()


def test_catching_up_brings_records_up_to_date_and_makes_none(
    exact: Generation, renamed: Generation, store: StateStore
) -> None:
    old, new = filled(store, exact), Engine(renamed, store)
    rebuild(new)
    old.update([Update("1", ["2"], [10**6]), Update("2", ["2"], [10**6]), Update("new here", ["2"], [10**6])])
    assert catch_up(new, seconds=0) == 0
    assert catch_up(new, seconds=60, max_share=1) == 2
    found = store.get_many(["1", "new here"], new.projection.number)
    assert found[0] and found[0].record and found[1] and not found[1].record
    assert catch_up(new, seconds=60) == 0
    assert rebuild(new).rebuilt == 1
    check_records(new)


def test_catching_up_ends_in_time(
    exact: Generation, renamed: Generation, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = filled(store, exact), Engine(renamed, store)
    rebuild(new)
    old.update([Update(str(user), ["2"], [10**6]) for user in list(HISTORIES)[:3]])
    monkeypatch.setattr(rebuilding, "BATCH_USERS", 1)
    clock = iter(range(100))
    monkeypatch.setattr(rebuilding.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(rebuilding.time, "sleep", lambda seconds: None)
    assert catch_up(new, seconds=3, max_share=1) == 1
