"""One worker in this process: health, reflection, and the order in which it closes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from conftest import TINY_ITEMS, running, serve_config
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dman_runtime.api.recommender import SERVICE_NAME
from dman_runtime.errors import BundleError, UsageError
from dman_runtime.serving.app import App
from dman_runtime.store.lmdb import LmdbStore
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub


@pytest.fixture(scope="module")
def channel(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    config = serve_config(tiny_bundle, tmp_path_factory.mktemp("app") / "state")
    with running(App(config)) as app, grpc.insecure_channel(f"127.0.0.1:{app.port}") as opened:
        yield opened


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
def test_health_is_serving(channel: grpc.Channel, service: str) -> None:
    reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(channel: grpc.Channel) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=30)
    listed = [service.name for service in next(iter(replies)).list_services_response.service]
    assert "dman.v1.Recommender" in listed and "grpc.health.v1.Health" in listed


@pytest.mark.slow
def test_closing_app_says_not_serving_and_stores_what_it_accepted(tiny_bundle: Path, tmp_path: Path) -> None:
    app = App(serve_config(tiny_bundle, tmp_path / "state", grace=30.0))
    with ThreadPoolExecutor(2) as pool, ExitStack() as after:
        with running(app):
            opened = after.enter_context(grpc.insecure_channel(f"127.0.0.1:{app.port}"))
            request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            watch = health_pb2_grpc.HealthStub(opened).Watch(request, timeout=60)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            events = [pb.Event(item_id=str(1 + n % TINY_ITEMS)) for n in range(2000)]
            stub, update = RecommenderStub(opened), pb.UpdateRequest(user_id="anna", events=events)
            reply = pool.submit(stub.Update, update, timeout=60)
            while not app._updates._long and not reply.done():
                time.sleep(0.001)

            def next_status() -> int:
                status: int = next(watch).status
                watch.cancel()  # or closing would wait for it
                return status

            watching = pool.submit(next_status)
        assert reply.result(60).event_count == 2000
        assert watching.result(60) == health_pb2.HealthCheckResponse.NOT_SERVING
    with LmdbStore.open(tmp_path / "state", readonly=True) as store:
        assert len(store.history("anna")[0]) == 2000


def test_app_that_cannot_have_its_port_leaves_no_store_behind(tiny_bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            App(serve_config(tiny_bundle, tmp_path / "state", port=port))
    assert caught.value.parameter == "port"
    with pytest.raises(BundleError):
        App(serve_config(tmp_path, tmp_path / "state"))
    assert list(tmp_path.iterdir()) == []
