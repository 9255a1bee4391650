"""The way of a call through a real server: the status of whatever goes wrong, limits, cancellation, the end."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from door_server import DoorServer, serving, status_of
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dman_runtime.api.admission import EVENT_BYTES, SMALL_BYTES
from dman_runtime.api.door import LARGE_BYTES, Call, Method
from dman_runtime.batcher import SLICE_EVENTS
from dman_runtime.errors import (
    ConflictError,
    DmanError,
    ExpiredError,
    ForbiddenError,
    LimitError,
    RefusedError,
    RequestError,
    StateError,
    StoppedError,
    StoreFullError,
    StoreUnavailableError,
    UnauthenticatedError,
    UsageError,
)
from dman_runtime.waiting import NO_DEADLINE
from protos.dman.v1 import dman_pb2 as pb
from tools.faults.http2 import RawConnection
from tools.faults.servers import wait_until

PATH = "/test.Service/Do"
WAIT = 30.0
Handler = Callable[[Any, Call], Awaitable[Message | bytes]]


def doing(run: Handler, *, weigh: Callable[[Any], int] = lambda _: 0, commits: bool = False) -> Method:
    return Method(PATH, pb.GetUserRequest, run, weigh, commits=commits)


async def name_back(request: pb.GetUserRequest, call: Call) -> pb.GetUserReply:
    return pb.GetUserReply(user_id=request.user_id)


def request_of(size: int) -> bytes:
    """A message with so many bytes of content."""
    return pb.GetUserRequest(user_id="x" * size).SerializeToString()


def ask(channel: grpc.Channel, message: bytes = b"", *, timeout: float | None = WAIT) -> Any:
    return channel.unary_unary(PATH)(message, timeout=timeout)


def failing(error: Exception) -> Method:
    async def fail(request: Any, call: Call) -> Message:
        raise error

    return doing(fail)


class Held:
    """A handler that holds its call until it may go on, and knows whether it was cancelled."""

    def __init__(self, reply: bytes = b"") -> None:
        self.entered, self.go_on, self.cancelled = threading.Event(), threading.Event(), threading.Event()
        self._reply = reply

    async def run(self, request: Any, call: Call) -> bytes:
        self.entered.set()
        try:
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return self._reply


# -- statuses --------------------------------------------------------------------------------------------------------

MENDABLE = [
    (RequestError, "INVALID_ARGUMENT"),
    (UnauthenticatedError, "UNAUTHENTICATED"),
    (ForbiddenError, "PERMISSION_DENIED"),
    (LimitError, "RESOURCE_EXHAUSTED"),
    (RefusedError, "RESOURCE_EXHAUSTED"),
    (ConflictError, "ABORTED"),
    (StoppedError, "UNAVAILABLE"),
    (ExpiredError, "DEADLINE_EXCEEDED"),
]


@pytest.mark.parametrize(("kind", "status"), MENDABLE, ids=[kind.__name__ for kind, _ in MENDABLE])
def test_an_error_that_the_caller_can_mend_is_told_in_its_own_words_and_not_logged(
    kind: type[DmanError], status: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = kind("the cause", "the remedy")
    with serving(failing(error)) as (server, channel):
        assert status_of(lambda: ask(channel)) == (status, "the cause; the remedy")
    assert server.seen == [error]
    assert server.metrics.calls == [("Do", status)]
    refused = status in ("RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED")
    assert server.metrics.refusals == ([kind.__name__] if refused else [])
    assert caplog.records == []


INTERNAL = [
    (StoreUnavailableError("of /secret/path", "mend /secret/path"), "UNAVAILABLE", "the state store is unavailable"),
    (StoreFullError("/secret is full"), "RESOURCE_EXHAUSTED", "the state store is full; nothing was written"),
    (StateError("in /secret"), "INTERNAL", "internal error"),
    (UsageError("not for callers: /secret"), "INVALID_ARGUMENT", "internal error"),
    (RuntimeError("secret"), "INTERNAL", "internal error"),
    (TimeoutError("secret"), "INTERNAL", "internal error"),
    (RecursionError(), "INTERNAL", "internal error"),
]


@pytest.mark.parametrize(("error", "status", "public"), INTERNAL, ids=[type(error).__name__ for error, *_ in INTERNAL])
def test_an_error_of_the_server_is_told_by_a_reference_that_the_log_has(
    error: Exception, status: str, public: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(failing(error)) as (server, channel):
        code, details = status_of(lambda: ask(channel))
    found = re.fullmatch(rf"{public}; the server's log has the cause under reference ([0-9a-f]{{12}})", details)
    assert code == status and found
    (record,) = [record for record in caplog.records if record.name == "dman_runtime.api.door"]
    assert found[1] in record.getMessage() and str(error) in record.getMessage()
    assert bool(record.exc_info) == (not isinstance(error, DmanError))
    assert server.seen == [error]


def test_of_many_errors_the_log_has_one_and_all_callers_get_its_reference(caplog: pytest.LogCaptureFixture) -> None:
    with serving(failing(RuntimeError("again"))) as (_, channel):
        told = {status_of(lambda: ask(channel)) for _ in range(20)}
    ((_, details),) = told
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dman_runtime.api.door"]
    assert details.rpartition(" ")[2] in line


def test_a_failing_call_leaves_nothing_counted() -> None:
    with serving(failing(RuntimeError("x"))) as (server, channel):
        for size in (0, 2 * LARGE_BYTES):
            status_of(lambda size=size: ask(channel, request_of(size)))  # type: ignore[misc]
        assert (server.admission.requests, server.admission.bytes) == (0, 0)
        assert not server.admission._running


def test_a_method_that_nobody_serves_is_unimplemented() -> None:
    with serving(doing(name_back)) as (_, channel):
        call = channel.unary_unary("/test.Service/Other")
        assert status_of(lambda: call(b"", timeout=WAIT))[0] == "UNIMPLEMENTED"


# -- messages --------------------------------------------------------------------------------------------------------


def test_a_call_without_a_message_is_an_invalid_argument() -> None:
    with serving(doing(name_back)) as (server, channel):
        call = channel.stream_unary(PATH)
        found = status_of(lambda: call(iter(()), timeout=WAIT))
        assert server.admission.requests == 0
    assert found == ("INVALID_ARGUMENT", "the call has no message; send one")


@pytest.mark.parametrize("size", [3, 2 * LARGE_BYTES], ids=["small", "large"])
def test_messages_that_do_not_parse_are_counted_and_logged_once(size: int, caplog: pytest.LogCaptureFixture) -> None:
    with serving(doing(name_back)) as (server, channel):
        found = {status_of(lambda: ask(channel, b"\xff" * size)) for _ in range(10)}
        assert server.admission.bytes == 0
    expected = "the message is not a dman.v1.GetUserRequest; send what the proto file describes"
    assert found == {("INVALID_ARGUMENT", expected)}
    assert server.metrics.did_not_parse == 10
    assert [record.getMessage() for record in caplog.records] == [f"a message to {PATH} does not parse"]


def test_large_messages_are_parsed_on_the_bulk_thread_and_small_ones_on_the_loop() -> None:
    threads = []

    def weigh(request: pb.GetUserRequest) -> int:
        threads.append(threading.current_thread().name.partition("_")[0])
        return 0

    with serving(doing(name_back, weigh=weigh)) as (_, channel):
        for size in (LARGE_BYTES + 1, 10):
            reply = pb.GetUserReply.FromString(ask(channel, request_of(size)))
            assert reply.user_id == "x" * size
    assert threads[0] == "bulk" and threads[1] != "bulk"


@pytest.mark.parametrize("size", [10, 2 * LARGE_BYTES], ids=["small", "large"])
def test_a_message_that_weighs_too_much_is_refused_before_the_handler(size: int) -> None:
    entered = []

    async def enter(request: Any, call: Call) -> bytes:
        entered.append(call)
        return b""

    def weigh(request: Any) -> int:
        raise RequestError("too many", "send fewer")

    with serving(doing(enter, weigh=weigh)) as (server, channel):
        assert status_of(lambda: ask(channel, request_of(size))) == ("INVALID_ARGUMENT", "too many; send fewer")
        assert not server.admission._running
    assert entered == []


def test_a_heavy_request_takes_turns_with_others_of_its_caller_and_a_light_one_does_not() -> None:
    running, most = 0, 0

    async def count(request: pb.GetUserRequest, call: Call) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return b""

    for weight, at_once in ((SLICE_EVENTS + 1, 2), (SLICE_EVENTS, 6)):
        most = 0
        with serving(doing(count, weigh=lambda _, weight=weight: weight)) as (_, channel):  # type: ignore[misc]
            calls = [channel.unary_unary(PATH).future(b"", timeout=WAIT) for _ in range(6)]
            for call in calls:
                call.result()
        assert most == at_once


# -- what a handler knows ----------------------------------------------------------------------------------------------


def test_the_deadline_of_the_caller_reaches_the_handler() -> None:
    calls = []

    async def remember(request: Any, call: Call) -> bytes:
        calls.append((call.deadline - time.monotonic(), call.caller))
        return b""

    with serving(doing(remember)) as (_, channel):
        ask(channel, timeout=20)
        ask(channel, timeout=None)
    assert 5 < calls[0][0] <= 21  # gRPC rounds it up
    assert calls[1][0] == NO_DEADLINE
    assert calls[0][1].startswith("ipv4:127.0.0.1:")


def test_a_call_that_its_client_cancels_is_cancelled_here_and_not_counted_any_more() -> None:
    held = Held()
    with serving(doing(held.run)) as (server, channel):
        call = channel.unary_unary(PATH).future(request_of(1000), timeout=WAIT)
        assert held.entered.wait(WAIT)
        assert (server.admission.requests, server.admission.bytes) == (1, len(request_of(1000)))
        call.cancel()
        assert held.cancelled.wait(WAIT)
        assert wait_until(lambda: (server.admission.requests, server.admission.bytes) == (0, 0), seconds=WAIT)
        assert server.metrics.calls == [("Do", "CANCELLED")]


def test_a_call_whose_deadline_passes_is_cancelled_here() -> None:
    held = Held()
    with serving(doing(held.run)) as (server, channel):
        assert status_of(lambda: ask(channel, timeout=0.5))[0] == "DEADLINE_EXCEEDED"
        assert held.cancelled.wait(WAIT)
        assert wait_until(lambda: server.admission.requests == 0, seconds=WAIT)


def test_clients_that_leave_at_any_moment_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Before the message, while it is handled, and while the reply is sent."""
    sleeps = iter([0.0, 0.001, 0.005] * 1000)

    async def slow(request: Any, call: Call) -> bytes:
        await asyncio.sleep(next(sleeps))
        return b"x" * 300_000

    with serving(doing(slow), max_requests=500) as (server, channel):
        do = channel.unary_unary(PATH)
        for n in range(150):
            call = do.future(request_of(10 if n % 2 else 2 * LARGE_BYTES), timeout=WAIT)
            time.sleep(n % 10 / 2000)
            call.cancel()
        with RawConnection(server.address) as connection:
            for _ in range(20):
                connection.open_request(PATH)
        wait_until(lambda: not server.door._running, seconds=WAIT)
        assert wait_until(lambda: (server.admission.requests, server.admission.bytes) == (0, 0), seconds=WAIT)
        assert not server.admission._running and not server.admission._queues and not server.admission._held
        assert not server.door.receiver._arriving
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_full_server_refuses_work_and_answers_probes() -> None:
    held = Held()
    with serving(doing(held.run), max_requests=1) as (server, channel):
        first = channel.unary_unary(PATH).future(b"", timeout=WAIT)
        assert held.entered.wait(WAIT)
        assert status_of(lambda: ask(channel)) == (
            "RESOURCE_EXHAUSTED",
            "the server holds 1 requests; send fewer at a time, or try again later",
        )
        assert server.metrics.refusals == ["RefusedError"]
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT)
        held.go_on.set()
        first.result()
        ask(channel)


def test_a_message_that_does_not_fit_is_refused_and_small_ones_still_pass() -> None:
    held = Held()
    with serving(doing(held.run), max_bytes=1 << 20) as (server, channel):
        first = channel.unary_unary(PATH).future(request_of(900_000), timeout=WAIT)
        assert held.entered.wait(WAIT)
        code, details = status_of(lambda: ask(channel, request_of(200_000)))
        assert code == "RESOURCE_EXHAUSTED" and "of messages and replies" in details
        held.go_on.set()
        first.result()
        ask(channel, request_of(200_000))
        assert wait_until(lambda: server.admission.bytes == 0, seconds=WAIT)


@pytest.mark.parametrize("size", [10, 2 * LARGE_BYTES], ids=["small", "large"])
def test_what_a_message_is_parsed_to_is_counted_while_it_runs(size: int) -> None:
    """Events of short item ids take many times the bytes of their message."""
    held, events = Held(), 6_000
    with serving(doing(held.run, weigh=lambda _: events), max_bytes=1 << 20) as (server, channel):
        first = channel.unary_unary(PATH).future(request_of(size), timeout=WAIT)
        assert held.entered.wait(WAIT)
        assert server.admission.bytes == len(request_of(size)) + events * EVENT_BYTES
        code, details = status_of(lambda: ask(channel, request_of(size)))
        assert code == "RESOURCE_EXHAUSTED" and "of messages and replies" in details
        held.go_on.set()
        first.result()
        assert wait_until(lambda: server.admission.bytes == 0, seconds=WAIT)


def test_a_caller_over_its_limit_is_refused_before_the_handler() -> None:
    with serving(doing(name_back), requests_per_second=0.001) as (server, channel):
        ask(channel)
        code, details = status_of(lambda: ask(channel))
    assert code == "RESOURCE_EXHAUSTED" and "requests per second" in details
    assert server.metrics.refusals == ["LimitError"]


def test_a_probe_with_a_large_message_is_refused() -> None:
    with serving() as (server, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="x" * (SMALL_BYTES + 1))
        code, details = status_of(lambda: stub.Check(request, timeout=WAIT))
        assert (code, details) == ("INVALID_ARGUMENT", "the message has more than 64 KiB; send a smaller one")
        assert server.admission.bytes == 0


# -- replies ---------------------------------------------------------------------------------------------------------

LARGE_REPLY = b"x" * (4 << 20)


async def large_reply(request: Any, call: Call) -> bytes:
    return LARGE_REPLY


def test_a_reply_is_counted_until_the_client_has_read_it() -> None:
    with serving(doing(large_reply)) as (server, channel):
        with RawConnection(server.address, receive_bytes=4096) as connection:
            connection.send_message(connection.open_request(PATH), b"")
            assert wait_until(lambda: server.admission.bytes == len(LARGE_REPLY), seconds=WAIT)
            assert server.admission.requests == 0  # others may come
            assert ask(channel) == LARGE_REPLY
            assert wait_until(lambda: server.admission.bytes == len(LARGE_REPLY), seconds=WAIT)
        assert wait_until(lambda: server.admission.bytes == 0, seconds=WAIT)  # that client has gone


def test_a_reply_that_does_not_fit_is_refused_unless_it_tells_of_a_commit() -> None:
    with serving(doing(large_reply), max_bytes=1 << 20) as (server, channel):
        code, details = status_of(lambda: ask(channel))
        assert code == "RESOURCE_EXHAUSTED" and "read replies at once" in details
        assert server.admission.bytes == 0
    with serving(doing(large_reply, commits=True), max_bytes=1 << 20) as (server, channel):
        assert ask(channel) == LARGE_REPLY
        assert wait_until(lambda: server.admission.bytes == 0, seconds=WAIT)


# -- the end ---------------------------------------------------------------------------------------------------------


def stop(server: DoorServer) -> None:
    """As the app does, on the server's own loop."""
    done = threading.Event()
    loop = server._server._loop
    loop.call_soon_threadsafe(lambda: (server.door.stop(), done.set()))
    assert done.wait(WAIT)


def test_stopping_ends_calls_as_unavailable_and_takes_no_new_ones() -> None:
    held = Held()
    expected = ("UNAVAILABLE", "the server is stopping; try another one or again later")
    with serving(doing(held.run)) as (server, channel):
        call = channel.unary_unary(PATH).future(b"", timeout=WAIT)
        assert held.entered.wait(WAIT)
        with RawConnection(server.address) as connection:  # a call whose message never comes
            connection.open_request(PATH)
            assert wait_until(lambda: len(server.door._running) == 2, seconds=WAIT)
            stop(server)
            assert status_of(call.result) == expected
            assert wait_until(lambda: not server.door._running, seconds=WAIT)
        assert held.cancelled.is_set()
        held.cancelled.clear()
        held.entered.clear()
        assert status_of(lambda: ask(channel)) == expected
        assert not held.entered.is_set()
        assert (server.admission.requests, server.admission.bytes) == (0, 0)
    assert {status for _, status in server.metrics.calls} == {"UNAVAILABLE"}
