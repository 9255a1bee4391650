"""Rebuilds beside a server that serves another bundle: killed again and again, and nobody else notices."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from record_checks import check_records

from dman_runtime.engine import Engine
from dman_runtime.jobs.generations import list_generations
from dman_runtime.model.generation import Generation
from dman_runtime.store.lmdb import LmdbStore
from sdk import Client
from tools.faults.servers import FaultServer, python_environment, wait_until

from .conftest import Start

pytestmark = pytest.mark.slow

USERS, EVENTS, KILLS = 400, 35, 5  # not many events: check_records compares with replays


class Callers:
    """Threads that update and recommend until they are stopped; `sent` counts acknowledged events by user."""

    def __init__(self, address: str, threads: int = 3) -> None:
        self.sent, self.calls, self.failures = Counter[str](), 0, list[str]()
        self._address, self._over = address, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        choices = random.Random(number)
        with Client(self._address, timeout=30) as client:
            while not self._over.wait(0.005):
                user = f"user {choices.randrange(number, USERS, len(self._threads))}"  # one thread for each user
                try:
                    if choices.random() < 0.2:
                        self.sent[user] += client.update(user, [choices.randrange(1, 61)]).applied
                    client.recommend(user)
                except Exception as error:
                    self.failures.append(repr(error))
                self.calls += 1


def start_rebuild(bundle: Path, state: Path, *, share: float) -> subprocess.Popen[str]:
    options = ["--bundle", str(bundle), "--state", str(state), "--provider", "cpu", "--max-share", str(share)]
    return subprocess.Popen(
        [sys.executable, "-m", "dman_runtime", "rebuild", *options],
        cwd=ROOT,
        env=python_environment(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def records_of(state: Path, bundle_id: str) -> int:
    with LmdbStore.open(state, readonly=True) as store:
        return sum(one.records for one in list_generations(store).generations if one.bundle_id == bundle_id)


def kill_in_the_middle(job: subprocess.Popen[str], state: Path, bundle_id: str) -> None:
    """Once it has made some more records."""
    before = records_of(state, bundle_id)
    assert wait_until(lambda: records_of(state, bundle_id) > before or job.poll() is not None, seconds=60)
    job.kill()
    job.communicate()


def test_rebuild_that_is_killed_beside_a_server_loses_nothing_and_ends(
    start: Start, renamed_bundle: Path, exact: Generation, renamed: Generation, exact_bundle: Path
) -> None:
    server = start("--workers 2", bundle=exact_bundle)
    choices = np.random.default_rng(0)
    with Client(server.address, timeout=30) as client:
        for first in range(0, USERS, 100):
            histories = {
                f"user {number}": choices.integers(1, 61, EVENTS).tolist() for number in range(first, first + 100)
            }
            client.update_many(histories)
    with Callers(server.address) as callers:
        for _ in range(KILLS):
            kill_in_the_middle(start_rebuild(renamed_bundle, server.state, share=0.05), server.state, renamed.bundle_id)
        output, errors = start_rebuild(renamed_bundle, server.state, share=1).communicate(timeout=120)
        assert f"records of bundle {renamed.bundle_id}" in output, errors
    assert callers.failures == [] and callers.calls > 100
    check_store(server, callers, exact, renamed)


def check_store(server: FaultServer, callers: Callers, old: Generation, new: Generation) -> None:
    """Every acknowledged event is stored once, and both bundles have the states of the histories."""
    server.stop()
    with LmdbStore.open(server.state) as store:
        for number in range(USERS):
            user_id = f"user {number}"
            assert len(store.history(user_id)[0]) == EVENTS + callers.sent[user_id]
        found = {one.bundle_id: one for one in list_generations(store).generations}
        assert found[old.bundle_id].current == USERS  # what it served, it kept current
        assert found[new.bundle_id].records == USERS
        assert found[new.bundle_id].current >= USERS - 64  # the rest changed at the end
        check_records(Engine(old, store))
        late = Engine(new, store)
        users = late.open_users(list(store.scan()))
        late.advance(users)
        assert late.commit(users) == []
        check_records(late)
