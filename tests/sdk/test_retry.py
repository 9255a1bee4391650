"""Deadlines and retries."""

import asyncio
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from protos.dman.v1 import dman_pb2 as pb
from sdk import AsyncClient, Client, ClientClosedError, DeadlineExceededError, UnavailableError, _retry
from sdk._exceptions import ERROR_OF_STATUS
from sdk._retry import RETRIED, Attempts

from .awaited import Awaited, Connect
from .breaking_proxy import BreakingProxy
from .fake_server import Recorder, hold, serve_recorder

pytestmark = pytest.mark.timeout(30)
UNAVAILABLE, CANCELLED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED


async def test_update_keeps_one_generated_request_id_across_retries(client: Awaited, recorder: Recorder) -> None:
    recorder.script.extend([UNAVAILABLE] * 2)
    assert (await client.update("anna", [1])).applied == 1
    ids = [seen.request.request_id for seen in recorder.seen]
    assert len(ids) == 3 and len(set(ids)) == 1 and len(ids[0]) == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("update", ("anna", 1)),
        ("update_many", ({"anna": 1},)),
        ("recommend", ("anna",)),
        ("recommend_many", (["anna"],)),
        ("user", ("anna",)),
        ("status", ()),
    ],
)
@pytest.mark.parametrize("code", [UNAVAILABLE, CANCELLED])
async def test_an_unavailable_or_stopping_server_is_tried_again(
    client: Awaited, recorder: Recorder, *, method: str, args: Any, code: grpc.StatusCode
) -> None:
    recorder.script.append(code)
    assert await getattr(client, method)(*args)
    first, second = recorder.seen
    assert first.request == second.request


@pytest.mark.parametrize("code", [UNAVAILABLE, CANCELLED])
async def test_delete_user_is_never_retried(client: Awaited, recorder: Recorder, code: grpc.StatusCode) -> None:
    recorder.script.append(code)
    with pytest.raises(UnavailableError):
        await client.delete_user("anna")
    assert len(recorder.seen) == 1


@pytest.mark.parametrize("code", sorted(set(grpc.StatusCode) - {grpc.StatusCode.OK, *RETRIED}, key=str))
async def test_no_other_status_is_retried(client: Awaited, recorder: Recorder, code: grpc.StatusCode) -> None:
    recorder.script.append(code)
    with pytest.raises(ERROR_OF_STATUS[code]) as caught:
        await client.update("anna", 1)
    assert caught.value.code is code
    assert len(recorder.seen) == 1


@pytest.mark.slow
async def test_retries_stop_at_their_number(server: SimpleNamespace, connect: Connect, recorder: Recorder) -> None:
    for retries in (0, 2):
        recorder.seen.clear()
        recorder.script.extend([UNAVAILABLE] * (retries + 1))
        with pytest.raises(UnavailableError):
            await connect(server.target, retries=retries).recommend("anna")
        assert len(recorder.seen) == retries + 1 and not recorder.script


@pytest.mark.slow
async def test_calls_that_a_stopping_server_cancels_are_unavailable_after_their_retries(
    client: Awaited, recorder: Recorder
) -> None:
    recorder.script.extend([CANCELLED] * 3)
    with pytest.raises(UnavailableError, match=r"\[CANCELLED after 3 attempts\]") as caught:
        await client.update("anna", 1)
    assert caught.value.code is CANCELLED and caught.value.request_id == recorder.seen[0].request.request_id


@pytest.mark.slow
async def test_a_call_outlives_the_stop_of_its_server(connect: Connect) -> None:
    """The real thing: the server stops while it works on the call, and the next one takes its place."""
    arrived, release = threading.Event(), threading.Event()
    stopping, address = serve_recorder(first := Recorder())
    first.script.append(lambda: hold(arrived, release))

    def replace_server() -> grpc.Server:
        assert arrived.wait(10)
        stopping.stop(0.05).wait()
        return serve_recorder(second, address)[0]

    second = Recorder()
    with ThreadPoolExecutor(1) as threads:
        replacing = threads.submit(replace_server)
        assert (await connect(address, retries=1000).update("anna", 1)).applied == 1
        release.set()
        replacing.result().stop(None).wait()
    assert first.request == second.request


@pytest.mark.slow
async def test_closing_between_two_attempts_says_the_request_id(
    server: SimpleNamespace, connect: Connect, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(server.target, retries=1000)
    monkeypatch.setattr(Attempts, "delay_after", lambda *_: 0.3)
    recorder.script.extend([UNAVAILABLE] * 1000)
    with ThreadPoolExecutor(1) as threads:
        if isinstance(client.client, Client):
            running: Any = threads.submit(client.client.update, "anna", 1)
        else:
            running = asyncio.ensure_future(client.client.update("anna", 1))
        while not recorder.seen:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(ClientClosedError) as caught:
            await asyncio.wrap_future(running) if isinstance(client.client, Client) else await running
    assert caught.value.request_id == recorder.request.request_id


@pytest.mark.slow
async def test_a_task_that_is_cancelled_between_two_attempts_stays_cancelled(
    server: SimpleNamespace, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attempts, "delay_after", lambda *_: 30)
    recorder.script.append(CANCELLED)
    async with AsyncClient(server.target, timeout=60) as client:
        calling = asyncio.ensure_future(client.update("anna", 1))
        while not recorder.seen:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    assert len(recorder.seen) == 1


@pytest.mark.slow
async def test_retries_may_be_more_than_the_four_of_grpc(
    server: SimpleNamespace, connect: Connect, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retry, "FIRST_DELAY", 0.001)  # seconds
    recorder.script.extend([UNAVAILABLE] * 8)
    assert (await connect(server.target, retries=8).update("anna", 1)).applied == 1
    assert len(recorder.seen) == 9


@pytest.mark.slow
async def test_retries_stop_at_the_deadline(server: SimpleNamespace, connect: Connect, recorder: Recorder) -> None:
    recorder.script.extend([UNAVAILABLE] * 1000)
    started = time.monotonic()
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        await connect(server.target, retries=1000, timeout=0.6).recommend("anna")
    assert time.monotonic() - started < 2
    assert 1 < len(recorder.seen) < 1000


@pytest.mark.slow
async def test_a_retry_has_only_the_time_that_is_left(client: Awaited, recorder: Recorder) -> None:
    def slow_failure() -> grpc.StatusCode:
        time.sleep(0.5)
        return UNAVAILABLE

    recorder.script.append(slow_failure)
    await client.update("anna", 1, timeout=2)
    first, second = recorder.seen
    assert second.seconds_left < 1.75 < first.seconds_left  # gRPC rounds the deadline that a server sees


@pytest.mark.slow
async def test_a_slow_server_raises_deadline_exceeded_and_is_not_asked_again(
    client: Awaited, recorder: Recorder
) -> None:
    release = threading.Event()
    recorder.script.append(lambda: hold(threading.Event(), release))
    with pytest.raises(DeadlineExceededError) as caught:
        await client.recommend("anna", timeout=0.5)
    release.set()
    assert isinstance(caught.value, TimeoutError) and caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(recorder.seen) == 1 and recorder.seen[0].seconds_left < 0.6


@pytest.mark.slow
async def test_no_server_is_unavailable_or_worth_waiting_for(connect: Connect, no_server: str) -> None:
    complaint = f"Recommend at {no_server}: .*after 2 attempts.*Check that a server"
    with pytest.raises(UnavailableError, match=complaint) as caught:
        await connect(no_server, retries=1).recommend("anna")
    error = caught.value
    assert isinstance(error, ConnectionError) and error.target == no_server and error.method == "Recommend"
    with pytest.raises(DeadlineExceededError):
        await connect(no_server, wait_for_ready=True, timeout=0.2).recommend("anna")


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [0.1, 0.2])
async def test_no_server_is_unavailable_also_with_a_short_timeout(
    connect: Connect, no_server: str, timeout: float
) -> None:
    client = connect(no_server, timeout=timeout)
    for _ in range(5):
        with pytest.raises(UnavailableError):
            await client.recommend("anna")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"retries": 1000}, {"retries": 0, "wait_for_ready": True}])
async def test_a_server_that_starts_within_the_timeout_is_reached(
    connect: Connect, no_server: str, settings: dict[str, Any]
) -> None:
    client = connect(no_server, **settings)
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(_serve_later, no_server)
        assert (await client.update("anna", 1)).applied == 1
    starting.result().stop(None).wait()


def _serve_later(address: str) -> grpc.Server:
    time.sleep(0.2)
    server, _ = serve_recorder(Recorder(), address)
    return server


@pytest.mark.slow
@pytest.mark.parametrize("reply_bytes", [0, 20_000], ids=["before the reply", "within the reply"])
async def test_a_call_whose_connection_breaks_is_retried(
    server: SimpleNamespace, connect: Connect, recorder: Recorder, reply_bytes: int
) -> None:
    with BreakingProxy(server.target) as proxy:

        def break_connection() -> pb.UpdateReply:
            proxy.break_after(reply_bytes)
            return pb.UpdateReply(unknown_item_ids=["x" * 50_000])

        recorder.script.append(break_connection)
        assert (await connect(proxy.target).update("anna", 1)).applied == 1
        assert proxy.connections == 2
    first, second = recorder.seen
    assert first.request == second.request and first.request.request_id


def test_delays_double_up_to_a_maximum_and_are_fully_jittered() -> None:
    def delays(jitter: float) -> list[float | None]:
        attempts = Attempts(6, timeout=1000, jitter=lambda: jitter)
        return [attempts.delay_after(UNAVAILABLE) for _ in range(7) if attempts.start()]

    assert delays(1.0) == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, None]
    assert delays(0.5) == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5, None]
    assert delays(0.0) == [0, 0, 0, 0, 0, 0, None]


def test_all_attempts_share_one_deadline_and_no_delay_outlasts_it() -> None:
    clock = itertools.count(start=100.0, step=0.25).__next__  # each look at the clock costs a quarter of a second
    attempts = Attempts(9, timeout=1.0, clock=clock, jitter=lambda: 0.9)
    assert attempts.start() == 0.75
    assert attempts.delay_after(UNAVAILABLE) is not None
    assert attempts.start() == 0.25
    assert attempts.delay_after(UNAVAILABLE) is None
    assert attempts.start() == 0 and attempts.count == 3
