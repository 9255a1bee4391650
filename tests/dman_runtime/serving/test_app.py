"""One worker in this process: health, reflection, and the order in which it closes."""

from __future__ import annotations

import socket
import threading
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
from dman_runtime.errors import BundleError, StoreFullError, UsageError
from dman_runtime.serving import app as app_module
from dman_runtime.serving import monitor as monitor_module
from dman_runtime.serving.app import PENDING_CALLS, App
from dman_runtime.store.lmdb import LmdbStore
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.faults.servers import wait_until


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


def test_it_says_what_was_loaded_before_it_serves(tiny_bundle: Path, tmp_path: Path) -> None:
    loaded = list[str]()
    app = App(serve_config(tiny_bundle, tmp_path / "state"), loaded=lambda: loaded.append("all"))
    with running(app):
        assert loaded  # by the worker: kept out of the garbage collection


def test_late_events_are_treated_as_the_server_was_told(tiny_bundle: Path, tmp_path: Path) -> None:
    found = {}
    for policy in ("arrival", "drop", "place"):
        config = serve_config(tiny_bundle, tmp_path / policy, late_events=policy)
        with running(App(config)) as app, grpc.insecure_channel(f"127.0.0.1:{app.port}") as opened:
            stub = RecommenderStub(opened)
            events = [pb.Event(item_id=str(number), timestamp=100 * number) for number in range(1, 14)]
            stub.Update(pb.UpdateRequest(user_id="u", events=events), timeout=30)
            late = [pb.Event(item_id="20", timestamp=1250), pb.Event(item_id="21", timestamp=150)]
            reply = stub.Update(pb.UpdateRequest(user_id="u", events=late), timeout=30)
            user = stub.GetUser(pb.GetUserRequest(user_id="u", recent_events=3), timeout=30)
            counts = reply.applied, reply.dropped_late, reply.placed_late, reply.deferred_late
            found[policy] = counts, user.deferred_events, [event.item_id for event in user.recent_events]
    assert found == {
        "arrival": ((2, 0, 0, 0), 0, ["13", "20", "21"]),
        "drop": ((0, 2, 0, 0), 0, ["11", "12", "13"]),
        "place": ((1, 0, 2, 1), 1, ["12", "20", "13"]),
    }


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


# -- looking for problems ----------------------------------------------------------------------------------------------


def health_of(app: App) -> int:
    with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        status: int = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status
        return status


def test_a_look_that_hangs_is_alone_and_keeps_the_worker_from_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(monitor_module, "HANGING_SECONDS", 0.2)
    app, looks, go_on = App(serve_config(tiny_bundle, tmp_path / "state")), [], threading.Event()

    def hang() -> None:
        looks.append(1)
        assert go_on.wait(60)

    monkeypatch.setattr(app._monitor, "_check_store", hang)
    try:
        with running(app):
            assert wait_until(lambda: "disk_hangs" in [one.name for one in app.problems.now()], seconds=30)
            assert health_of(app) == health_pb2.HealthCheckResponse.SERVING
            app.problems.set("store_gone", "x", blocking=True)
            assert wait_until(lambda: health_of(app) == health_pb2.HealthCheckResponse.NOT_SERVING, seconds=30)
            assert looks == [1]
            go_on.set()
            assert wait_until(lambda: len(looks) > 3, seconds=30)
            assert [one.name for one in app.problems.now()] == ["store_gone"]
    finally:
        go_on.set()


def test_a_look_that_fails_is_logged_once_and_repeated(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app_module, "LOOK_SECONDS", 0.02)
    app, looks = App(serve_config(tiny_bundle, tmp_path / "state")), []

    def fail() -> None:
        looks.append(1)
        raise RuntimeError("an unforeseen fault")

    monkeypatch.setattr(app._monitor, "_check_store", fail)
    with running(app):
        assert wait_until(lambda: len(looks) > 5, seconds=30)
        assert health_of(app) == health_pb2.HealthCheckResponse.SERVING
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == "looking for problems failed" and record.exc_info


def test_a_commit_tells_that_the_store_has_room(tiny_bundle: Path, tmp_path: Path) -> None:
    app = App(serve_config(tiny_bundle, tmp_path / "state"))
    with running(app), grpc.insecure_channel(f"127.0.0.1:{app.port}") as opened:
        stub = RecommenderStub(opened)
        app._monitor.saw(StoreFullError("full", "enlarge it"))
        stub.Update(pb.UpdateRequest(user_id="anna"), timeout=30)  # stores nothing
        assert not app._monitor._has_room
        stub.Update(pb.UpdateRequest(user_id="anna", events=[pb.Event(item_id="1")]), timeout=30)
        assert app._monitor._has_room


def test_watchers_do_not_hold_up_the_end(tiny_bundle: Path, tmp_path: Path) -> None:
    app = App(serve_config(tiny_bundle, tmp_path / "state", grace=60.0))
    with ExitStack() as after:
        with running(app):
            opened = after.enter_context(grpc.insecure_channel(f"127.0.0.1:{app.port}"))
            watch = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest(), timeout=120)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            began = time.monotonic()
        assert time.monotonic() - began < 30  # and not the grace period
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_worker_that_is_held_up_refuses_what_it_could_only_answer_late(tiny_bundle: Path, tmp_path: Path) -> None:
    """Calls that it has not taken yet wait in gRPC: as many as are allowed are answered, the others refused at once."""
    calls, held = PENDING_CALLS[1] + 400, threading.Event()
    with ExitStack() as stack:
        app = stack.enter_context(running(App(serve_config(tiny_bundle, tmp_path / "state"))))
        app._looking.get_loop().call_soon_threadsafe(held.wait)
        stack.callback(held.set)
        channels = [stack.enter_context(own_channel(app.port)) for _ in range(1 + calls // 400)]
        requests = [pb.RecommendRequest(user_id=f"u{number}", k=1) for number in range(calls)]
        futures = [
            RecommenderStub(channels[number // 400]).Recommend.future(request, timeout=60)
            for number, request in enumerate(requests)
        ]
        least = calls - PENDING_CALLS[1] - 64
        assert wait_until(lambda: sum(one.done() for one in futures) >= least, seconds=30)
        assert {one.code() for one in futures if one.done()} == {grpc.StatusCode.CANCELLED}
        held.set()
        codes = [one.code() for one in futures]
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED}
        assert codes.count(grpc.StatusCode.OK) >= PENDING_CALLS[0]
        assert RecommenderStub(channels[0]).Recommend(requests[0], timeout=30).items


def own_channel(port: int) -> grpc.Channel:
    """With a connection of its own."""
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
