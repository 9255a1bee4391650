"""GetStatus: what those who run a server are told."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator

import pytest
from door_server import serving

from dman_runtime.api.admission import Admission
from dman_runtime.api.operations import SERVICE_NAME, OperationsService
from dman_runtime.problems import ClusterStatus, Problem, Problems
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import OperationsStub


class Served:
    """A running service, with what it reports on."""

    def __init__(self) -> None:
        self.problems, self.admission = Problems(), Admission(max_requests=9, max_bytes=1 << 20)
        self.cluster = ClusterStatus(workers=1, ready=1, restarts=0, problems=())
        self.service = OperationsService(lambda: "the-bundle", self.problems, self.admission, lambda: self.cluster)

    def status(self) -> pb.GetStatusReply:
        return self.stub.GetStatus(pb.GetStatusRequest(), timeout=30)


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    with serving(*made.service.methods()) as (_, channel):
        made.stub = OperationsStub(channel)  # type: ignore[attr-defined]
        yield made


def test_every_method_of_the_proto_file_is_served() -> None:
    described = {f"/{SERVICE_NAME}/{one.name}" for one in pb.DESCRIPTOR.services_by_name["Operations"].methods}
    assert {method.path for method in Served().service.methods()} == described


def test_a_server_without_problems_is_ready_and_says_what_it_holds(served: Served) -> None:
    served.admission.enter()
    served.admission.hold("somebody", 1000)
    reply = served.status()
    assert (reply.ready, len(reply.problems), reply.bundle_id) == (True, 0, "the-bundle")
    assert (reply.workers, reply.workers_ready, reply.restarts) == (1, 1, 0)
    assert (reply.requests, reply.bytes_in_flight) == (1, 1000)
    assert 0 <= reply.uptime_seconds < 300
    assert reply.version == importlib.metadata.version("dman")


def test_problems_of_the_worker_come_first_and_those_of_others_do_not_block_it(served: Served) -> None:
    now = time.monotonic()
    down = Problem("worker_down", "worker 1 ended", since=now - 60, blocking=True)
    served.cluster = ClusterStatus(workers=3, ready=2, restarts=7, problems=(down,))
    served.problems.set("disk_full", "free some")
    reply = served.status()
    assert reply.ready
    assert (reply.workers, reply.workers_ready, reply.restarts) == (3, 2, 7)
    assert [(one.name, one.detail, one.blocking) for one in reply.problems] == [
        ("disk_full", "free some", False),
        ("worker_down", "worker 1 ended", False),
    ]
    assert 0 <= reply.problems[0].seconds < 30 and 60 <= reply.problems[1].seconds < 90


def test_a_blocking_problem_makes_the_server_not_ready(served: Served) -> None:
    served.problems.set("disk_full", "free some")
    served.problems.set("store_gone", "mount it", blocking=True)
    reply = served.status()
    assert not reply.ready
    assert [(one.name, one.blocking) for one in reply.problems] == [("store_gone", True), ("disk_full", False)]
    served.problems.set("store_gone", "")
    assert served.status().ready


def test_a_problem_of_this_moment_has_lasted_for_no_time(served: Served) -> None:
    ahead = Problem("worker_down", "x", since=time.monotonic() + 5)  # found after the reply was begun
    served.cluster = ClusterStatus(workers=1, ready=0, restarts=0, problems=(ahead,))
    assert served.status().problems[0].seconds == 0
