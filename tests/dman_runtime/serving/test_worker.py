"""Real `dman-runtime serve` processes with one worker: crashes, stopping, limits."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from conftest import ROOT, TINY_ITEMS, running_server
from streams import Stream, assert_states_are_replays, run_streams

from dman_runtime.model.generation import Generation
from dman_runtime.store.lmdb import LmdbStore
from sdk import Client, ResourceExhaustedError, UpdateResult

# -- crash safety ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_server_killed_20_times_in_a_stream_keeps_every_acknowledged_event_once(
    exact: Generation, exact_bundle: Path, tmp_path: Path
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
    stored = assert_states_are_replays(exact, tmp_path / "state")
    for stream in streams:
        stream.check(stored)
    assert stored == {}  # nobody else is there
    assert min(stream.events for stream in streams) > 100
    assert sum(stream.repeats_found for stream in streams) > 0  # some kill fell between the commit and its answer


# -- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_lets_requests_in_flight_finish_and_keeps_what_was_acknowledged(
    exact: Generation, exact_bundle: Path, tmp_path: Path
) -> None:
    streams = [Stream(f"stream {number}") for number in range(4)]
    with running_server(exact_bundle, tmp_path / "state") as (address, process):

        def stop() -> None:
            time.sleep(0.3)
            process.terminate()

        run_streams(streams, address, stop)
        assert process.wait(30) == 0
    assert min(stream.events for stream in streams) > 0
    stored = assert_states_are_replays(exact, tmp_path / "state")
    with running_server(exact_bundle, tmp_path / "state") as (address, _), Client(address, timeout=10) as client:
        for user, events in stored.items():
            assert client.user(user).event_count == len(events)
    for stream in streams:
        stream.check(stored)
    assert stored == {}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_waits_for_a_long_update_and_exits_with_0(exact_bundle: Path, tmp_path: Path, workers: int) -> None:
    options = ("--workers", str(workers), "--grace", "30")
    with running_server(exact_bundle, tmp_path / "state", *options) as (address, process):
        with Client(address, retries=0, timeout=60) as client, ThreadPoolExecutor(1) as pool:
            client.update("other", [1])  # connected
            waiting = pool.submit(client.update, "long", [1 + n % TINY_ITEMS for n in range(10_000)])
            deadline = time.monotonic() + 20
            while client.status().bytes_in_flight < 10_000 and time.monotonic() < deadline:  # until it has arrived
                time.sleep(0.01)
            process.terminate()
            in_flight = not waiting.done()
            assert waiting.result(60).event_count == 10_000
        assert in_flight
        assert process.wait(30) == 0
    with LmdbStore.open(tmp_path / "state", readonly=True) as store:
        assert len(store.history("long")[0]) == 10_000


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
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
        public, _, reference = (caught.value.details or "").rpartition(" ")
        assert public == (
            "the state store is full; nothing was written; the server's log has the cause under reference"
        )
        assert re.fullmatch("[0-9a-f]{12}", reference)
        refused, _ = written.popitem()
        assert len(written) > 20
        assert client.recommend(refused).is_popular
        for user, count in written.items():
            assert client.user(user).event_count == count == 3
            assert not client.recommend(user).is_popular
        for user in list(written)[: len(written) // 2]:  # a deletion makes room
            assert client.delete_user(user).existed
        assert client.update(refused, [1]).event_count == 1


@pytest.mark.slow
def test_a_message_over_16_mib_is_refused_and_changes_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    with running_server(tiny_bundle, tmp_path / "state") as (address, _):
        options = [("grpc.max_send_message_length", 64 << 20)]
        with Client(address, timeout=30, options=options) as client:
            with pytest.raises(ResourceExhaustedError) as caught:
                client.update("anna", ["x" * (17 << 20)])
            assert "larger than max" in (caught.value.details or "")
            assert client.update("anna", [1]).event_count == 1


@pytest.mark.slow
def test_overload_beyond_max_concurrent_is_refused_at_once(exact_bundle: Path, tmp_path: Path) -> None:
    options = ("--max-concurrent", "1")
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


def test_worker_multiplies_matrices_on_one_thread() -> None:
    script = """
from dman_runtime.retrieval.exact import multiply_on_one_thread
from threadpoolctl import threadpool_info
multiply_on_one_thread()
print([pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[1]"
