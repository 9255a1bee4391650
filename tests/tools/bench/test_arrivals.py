"""The open loop, against a recommender whose speed is known: queues show, deadlines are kept, refusals are seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from dman_runtime.errors import UsageError
from tools.bench import open_loop
from tools.bench.arrivals import DEADLINE_EXCEEDED, OK, RESOURCE_EXHAUSTED, Arrivals, Client, Outcome, arrivals_client
from tools.bench.h2load import Call
from tools.bench.messages import UPDATE, recommend_calls

pytestmark = pytest.mark.slow
CALLS = [*recommend_calls(["a", "b"]), Call(UPDATE, b"\n\1a")]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with arrivals_client() as client:
        yield client


def test_calls_come_at_the_rate_that_was_asked_for_and_are_all_answered(
    client: Client, serve_fake: Callable[..., str]
) -> None:
    found = client.run(Arrivals(serve_fake(), CALLS, 1.0, 200, connections=4, deadline=20.0))
    assert len(found.due) == 200 and found.good.all()
    assert np.allclose(found.due, np.arange(200) / 200)
    assert (found.sent >= found.due).all() and (found.ended > found.sent).all()
    assert found.call.tolist() == [number % len(CALLS) for number in range(200)]


def test_queue_shows_in_the_time_from_when_a_call_was_due(client: Client, serve_fake: Callable[..., str]) -> None:
    """20 calls a second are done, 40 come: the last one of two seconds waits for about two more."""
    found = client.run(Arrivals(serve_fake(call=0.05), CALLS, 2.0, 40, deadline=30.0))
    assert found.good.all()
    assert found.milliseconds[0] < 500 and found.milliseconds[-1] > 1500


def test_call_is_given_up_at_its_deadline(client: Client, serve_fake: Callable[..., str]) -> None:
    found = client.run(Arrivals(serve_fake(call=0.05), CALLS, 2.0, 40, deadline=0.5))
    late = found.status == DEADLINE_EXCEEDED
    assert 10 < late.sum() < 75 and found.good.sum() + late.sum() == 80
    assert (found.milliseconds[late] >= 500).all() and (found.milliseconds[found.good] <= 500).all()
    assert found.accepted.all()


def test_connection_holds_calls_that_the_server_has_no_stream_for(
    client: Client, serve_limited: Callable[[int], str]
) -> None:
    found = client.run(Arrivals(serve_limited(2), CALLS, 0.5, 40, connections=1, deadline=20.0))
    assert len(found.due) == 20 and found.good.all()
    most = max(int(((found.sent <= at) & (found.ended > at)).sum()) for at in found.sent)
    assert most <= 2 and found.late_ms > 100


def test_closed_loop_keeps_one_call_on_each_connection(client: Client, serve_fake: Callable[..., str]) -> None:
    found = client.run(Arrivals(serve_fake(call=0.01), CALLS, 1.0, None, connections=3, deadline=20.0))
    assert 10 < len(found.due) < 110 and found.good.all()
    assert max(int(((found.sent <= at) & (found.ended > at)).sum()) for at in found.sent) <= 3


def test_refusals_are_seen_in_the_trailers(client: Client) -> None:
    def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no")

    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(refuse)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("dman.v1.Recommender", {"Update": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        found = client.run(Arrivals(f"127.0.0.1:{port}", CALLS[-1:], 0.5, 40, deadline=20.0))
    finally:
        server.stop(0).wait()
    assert open_loop.statuses(found) == {RESOURCE_EXHAUSTED: 20} and not found.accepted.any()


def test_client_says_that_no_server_listens(client: Client) -> None:
    with pytest.raises(UsageError, match="the client of the open loop failed"):
        client.run(Arrivals("127.0.0.1:9", CALLS, 0.1, 10))


@pytest.fixture
def serve_limited() -> Iterator[Callable[[int], str]]:
    """Serves calls of a tenth of a second, so many at a time on one connection."""
    servers: list[grpc.Server] = []

    def serve(streams: int) -> str:
        import time

        def slow(request: bytes, context: grpc.ServicerContext) -> bytes:
            time.sleep(0.1)
            return b""

        server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.max_concurrent_streams", streams)])
        handlers = dict.fromkeys(("Update", "Recommend"), grpc.unary_unary_rpc_method_handler(slow))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("dman.v1.Recommender", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield serve
    for server in servers:
        server.stop(0).wait()


# -- what an overload says -------------------------------------------------------------------------------------------


def outcome(due: list[float], milliseconds: list[float], status: list[int]) -> Outcome:
    begun = np.array(due)
    ended = begun + np.array(milliseconds) / 1000
    return Outcome(begun, begun, ended, np.array(status), np.zeros(len(due), np.int64), 1.0, 0.1)


@pytest.mark.parametrize(
    ("milliseconds", "status", "seconds"),
    [
        ([1.0] * 8, [OK] * 8, 0.0),
        ([9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0], [OK] * 8, 1.5),
        ([1.0] * 8, [OK, OK, OK, DEADLINE_EXCEEDED, OK, OK, OK, OK], 2.0),
        ([1.0] * 7 + [9.0], [OK] * 8, float("inf")),
    ],
)
def test_normal_again_is_the_end_of_the_last_window_that_is_not(
    milliseconds: list[float], status: list[int], seconds: float
) -> None:
    due = [0.5 * number + 0.1 for number in range(8)]
    assert open_loop._normal_again(outcome(due, milliseconds, status), limit=2.0) == seconds


def test_slices_count_calls_by_when_they_were_due() -> None:
    due = [0.0, 1.0, 4.9, 5.1, 6.0, 7.0]
    status = [OK, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, OK, OK, 14]
    found = outcome(due * 10, [1, 2, 3, 4, 5, 6] * 10, status * 10)
    memory = open_loop.Watched([(0.0, 10), (5.0, 20_000_000), (10.0, 30_000_000)])
    first, second = open_loop._slices(found, memory, 10.0)
    assert (first.good, first.refused, first.expired, first.other, first.megabytes) == (2, 2, 2, 0, 20.0)
    assert (second.began, second.good, second.other, second.megabytes) == (5.0, 4, 2, 30.0)
    assert second.p50 == pytest.approx(4.5)
    assert open_loop._growth([first, second]) == 1.5
