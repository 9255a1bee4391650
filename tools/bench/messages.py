"""The requests that clients send again and again, and real calls that show what they are answered with."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from dman_runtime.api.recommender import SERVICE_NAME
from dman_runtime.errors import UsageError
from protos.dman.v1 import dman_pb2 as pb
from tools.bench.h2load import Call
from tools.bench.servers import Running, connect
from tools.bench.setting import Bench, K
from tools.loadgen import CALL_SECONDS

RECOMMEND, UPDATE = f"/{SERVICE_NAME}/Recommend", f"/{SERVICE_NAME}/Update"
NOW = 1_700_000_000  # the time of events that are added


def recommend_calls(users: Sequence[str], k: int = K) -> list[Call]:
    return [Call(RECOMMEND, pb.RecommendRequest(user_id=user, k=k).SerializeToString()) for user in users]


def update_calls(bench: Bench, users: Sequence[str]) -> list[Call]:
    """One event each, without a request id: h2load would repeat it, and the server would store nothing."""
    return [
        Call(UPDATE, pb.UpdateRequest(user_id=user, events=[event]).SerializeToString())
        for user in users
        for event in [pb.Event(item_id=bench.history(f"of {user}", 1)[0], timestamp=NOW)]
    ]


def check(server: Running, calls: Sequence[Call]) -> None:
    """Sends each call once. Raises UsageError where one is not answered in full, and gRPC's errors."""
    with connect(server.address) as channel:
        for call in calls:
            method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(call.path)  # as h2load sends it
            reply = method(call.message, timeout=CALL_SECONDS)
            if not _is_right(call, reply):
                raise UsageError(f"a call of {call.path} was not answered in full, so its speed says nothing")


def _is_right(call: Call, reply: bytes) -> bool:
    if call.path == UPDATE:
        return pb.UpdateReply.FromString(reply).applied == 1
    found = pb.RecommendReply.FromString(reply)
    asked = pb.RecommendRequest.FromString(call.message)
    return found.source == pb.SOURCE_PERSONALIZED and len(found.items) == asked.k
