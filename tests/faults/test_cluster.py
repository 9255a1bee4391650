"""Servers and commands over a store of the Redis protocol, as its users run them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from dman_runtime.jobs.asking import Server, ask_status
from sdk import CallError, Client
from tools.faults.jobs import run_job
from tools.faults.redis_servers import Cluster
from tools.faults.servers import FaultServer, wait_until
from tools.soak.cluster import PRIMARIES, PrimaryKills, lost_events
from tools.soak.exactly_once import Writer, wrong_histories

pytestmark = pytest.mark.slow
WAIT = 60


def problems(address: str) -> set[str]:
    return {problem["name"] for problem in ask_status(Server(address, timeout=30))["problems"]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), primaries=PRIMARIES, replicas=1) as running:
        yield running


def test_nothing_acknowledged_is_lost_when_a_primary_and_a_server_die(
    cluster: Cluster, bundle: Path, tmp_path: Path
) -> None:
    state, writers = f"redis://{cluster.address}/deaths", [Writer(number, list("123456789")) for number in range(4)]

    def server(number: int) -> FaultServer:
        return FaultServer(bundle, state, "--durability replica", log=tmp_path / f"{number}.log")

    over = threading.Event()
    with server(0) as first, server(1) as second:
        addresses = [first.address, second.address]
        threads = [threading.Thread(target=one.run, args=(addresses[one.number % 2], over)) for one in writers]
        for thread in threads:
            thread.start()
        with PrimaryKills(cluster, 1) as kills:
            assert wait_until(lambda: sum(one.updates for one in writers) > 20, seconds=WAIT)
            second.kill()
            second.start()
            assert wait_until(lambda: kills.done == 1, seconds=WAIT)
        written = sum(one.updates for one in writers)
        assert wait_until(lambda: sum(one.updates for one in writers) > written + 20, seconds=WAIT)
        over.set()
        for thread in threads:
            thread.join()
        assert [failure for one in writers for failure in one.failures] == []
        assert wrong_histories(first.address, writers) == [] and lost_events(second.address, writers) == 0


def test_roll_over_reaches_servers_that_share_no_directory(
    cluster: Cluster, bundle: Path, renamed_bundle: Path, tmp_path: Path
) -> None:
    state = f"redis://{cluster.address}/rollover"
    with (
        FaultServer(bundle, state, log=tmp_path / "0.log") as first,
        FaultServer(bundle, state, log=tmp_path / "1.log") as second,
        Client(first.address, timeout=WAIT) as client,
        Client(second.address, timeout=WAIT) as other,
    ):
        client.update("anna", ["1", "2", "3"])
        assert other.recommend("anna", k=3).event_count == 3  # what one has written, the other reads
        status, line = run_job("activate", "--bundle", renamed_bundle, "--state", state, "--provider", "cpu")
        both = client, other
        assert status == 0 and "in 2 running server processes" in line
        wanted = json.loads((renamed_bundle / "manifest.json").read_text())["bundle_id"]
        assert wait_until(
            lambda: {one.recommend("anna").bundle_id for one in (client, other)} == {wanted}, seconds=WAIT
        )
        assert run_job("items", "off", "1", "--state", state)[0] == 0
        assert wait_until(
            lambda: all("1" not in [item.item_id for item in one.recommend("anna", k=50)] for one in both),
            seconds=WAIT,
        )


def test_server_says_what_is_wrong_with_its_servers(bundle: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path / "nodes", primaries=1) as alone:
        state = f"redis://{alone.address}/alone"
        with (
            FaultServer(bundle, state, log=tmp_path / "server.log") as server,
            Client(server.address, timeout=30, retries=0) as client,
        ):
            assert client.recommend("anna", k=3).event_count == 0
            alone.nodes[0].kill()
            assert wait_until(lambda: "store_unreachable" in problems(server.address), seconds=WAIT)
            with pytest.raises(CallError) as caught:
                client.update("anna", ["1"])
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE and "redis" not in str(caught.value)
