"""Real `dman-runtime serve` processes with several workers: one service, whatever happens to one of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, TINY_ITEMS, events_of, running_server
from streams import TOLERANCE, Stream, assert_states_are_replays, item_of, run_streams

from dman_runtime.model.generation import Generation
from sdk import Client
from tools.faults.servers import free_port

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
    whole = exact.replay([events_of(history) for history in histories.values()])
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


# -- what happens to one worker and what the others do ---------------------------------------------------------------


def listening(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The workers that take connections."""
    found = []
    for worker in workers_of(process):
        with suppress(psutil.Error):
            if any(one.status == psutil.CONN_LISTEN for one in worker.net_connections("tcp")):
                found.append(worker)
    return found


def wait_for(done: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def client_of(worker: psutil.Process, address: str, stack: ExitStack) -> Client:
    """One whose connection this worker has. It never repeats a call: each must succeed."""
    for _ in range(100):
        before = connections(worker)
        client = stack.enter_context(Client(address, timeout=10, retries=0))
        client.recommend("nobody")
        if connections(worker) > before:
            return client
    raise AssertionError("no connection reached the worker")


def replace_bundle(path: Path, new: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(new, path)


def test_a_replaced_bundle_keeps_a_worker_from_starting_and_the_other_serving(
    tiny_bundle: Path, renamed_bundle: Path, tmp_path: Path
) -> None:
    """The service used to be gone after 9 s."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with (
        running_server(bundle, tmp_path / "state", "--workers", "2") as (address, process),
        ExitStack() as stack,
    ):
        victim, healthy = workers_of(process)
        client = client_of(healthy, address, stack)
        replace_bundle(bundle, renamed_bundle)
        victim.kill()
        end, calls, started = time.monotonic() + 12, 0, {victim.pid}
        while time.monotonic() < end:
            calls += 1
            assert client.update("anna", [1]).event_count == calls
            assert client.recommend("anna").event_count == calls
            started |= {worker.pid for worker in workers_of(process)} - {healthy.pid}
            time.sleep(0.01)
        assert listening(process) == [healthy] and process.poll() is None
        assert 3 <= len(started) <= 8  # after pauses of .5, 1, 2, 4, ... s
        replace_bundle(bundle, tiny_bundle)
        wait_for(lambda: len(listening(process)) == 2)
        assert healthy in listening(process)
        new = next(worker for worker in listening(process) if worker != healthy)
        assert client_of(new, address, stack).user("anna").event_count == calls
        process.terminate()
        assert process.wait(30) == 0


def test_a_stopped_worker_is_replaced_and_the_other_serves_meanwhile(tiny_bundle: Path, tmp_path: Path) -> None:
    with (
        running_server(tiny_bundle, tmp_path / "state", "--workers", "2") as (address, process),
        ExitStack() as stack,
    ):
        victim, healthy = workers_of(process)
        client = client_of(healthy, address, stack)
        victim.suspend()
        stopped, calls = time.monotonic(), 0
        while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - stopped < 20
            calls += 1
            assert client.update("anna", [1]).event_count == calls
            time.sleep(0.01)
        assert time.monotonic() - stopped > 4
        wait_for(lambda: len(listening(process)) == 2)
        for _ in range(8):
            with Client(address, timeout=5, retries=0) as other:
                assert other.user("anna").event_count == calls


def test_while_one_worker_is_killed_again_and_again_the_other_answers_every_call(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    with (
        running_server(tiny_bundle, tmp_path / "state", "--workers", "2") as (address, process),
        ExitStack() as stack,
    ):
        victim, healthy = workers_of(process)
        client = client_of(healthy, address, stack)
        killed, calls, slowest, end = set[int](), 0, 0.0, time.monotonic() + 12
        while time.monotonic() < end:
            for worker in workers_of(process):
                if worker.pid not in {healthy.pid, *killed}:
                    worker.kill()
                    killed.add(worker.pid)
            calls += 1
            asked = time.monotonic()
            assert client.update("anna", [1]).event_count == calls
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.01)
        assert victim.pid in killed and 4 <= len(killed) <= 8
        assert slowest < 1.0 and healthy.is_running()
        wait_for(lambda: len(listening(process)) == 2)


# -- metrics and logs ------------------------------------------------------------------------------------------------


def metrics_at(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@pytest.mark.parametrize("workers", [1, 2])
def test_metrics_of_a_server_are_at_its_port_until_it_ends(
    tiny_bundle: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "another program's"))
    port = free_port()
    options = ("--workers", str(workers), "--metrics-port", str(port))
    with running_server(tiny_bundle, tmp_path / "state", *options) as (_, process):
        found = metrics_at(port)
        assert (found["dman_workers"], found["dman_workers_ready"]) == (workers, workers)
        assert found["dman_worker_restarts_total"] == 0 and "dman_queue_depth" in found
        if workers > 1:
            workers_of(process)[0].kill()
            wait_for(lambda: metrics_at(port)["dman_worker_restarts_total"] == 1)
            wait_for(lambda: metrics_at(port)["dman_workers_ready"] == 2)
            assert metrics_at(port)['dman_problem{problem="worker_down"}'] == 0
        process.terminate()
        assert process.wait(30) == 0
        with pytest.raises(OSError):
            metrics_at(port)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_taken_metrics_port_is_one_line_before_anything_starts(
    tiny_bundle: Path, tmp_path: Path, workers: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "dman_runtime", "serve", "--port", "0", "--bundle", str(tiny_bundle)]
        command += ["--state", str(tmp_path / "state"), "--workers", str(workers), "--metrics-port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    reason, remedy = "Address already in use", "choose another address or port (--metrics-port)"
    assert done.stderr == f"error: cannot serve metrics on 127.0.0.1 port {port}: {reason}; {remedy}\n"


LOGGING_SERVER = """
import sys
from dataclasses import replace
from pathlib import Path
from dman_runtime.options import configure_logging
from dman_runtime.serving.config import ServeConfig
from dman_runtime.serving.supervisor import serve
if __name__ == "__main__":
    configure_logging(json=True)
    sys.exit(serve(ServeConfig(
        bundle=Path(sys.argv[1]), state=Path(sys.argv[2]), host="127.0.0.1", port=0, provider="cpu", workers=2,
        encoder_threads=1, max_concurrent=64, map_size_mib=64, grace=5.0, log_format="json")))
"""


def test_with_json_logs_every_line_of_supervisor_and_workers_is_an_object(tiny_bundle: Path, tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(LOGGING_SERVER)
    command = [sys.executable, str(script), str(tiny_bundle), str(tmp_path / "state")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None and "serving bundle" in process.stdout.readline()
            workers_of(process)[0].send_signal(signal.SIGKILL)
            wait_for(lambda: '"worker_ready"' in (tmp_path / "log").read_text())
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.stdout.close()  # type: ignore[union-attr]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {"worker_down", "worker_ready"} <= {line.get("event") for line in lines}
    assert len({line["process"] for line in lines}) >= 3 and all(line["time"].endswith("Z") for line in lines)
