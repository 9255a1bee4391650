"""The SDK against a real gRPC server on a free port. Every test of a call runs for Client and for AsyncClient."""

import asyncio
import copy
import dataclasses
import inspect
import itertools
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

import sdk
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1 import dman_pb2_grpc as pb_grpc
from sdk import (
    AsyncClient,
    CallError,
    Client,
    ClientClosedError,
    DeadlineExceededError,
    DeletedUser,
    DmanError,
    Event,
    EventLoopError,
    InternalError,
    InvalidArgumentError,
    Recommendation,
    Recommendations,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
    UpdateResult,
    User,
    UserNotFoundError,
)
from sdk._exceptions import ERROR_OF_STATUS, error_from_status
from sdk._retry import Attempts, RetryPolicy

METHODS = ("delete_user", "recommend", "recommend_many", "update", "update_many", "user")
ITEMS_REPLY = pb.RecommendReply(
    items=[
        pb.RecommendedItem(item_id="30", score=0.75, title="Alien"),
        pb.RecommendedItem(item_id="4", score=0.5),
    ],
    source=pb.SOURCE_PERSONALIZED,
    bundle_id="b1",
    event_count=7,
    unknown_item_ids=["nope"],
    integer_item_ids=True,
)
USER_REPLY = pb.GetUserReply(
    user_id="42",
    bundle_id="b1",
    event_count=45,
    segment_fill=5,
    absorbed_segments=1,
    state_bytes=24000,
    recent_events=[pb.Event(item_id="7", timestamp=100), pb.Event(item_id="8")],
    integer_item_ids=True,
)

pytestmark = pytest.mark.timeout(30)


@dataclasses.dataclass
class Seen:
    rpc: str
    request: Any
    seconds_left: float
    metadata: dict[str, Any]
    peer: str


class Recorder(pb_grpc.RecommenderServicer):
    """Records what arrives. Plays one step of `script` for each call: a status to fail with, a reply, or a function
    that may return one of these. Answers by itself when there is none."""

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

    def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserReply:
        reply = pb.DeleteUserReply(existed=True, event_count=45, bundle_id="b1")
        return self._answer("DeleteUser", request, context, reply)


def _update_reply(request: pb.UpdateRequest) -> pb.UpdateReply:
    count = len(request.events)
    return pb.UpdateReply(bundle_id="b1", event_count=40 + count, applied=count, unknown_item_ids=["x", "9"])


def hold(arrived: threading.Event, release: threading.Event) -> None:
    """A step that reports the call and keeps it waiting."""
    arrived.set()
    release.wait(10)


class Awaited:
    """Either client behind one face: every method is awaited."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self.client, name)(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

        return call


Connect = Callable[..., Awaited]


def _serve(register: Callable[[grpc.Server], None], **options: Any) -> tuple[grpc.Server, str]:
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0), *options.items()])
    register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    recorder = Recorder()
    grpc_server, target = _serve(lambda new: pb_grpc.add_RecommenderServicer_to_server(recorder, new))
    yield SimpleNamespace(recorder=recorder, target=target)
    grpc_server.stop(None).wait()


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Makes clients of one kind, and closes them. The deadline is generous, for a busy machine."""
    made: list[Awaited] = []

    def make(target: str, **settings: Any) -> Awaited:
        made.append(Awaited(request.param(target, **{"timeout": 10, **settings})))
        return made[-1]

    yield make
    for client in made:
        await client.close()


@pytest.fixture
def recorder(server: SimpleNamespace) -> Recorder:
    return server.recorder


@pytest.fixture
def client(server: SimpleNamespace, connect: Connect) -> Awaited:
    return connect(server.target)


# Results ------------------------------------------------------------------------------------------------------


async def test_update_returns_what_the_server_did(client: Awaited) -> None:
    assert await client.update(42, [1, 2]) == UpdateResult(
        event_count=42, applied=2, unknown_item_ids=("x", "9"), duplicate=False, bundle_id="b1"
    )


async def test_update_reports_a_duplicate(client: Awaited, recorder: Recorder) -> None:
    recorder.script.append(pb.UpdateReply(duplicate=True, event_count=3))
    result = await client.update("anna", "alien", request_id="order-17")
    assert result.duplicate and result.applied == 0
    assert recorder.request.request_id == "order-17"


async def test_update_many_answers_in_order(client: Awaited, recorder: Recorder) -> None:
    for updates in ({"anna": [1, 2, 3], "bob": 4}, iter([("anna", [1, 2, 3]), ("bob", Event(4))])):
        results = await client.update_many(updates)
        assert [result.applied for result in results] == [3, 1]
    assert [one.user_id for one in recorder.seen[0].request.updates] == ["anna", "bob"]


async def test_recommend_returns_items_best_first_with_their_origin(client: Awaited) -> None:
    answer = await client.recommend(42, k=2)
    assert list(answer) == [Recommendation(30, 0.75, "Alien"), Recommendation(4, 0.5)]
    assert answer == Recommendations(
        items=tuple(answer), source="personalized", event_count=7, unknown_item_ids=("nope",), bundle_id="b1"
    )
    assert not answer.is_popular


async def test_recommend_marks_popular_items_and_sources_it_does_not_know(client: Awaited, recorder: Recorder) -> None:
    recorder.script.extend([pb.RecommendReply(source=pb.SOURCE_POPULAR), pb.RecommendReply(source=99)])
    popular, newer = await client.recommend("new user"), await client.recommend("anna")
    assert popular.source == "popular" and popular.is_popular and len(popular) == 0
    assert newer.source == "unknown" and not newer.is_popular


async def test_recommend_many_answers_in_order(client: Awaited, recorder: Recorder) -> None:
    answers = await client.recommend_many(["anna", 7], 3, exclude=[1], what_if=iter([2, 3]), include_seen=True)
    assert [answer.bundle_id for answer in answers] == ["for anna", "for 7"]
    for request in recorder.request.requests:
        assert (request.k, request.include_seen, list(request.exclude_item_ids)) == (3, True, ["1"])
        assert [event.item_id for event in request.what_if_events] == ["2", "3"]


async def test_user_returns_what_is_stored(client: Awaited, recorder: Recorder) -> None:
    assert await client.user(42, recent_events=2) == User(
        user_id="42",
        event_count=45,
        segment_fill=5,
        absorbed_segments=1,
        state_bytes=24000,
        recent_events=(Event(7, 100), Event(8)),
        bundle_id="b1",
    )
    assert recorder.request == pb.GetUserRequest(user_id="42", recent_events=2)


async def test_delete_user_returns_what_was_deleted(client: Awaited, recorder: Recorder) -> None:
    assert await client.delete_user("anna") == DeletedUser(existed=True, event_count=45, bundle_id="b1")
    assert recorder.request == pb.DeleteUserRequest(user_id="anna")


@pytest.mark.parametrize("integers", [True, False])
async def test_item_ids_come_back_in_the_type_the_bundle_was_trained_on(
    client: Awaited, recorder: Recorder, integers: bool
) -> None:
    recorder.script.append(
        pb.RecommendReply(items=[pb.RecommendedItem(item_id="007" if not integers else "7")], integer_item_ids=integers)
    )
    recorder.script.append(pb.GetUserReply(recent_events=[pb.Event(item_id="7")], integer_item_ids=integers))
    expected: int | str = 7 if integers else "007"
    assert (await client.recommend("anna")).item_ids == (expected,)
    assert (await client.user("anna")).recent_events[0].item_id == (7 if integers else "7")


def test_recommendations_are_an_immutable_sequence_that_survives_copy_and_pickle() -> None:
    best = tuple(Recommendation(item, 1.0 / item, "") for item in (1, 2, 3))
    answer = Recommendations(items=best, source="popular", event_count=0, unknown_item_ids=(), bundle_id="b")
    assert answer[0] == best[0] and answer[-1] == best[2] and best[1] in answer and len(answer) == 3
    assert answer[:2].item_ids == (1, 2) and answer[:2].is_popular
    assert [*reversed(answer)] == [*reversed(best)]
    assert pickle.loads(pickle.dumps(answer)) == copy.deepcopy(answer) == answer and hash(answer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.source = "personalized"  # type: ignore[misc]


# Requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "timestamps", "expected"),
    [
        ("alien", None, [("alien", 0)]),
        (7, None, [("7", 0)]),
        (Event("alien", 5), None, [("alien", 5)]),
        (["a", 7, Event(8, 9), "ü"], None, [("a", 0), ("7", 0), ("8", 9), ("ü", 0)]),
        ([1, 2], [10, 20], [("1", 10), ("2", 20)]),
        ("alien", 10, [("alien", 10)]),
        ((item for item in (1, 1)), None, [("1", 0), ("1", 0)]),
        (np.array([3, -1]), np.array([5, 6]), [("3", 5), ("-1", 6)]),
        (np.int64(3), np.int32(4), [("3", 4)]),
        (np.array(3), None, [("3", 0)]),
        (np.array(["a", "b"]), None, [("a", 0), ("b", 0)]),
        (np.uint64(2**64 - 1), None, [("18446744073709551615", 0)]),
        ([], None, []),
    ],
)
async def test_update_takes_one_item_or_several(
    client: Awaited, recorder: Recorder, items: Any, timestamps: Any, expected: list[tuple[str, int]]
) -> None:
    if inspect.isgenerator(items):  # parameters are shared between the two clients
        items = iter([1, 1])
    await client.update(np.int64(42), items, timestamps=timestamps)
    assert recorder.request.user_id == "42"
    assert [(event.item_id, event.timestamp) for event in recorder.request.events] == expected


async def test_recommend_sends_every_option(client: Awaited, recorder: Recorder) -> None:
    await client.recommend(
        7, np.int64(3), exclude={1}, include_seen=True, candidates=("a", 2), what_if=[3, Event(4, 5)]
    )
    assert recorder.request == pb.RecommendRequest(
        user_id="7",
        k=3,
        exclude_item_ids=["1"],
        include_seen=True,
        candidate_item_ids=["a", "2"],
        what_if_events=[pb.Event(item_id="3"), pb.Event(item_id="4", timestamp=5)],
    )


async def test_recommend_without_a_user_is_anonymous(client: Awaited, recorder: Recorder) -> None:
    await client.recommend(what_if="alien")
    assert recorder.request == pb.RecommendRequest(k=10, what_if_events=[pb.Event(item_id="alien")])


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "complaint"),
    [
        ("update", (1.5, [1]), {}, "user_id must be str or int, not float"),
        ("update", (True, [1]), {}, "user_id must be str or int, not bool"),
        ("update", ("", [1]), {}, "user_id must not be empty"),
        ("update", (None, [1]), {}, "user_id must be str or int, not NoneType"),
        ("update", ("\ud800", [1]), {}, "user_id is not valid Unicode"),
        ("update", ("anna", [1, 2.0]), {}, r"items\[1\] must be str, int or Event, not float"),
        ("update", ("anna", [(1, 5)]), {}, r"items\[0\] must be str, int or Event, not tuple"),
        ("update", ("anna", None), {}, "items must be one value or several, not NoneType"),
        ("update", ("anna", b"alien"), {}, "items must be one value or several, not bytes"),
        ("update", ("anna", {1, 2}), {}, "items must be in order, oldest first; set has no order"),
        ("update", ("anna", {1: 2}), {}, "items must be in order, oldest first; dict has no order"),
        ("update", ("anna", np.array([[1], [2]])), {}, r"items\[0\] must be str, int or Event, not ndarray"),
        ("update", ("anna", [1, 2]), {"timestamps": [1]}, "timestamps must have one value for each of items"),
        ("update", ("anna", [Event(1)]), {"timestamps": [1]}, "timestamps go with ids"),
        ("update", ("anna", 1), {"timestamps": 1.5}, "whole seconds.* must be an integer, not float"),
        ("update", ("anna", Event(1, 2**63)), {}, "out of range"),
        ("update", ("anna", [1]), {"request_id": ""}, "request_id must not be empty"),
        ("update", ("anna", [1]), {"timeout": 0}, "timeout must be a positive number"),
        ("update_many", ([("anna", [1]), ("bob", [1, None])],), {}, r"updates\[1\]\.items\[1\] must be"),
        ("update_many", (["anna"],), {}, r"updates\[0\] must be a pair"),
        ("recommend", ("",), {}, "user_id must not be empty"),
        ("recommend", ("anna", "10"), {}, "k must be an integer, not str"),
        ("recommend", ("anna", 2**31), {}, "k is out of range"),
        ("recommend", ("anna",), {"candidates": []}, "candidates must not be empty"),
        ("recommend", ("anna",), {"exclude": [None]}, r"exclude\[0\] must be str or int, not NoneType"),
        ("recommend_many", (["anna", ""],), {}, r"user_ids\[1\] must not be empty"),
        ("user", ("anna",), {"recent_events": True}, "recent_events must be an integer, not bool"),
        ("delete_user", (b"anna",), {}, "user_id must be str or int, not bytes"),
    ],
)
async def test_bad_arguments_are_named_and_nothing_is_sent(
    client: Awaited, recorder: Recorder, *, method: str, args: Any, kwargs: Any, complaint: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint) as caught:
        await getattr(client, method)(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    assert not recorder.seen


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"target": ""}, "target must be an address"),
        ({"timeout": -1}, "timeout must be a positive"),
        ({"timeout": float("inf")}, "timeout must be a positive"),
        ({"timeout": None}, "timeout must be a number of seconds, not NoneType"),
        ({"retries": -1}, "retries must not be negative"),
        ({"retries": 1.5}, "retries must be an integer"),
        ({"metadata": [("Authorization", "x")]}, "metadata keys are lower-case"),
        ({"metadata": {"token": "x"}}, "metadata must be pairs"),
        ({"options": ["grpc.enable_retries"]}, "options must be pairs"),
        ({"metadata": [("token", b"x")]}, "metadata 'token' must be printable ASCII"),
        ({"metadata": [("token", "line\nbreak")]}, "metadata 'token' must be printable ASCII"),
        ({"metadata": [("token-bin", "x")]}, "metadata 'token-bin' must be bytes"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, Any], complaint: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidArgumentError, match=complaint):
            kind(**settings)


async def test_metadata_goes_with_every_call_and_is_not_shown(
    server: SimpleNamespace, connect: Connect, recorder: Recorder
) -> None:
    client = connect(server.target, metadata=[("authorization", "Bearer s3cret"), ("trace-bin", b"\0\1")])
    await client.update("anna", 1)
    await client.recommend("anna")
    for seen in recorder.seen:
        assert seen.metadata["authorization"] == "Bearer s3cret" and seen.metadata["trace-bin"] == b"\0\1"
    assert "s3cret" not in repr(client.client) + repr(client.client._settings)


# Deadlines and retries ----------------------------------------------------------------------------------------


async def test_update_keeps_one_generated_request_id_across_retries(client: Awaited, recorder: Recorder) -> None:
    recorder.script.extend([grpc.StatusCode.UNAVAILABLE] * 2)
    assert (await client.update("anna", [1])).applied == 1
    ids = [seen.request.request_id for seen in recorder.seen]
    assert len(ids) == 3 and len(set(ids)) == 1 and len(ids[0]) == 32


async def test_every_update_gets_its_own_request_id(client: Awaited, recorder: Recorder) -> None:
    await client.update("anna", [1])
    await client.update("anna", [1])
    await client.update_many([("anna", 1), ("anna", 1)])
    single, again, batch = (seen.request for seen in recorder.seen)
    ids = [single.request_id, again.request_id, *(one.request_id for one in batch.updates)]
    assert len(set(ids)) == 4 and all(ids)


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("update", ("anna", 1)),
        ("update_many", ({"anna": 1},)),
        ("recommend", ("anna",)),
        ("recommend_many", (["anna"],)),
        ("user", ("anna",)),
    ],
)
async def test_an_unavailable_server_is_tried_again(
    client: Awaited, recorder: Recorder, method: str, args: Any
) -> None:
    recorder.script.append(grpc.StatusCode.UNAVAILABLE)
    assert await getattr(client, method)(*args)
    first, second = recorder.seen
    assert first.request == second.request


async def test_delete_user_is_never_retried(client: Awaited, recorder: Recorder) -> None:
    recorder.script.append(grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(UnavailableError):
        await client.delete_user("anna")
    assert len(recorder.seen) == 1


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name not in ("OK", "UNAVAILABLE")])
async def test_no_other_status_is_retried(client: Awaited, recorder: Recorder, code: grpc.StatusCode) -> None:
    recorder.script.append(code)
    with pytest.raises(ERROR_OF_STATUS[code]) as caught:
        await client.update("anna", 1)
    assert caught.value.code is code
    assert len(recorder.seen) == 1


async def test_retries_stop_at_their_number(server: SimpleNamespace, connect: Connect, recorder: Recorder) -> None:
    for retries in (0, 2):
        recorder.seen.clear()
        recorder.script.extend([grpc.StatusCode.UNAVAILABLE] * (retries + 1))
        with pytest.raises(UnavailableError):
            await connect(server.target, retries=retries).recommend("anna")
        assert len(recorder.seen) == retries + 1 and not recorder.script


async def test_retries_stop_at_the_deadline(server: SimpleNamespace, connect: Connect, recorder: Recorder) -> None:
    recorder.script.extend([grpc.StatusCode.UNAVAILABLE] * 1000)
    started = time.monotonic()
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        await connect(server.target, retries=1000, timeout=0.6).recommend("anna")
    assert time.monotonic() - started < 2
    assert 1 < len(recorder.seen) < 1000


async def test_a_retry_has_only_the_time_that_is_left(client: Awaited, recorder: Recorder) -> None:
    def slow_failure() -> grpc.StatusCode:
        time.sleep(0.5)
        return grpc.StatusCode.UNAVAILABLE

    recorder.script.append(slow_failure)
    await client.update("anna", 1, timeout=2)
    first, second = recorder.seen
    assert second.seconds_left < 1.75 < first.seconds_left  # gRPC rounds the deadline that a server sees


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


async def test_no_server_is_unavailable_or_worth_waiting_for(connect: Connect) -> None:
    gone, target = _serve(lambda _: None)
    gone.stop(None).wait()
    with pytest.raises(UnavailableError, match=f"Recommend at {target}: .*after 2 attempts.*Check that a server") as no:
        await connect(target, retries=1).recommend("anna")
    assert isinstance(no.value, ConnectionError) and no.value.target == target and no.value.method == "Recommend"
    with pytest.raises(DeadlineExceededError):
        await connect(target, wait_for_ready=True, timeout=0.2).recommend("anna")


def test_backoff_grows_to_its_maximum_and_is_fully_jittered() -> None:
    policy = RetryPolicy(retries=10, first_delay=0.1, max_delay=0.5)

    def delay(attempts: int, jitter: float) -> float | None:
        return policy.delay(grpc.StatusCode.UNAVAILABLE, attempts=attempts, remaining=9, jitter=jitter)

    assert [delay(attempts, 1.0) for attempts in (1, 2, 3, 4, 10)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    assert [delay(3, jitter) for jitter in (0.0, 0.5)] == [0.0, 0.2]
    assert delay(11, 0.5) is None


def test_no_delay_outlasts_the_deadline_which_all_attempts_share() -> None:
    clock = itertools.count(start=100.0, step=0.25).__next__  # each look at the clock costs a quarter of a second
    attempts = Attempts(RetryPolicy(retries=9, first_delay=0.1, max_delay=0.1), timeout=1.0, clock=clock)
    assert attempts.start() == 0.75
    assert attempts.delay_after(grpc.StatusCode.UNAVAILABLE) is not None
    assert attempts.start() == 0.25
    assert attempts.delay_after(grpc.StatusCode.UNAVAILABLE) is None
    assert attempts.start() == 0 and attempts.count == 3


# Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_becomes_an_error_that_says_where_why_and_what_to_do(code: grpc.StatusCode) -> None:
    error = error_from_status(code, method="Update", target="host:1", details="disk on fire.", attempts=3)
    assert type(error) is ERROR_OF_STATUS[code]
    assert (error.code, error.method, error.target, error.details) == (code, "Update", "host:1", "disk on fire.")
    assert str(error).startswith(f"Update at host:1: disk on fire [{code.name} after 3 attempts]. ")
    assert str(error).endswith(type(error).remedy) and type(error).remedy
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and again.code is code


def test_the_error_tree_is_the_documented_one() -> None:
    public = {name: kind for name, kind in vars(sdk).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    drawn = [line.split("── ")[-1].split()[0] for line in (DmanError.__doc__ or "").splitlines() if "── " in line]
    assert {"DmanError", *drawn} == set(public)
    assert set(ERROR_OF_STATUS) == set(grpc.StatusCode)
    assert set(ERROR_OF_STATUS.values()) <= set(public.values())
    called = set(ERROR_OF_STATUS.values()) - {InvalidArgumentError}
    assert all(issubclass(kind, CallError) for kind in called)
    assert not any(issubclass(kind, grpc.RpcError) for kind in public.values())


async def test_an_unknown_user_is_not_found(client: Awaited, recorder: Recorder) -> None:
    recorder.script.append(grpc.StatusCode.NOT_FOUND)
    with pytest.raises(UserNotFoundError, match="no luck today") as caught:
        await client.user("nobody")
    assert isinstance(caught.value, LookupError) and caught.value.details == "no luck today"


async def test_another_server_is_unimplemented(connect: Connect) -> None:
    other, target = _serve(lambda _: None)
    with pytest.raises(UnimplementedError, match="address is that of a DMAN server"):
        await connect(target).recommend("anna")
    other.stop(None).wait()


async def test_a_crashing_server_is_an_internal_error(client: Awaited, recorder: Recorder) -> None:
    def crash() -> None:
        raise RuntimeError("bug")

    recorder.script.append(crash)
    with pytest.raises(InternalError, match="server's log") as caught:
        await client.recommend("anna")
    assert caught.value.code is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(
    ("method", "args", "reply"),
    [
        ("recommend_many", (["anna", "bob"],), pb.BatchRecommendReply()),
        ("update_many", ({"anna": 1},), pb.BatchUpdateReply()),
        (
            "recommend",
            ("anna",),
            pb.RecommendReply(items=[pb.RecommendedItem(item_id="alien")], integer_item_ids=True),
        ),
    ],
)
async def test_a_reply_that_makes_no_sense_is_an_internal_error(
    client: Awaited, recorder: Recorder, method: str, args: Any, reply: Any
) -> None:
    recorder.script.append(reply)
    with pytest.raises(InternalError, match="unreadable reply"):
        await getattr(client, method)(*args)


async def test_a_reply_that_is_no_message_is_an_internal_error(connect: Connect) -> None:
    def register(new: grpc.Server) -> None:
        garbage = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\xff\xff\xff")
        new.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("dman.v1.Recommender", {"Update": garbage})])

    broken, target = _serve(register)
    with pytest.raises(InternalError):
        await connect(target).update("anna", 1)
    broken.stop(None).wait()


async def test_a_message_over_the_limit_is_resource_exhausted(
    server: SimpleNamespace, connect: Connect, recorder: Recorder
) -> None:
    with pytest.raises(ResourceExhaustedError, match=r"larger than max.*Split a large batch"):
        await connect(server.target).update("anna", ["x" * (17 << 20)])
    assert not recorder.seen
    with pytest.raises(ResourceExhaustedError, match="larger than max"):
        await connect(server.target, options=[("grpc.max_receive_message_length", 10)]).recommend("anna")


# Life of a client ---------------------------------------------------------------------------------------------


async def test_a_closed_client_says_so(client: Awaited) -> None:
    await client.recommend("anna")
    await client.close()
    await client.close()
    for method, args in (("update", ("anna", 1)), ("recommend", ()), ("__enter__", ()), ("__aenter__", ())):
        if hasattr(client.client, method):
            with pytest.raises(ClientClosedError, match="Create a new one"):
                await getattr(client, method)(*args)
    assert "(closed)" in repr(client.client)


async def test_a_client_that_never_called_can_be_closed(client: Awaited) -> None:
    await client.close()
    with pytest.raises(ClientClosedError):
        await client.recommend("anna")


async def test_closing_ends_the_calls_under_way(client: Awaited, recorder: Recorder) -> None:
    release, arrived = threading.Event(), threading.Event()
    recorder.script.append(lambda: hold(arrived, release))

    async def call() -> None:
        with pytest.raises(ClientClosedError):
            if isinstance(client.client, Client):
                await asyncio.to_thread(client.client.recommend, "anna")
            else:
                await client.recommend("anna")

    calling = asyncio.create_task(call())
    await asyncio.to_thread(arrived.wait, 10)
    await client.close()
    await calling
    release.set()


async def test_one_connection_is_reused_and_each_client_has_its_own(
    server: SimpleNamespace, connect: Connect, recorder: Recorder
) -> None:
    first, second = connect(server.target), connect(server.target)
    for _ in range(5):
        await first.recommend("anna")
    assert len({seen.peer for seen in recorder.seen}) == 1
    await second.recommend("anna")
    assert len({seen.peer for seen in recorder.seen}) == 2


async def test_a_client_outlives_a_restart_of_its_server(connect: Connect) -> None:
    def register(new: grpc.Server) -> None:
        pb_grpc.add_RecommenderServicer_to_server(Recorder(), new)

    first, target = _serve(register)
    client = connect(target, wait_for_ready=True)
    await client.recommend("anna")
    first.stop(None).wait()
    second = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    register(second)
    second.add_insecure_port(target)
    second.start()
    assert len(await client.recommend("anna")) == 2
    second.stop(None).wait()


def test_a_client_is_shared_by_threads(server: SimpleNamespace, recorder: Recorder) -> None:
    with Client(server.target, timeout=10) as client, ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda user: client.update(user, [1]).applied, range(64)))
    assert results == [1] * 64
    assert {seen.request.user_id for seen in recorder.seen} == {str(user) for user in range(64)}


async def test_an_async_client_is_shared_by_tasks(server: SimpleNamespace) -> None:
    async with AsyncClient(server.target, timeout=10) as client:
        results = await asyncio.gather(*(client.update(user, [1]) for user in range(64)))
    assert [result.applied for result in results] == [1] * 64


async def test_cancelling_a_task_cancels_its_call(server: SimpleNamespace, recorder: Recorder) -> None:
    release, arrived = threading.Event(), threading.Event()
    recorder.script.append(lambda: hold(arrived, release))
    async with AsyncClient(server.target, timeout=10) as client:
        calling = asyncio.create_task(client.recommend("anna"))
        await asyncio.to_thread(arrived.wait, 10)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        release.set()
        assert len(await client.recommend("anna")) == 2  # the client is as good as before


async def test_an_async_client_refuses_another_event_loop(server: SimpleNamespace) -> None:
    async with AsyncClient(server.target, timeout=10) as client:
        await client.recommend("anna")
        with pytest.raises(EventLoopError, match="one client for each loop"):
            await asyncio.to_thread(lambda: asyncio.run(client.recommend("anna")))


def test_a_client_speaks_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    try:
        subprocess.run(
            [*command.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
            check=True,
            capture_output=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs the openssl command, to make a certificate")
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_RecommenderServicer_to_server(Recorder(), server)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    target = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
    with Client(target, timeout=10, channel_credentials=trusted) as client:
        assert len(client.recommend("anna")) == 2

    async def recommend() -> Recommendations:
        async with AsyncClient(target, timeout=10, channel_credentials=trusted) as client:
            return await client.recommend("anna")

    assert len(asyncio.run(recommend())) == 2
    with Client(target, timeout=10, retries=0) as plain, pytest.raises(UnavailableError, match="TLS"):
        plain.recommend("anna")
    server.stop(None).wait()


# The package --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_both_clients_have_the_same_documented_methods(name: str) -> None:
    sync, async_ = getattr(Client, name), getattr(AsyncClient, name)
    assert inspect.signature(sync) == inspect.signature(async_)
    assert next(iter(inspect.signature(sync).parameters)) == "self"
    assert inspect.getdoc(sync) == inspect.getdoc(async_)
    assert "Raises:" in sync.__doc__
    for parameter in [*inspect.signature(sync).parameters][1:]:
        assert f"    {parameter}: " in sync.__doc__
    assert inspect.iscoroutinefunction(async_) and not inspect.iscoroutinefunction(sync)
    assert async_.__qualname__ == f"AsyncClient.{name}"


def test_both_clients_have_the_same_names() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient) == {*METHODS, "close", "target"}
    assert inspect.signature(Client) == inspect.signature(AsyncClient)
    assert inspect.signature(Client.recommend).return_annotation is Recommendations


def test_the_public_names_are_sorted_and_complete() -> None:
    assert sdk.__all__ == sorted(sdk.__all__)
    public = {name for name in vars(sdk) if not name.startswith("_")}
    assert public == {name for name in sdk.__all__ if not name.startswith("_")}


def test_importing_the_sdk_needs_grpc_and_protobuf_only() -> None:
    script = (
        "import sys, threading, sdk\n"
        "heavy = {'numpy', 'torch', 'onnxruntime', 'lmdb', 'dman_runtime', 'dman_train', 'tools'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
