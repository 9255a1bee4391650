"""gRPC's health and reflection services in a real server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import grpc
import pytest
from door_server import DoorServer, serving, status_of
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dman_runtime.api import admission as admission_module
from dman_runtime.api import standard as module
from dman_runtime.api.admission import SMALL_BYTES
from dman_runtime.api.standard import LIVE, REFLECTION
from tools.faults.http2 import RawConnection
from tools.faults.servers import wait_until

WAIT = 30.0
WATCH = "/grpc.health.v1.Health/Watch"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
Served = tuple[DoorServer, grpc.Channel]


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def on_loop(server: DoorServer, work: object, *values: object) -> None:
    """Runs a function on the server's loop, and waits for its end."""
    done = threading.Event()
    server._server._loop.call_soon_threadsafe(lambda: (work(*values), done.set()))  # type: ignore[operator]
    assert done.wait(WAIT)


def check(channel: grpc.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    status: int = health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT).status
    return status


def watch(channel: grpc.Channel, service: str = "") -> Iterator[health_pb2.HealthCheckResponse]:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Watch(request, timeout=WAIT)  # type: ignore[no-any-return]


# -- health ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["", "dman.v1.Recommender"])
def test_a_service_is_ready_when_it_was_said_and_not_before(served: Served, service: str) -> None:
    server, channel = served
    assert check(channel, service) == NOT_SERVING
    for ready, status in ((True, SERVING), (False, NOT_SERVING), (True, SERVING)):
        on_loop(server, server.health.set, ready)
        assert check(channel, service) == status


def test_a_process_that_answers_is_alive_whether_or_not_it_is_ready(served: Served) -> None:
    server, channel = served
    for step in (lambda: None, lambda: server.health.set(False), server.health.stop):
        on_loop(server, step)
        assert check(channel, LIVE) == SERVING


def test_an_unknown_service_is_not_found(served: Served) -> None:
    server, channel = served
    code, details = status_of(lambda: check(channel, "no.Such"))
    assert code == "NOT_FOUND" and "no.Such" in details
    assert server.metrics.calls == [("Check", "NOT_FOUND")]


def test_list_names_all_services_with_their_statuses(served: Served) -> None:
    server, channel = served
    on_loop(server, server.health.set, True)
    reply = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=WAIT)
    found = {name: one.status for name, one in reply.statuses.items()}
    assert found == {"": SERVING, "dman.v1.Recommender": SERVING, LIVE: SERVING}


def test_watch_tells_the_status_of_now_and_each_change(served: Served) -> None:
    server, channel = served
    stream = watch(channel)
    assert next(stream).status == NOT_SERVING
    for ready, status in ((True, SERVING), (False, NOT_SERVING)):
        on_loop(server, server.health.set, ready)
        on_loop(server, server.health.set, ready)  # no change
        assert next(stream).status == status


def test_watch_of_an_unknown_service_says_so_and_stays_open(served: Served) -> None:
    server, channel = served
    stream = watch(channel, "no.Such")
    assert next(stream).status == SERVICE_UNKNOWN
    assert server.streams._open["watch"] == 1


def test_a_watcher_that_leaves_is_forgotten_without_a_word_in_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    server, channel = served
    streams = [watch(channel) for _ in range(10)]
    for stream in streams:
        next(stream)
        stream.cancel()  # type: ignore[attr-defined]
    on_loop(server, server.health.set, True)
    assert wait_until(lambda: server.streams._open["watch"] == 0, seconds=WAIT)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_watcher_that_does_not_read_keeps_nobody_from_hearing_of_changes(served: Served) -> None:
    server, channel = served
    message = health_pb2.HealthCheckRequest(service="").SerializeToString()
    with RawConnection(server.address, window=0) as connection:
        for _ in range(3):
            connection.send_message(connection.open_request(WATCH), message)
        assert wait_until(lambda: server.streams._open["watch"] == 3, seconds=WAIT)
        stream = watch(channel)
        assert next(stream).status == NOT_SERVING
        on_loop(server, server.health.set, True)
        assert next(stream).status == SERVING
        assert check(channel) == SERVING
    assert wait_until(lambda: server.streams._open["watch"] == 1, seconds=WAIT)


def test_stopping_tells_watchers_and_ends_their_streams(served: Served) -> None:
    server, channel = served
    on_loop(server, server.health.set, True)
    stream = watch(channel)
    assert next(stream).status == SERVING
    on_loop(server, server.health.stop)
    assert next(stream).status == NOT_SERVING
    assert status_of(lambda: next(stream)) == (
        "UNAVAILABLE",
        "the server is stopping; try another one or again later",
    )
    assert wait_until(lambda: server.streams._open["watch"] == 0, seconds=WAIT)


def test_watchers_beyond_the_limit_are_refused_and_a_place_comes_free(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, channel = served
    monkeypatch.setattr(module, "MAX_WATCHERS", 2)
    first, second = watch(channel), watch(channel)
    next(first), next(second)
    code, details = status_of(lambda: next(watch(channel)))
    assert (code, details) == ("RESOURCE_EXHAUSTED", "2 streams of this kind are open; close some, or try again later")
    first.cancel()  # type: ignore[attr-defined]
    assert wait_until(lambda: server.streams._open["watch"] == 1, seconds=WAIT)
    assert next(watch(channel)).status == NOT_SERVING


@pytest.mark.parametrize("path", [WATCH, REFLECTION])
@pytest.mark.parametrize(
    ("message", "expected"),
    [(b"\xff\xff", "the message is not a grpc."), (b"\x0a\xff\xff\x03" + b"x" * SMALL_BYTES, "more than 64 KiB")],
    ids=["malformed", "large"],
)
def test_a_stream_with_a_message_that_cannot_be_used_ends_as_an_invalid_argument(
    served: Served, path: str, message: bytes, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, channel = served
    code, details = status_of(lambda: next(channel.stream_stream(path)(iter([message]), timeout=WAIT)))
    assert code == "INVALID_ARGUMENT" and expected in details
    assert wait_until(lambda: set(server.streams._open.values()) == {0}, seconds=WAIT)
    assert caplog.records == []


# -- reflection ------------------------------------------------------------------------------------------------------

Request = reflection_pb2.ServerReflectionRequest


def reflect(channel: grpc.Channel, *requests: Request) -> list[reflection_pb2.ServerReflectionResponse]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    return list(stub.ServerReflectionInfo(iter(requests), timeout=WAIT))


def test_reflection_lists_all_services_and_describes_their_methods(served: Served) -> None:
    names = {"dman.v1.Recommender", "dman.v1.Operations", "grpc.health.v1.Health"}
    listed, *described = reflect(
        served[1], Request(list_services=""), *(Request(file_containing_symbol=name) for name in sorted(names))
    )
    assert {one.name for one in listed.list_services_response.service} == {
        *names,
        "grpc.reflection.v1alpha.ServerReflection",
    }
    for name, reply in zip(sorted(names), described, strict=True):
        files = map(descriptor_pb2.FileDescriptorProto.FromString, reply.file_descriptor_response.file_descriptor_proto)
        services = {f"{file.package}.{one.name}": one for file in files for one in file.service}
        assert services[name].method


def test_reflection_answers_what_it_does_not_know_and_nothing_it_is_asked_ends_in_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    odd = ["", "\x00", "no.Such", ".", "..", "x" * 10_000, "dman.v1.Event", "é"]
    requests = [Request(file_containing_symbol=name) for name in odd]
    requests += [Request(file_by_filename=name) for name in odd]
    requests += [Request(all_extension_numbers_of_type=name) for name in odd]
    for number in (-(2**31), -1, 0, 1, 2**31 - 1):
        for name in odd:
            extension = reflection_pb2.ExtensionRequest(containing_type=name, extension_number=number)
            requests.append(Request(file_containing_extension=extension))
    requests.append(Request())
    assert len(reflect(served[1], *requests)) == len(requests)
    assert caplog.records == []


def test_a_reflection_stream_that_stays_open_is_ended(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server, channel = served
    monkeypatch.setattr(module, "REFLECTION_SECONDS", 0.3)
    more = threading.Event()

    def requests() -> Iterator[Request]:
        yield Request(list_services="")
        more.wait(WAIT)

    replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(requests(), timeout=WAIT)
    assert next(replies).list_services_response.service
    found = status_of(lambda: next(replies))
    more.set()
    assert found == ("DEADLINE_EXCEEDED", "the stream was open for too long; open a new one")
    assert wait_until(lambda: server.streams._open["reflection"] == 0, seconds=WAIT)


def test_a_reflection_stream_that_asks_nothing_for_long_is_dropped(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = served
    monkeypatch.setattr(admission_module, "SLOW_SECONDS", 0.2)
    with RawConnection(server.address) as connection:
        connection.open_request(REFLECTION)
        assert wait_until(lambda: server.streams._open["reflection"] == 1, seconds=WAIT)
        assert wait_until(lambda: server.streams._open["reflection"] == 0, seconds=WAIT)


def test_reflection_streams_beyond_the_limit_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server, channel = served
    monkeypatch.setattr(module, "MAX_REFLECTIONS", 1)
    with RawConnection(server.address) as connection:
        connection.open_request(REFLECTION)
        assert wait_until(lambda: server.streams._open["reflection"] == 1, seconds=WAIT)
        code, _ = status_of(lambda: reflect(channel, Request(list_services="")))
        assert code == "RESOURCE_EXHAUSTED"
    assert wait_until(lambda: server.streams._open["reflection"] == 0, seconds=WAIT)


def test_a_fault_of_a_stream_is_told_by_a_reference_only(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server, channel = served

    def fail(request: object) -> None:
        raise RuntimeError("secret in /work/secret.py")

    monkeypatch.setattr(server.streams._reflection, "_list_services", fail)
    code, details = status_of(lambda: reflect(channel, Request(list_services="")))
    assert code == "INTERNAL" and "secret" not in details and "reference" in details
