"""Roll-overs of a real server under load: rebuilds are killed again and again, bundles change, and nobody notices."""

from __future__ import annotations

import random
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import whole_benchmark
from record_checks import check_records

from dman_runtime.engine import Engine
from dman_runtime.jobs.generations import list_generations
from dman_runtime.model.generation import Generation
from dman_runtime.store.lmdb import LmdbStore
from sdk import Client
from tools.faults.jobs import kill_when_encoded, run_job, start_rebuild
from tools.faults.servers import FaultServer, wait_until
from tools.soak.rollover import while_bundles_change
from tools.soak.setting import QUICK, Soak

from .conftest import Start

pytestmark = pytest.mark.slow

USERS, EVENTS, KILLS = 400, 35, 5  # not many events: check_records compares with replays


class Callers:
    """Threads that update and recommend until they are stopped; `sent` counts acknowledged events by user.

    Every answer must have items of the bundle that it names only.
    """

    def __init__(self, address: str, items: dict[str, range], threads: int = 3) -> None:
        self.sent, self.answers, self.failures = Counter[str](), Counter[str](), list[str]()
        self._address, self._items, self._over = address, items, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number, threads)) for number in range(threads)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def answered(self) -> set[str]:
        """The bundles of the answers from now on, for a while."""
        before, calls = self.answers.copy(), self.answers.total() + 60
        assert wait_until(lambda: self.answers.total() > calls, seconds=60)
        return set(self.answers - before)

    def _run(self, number: int, threads: int) -> None:
        choices = random.Random(number)
        with Client(self._address, timeout=30) as client:
            while not self._over.wait(0.005):
                user = f"user {choices.randrange(number, USERS, threads)}"  # one thread for each user
                try:
                    if choices.random() < 0.2:
                        update = client.update(user, [choices.randrange(21, 61)])  # both bundles know it
                        self.sent[user] += update.applied
                        self.answers[update.bundle_id] += 1
                    found = client.recommend(user)
                    self.answers[found.bundle_id] += 1
                    items = [int(item.item_id) for item in found]
                    if not items or not set(items) <= set(self._items[found.bundle_id]):
                        self.failures.append(f"bundle {found.bundle_id} answered {items}")
                except Exception as error:
                    self.failures.append(repr(error))


def command(server: FaultServer, name: str, bundle: Path, *options: str) -> tuple[int, str]:
    """The exit status of a command, and what it printed last."""
    return run_job(name, "--bundle", bundle, "--state", server.state, *options)


@pytest.fixture
def server(start: Start, exact_bundle: Path) -> FaultServer:
    """Of two workers, with histories."""
    server = start("--workers 2", bundle=exact_bundle)
    choices = np.random.default_rng(0)
    with Client(server.address, timeout=30) as client:
        for first in range(0, USERS, 100):
            users = [f"user {number}" for number in range(first, first + 100)]
            client.update_many({user: choices.integers(1, 61, EVENTS).tolist() for user in users})
    return server


def answered(done: tuple[int, str]) -> str:
    """What a successful activation says, without how many states it brought up to date first."""
    status, line = done
    assert status == 0, line
    return "; ".join(line.split("; ")[:2])


def test_roll_over_and_back_under_load_is_noticed_by_nobody(
    server: FaultServer, exact_bundle: Path, renamed_bundle: Path, exact: Generation, renamed: Generation
) -> None:
    """A rebuild that is killed again and again, a trial, an activation and a roll-back; then all states are right."""
    old, new = exact.bundle_id, renamed.bundle_id
    with Callers(server.address, {old: range(1, 61), new: range(21, 81)}) as callers:
        for _ in range(KILLS):
            kill_when_encoded(start_rebuild(renamed_bundle, server.state, share=0.05), 0)
        output, errors = start_rebuild(renamed_bundle, server.state, share=1).communicate(timeout=120)
        assert f"records of bundle {new}" in output, errors
        assert callers.answered() == {old}

        expected = f"bundle {new} answers 30.00% of the users, and {old} the others; in 2 running server processes"
        assert answered(command(server, "activate", renamed_bundle, "--share", "0.3")) == expected
        assert callers.answered() == {old, new}
        expected = f"bundle {new} answers instead of {old}; in 2 running server processes"
        assert answered(command(server, "activate", renamed_bundle)) == expected
        assert callers.answered() == {new}
        assert command(server, "activate", exact_bundle)[0] == 0
        assert callers.answered() == {old}
        assert command(server, "activate", renamed_bundle)[0] == 0
        assert callers.answered() == {new}
    assert callers.failures == []
    check_store(server, callers, exact, renamed)


def test_bad_bundle_changes_nothing_and_a_restart_keeps_what_was_activated(
    server: FaultServer, renamed_bundle: Path, tmp_path: Path, exact: Generation, renamed: Generation
) -> None:
    with Client(server.address, timeout=30) as client:
        bad = Path(shutil.copytree(renamed_bundle, tmp_path / "bad"))
        with (bad / "segment_encoder.onnx").open("r+b") as file:
            file.seek(1000)
            file.write(b"damage")
        status, error = command(server, "activate", bad)
        assert (status, "does not match its checksum" in error) == (2, True)
        assert client.recommend("user 1").bundle_id == exact.bundle_id

        assert command(server, "activate", renamed_bundle)[0] == 0
        assert client.recommend("user 1").bundle_id == client.status().bundle_id == renamed.bundle_id
        server.kill()
        server.start()  # with the bundle of before
        assert client.recommend("user 1").bundle_id == client.status().bundle_id == renamed.bundle_id
        victim, _ = server.workers()
        victim.kill()
        assert wait_until(lambda: client.status().workers_ready == 2 and victim not in server.workers(), seconds=40)
        for _ in range(10):
            with Client(server.address, timeout=30) as other:
                assert other.recommend("user 2").bundle_id == renamed.bundle_id
    status, line = run_job("drop", exact.bundle_id, "--state", server.state)
    assert not status and line.startswith(f"dropped {USERS} records")


@pytest.mark.parametrize("workers", [pytest.param(1, marks=whole_benchmark), 2])
def test_updates_are_applied_once_while_servers_are_killed_and_bundles_change(
    bundle: Path, tmp_path: Path, workers: int
) -> None:
    """A short form of `python -m tools.soak roll-overs`."""
    section = while_bundles_change(Soak(bundle, tmp_path, replace(QUICK, kills=3, updates=120)), workers)
    assert [claim for claim in section.claims if not claim.met] == []


def check_store(server: FaultServer, callers: Callers, old: Generation, new: Generation) -> None:
    """Every acknowledged event is stored once, and both bundles have the states of the histories."""
    server.stop()
    with LmdbStore.open(server.state) as store:
        for number in range(USERS):
            user_id = f"user {number}"
            assert len(store.history(user_id)[0]) == EVENTS + callers.sent[user_id]
        found = {one.bundle_id: one for one in list_generations(store).generations}
        assert found[old.bundle_id].records == found[new.bundle_id].records == USERS
        for generation in (old, new):  # what changed under the other is caught up when it is touched
            engine = Engine(generation, store)
            users = engine.open_users(list(store.scan()))
            engine.advance(users)
            assert engine.commit(users) == []
            check_records(engine)
