"""Real `dman-runtime serve` processes: workers, crashes, stopping, and everything that can keep one from starting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from conftest import ROOT, TINY_ITEMS, running_server

from dman_runtime.model import encoder as encoder_module
from dman_runtime.model.bundle import FILES, MANIFEST, open_bundle
from dman_runtime.model.encoder import Encoder
from dman_runtime.model.recurrence import replay
from dman_runtime.model.state import StateBatch
from dman_runtime.store.lmdb import StateStore
from sdk import CallError, Client, ResourceExhaustedError, UpdateResult

TOLERANCE = 1e-4  # of exact_bundle, whose states are float32; see tests/test_engine.py


def error_of(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected value."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def assert_states_are_replays(bundle_path: Path, state: Path) -> dict[str, list[tuple[int, int]]]:
    """The store is whole: every record is what the stored history replays to. Returns (item, time) events by user."""
    bundle = open_bundle(bundle_path)
    graphs = Encoder(bundle_path, provider="cpu")
    with StateStore.open(state, readonly=True) as store:
        users = list(store.user_ids())
        stored = store.get_many(users)
        histories = [store.history(user) for user in users]
    found = StateBatch.from_records(bundle, [user.record for user in stored if user])
    expected = replay([items.astype(np.int64) for items, _ in histories], bundle=bundle, graphs=graphs)
    for row, (items, _) in enumerate(histories):
        used, user = int(expected.counts[row]), stored[row]
        assert user is not None and user.event_count == len(items)
        assert (found.event_counts[row], found.counts[row]) == (len(items), used)
        assert found.recent[row, :used].tolist() == items[len(items) - used :].tolist()
        assert error_of(found.hidden[row, :, :used], expected.hidden[row, :, :used]) < TOLERANCE
        assert error_of(found.memory[row], expected.memory[row]) < TOLERANCE
        assert error_of(found.user_embeddings[row], expected.user_embeddings[row]) < TOLERANCE
    return {
        user: list(zip(items.tolist(), timestamps.tolist(), strict=True))
        for user, (items, timestamps) in zip(users, histories, strict=True)
    }


def item_of(number: int) -> int:
    """The item index of event `number` of every stream; 7 and 60 have no common factor."""
    return 7 * number % TINY_ITEMS


@dataclass
class Stream:
    """A client that never stops: it feeds one user after the other with updates of 1 to 3 events, numbered by their
    timestamps, so that an event that is lost, doubled or out of order shows."""

    name: str
    acknowledged: dict[str, int] = field(default_factory=dict)  # events by user
    unanswered: tuple[str, int] | None = None  # user and size of an update that was sent and not answered
    repeats_found: int = 0  # unanswered updates that had been applied
    failures: list[str] = field(default_factory=list)

    @property
    def events(self) -> int:
        return sum(self.acknowledged.values())

    def run(self, address: str) -> None:
        """Sends until the server is gone."""
        with Client(address, retries=0, timeout=10) as client:
            try:
                if self.unanswered:
                    self._resume(client, *self.unanswered)
                while not self.failures:
                    # The memory of a random model is chaotic: rounding grows tenfold in some 60 events. So users stay
                    # short, for the comparison of states.
                    user = f"{self.name}, {self.events // 60}"
                    self._send(client, user, 1 + self.events % 3)
            except CallError:
                pass
            except Exception as error:
                self.failures.append(repr(error))

    def _resume(self, client: Client, user: str, size: int) -> None:
        """After a crash: the unanswered update is there whole or not at all, and a repeat does not apply it twice."""
        before = self.acknowledged.get(user, 0)
        found = client.recommend(user).event_count
        duplicate = self._send(client, user, size).duplicate
        self.repeats_found += duplicate
        if (found, duplicate) not in ((before, False), (before + size, True)):
            self.failures.append(f"after {before} events and {size} unanswered: {found}, {duplicate=}")

    def _send(self, client: Client, user: str, size: int) -> UpdateResult:
        first, self.unanswered = self.acknowledged.get(user, 0), (user, size)
        result = client.update(
            user,
            [item_of(n) + 1 for n in range(first, first + size)],  # item index i has the id i + 1
            timestamps=range(first, first + size),
            request_id=f"{user} from {first}",
        )
        self.acknowledged[user], self.unanswered = first + size, None
        if result.event_count != first + size:
            self.failures.append(f"{first + size} acknowledged, the server has {result.event_count}")
        return result

    def check(self, stored: dict[str, list[tuple[int, int]]]) -> None:
        """Acknowledged events are stored once, in order; an unanswered update whole or not at all."""
        possible = {user: {count} for user, count in self.acknowledged.items()}
        if self.unanswered:
            user, size = self.unanswered
            possible.setdefault(user, {0}).add(self.acknowledged.get(user, 0) + size)
        for user, counts in possible.items():
            events = stored.pop(user, [])
            assert events == [(item_of(n), n) for n in range(len(events))]
            assert len(events) in counts


def run_streams(streams: list[Stream], address: str, stop: Callable[[], None]) -> None:
    """All streams at once, until `stop` has made the server go."""
    threads = [threading.Thread(target=stream.run, args=(address,)) for stream in streams]
    for thread in threads:
        thread.start()
    try:
        stop()
    finally:
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert [failure for stream in streams for failure in stream.failures] == []


# -- crash safety ----------------------------------------------------------------------------------------------------


def test_server_killed_20_times_in_a_stream_keeps_every_acknowledged_event_once(
    exact_bundle: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    streams = [Stream(f"stream {number}") for number in range(5)]
    for _ in range(20):
        with running_server(exact_bundle, tmp_path / "state") as (address, process):
            before = sum(stream.events for stream in streams)

            def kill(process: subprocess.Popen[str] = process, before: int = before) -> None:
                deadline = time.monotonic() + 20
                while sum(stream.events for stream in streams) == before and time.monotonic() < deadline:
                    time.sleep(0.002)  # every round makes progress
                time.sleep(random.uniform(0, 0.2))
                process.kill()

            run_streams(streams, address, kill)
            assert process.wait(30) == -signal.SIGKILL
    stored = assert_states_are_replays(exact_bundle, tmp_path / "state")
    for stream in streams:
        stream.check(stored)
    assert stored == {}  # nobody else is there
    assert min(stream.events for stream in streams) > 100
    assert sum(stream.repeats_found for stream in streams) > 0  # some kill fell between the commit and its answer


# -- stopping --------------------------------------------------------------------------------------------------------


def test_sigterm_lets_requests_in_flight_finish_and_keeps_what_was_acknowledged(
    exact_bundle: Path, tmp_path: Path
) -> None:
    streams = [Stream(f"stream {number}") for number in range(4)]
    with running_server(exact_bundle, tmp_path / "state") as (address, process):

        def stop() -> None:
            time.sleep(0.3)
            process.terminate()

        run_streams(streams, address, stop)
        assert process.wait(30) == 0
    assert min(stream.events for stream in streams) > 0
    stored = assert_states_are_replays(exact_bundle, tmp_path / "state")
    with running_server(exact_bundle, tmp_path / "state") as (address, _), Client(address, timeout=10) as client:
        for user, events in stored.items():
            assert client.user(user).event_count == len(events)
    for stream in streams:
        stream.check(stored)
    assert stored == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_waits_for_a_long_update_and_exits_with_0(exact_bundle: Path, tmp_path: Path, workers: int) -> None:
    options = ("--workers", str(workers), "--grace", "30")
    with running_server(exact_bundle, tmp_path / "state", *options) as (address, process):
        with Client(address, retries=0, timeout=60) as client, ThreadPoolExecutor(1) as pool:
            client.update("other", [1])  # connected
            waiting = pool.submit(client.update, "long", [1 + n % TINY_ITEMS for n in range(10_000)])
            time.sleep(0.1)
            process.terminate()
            in_flight = not waiting.done()
            assert waiting.result(60).event_count == 10_000
        assert in_flight
        assert process.wait(30) == 0
    with StateStore.open(tmp_path / "state", readonly=True) as store:
        assert len(store.history("long")[0]) == 10_000


STOPPED_BY_ANOTHER_THREAD = """
import os, signal, threading, time
from dman_runtime.serving.server import _Stop
with _Stop() as stop:
    assert not stop.wait(0)
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # this thread will get the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert stop.wait(20) and stop.wait(0)
stop.set()
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
"""


def test_sigterm_is_noticed_though_the_main_thread_sleeps_through_it() -> None:
    """Once in some hundred stops, the signal came as the main thread began to wait, and the server never stopped."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_BY_ANOTHER_THREAD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")  # nor does a second one, while the process ends, say anything


# -- several workers -------------------------------------------------------------------------------------------------


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


def test_two_workers_and_many_clients_give_what_one_replay_gives(exact_bundle: Path, tmp_path: Path) -> None:
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

    stored = assert_states_are_replays(exact_bundle, tmp_path / "state")
    assert {user: [item for item, _ in events] for user, events in stored.items()} == histories
    bundle = open_bundle(exact_bundle)
    whole = replay(
        [np.array(history) for history in histories.values()],
        bundle=bundle,
        graphs=Encoder(exact_bundle, provider="cpu"),
    )
    for (user, history), embedding in zip(histories.items(), whole.user_embeddings, strict=True):
        scores = bundle.item_embeddings @ embedding
        best = np.sort(np.delete(scores, np.unique(history)))[::-1][:10]
        found = np.array([item.score for item in answers[user]])
        items = np.array([int(item.item_id) - 1 for item in answers[user]])
        assert answers[user].event_count == len(history)
        assert not set(items.tolist()) & set(history)
        margin = TOLERANCE * np.abs(scores).max()
        assert np.abs(found - best).max() <= margin and np.abs(found - scores[items]).max() <= margin


def test_concurrent_updates_of_one_user_through_two_workers_lose_nothing(exact_bundle: Path, tmp_path: Path) -> None:
    with running_server(exact_bundle, tmp_path / "state", "--workers", "2") as (address, process):

        def feed(thread: int) -> None:
            with Client(address, timeout=60) as client:
                for n in range(5):
                    client.update("shared", [item_of(n) + 1], timestamps=1000 * thread + n)

        with ThreadPoolExecutor(16) as pool:
            running = [pool.submit(feed, thread) for thread in range(16)]
            busy: set[int] = set()
            while not all(one.done() for one in running):  # bounded by the clients' timeouts
                busy |= {worker.pid for worker in workers_of(process) if connections(worker)}
                time.sleep(0.02)
            for one in running:
                one.result()
        assert len(busy) == 2
    events = assert_states_are_replays(exact_bundle, tmp_path / "state")["shared"]
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


def test_workers_killed_in_a_stream_lose_and_double_nothing(exact_bundle: Path, tmp_path: Path) -> None:
    """The store's lock outlives a worker that dies holding it, and the other worker goes on at once."""
    streams = [Stream(f"stream {number}") for number in range(6)]
    for place in range(4):
        options = ("--workers", "2")
        with running_server(exact_bundle, tmp_path / "state", *options) as (address, process):

            def stop(process: subprocess.Popen[str] = process, place: int = place) -> None:
                time.sleep(0.3)
                workers_of(process)[place % 2].kill()
                time.sleep(0.3)
                process.terminate()

            run_streams(streams, address, stop)
            assert process.wait(30) == 0
    stored = assert_states_are_replays(exact_bundle, tmp_path / "state")
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


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_full_store_refuses_updates_and_keeps_serving_what_it_has(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--map-size-mib", "1")
    with (
        running_server(tiny_bundle, tmp_path / "state", *options) as (address, _),
        Client(address, timeout=30) as client,
    ):
        written: dict[str, int] = {}
        with pytest.raises(ResourceExhaustedError) as caught:
            for n in range(5000):
                written[f"user {n}"] = -1
                written[f"user {n}"] = client.update(f"user {n}", [1 + n % TINY_ITEMS, 2, 3]).event_count
        assert caught.value.details == "the state store is full; nothing was written"
        refused, _ = written.popitem()
        assert len(written) > 20
        assert client.recommend(refused).is_popular
        for user, count in written.items():
            assert client.user(user).event_count == count == 3
            assert not client.recommend(user).is_popular
        for user in list(written)[: len(written) // 2]:  # a deletion makes room
            assert client.delete_user(user).existed
        assert client.update(refused, [1]).event_count == 1


def test_a_message_over_16_mib_is_refused_and_changes_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    with running_server(tiny_bundle, tmp_path / "state") as (address, _):
        options = [("grpc.max_send_message_length", 64 << 20)]
        with Client(address, timeout=30, options=options) as client:
            with pytest.raises(ResourceExhaustedError) as caught:
                client.update("anna", ["x" * (17 << 20)])
            assert "larger than max" in (caught.value.details or "")
            assert client.update("anna", [1]).event_count == 1


# -- not starting ----------------------------------------------------------------------------------------------------


def refusal(bundle: Path, state: Path, *options: str) -> str:
    """The one line with which `serve` refuses to start, with exit status 2."""
    command = [sys.executable, "-m", "dman_runtime", "serve", "--bundle", str(bundle), "--state", str(state)]
    done = subprocess.run(
        [*command, "--port", "0", *options], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0]
    rest = [line for line in done.stderr.splitlines()[:-1] if " INFO " not in line]
    assert rest == []  # nothing but the log beside it
    return errors[0]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_port_in_use_is_refused_with_the_address_and_the_remedy(
    tiny_bundle: Path, tmp_path: Path, workers: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        message = refusal(tiny_bundle, tmp_path / "state", "--port", port, "--workers", workers)
    assert f"cannot listen on 127.0.0.1:{port}" in message
    assert message.endswith("stop the other server or choose another --port")


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("other_workers", ["1", "2"])
def test_port_of_another_dman_server_is_not_shared(
    tiny_bundle: Path, tmp_path: Path, workers: str, other_workers: str
) -> None:
    with running_server(tiny_bundle, tmp_path / "other", "--workers", other_workers) as (address, _):
        port = address.rpartition(":")[2]
        message = refusal(tiny_bundle, tmp_path / "state", "--port", port, "--workers", workers)
    assert f"cannot listen on {address}" in message


@pytest.mark.parametrize("workers", ["1", "2"])
def test_port_is_free_again_right_after_a_crash(tiny_bundle: Path, tmp_path: Path, workers: str) -> None:
    """Connections that the dead server closed linger in TIME_WAIT for a minute; they do not hold the port."""
    with running_server(tiny_bundle, tmp_path / "state") as (address, process), Client(address, timeout=30) as client:
        client.update("anna", [1])
        process.kill()
        process.wait(30)
        with pytest.raises(CallError):
            client.user("anna", timeout=1)
    options = ("--port", address.rpartition(":")[2], "--workers", workers)
    with running_server(tiny_bundle, tmp_path / "state", *options) as (again, _), Client(again, timeout=30) as client:
        assert again == address
        assert client.user("anna").event_count == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_unusable_state_directory_is_refused(tiny_bundle: Path, tmp_path: Path, workers: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    for state in (tmp_path / "file", tmp_path / "file" / "state", Path("/proc/dman-state")):
        message = refusal(tiny_bundle, state, "--workers", workers)
        assert str(state) in message
        assert "--state" in message or "permissions" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_state_directory_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o500)
    assert str(state) in refusal(tiny_bundle, state)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_state_of_another_bundle_is_refused_and_left_alone(
    exact_bundle: Path, tiny_bundle: Path, tmp_path: Path, workers: str
) -> None:
    state = tmp_path / "state"
    with running_server(exact_bundle, state) as (address, _), Client(address, timeout=30) as client:
        client.update("anna", [1])
    before = (state / "data.mdb").read_bytes()
    message = refusal(tiny_bundle, state, "--workers", workers)
    assert open_bundle(exact_bundle).bundle_id in message and open_bundle(tiny_bundle).bundle_id in message
    assert "--state" in message
    assert (state / "data.mdb").read_bytes() == before


@pytest.fixture
def copied_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("name", FILES)
def test_bundle_with_a_flipped_bit_is_refused(copied_bundle: Path, tmp_path: Path, name: str) -> None:
    content = bytearray((copied_bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied_bundle / name).write_bytes(content)
    message = refusal(copied_bundle, tmp_path / "state")
    assert str(copied_bundle / name) in message and "damaged" in message
    assert not (tmp_path / "state").exists()


def test_bundle_with_an_edited_manifest_is_refused(copied_bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((copied_bundle / MANIFEST).read_text())
    manifest["state"]["segment_length"] += 1
    (copied_bundle / MANIFEST).write_text(json.dumps(manifest))
    assert "damaged or was edited" in refusal(copied_bundle, tmp_path / "state")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bundle_of_another_format_version_is_refused(copied_bundle: Path, tmp_path: Path, workers: str) -> None:
    manifest = json.loads((copied_bundle / MANIFEST).read_text())
    (copied_bundle / MANIFEST).write_text(json.dumps({**manifest, "format_version": 2, "new": 1}))
    message = refusal(copied_bundle, tmp_path / "state", "--workers", workers)
    assert "bundle format 2, this runtime reads format 1" in message and "export it again" in message


def test_missing_bundle_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} is not a bundle" in refusal(tmp_path / "nowhere", tmp_path / "state")


@pytest.mark.skipif(encoder_module._has_cuda_device(), reason="there is a CUDA device")
def test_provider_cuda_without_cuda_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    message = refusal(tiny_bundle, tmp_path / "state", "--provider", "cuda")
    assert "--provider cuda: " in message and "use --provider auto or cpu" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "65536"),
        ("--workers", "0"),
        ("--threads", "0"),
        ("--max-concurrent", "0"),
        ("--map-size-mib", "0"),
        ("--grace", "nan"),
        ("--grace", "-1.0"),
    ],
)
def test_impossible_option_is_refused_with_its_range(
    tiny_bundle: Path, tmp_path: Path, option: str, value: str
) -> None:
    message = refusal(tiny_bundle, tmp_path / "state", option, value)
    assert f"{option} is {value}; choose" in message


def test_overload_beyond_max_concurrent_is_refused_at_once(exact_bundle: Path, tmp_path: Path) -> None:
    options = ("--max-concurrent", "1", "--threads", "1")
    with (
        running_server(exact_bundle, tmp_path / "state", *options) as (address, _),
        Client(address, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.update("other", [1])

        def long_update() -> UpdateResult:
            for _ in range(100):  # it may itself arrive while the one place is taken
                with suppress(ResourceExhaustedError):
                    return client.update("long", [1 + n % TINY_ITEMS for n in range(10_000)])
            raise AssertionError("never admitted")

        waiting = pool.submit(long_update)
        with pytest.raises(ResourceExhaustedError) as caught:  # as soon as the long update has been admitted
            while not waiting.done():
                client.recommend("other")
                time.sleep(0.02)
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert waiting.result(60).event_count == 10_000
        assert client.recommend("other").event_count == 1
