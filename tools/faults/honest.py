"""Callers who do nothing wrong, and what they see: the measure of every attack."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.servers import connect
from tools.faults.attacks import update

CallOnce = Callable[[grpc.Channel, float], object]  # gets the seconds that it may take


def recommend(channel: grpc.Channel, seconds: float) -> object:
    return RecommenderStub(channel).Recommend(pb.RecommendRequest(user_id="honest", k=5), timeout=seconds)


def health(channel: grpc.Channel, seconds: float) -> object:
    """Raises ValueError where the server answers that it does not serve."""
    stub = health_pb2_grpc.HealthStub(channel)
    status = stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds).status
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise ValueError(f"health says {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
    return status


def add_one_event(channel: grpc.Channel, seconds: float) -> object:
    return RecommenderStub(channel).Update(update("honest", ["1"]), timeout=seconds)


def failures(address: str, *calls: CallOnce, rounds: int = 20, seconds: float = 2.0) -> list[str]:
    """Makes each of the calls so many times on one new connection. Returns what did not succeed within `seconds`.

    Stops after three failures.
    """
    found: list[str] = []
    with connect(address) as channel:
        for _ in range(rounds):
            for call in calls:
                try:
                    call(channel, seconds)
                except grpc.RpcError as error:
                    found.append(f"{call.__name__}: {error.code().name}")
                except ValueError as error:
                    found.append(f"{call.__name__}: {error}")
                if len(found) == 3:
                    return found
    return found


def status_of(address: str, call: CallOnce, *, seconds: float = 2.0) -> str:
    """The name of the gRPC status of one call on a new connection."""
    with connect(address) as channel:
        try:
            call(channel, seconds)
        except grpc.RpcError as error:
            return str(error.code().name)
        except ValueError:
            return "NOT_SERVING"
    return "OK"


def stored_events(address: str, user: str, *, seconds: float = 10.0) -> list[tuple[str, int]]:
    """Item and time of the latest 10,000 events of a user, oldest first; none where there is no such user."""
    with connect(address) as channel:
        request = pb.GetUserRequest(user_id=user, recent_events=10_000)
        try:
            reply = RecommenderStub(channel).GetUser(request, timeout=seconds)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return []
            raise
    return [(event.item_id, event.timestamp) for event in reply.recent_events]


def keeps_failing(address: str, call: CallOnce, *, seconds: float, times: int = 5) -> bool:
    """Whether a call fails so many times in a row within `seconds`."""
    deadline, in_a_row = time.monotonic() + seconds, 0
    while in_a_row < times and time.monotonic() < deadline:
        in_a_row = 0 if status_of(address, call) == "OK" else in_a_row + 1
        with suppress(InterruptedError):
            time.sleep(0.05)
    return in_a_row == times
