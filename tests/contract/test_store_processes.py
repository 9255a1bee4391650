"""What durable stores promise to several processes, and after the death of one."""

from __future__ import annotations

import json
import os
import signal
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from contract.processes import finish, release, say, start_with
from contract.stores import Harness

from dman_runtime.store.base import StateStore, Write

# -- death ----------------------------------------------------------------------------------------------------------

DIE = """
def commit(store, number):
    users = ["a", "b", f"new-{number}"]
    versions = [stored.head.version if stored else 0 for stored in store.get_many(users, 1)]
    times = np.arange(40 * number, 40 * number + 40)
    records = {1: b"%d" % number, 2: bytes(5000)}
    writes = [Write(user, version, records, times % 50, times, [number]) for user, version in zip(users, versions)]
    (merged,) = store.get_many(["merged"], 1)
    every = np.arange(40 * number + 40)[::-1]
    version = merged.head.version if merged else 0
    writes.append(Write("merged", version, {1: b"%d" % number}, every % 50, every, [number], replace_from=0))
    assert store.commit(writes) == []

for line in sys.stdin:
    step, number = map(int, line.split())
    child = os.fork()
    if not child:
        store = harness.open()
        with harness.at_step(step, lambda: os._exit(1)):
            commit(store, number)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def commits_found(store: StateStore) -> int:
    """How many commits of `DIE` the store holds; each must be there in full. All replace the history of "merged"."""
    users = [user for user in store.scan() if user not in ("parent", "merged")]
    commits = len([user for user in users if user.startswith("new-")])
    assert sorted(users) == sorted([*(["a", "b"] if commits else []), *(f"new-{number}" for number in range(commits))])
    times = np.arange(40 * commits)
    for user, expected in [("a", times), ("b", times), *((f"new-{n}", times[40 * n :][:40]) for n in range(commits))]:
        items, timestamps = store.history(user)
        assert (items.tolist(), timestamps.tolist()) == ((expected % 50).tolist(), expected.tolist())
        assert store.seen(user).tolist() == sorted(set((expected % 50).tolist()))
        for generation, record in [(1, b"%d" % (expected[-1] // 40) if commits else None), (2, bytes(5000))]:
            (stored,) = store.get_many([user], generation)
            if stored is None:
                assert not commits
                continue
            assert (stored.record, stored.head.history_count) == (record, len(expected))
            assert store.applied(user, range(commits + 1)) == set((expected // 40).tolist())
    items, timestamps = store.history("merged")
    assert (items.tolist(), timestamps.tolist()) == ((times[::-1] % 50).tolist(), times[::-1].tolist())
    assert store.seen("merged").tolist() == sorted(set((times % 50).tolist()))
    assert store.applied("merged", range(commits + 1)) == set(range(commits))
    (merged,) = store.get_many(["merged"], 1)
    assert (merged and merged.record) == (b"%d" % (commits - 1) if commits else None)
    return commits


@pytest.mark.slow
@pytest.mark.parametrize("durable", ["lmdb"], indirect=True)
@pytest.mark.parametrize("kept_open", [False, True], ids=["reopened", "kept open"])
def test_death_at_any_step_of_a_commit_leaves_all_of_it_or_nothing(
    durable: Harness, directory: Path, kept_open: bool
) -> None:
    """The dead child held the lock of the writers; who has the store open goes on, and who opens it does too."""
    store = durable.open()
    store.add_items([f"item-{number}" for number in range(50)])
    process = start_with(durable, directory, DIE)
    stored, found = 0, []
    for step in count():
        if not kept_open:
            store.close()
        say(process, f"{step} {stored}")
        assert process.stdout is not None
        answer = process.stdout.readline()
        if not kept_open:
            store = durable.open()
        commits = commits_found(store)
        found.append(commits > stored)
        assert stored <= commits <= stored + 1
        stored = commits
        (parent,) = store.get_many(["parent"], 1)
        events = np.array([step]), np.array([step])
        assert store.commit([Write("parent", parent.head.version if parent else 0, {}, *events)]) == []
        if answer == "0\n":
            break
        assert answer == "1\n"
    assert finish(process) == ""
    assert found[-2:] == [True, True]  # died before the return; did not die
    assert len(found) >= 4 and found == sorted(found)  # before that, at the last steps only
    assert store.history("parent")[0].tolist() == list(range(len(found)))
    store.close()
    assert durable.problems() == []


CREATE = """
for step in map(int, sys.stdin):
    child = os.fork()
    if not child:
        harness = getattr(stores, sys.argv[1])(Path(sys.argv[2], str(step)))
        with harness.at_step(step, lambda: os._exit(1)):
            store = harness.open()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_death_while_a_store_is_created_leaves_one_that_can_be_opened(durable: Harness, directory: Path) -> None:
    process = start_with(durable, directory, CREATE)
    for step in count():
        own = directory / str(step)
        own.mkdir()
        say(process, str(step))
        assert process.stdout is not None
        answer = process.stdout.readline()
        harness = type(durable)(own)
        with harness.open() as store:
            assert store.add_items(["a"]).tolist() == [0]
            assert store.commit([Write("a", 0, {1: b"record"}, np.array([0]), np.array([1]))]) == []
        assert harness.problems() == []
        if answer == "0\n":
            break
        assert answer == "1\n"
    assert finish(process) == ""
    assert step > 0 or not durable.together  # there is no step to die in where a server creates it


STREAM = """
with harness.open() as store:
    items = store.add_items([f"item-{number}" for number in range(100)])
    while True:
        writes, counts = [], []
        for name, user in zip("ab", store.get_many(["a", "b"], 1)):
            count = user.head.history_count if user else 0
            new = np.arange(count, count + 1 + count % 3)
            counts.append(count + len(new))
            records = {1: b"%d " % counts[-1] + bytes(20_000)}
            writes.append(Write(name, user.head.version if user else 0, records, items[new % 100], new))
        assert store.commit(writes) == []
        print(min(counts), flush=True)
"""


@pytest.mark.slow
def test_kill_in_a_stream_of_commits_keeps_every_acknowledged_event_once(durable: Harness, directory: Path) -> None:
    random = np.random.default_rng(3)
    for _ in range(8 if durable.together else 3):
        process = start_with(durable, directory, STREAM)
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        time.sleep(random.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.stdout.read().split("\n")[:-1]  # communicate() would not see what readline() has buffered
        process.communicate(timeout=60)
        acknowledged = int(lines[-1]) if lines else acknowledged
        with durable.open() as store:
            counts = set()
            for user_id, stored in zip("ab", store.get_many(["a", "b"], 1), strict=True):
                assert stored is not None and stored.record is not None
                counts.add(stored.head.history_count)
                assert int(stored.record.split()[0]) == stored.head.history_count
                items, timestamps = store.history(user_id)
                assert timestamps.tolist() == list(range(stored.head.history_count))
                assert store.item_ids(items[:150]) == [f"item-{number % 100}" for number in timestamps[:150]]
                assert store.seen(user_id).tolist() == sorted(set(items.tolist()))
            assert len(counts) == 1 or not durable.together
            # At most what was not answered; where each user is stored by itself, that may add up.
            assert acknowledged <= min(counts) <= max(counts) <= acknowledged + (3 if durable.together else 9)
        assert durable.problems() == []


# -- several at once ------------------------------------------------------------------------------------------------

INCREMENT = """
worker, rounds = map(int, arguments)
conflicts = 0
with harness.open() as store:
    items = store.add_items(["item-0", "item-1", "item-2"])
    for number in range(rounds):
        while True:
            (user,) = store.get_many(["shared"], 1)
            version, count = (user.head.version, int(user.record)) if user else (0, 0)
            if not number and not conflicts:  # all have read the same version, so that all but one conflict
                print("ready", flush=True)
                sys.stdin.readline()
            event = items[worker : worker + 1], np.array([worker * 1000 + number])
            if not store.commit([Write("shared", version, {1: b"%d" % (count + 1)}, *event)]):
                break
            conflicts += 1
print(conflicts)
"""


@pytest.mark.slow
def test_processes_that_write_one_user_lose_nothing(durable: Harness, directory: Path) -> None:
    processes = [start_with(durable, directory, INCREMENT, worker, 60) for worker in (1, 2)]
    release(processes)
    assert sum(int(finish(process)) for process in processes) > 0  # there were conflicts to survive
    with durable.open() as store:
        (stored,) = store.get_many(["shared"], 1)
        assert stored is not None and (stored.record, stored.head.history_count) == (b"120", 120)
        items, timestamps = store.history("shared")
        assert [store.item_ids([item]) for item in items] == [[f"item-{when // 1000}"] for when in timestamps]
        for worker in (1, 2):
            own = [when for when in timestamps.tolist() if when // 1000 == worker]
            assert own == list(range(1000 * worker, 1000 * worker + 60))


ADD = """
order = np.random.default_rng(int(arguments[0])).permutation(60).tolist()
print("ready", flush=True)
sys.stdin.readline()
with harness.open() as store:
    numbers = {}
    for start in range(0, 60, 7):
        ids = [f"item-{number}" for number in order[start : start + 7]]
        numbers |= zip(ids, store.add_items(ids).tolist())
        store.add_generation(f"bundle-{start + int(arguments[0]) % 2}")
    print(json.dumps([numbers, store.generations()]))
"""


@pytest.mark.slow
def test_processes_that_create_a_store_and_add_items_at_once_agree(durable: Harness, directory: Path) -> None:
    processes = [start_with(durable, directory, ADD, seed) for seed in range(4)]
    release(processes)
    answers = [json.loads(finish(process)) for process in processes]
    with durable.open() as store:
        ids, generations = store.item_ids(range(60)), store.generations()
    assert sorted(ids) == sorted(f"item-{number}" for number in range(60))
    assert sorted(generations.values()) == list(range(1, 19))
    for numbers, known in answers:
        assert numbers == {item_id: number for number, item_id in enumerate(ids)}
        assert known.items() <= generations.items() and len(known) >= 9
    assert durable.problems() == []
