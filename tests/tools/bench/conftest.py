"""A recommender whose speed a test chooses, so that measurements of it have a known answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from dman_runtime.model.bundle import open_bundle
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderServicer, add_RecommenderServicer_to_server
from tools.bench.setting import QUICK, Bench

Serve = Callable[..., str]


class FakeRecommender(RecommenderServicer):
    """Does one request at a time and never interrupts it. Times are in seconds."""

    def __init__(self, *, call: float = 0.0, what_if: float = 0.0) -> None:
        self._call, self._what_if = call, what_if
        self._busy = threading.Lock()

    def Update(self, request: pb.UpdateRequest, context: grpc.ServicerContext) -> pb.UpdateReply:
        self._work(self._call)
        return pb.UpdateReply(applied=len(request.events))

    def BatchUpdate(self, request: pb.BatchUpdateRequest, context: grpc.ServicerContext) -> pb.BatchUpdateReply:
        return pb.BatchUpdateReply()

    def Recommend(self, request: pb.RecommendRequest, context: grpc.ServicerContext) -> pb.RecommendReply:
        self._work(self._what_if if request.what_if_events else self._call)
        return pb.RecommendReply(source=pb.SOURCE_PERSONALIZED)

    def _work(self, seconds: float) -> None:
        with self._busy:
            time.sleep(seconds)


@pytest.fixture
def serve_fake() -> Iterator[Serve]:
    """Serves a `FakeRecommender` with these times; returns the address."""
    with ExitStack() as stack:

        def serve(**seconds: float) -> str:
            pool = stack.enter_context(ThreadPoolExecutor(32))
            server = grpc.server(pool)
            add_RecommenderServicer_to_server(FakeRecommender(**seconds), server)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(lambda: server.stop(0).wait())
            return f"127.0.0.1:{port}"

        yield serve


@pytest.fixture
def bench(tiny_bundle: Path, tmp_path: Path) -> Bench:
    return Bench(open_bundle(tiny_bundle), tmp_path, "cpu", QUICK, "")
