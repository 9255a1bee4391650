"""A gRPC server on a free port that records what arrives and answers as a test tells it."""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from protos.dman.v1 import admin_pb2, admin_pb2_grpc
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1 import dman_pb2_grpc as pb_grpc

ITEMS_REPLY = pb.RecommendReply(
    items=[
        pb.RecommendedItem(item_id="30", score=0.75, title="Alien"),
        pb.RecommendedItem(item_id="4", score=0.5),
    ],
    source=pb.SOURCE_PERSONALIZED,
    bundle_id="b1",
    event_count=7,
    unknown_item_ids=["nope"],
    unknown_count=2,
    integer_item_ids=True,
)
USER_REPLY = pb.GetUserReply(
    user_id="42",
    bundle_id="b1",
    event_count=45,
    history_count=47,
    segment_fill=5,
    absorbed_segments=1,
    state_bytes=24000,
    recent_events=[pb.Event(item_id="7", timestamp=100), pb.Event(item_id="8")],
    integer_item_ids=True,
)
STATUS_REPLY = pb.GetStatusReply(
    ready=False,
    problems=[pb.Problem(name="disk_full", detail="no space; free some", seconds=2.5, blocking=True)],
    bundle_id="b1",
    workers=4,
    workers_ready=3,
    restarts=2,
    uptime_seconds=60.5,
    requests=5,
    bytes_in_flight=1000,
    version="0.1.0",
)


ROLLOUT = {"revision": 4, "active": "b2", "trial": "", "share": 0.0, "prepared": "", "bundles": {"b2": "/srv/b2"}}
ADMIN_REPLIES = {
    "ListGenerations": admin_pb2.ListGenerationsReply(
        users=9,
        generations=[
            admin_pb2.Generation(number=1, bundle_id="b1", records=9, current=8, bytes=900),
            admin_pb2.Generation(number=2, bundle_id="b2", records=3, current=3, bytes=300, share=1.0),
        ],
        text="9 users",
    ),
    "GetRollout": admin_pb2.GetRolloutReply(**ROLLOUT),
    "Rebuild": admin_pb2.RebuildResult(users=9, rebuilt=8, events=70, lagging=1, bundle_id="b2", text="encoded"),
    "Activate": admin_pb2.ActivateReply(**ROLLOUT, before="b1", servers=2, caught_up=7, text="bundle b2 answers"),
    "Drop": admin_pb2.DropReply(bundle_id="b1", dropped=9, text="dropped"),
    "Backup": admin_pb2.BackupReply(path="/srv/backup", bytes=4096, counts={"users": 9, "events": 70}, text="copied"),
    "ExportUser": b'{"user_id": "42", "events": [], "states": []}',
    "Expire": admin_pb2.ExpireReply(users=9, expired=2, events=20, untimed=1, before=1000, dry_run=True, text="would"),
    "Verify": admin_pb2.VerifyReply(
        path="/srv/state", counts={"users": 9}, problem_count=3, problems=["one", "two"], text="damaged"
    ),
    "SwitchItems": admin_pb2.SwitchItemsReply(changed=2, unchanged=1, unknown=["x"], off=5, text="switched"),
    "ListItemsOff": "7\nK\u00e4se\n".encode(),
    "AddItems": admin_pb2.AddItemsReply(
        added=3, unchanged=1, known=["7"], unusable={"x": "no title"}, total=4, text="added"
    ),
}


@dataclasses.dataclass
class Seen:
    rpc: str
    request: Any
    seconds_left: float
    metadata: dict[str, Any]
    peer: str


class Recorder(pb_grpc.RecommenderServicer, pb_grpc.OperationsServicer, admin_pb2_grpc.AdminServicer):
    """Records what arrives.

    Each call takes one step of `script`: a status to fail with, a reply, or a function that may return one of these.
    Without a step the call gets a standard reply.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.script: deque[Any] = deque()

    @property
    def request(self) -> Any:
        """The request of the only call."""
        (seen,) = self.seen
        return seen.request

    def _answer(self, rpc: str, request: Any, context: grpc.ServicerContext, reply: Any) -> Any:
        metadata = dict(context.invocation_metadata())
        self.seen.append(Seen(rpc, request, context.time_remaining(), metadata, context.peer()))
        step = self.script.popleft() if self.script else None
        if callable(step):
            step = step()
        if isinstance(step, grpc.StatusCode):
            context.abort(step, "no luck today")
        return reply if step is None else step

    def Update(self, request: pb.UpdateRequest, context: Any) -> pb.UpdateReply:
        return self._answer("Update", request, context, _update_reply(request))

    def BatchUpdate(self, request: pb.BatchUpdateRequest, context: Any) -> pb.BatchUpdateReply:
        reply = pb.BatchUpdateReply(replies=[_update_reply(update) for update in request.updates])
        return self._answer("BatchUpdate", request, context, reply)

    def Recommend(self, request: pb.RecommendRequest, context: Any) -> pb.RecommendReply:
        return self._answer("Recommend", request, context, ITEMS_REPLY)

    def BatchRecommend(self, request: pb.BatchRecommendRequest, context: Any) -> pb.BatchRecommendReply:
        replies = [pb.RecommendReply(bundle_id=f"for {one.user_id}") for one in request.requests]
        return self._answer("BatchRecommend", request, context, pb.BatchRecommendReply(replies=replies))

    def GetUser(self, request: pb.GetUserRequest, context: Any) -> pb.GetUserReply:
        return self._answer("GetUser", request, context, USER_REPLY)

    def GetHistory(self, request: pb.GetHistoryRequest, context: Any) -> pb.GetHistoryReply:
        reply = pb.GetHistoryReply(bundle_id="b1", history_count=3, item_ids=["7", "8", "x"], timestamps=[100, 0, 5])
        return self._answer("GetHistory", request, context, reply)

    def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserReply:
        reply = pb.DeleteUserReply(existed=True, event_count=45, bundle_id="b1")
        return self._answer("DeleteUser", request, context, reply)

    def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusReply:
        return self._answer("GetStatus", request, context, STATUS_REPLY)

    def Rebuild(self, request: admin_pb2.RebuildRequest, context: Any) -> Iterator[admin_pb2.RebuildReply]:
        for done in (0, 35):
            yield admin_pb2.RebuildReply(progress=admin_pb2.Progress(done=done, total=70, seconds=0.5 * done))
        yield admin_pb2.RebuildReply(result=self._answer("Rebuild", request, context, ADMIN_REPLIES["Rebuild"]))

    def ExportUser(self, request: admin_pb2.ExportUserRequest, context: Any) -> Iterator[admin_pb2.ExportUserReply]:
        document = self._answer("ExportUser", request, context, ADMIN_REPLIES["ExportUser"])
        yield from (admin_pb2.ExportUserReply(part=part) for part in (document[:7], document[7:]))

    def ListItemsOff(
        self, request: admin_pb2.ListItemsOffRequest, context: Any
    ) -> Iterator[admin_pb2.ListItemsOffReply]:
        listed = self._answer("ListItemsOff", request, context, ADMIN_REPLIES["ListItemsOff"])
        yield from (admin_pb2.ListItemsOffReply(part=part) for part in (listed[:4], listed[4:]))  # inside a letter


def _admin_method(name: str) -> Callable[[Recorder, Any, Any], Any]:
    return lambda self, request, context: self._answer(name, request, context, ADMIN_REPLIES[name])


for _name in ADMIN_REPLIES.keys() - {"Rebuild", "ExportUser", "ListItemsOff"}:
    setattr(Recorder, _name, _admin_method(_name))


def _update_reply(request: pb.UpdateRequest) -> pb.UpdateReply:
    count = len(request.events)
    return pb.UpdateReply(
        bundle_id="b1",
        event_count=40 + count,
        history_count=50 + count,
        applied=count,
        unknown_item_ids=["x", "9"],
        unknown_count=3,
    )


def serve(
    register: Callable[[grpc.Server], None],
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
) -> tuple[grpc.Server, str]:
    """A running server and its address, on a free port by default. `register` adds the service."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    register(server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    return server, f"127.0.0.1:{port}"


def serve_recorder(
    recorder: Recorder, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
) -> tuple[grpc.Server, str]:
    """A running server that plays `recorder`, and its address."""

    def register(server: grpc.Server) -> None:
        pb_grpc.add_RecommenderServicer_to_server(recorder, server)
        pb_grpc.add_OperationsServicer_to_server(recorder, server)
        admin_pb2_grpc.add_AdminServicer_to_server(recorder, server)

    return serve(register, address, credentials)


def hold(arrived: threading.Event, release: threading.Event) -> None:
    """A step that reports the call and keeps it waiting."""
    arrived.set()
    release.wait(10)
