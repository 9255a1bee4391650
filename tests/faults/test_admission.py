"""Callers who send nothing, too much, or more than they wait for: others are served meanwhile."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest

from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.servers import connect
from tools.faults import http2
from tools.faults.attacks import (
    IdleConnections,
    OpenRequests,
    SlowReaders,
    WriteLock,
    abandoned_batches,
    busy_user,
    large_messages,
    large_reply_request,
    update,
    what_ifs,
)
from tools.faults.honest import add_one_event, failures, health, recommend, stored_events
from tools.faults.http2 import RawConnection
from tools.faults.servers import PeakMemory, wait_until

from .conftest import ITEMS, Start

pytestmark = pytest.mark.slow  # each starts a server, and most wait for what must not happen


@pytest.mark.parametrize("path", [http2.RECOMMEND, http2.REFLECTION], ids=["recommend", "reflection"])
def test_requests_without_a_body_hold_up_nobody(start: Start, path: str) -> None:
    server = start()
    with OpenRequests(server.address, path=path):
        assert failures(server.address, recommend, health, add_one_event) == []


def test_blocked_commits_hold_up_neither_reads_nor_health(start: Start) -> None:
    server = start()
    assert failures(server.address, add_one_event, rounds=1) == []
    with WriteLock(server.data_file(), seconds=60), connect(server.address) as channel:
        stub = RecommenderStub(channel)
        waiting = [stub.Update.future(update(f"user {n}", ["1"]), timeout=60) for n in range(40)]
        time.sleep(0.5)
        found = failures(server.address, recommend, health)
        assert not any(one.done() and one.exception() is None for one in waiting)  # the lock did hold them up
        assert found == []


def test_large_what_ifs_do_not_hold_up_others(start: Start) -> None:
    server = start()
    with what_ifs(server.address, ITEMS, callers=24, calls=200, seconds=5):
        time.sleep(0.5)
        assert failures(server.address, recommend, add_one_event, health, rounds=10) == []


def test_abandoned_batches_cost_nothing_after_their_callers_have_gone(start: Start) -> None:
    server = start()
    with abandoned_batches(server.address, ITEMS, leave_after=1.5) as attack:
        attack.wait()
    assert attack.statuses["OK"] == 0
    assert failures(server.address, recommend, add_one_event, health, rounds=10) == []


def test_an_update_whose_deadline_passes_in_the_queue_is_not_applied(start: Start) -> None:
    server = start()
    assert failures(server.address, add_one_event, rounds=1) == []
    with WriteLock(server.data_file(), seconds=1.5) as lock, connect(server.address) as channel:
        stub = RecommenderStub(channel)
        first = stub.Update.future(update("patient", ["1"]), timeout=30)
        time.sleep(0.3)
        late = stub.Update.future(update("hasty", ["1"]), timeout=0.4)
        assert late.exception(timeout=10).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        lock.wait()
        assert first.result(timeout=30).event_count == 1
        stub.Update(update("after", ["1"]), timeout=30)  # the queue is empty
    assert stored_events(server.address, "hasty") == []


def test_a_large_batch_with_a_busy_user_succeeds_and_others_do_not_wait(start: Start) -> None:
    """Two servers on one store: while one computes the batch, the other changes one of its users."""
    quick, server = start(), start()
    updates = [update(f"user {n}", [ITEMS[(n + i) % len(ITEMS)] for i in range(150)]) for n in range(300)]
    batch = pb.BatchUpdateRequest(updates=[*updates, update("busy", ITEMS[:5])])
    with busy_user(quick.address, "busy", ITEMS) as busy, connect(server.address) as channel:
        time.sleep(0.3)
        future = RecommenderStub(channel).BatchUpdate.future(batch, timeout=25)
        time.sleep(0.3)
        others = failures(server.address, add_one_event, rounds=10)
        replies = future.result().replies
    assert len(replies) == 301
    assert others == []
    assert set(busy.statuses) == {"OK"}


def test_large_messages_take_little_memory(start: Start) -> None:
    server = start()
    assert failures(server.address, add_one_event, rounds=1) == []
    with PeakMemory(server) as memory, large_messages(server.address) as attack:
        attack.wait()
    assert sum(attack.statuses.values()) == 8
    assert memory.peak <= 600e6
    assert failures(server.address, recommend, health, rounds=3) == []


def test_callers_who_do_not_read_take_little_memory(start: Start, large_bundle: Path) -> None:
    server = start(bundle=large_bundle, if_known=("--max-in-flight-mib 32",))
    message = large_reply_request(server.address)
    with PeakMemory(server) as memory, SlowReaders(server.address, message, readers=16):
        wait_until(lambda: memory.growth > 150e6, seconds=8)
        found = failures(server.address, recommend, health, rounds=3)
    assert memory.growth <= 150e6
    assert found == []


def test_an_idle_connection_is_closed(start: Start) -> None:
    server = start(if_known=("--idle-timeout 1",))
    with RawConnection(server.address) as connection:
        assert connection.closed_within(8)


def test_idle_connections_beyond_the_limit_of_open_files_keep_nobody_out(start: Start) -> None:
    server = start(if_known=("--idle-timeout 2",), open_files=1024)
    with IdleConnections(server.address, connections=2000):
        assert wait_until(lambda: not failures(server.address, recommend, rounds=1), seconds=15)
        assert failures(server.address, recommend, health, rounds=5) == []
