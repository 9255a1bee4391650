"""Users encoded by other processes: the same store to the bit, whatever becomes of processes, servers and items."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from histories import Histories, make_histories, with_unknown_items, write_csv
from log_files import import_log, score_log
from record_checks import HookedStore, check_records

from dman_runtime.cli import main
from dman_runtime.data.added_items import AddedItem
from dman_runtime.engine import Engine
from dman_runtime.jobs import encoding, partitions, rebuilding
from dman_runtime.jobs.adding import add_items
from dman_runtime.jobs.encoding import Throttle
from dman_runtime.jobs.rebuilding import rebuild
from dman_runtime.jobs.spreading import HERE, Processes, RayCluster, Spread, Work
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Update
from dman_runtime.store.base import StateStore
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.memory import MemoryStore

HISTORIES: Histories = with_unknown_items(make_histories(25, seed=3))
MORE: Histories = {user: [(7, 1000 * user + 1), (61, 10**6)] for user in (1, 2, 3)}  # one of them late, one "61"


class Ahead:
    """Works as others would, with batches that were read ahead, but in this process."""

    name = "ahead"

    def results(self, work: Work[Any, Any], batches: Iterable[Any]) -> Generator[Any, None, None]:
        do, left = work.open(), iter(batches)
        while some := list(islice(left, 4)):
            yield from [do(batch) for batch in some]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", 3)
    monkeypatch.setattr(rebuilding, "BATCH_USERS", 3)


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("encoding") / "log.csv", HISTORIES)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("encoding") / "more.csv", MORE)


def contents(store: StateStore) -> dict[str, Any]:
    """All that jobs write, to the bit: item numbers, histories, records, and heads but for their versions."""
    numbers = store.generations()
    found: dict[str, Any] = {"items": store.item_ids(range(store.stats().items)), "bundles": numbers}
    for user_id in sorted(store.scan()):
        items, times = store.history(user_id)
        stored = [store.get_many([user_id], number)[0] for number in numbers.values()]
        found[f"user {user_id}"] = (
            items.tolist(),
            times.tolist(),
            [one and (one.head[1:], one.record) for one in stored],
        )
    return found


class Killing:
    """Others do the work. One of them is killed when the first result is there, in the first so many jobs."""

    def __init__(self, spread: Spread, jobs: int) -> None:
        self._spread, self.name, self.left = spread, spread.name, jobs

    def results(self, work: Work[Any, Any], batches: Iterable[Any]) -> Generator[Any, None, None]:
        with closing(self._spread.results(work, batches)) as results:
            for number, result in enumerate(results):
                if not number and self.left:
                    self.left -= 1
                    children = psutil.Process().children(recursive=True)
                    next(one for one in children if is_at_work(one.name(), one.cmdline())).kill()
                yield result


def is_at_work(name: str, command: list[str]) -> bool:
    """Whether a process works on users; Ray has some that do not."""
    return name.startswith(("ray::_do", "ray::IDLE")) or "--multiprocessing-fork" in command


def jobs_done(exact: Generation, renamed: Generation, logs: list[Path], scores: Path, spread: Spread) -> Any:
    """Scores, an import of logs into an empty store, and a rebuild under another bundle: all that they leave."""
    score_log(logs[0], scores, exact, k=5, spread=spread)
    with MemoryStore() as store:
        results: list[object] = [import_log(log, Engine(exact, store), spread=spread) for log in logs]
        results.append(rebuild(Engine(renamed, store), spread=spread))
        check_records(Engine(renamed, store))
        return results, contents(store), scores.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_jobs_on_other_processes_give_the_same_though_one_is_killed(
    kind: str,
    exact: Generation,
    renamed: Generation,
    log_file: Path,
    more: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "ray":
        request.getfixturevalue("ray_cluster")
    # each time, Ray takes seconds to start another one
    spread = Killing(RayCluster(), jobs=1) if kind == "ray" else Killing(Processes(2), jobs=4)
    logs = [log_file] if kind == "ray" else [log_file, more]
    found = jobs_done(exact, renamed, logs, tmp_path / "scores.parquet", spread)
    assert found == jobs_done(exact, renamed, logs, tmp_path / "scores.parquet", HERE)
    assert not spread.left


def test_batches_that_are_read_ahead_give_the_same(
    exact: Generation, renamed: Generation, log_file: Path, more: Path, tmp_path: Path
) -> None:
    logs = [log_file, more, log_file]
    found = jobs_done(exact, renamed, logs, tmp_path / "scores.parquet", Ahead())
    assert found == jobs_done(exact, renamed, logs, tmp_path / "scores.parquet", HERE)


def test_share_of_a_core_is_that_of_each_process(
    exact: Generation, renamed: Generation, log_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    class Noted(Throttle):
        def __init__(self, share: float) -> None:
            shares.append(share)
            super().__init__(share)

    import_log(log_file, Engine(exact, store := MemoryStore()), spread=Ahead())
    monkeypatch.setattr(encoding, "Throttle", Noted)  # which processes make for themselves
    import_log(log_file, Engine(exact, MemoryStore()), spread=Ahead())
    assert shares == []
    rebuild(Engine(renamed, store), spread=Ahead(), max_share=0.9)
    assert shares == [0.9]


def test_import_keeps_what_a_server_adds_to_users_that_were_read_ahead(exact: Generation, log_file: Path) -> None:
    server = Engine(exact, store := MemoryStore())

    def add(commit: int) -> None:
        if commit in (1, 4):
            server.update([Update(str(user), ["7"], [user]) for user in HISTORIES])

    result = import_log(log_file, Engine(exact, HookedStore(store, add)), spread=Ahead())
    assert (result.users, result.events) == (26, sum(map(len, HISTORIES.values())))
    for user, events in HISTORIES.items():
        items, times = store.history(str(user))
        assert sorted(times.tolist()) == sorted([time for _, time in events] + [user, user])
        assert store.item_ids(items).count("7") == 2 + sum(item == 7 for item, _ in events)
    check_records(server)


def test_rebuild_encodes_on_from_what_others_encoded(exact: Generation, renamed: Generation, log_file: Path) -> None:
    server = Engine(exact, store := MemoryStore())
    import_log(log_file, server)
    changes = 3

    def update(number: int) -> None:
        if number <= changes:
            server.update([Update(str(user), ["33"], [10**6]) for user in HISTORIES])

    new = Engine(renamed, HookedStore(store, update))
    result = rebuild(new, spread=Ahead())
    assert result.lagging == 0
    assert result.events == sum(len(new.projection.known_events(store.history(user))) for user in store.scan())
    check_records(new)


@pytest.mark.parametrize("added_at", [0, 3])
def test_items_added_before_and_meanwhile_are_encoded(
    exact: Generation, log_file: Path, more: Path, added_at: int
) -> None:
    def done(spread: Spread) -> Any:
        with MemoryStore() as store:
            hooked = HookedStore(store, lambda number: number == added_at and add())

            def add() -> None:
                add_items(store, exact.bundle, {"61": AddedItem(like=("5",)), "999": AddedItem(like=("6", "7"))})

            if not added_at:
                add()
            results = [import_log(log, Engine(exact, hooked), spread=spread) for log in (log_file, more)]
            rebuild(engine := Engine(exact, store), spread=spread)
            assert engine.current.bundle.added == 2
            for user_id in store.scan():
                (stored,) = store.get_many([user_id], engine.projection.number)
                assert stored is not None and stored.record is not None
                state = engine.current.generation.unpack(stored.record)
                assert state.event_count == len(engine.current.known_events(store.history(user_id)))
            return results, contents(store)

    ahead, here = done(Ahead()), done(HERE)
    assert added_at or ahead == here


@pytest.mark.parametrize("events", [10**6, 100])
def test_files_may_hold_the_users_in_any_way(
    exact: Generation, tmp_path: Path, events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file, files of users in any order, and files of times: the same store, and the same scores."""
    monkeypatch.setattr(partitions, "EVENTS_PER_PARTITION", events)
    rows = [(user, *event) for user, events in HISTORIES.items() for event in events]
    by_user = [[row for row in rows if row[0] % 3 == part] for part in (2, 0, 1)]
    by_time = [sorted(rows, key=lambda row: row[2])[start::4] for start in range(4)]
    found = []
    for number, parts in enumerate(([rows], by_user, by_time)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for part, of_part in enumerate(parts):
            columns = zip(("user_id", "item_id", "timestamp"), zip(*of_part, strict=True), strict=True)
            pq.write_table(pa.table({name: list(values) for name, values in columns}), folder / f"{part}.parquet")
        with MemoryStore() as store:
            result = import_log(folder / "*.parquet", Engine(exact, store))
            score_log(folder, tmp_path / "scores.parquet", exact, k=5)
            found.append((result, contents(store), (tmp_path / "scores.parquet").read_bytes()))
    assert found[0] == found[1] == found[2]


# -- commands ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from dman_runtime.cli import main
from dman_runtime.jobs import partitions
from dman_runtime.store.lmdb import LmdbStore
partitions.USERS_PER_BATCH, commit, commits = 3, LmdbStore.commit, []
def counted(store, writes):
    commits.append(writes)
    if len(commits) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return commit(store, writes)
LmdbStore.commit = counted
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_import_that_is_killed_leaves_no_process_and_can_be_repeated(
    exact: Generation, exact_bundle: Path, log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    command = ["import", "--bundle", str(exact_bundle), "--state", str(tmp_path / "state"), "--input", str(log_file)]
    command += ["--provider", "cpu", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, tmp_path / "killed.py", *command], env=environment) as process:
        working: set[psutil.Process] = set()
        while process.poll() is None:
            working |= set(children_of(process.pid))
            time.sleep(0.05)
    assert process.returncode == -signal.SIGKILL and working
    assert not psutil.wait_procs(working, timeout=10)[1]
    with LmdbStore.open(tmp_path / "state") as store:
        assert len(list(store.scan())) == 9

    assert main(command) == 0
    assert "26 users" in (printed := capsys.readouterr().out) and "; the users were encoded by 2 processes" in printed
    with LmdbStore.open(tmp_path / "state") as store, MemoryStore() as once:
        import_log(log_file, Engine(exact, once))
        assert contents(store) == contents(once)


def children_of(pid: int) -> Iterator[psutil.Process]:
    try:
        yield from psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return


@pytest.mark.parametrize("command", ["import", "rebuild", "score"])
def test_command_without_ray_says_what_to_install(
    command: str,
    exact_bundle: Path,
    log_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    options = ["--bundle", str(exact_bundle), "--provider", "cpu", "--engine", "ray"]
    assert main([command, *options, *([] if command == "rebuild" else ["--input", str(log_file)])]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "error: the library Ray is not installed; install dman[ray] (--engine)"
    assert list(tmp_path.iterdir()) == []
