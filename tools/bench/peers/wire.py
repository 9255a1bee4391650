"""How each server is asked and what it answers: the same question and the same contents, in the form of each."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import grpc

from protos.dman.v1 import dman_pb2 as pb
from tools.bench.h2load import GRPC_HEADERS, Request
from tools.bench.servers import connect
from tools.faults.http2 import FRAME_BYTES, framed

SECONDS = 20.0  # for one call


class Ranked(NamedTuple):
    item_ids: list[str]
    scores: list[float]


class WrongReplyError(Exception):
    """A server answers something else than it should."""


class Wire(Protocol):
    """The form of one kind of server."""

    http1: bool  # else HTTP/2 without TLS

    def recommend(self, user_id: str, k: int) -> Request: ...

    def update(self, user_id: str, item_id: str) -> Request:
        """One event, at an unknown time."""
        ...

    def ranked(self, reply: bytes) -> Ranked: ...

    def event_count(self, reply: bytes) -> int:
        """Events of the user after an update."""
        ...

    def send(self, address: str, request: Request) -> bytes:
        """The body of the reply. Raises WrongReplyError, OSError."""
        ...


class DmanWire:
    """Ours: gRPC."""

    http1 = False
    service = "/dman.v1.Recommender"

    def recommend(self, user_id: str, k: int) -> Request:
        return self._request("Recommend", pb.RecommendRequest(user_id=user_id, k=k).SerializeToString())

    def update(self, user_id: str, item_id: str) -> Request:
        event = pb.Event(item_id=item_id)
        return self._request("Update", pb.UpdateRequest(user_id=user_id, events=[event]).SerializeToString())

    def _request(self, method: str, message: bytes) -> Request:
        return Request(f"{self.service}/{method}", framed(message), GRPC_HEADERS)

    def ranked(self, reply: bytes) -> Ranked:
        items = pb.RecommendReply.FromString(reply[FRAME_BYTES:]).items
        return Ranked([item.item_id for item in items], [item.score for item in items])

    def event_count(self, reply: bytes) -> int:
        return pb.UpdateReply.FromString(reply[FRAME_BYTES:]).event_count

    def send(self, address: str, request: Request) -> bytes:
        with connect(address) as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(request.path)
            try:
                message = call(request.body[FRAME_BYTES:], timeout=SECONDS)
            except grpc.RpcError as error:
                raise WrongReplyError(f"{error.code().name}: {error.details()}") from None
        return framed(message)


class JsonWire:
    """JSON over HTTP/1.1."""

    http1 = True

    def __init__(self, path: str) -> None:
        self._path = path

    def recommend(self, user_id: str, k: int) -> Request:
        return self._request({"user_id": user_id, "k": k})

    def update(self, user_id: str, item_id: str) -> Request:
        return self._request({"user_id": user_id, "item_id": item_id})

    def _request(self, content: Mapping[str, object]) -> Request:
        return Request(self._path, json.dumps(content).encode(), ("content-type: application/json",))

    def ranked(self, reply: bytes) -> Ranked:
        content = json.loads(reply)
        return Ranked(content["item_ids"], content["scores"])

    def event_count(self, reply: bytes) -> int:
        return int(json.loads(reply)["event_count"])

    def send(self, address: str, request: Request) -> bytes:
        connection = http.client.HTTPConnection(address, timeout=SECONDS)
        try:
            headers = dict(line.split(": ", 1) for line in request.headers)
            connection.request("POST", request.path, request.body, headers)
            reply = connection.getresponse()
            content = reply.read()
        except http.client.HTTPException as error:
            raise WrongReplyError(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if reply.status != http.client.OK:
            raise WrongReplyError(f"status {reply.status}: {content[:200]!r}")
        return content


class BatchOfOneWire(JsonWire):
    """JSON where a batchable method takes and returns a list: BentoML."""

    def _request(self, content: Mapping[str, object]) -> Request:
        return super()._request({"requests": [content]})

    def ranked(self, reply: bytes) -> Ranked:
        return super().ranked(json.dumps(json.loads(reply)[0]).encode())

    def event_count(self, reply: bytes) -> int:
        return super().event_count(json.dumps(json.loads(reply)[0]).encode())


class TritonWire(JsonWire):
    """JSON of the KServe protocol over HTTP/1.1."""

    def __init__(self) -> None:
        super().__init__("/v2/models/{}/infer")

    def recommend(self, user_id: str, k: int) -> Request:
        return self._infer("recommend", user_id=("BYTES", user_id), k=("INT32", k))

    def update(self, user_id: str, item_id: str) -> Request:
        return self._infer("update", user_id=("BYTES", user_id), item_id=("BYTES", item_id))

    def _infer(self, model: str, **inputs: tuple[str, str | int]) -> Request:
        tensors = [
            {"name": name, "shape": [1, 1], "datatype": kind, "data": [value]} for name, (kind, value) in inputs.items()
        ]
        request = self._request({"inputs": tensors})
        return request._replace(path=request.path.format(model))

    def ranked(self, reply: bytes) -> Ranked:
        outputs = self._outputs(reply)
        return Ranked(outputs["item_ids"], outputs["scores"])

    def event_count(self, reply: bytes) -> int:
        return int(self._outputs(reply)["event_count"][0])

    def _outputs(self, reply: bytes) -> dict[str, list[Any]]:
        return {one["name"]: one["data"] for one in json.loads(reply)["outputs"]}
