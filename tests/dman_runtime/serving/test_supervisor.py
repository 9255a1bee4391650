"""Real `dman-runtime serve` processes with several workers: one service, whatever happens to one of them."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import TINY_ITEMS, running_server
from streams import TOLERANCE, Stream, assert_states_are_replays, item_of, run_streams

from dman_runtime.model.generation import Generation
from sdk import Client

pytestmark = pytest.mark.slow  # each starts three processes


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has just ended
            continue
    return found


def connections(worker: psutil.Process) -> int:
    return sum(one.status == psutil.CONN_ESTABLISHED for one in worker.net_connections("tcp"))


def test_two_workers_and_many_clients_give_what_one_replay_gives(
    exact: Generation, exact_bundle: Path, tmp_path: Path
) -> None:
    """Concurrent clients, the updates of each user one after the other: any worker may get any of them."""
    random = np.random.default_rng(1)
    histories = {f"user {n}": random.integers(0, TINY_ITEMS, 7 + 5 * n).tolist() for n in range(12)}
    with running_server(exact_bundle, tmp_path / "state", "--workers", "2") as (address, process), ExitStack() as stack:
        clients = [stack.enter_context(Client(address, timeout=30)) for _ in range(16)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda client: client.recommend("nobody"), clients))
        assert min(connections(worker) for worker in workers_of(process)) > 0

        def feed(user: str, seed: int) -> None:
            choices, left = np.random.default_rng(seed), histories[user]
            while left:
                size = int(choices.integers(1, 7))
                clients[choices.integers(len(clients))].update(user, [item + 1 for item in left[:size]])
                left = left[size:]

        with ThreadPoolExecutor(len(histories)) as pool:
            list(pool.map(feed, histories, range(len(histories))))
        answers = {user: clients[0].recommend(user, k=10) for user in histories}

    stored = assert_states_are_replays(exact, tmp_path / "state")
    assert {user: [int(item) - 1 for item, _ in events] for user, events in stored.items()} == histories
    whole = exact.replay([np.array(history) for history in histories.values()])
    for (user, history), state in zip(histories.items(), whole, strict=True):
        scores = exact.bundle.item_embeddings @ state.user_embedding
        best = np.sort(np.delete(scores, np.unique(history)))[::-1][:10]
        found = np.array([item.score for item in answers[user]])
        items = np.array([int(item.item_id) - 1 for item in answers[user]])
        assert answers[user].event_count == len(history)
        assert not set(items.tolist()) & set(history)
        margin = TOLERANCE * np.abs(scores).max()
        assert np.abs(found - best).max() <= margin and np.abs(found - scores[items]).max() <= margin


def test_concurrent_updates_of_one_user_through_two_workers_lose_nothing(
    exact: Generation, exact_bundle: Path, tmp_path: Path
) -> None:
    with running_server(exact_bundle, tmp_path / "state", "--workers", "2") as (address, process):

        def feed(thread: int) -> None:
            with Client(address, timeout=60) as client:
                for n in range(5):
                    client.update("shared", [item_of(n)], timestamps=1000 * thread + n)

        with ThreadPoolExecutor(16) as pool:
            running = [pool.submit(feed, thread) for thread in range(16)]
            busy: set[int] = set()
            while not all(one.done() for one in running):  # bounded by the clients' timeouts
                busy |= {worker.pid for worker in workers_of(process) if connections(worker)}
                time.sleep(0.02)
            for one in running:
                one.result()
        assert len(busy) == 2
    events = assert_states_are_replays(exact, tmp_path / "state")["shared"]
    for thread in range(16):
        own = [(item, time % 1000) for item, time in events if time // 1000 == thread]
        assert own == [(item_of(n), n) for n in range(5)]  # each once, in the order that its client sent them
    assert len(events) == 16 * 5


def test_a_killed_worker_is_restarted_and_service_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    with running_server(tiny_bundle, tmp_path / "state", "--workers", "2") as (address, process):
        before = workers_of(process)
        assert len(before) == 2
        with Client(address, timeout=30) as client:
            client.update("anna", [1, 2, 3])
        before[0].kill()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            after = workers_of(process)
            if len(after) == 2 and before[0].pid not in [worker.pid for worker in after]:
                break
            time.sleep(0.05)
        assert len(after) == 2 and before[1] in after and before[0] not in after
        for _ in range(12):  # new connections land on either worker
            with Client(address, timeout=30, retries=5) as client:
                assert client.user("anna").event_count == 3
        assert process.poll() is None


def test_a_worker_killed_while_it_starts_is_restarted_again(tiny_bundle: Path, tmp_path: Path) -> None:
    with running_server(tiny_bundle, tmp_path / "state", "--workers", "2") as (address, process):
        first, other = workers_of(process)
        first.kill()
        done, deadline = {first.pid, other.pid}, time.monotonic() + 30
        while len(done) < 4 and time.monotonic() < deadline:  # two of its successors, as soon as they show
            for worker in workers_of(process):
                if worker.pid not in done:
                    worker.kill()
                    done.add(worker.pid)
            time.sleep(0.01)
        assert len(done) == 4
        while len(workers_of(process)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(workers_of(process)) == 2 and other.is_running() and process.poll() is None
        with Client(address, timeout=30, retries=5) as client:
            assert client.update("anna", [1]).event_count == 1


def test_workers_killed_in_a_stream_lose_and_double_nothing(
    exact: Generation, exact_bundle: Path, tmp_path: Path
) -> None:
    """The store's lock outlives a worker that dies holding it, and the other worker goes on at once."""
    streams = [Stream(f"stream {number}") for number in range(6)]
    for turn in range(4):
        options = ("--workers", "2")
        with running_server(exact_bundle, tmp_path / "state", *options) as (address, process):

            def stop(process: subprocess.Popen[str] = process, turn: int = turn) -> None:
                time.sleep(0.3)
                workers_of(process)[turn % 2].kill()
                time.sleep(0.3)
                process.terminate()

            run_streams(streams, address, stop)
            assert process.wait(30) == 0
    stored = assert_states_are_replays(exact, tmp_path / "state")
    for stream in streams:
        stream.check(stored)
    assert stored == {}


def test_workers_of_a_killed_supervisor_stop_by_themselves(tiny_bundle: Path, tmp_path: Path) -> None:
    with running_server(tiny_bundle, tmp_path / "state", "--workers", "2") as (_, process):
        workers = workers_of(process)
        assert len(workers) == 2
        process.kill()
        gone, alive = psutil.wait_procs(workers, timeout=30)
        for worker in alive:
            worker.kill()
        assert (len(gone), alive) == (2, [])
