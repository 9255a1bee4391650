"""The gRPC service in a real server: replies, and the status of every request that cannot be served."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import running, serve_config

from dman_runtime import engine as engine_module
from dman_runtime.access.callers import Access
from dman_runtime.access.limits import Limits
from dman_runtime.api import recommender
from dman_runtime.api.admission import Admission
from dman_runtime.api.door import Door
from dman_runtime.api.recommender import FEW, MAX_REPLY_BYTES, SERVICE_NAME, RecommenderService
from dman_runtime.batcher import Batcher
from dman_runtime.engine import Engine
from dman_runtime.errors import StoreUnavailableError
from dman_runtime.model.generation import Generation
from dman_runtime.requests import MAX_BATCH, MAX_EVENTS, MAX_K, MAX_LISTED_IDS, MAX_PRODUCER_BYTES, MAX_REQUEST_ID_BYTES
from dman_runtime.serving.app import App
from dman_runtime.store.base import Write
from dman_runtime.store.lmdb import LmdbStore
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub

NOTHING = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def channel(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    config = serve_config(tiny_bundle, tmp_path_factory.mktemp("service") / "state")
    with running(App(config)) as app, grpc.insecure_channel(f"127.0.0.1:{app.port}") as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> RecommenderStub:
    return RecommenderStub(channel)


def update_request(user_id: str, *items: object, **fields: Any) -> pb.UpdateRequest:
    return pb.UpdateRequest(user_id=user_id, events=[pb.Event(item_id=str(item)) for item in items], **fields)


def refused(call: Callable[..., Any], request: Any, code: grpc.StatusCode) -> str:
    """The one line, free of internals, with which `request` is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=30)
    assert caught.value.code() is code
    details: str = caught.value.details()
    assert details and "\n" not in details and len(details) < 300
    assert not re.search(r"Traceback|File |\.py\b|/tmp|/work|0x[0-9a-f]{6}|Error\b", details)
    return details


def test_recommendation_is_for_the_moment_that_was_asked_for_and_for_now_without_one() -> None:
    events = [pb.Event(item_id="1", timestamp=50), pb.Event(item_id="2")]
    query = recommender._query(pb.RecommendRequest(user_id="u", k=3, at=0, what_if_events=events))
    assert (query.at, list(query.what_if_times)) == (0, [50, 0])
    before = int(time.time())
    now = recommender._query(pb.RecommendRequest(user_id="u", k=3)).at
    assert now is not None and before <= now <= time.time()


# -- requests that cannot be served ----------------------------------------------------------------------------------

BAD_USER_IDS = {"empty": "", "too long": "x" * 401, "too long in UTF-8": "é" * 201, "control": "a\x00b", "line": "a\nb"}
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("user_id", BAD_USER_IDS.values(), ids=BAD_USER_IDS)
@pytest.mark.parametrize("rpc", ["Update", "GetUser", "GetHistory", "DeleteUser", "Recommend"])
def test_bad_user_id_is_an_invalid_argument(stub: RecommenderStub, rpc: str, user_id: str) -> None:
    if rpc == "Recommend" and not user_id:
        return  # anonymous
    kind: dict[str, type[Any]] = {
        "Update": pb.UpdateRequest,
        "GetUser": pb.GetUserRequest,
        "GetHistory": pb.GetHistoryRequest,
        "DeleteUser": pb.DeleteUserRequest,
    }
    request = kind.get(rpc, pb.RecommendRequest)(user_id=user_id)
    assert "1 to 400 bytes" in refused(getattr(stub, rpc), request, INVALID)


def test_user_id_of_400_bytes_is_accepted(stub: RecommenderStub) -> None:
    assert stub.Update(update_request("é" * 200, 1)).event_count == 1


@pytest.mark.parametrize("k", [0, -1, MAX_K + 1, 2**31 - 1])
def test_k_out_of_range_is_an_invalid_argument(stub: RecommenderStub, k: int) -> None:
    assert refused(stub.Recommend, pb.RecommendRequest(k=k), INVALID) == f"k is {k}; choose 1 to {MAX_K}"


def test_k_is_10_when_absent_and_may_be_1_or_1000(stub: RecommenderStub) -> None:
    assert len(stub.Recommend(pb.RecommendRequest()).items) == 10
    assert len(stub.Recommend(pb.RecommendRequest(k=1)).items) == 1
    assert len(stub.Recommend(pb.RecommendRequest(k=1000)).items) == 60  # all there are


TOO_MUCH: dict[str, tuple[str, Any, str]] = {
    "events": ("Update", update_request("u", *["1"] * (MAX_EVENTS + 1)), f"{MAX_EVENTS} at a time"),
    "request id": ("Update", update_request("u", 1, request_id="r" * 129), f"{MAX_REQUEST_ID_BYTES} bytes"),
    "producer": ("Update", update_request("u", 1, producer="p" * 129, sequence=1), f"{MAX_PRODUCER_BYTES} bytes"),
    "producer alone": ("Update", update_request("u", 1, producer="p"), "give both, or none"),
    "sequence alone": ("Update", update_request("u", 1, sequence=0), "give both, or none"),
    "what-if events": (
        "Recommend",
        pb.RecommendRequest(what_if_events=[pb.Event(item_id="1")] * (MAX_EVENTS + 1)),
        f"at most {MAX_EVENTS}",
    ),
    "exclusions": (
        "Recommend",
        pb.RecommendRequest(exclude_item_ids=["1"] * (MAX_LISTED_IDS + 1)),
        f"at most {MAX_LISTED_IDS}",
    ),
    "candidates": (
        "Recommend",
        pb.RecommendRequest(candidate_item_ids=["1"] * (MAX_LISTED_IDS + 1)),
        f"at most {MAX_LISTED_IDS}",
    ),
    "updates": (
        "BatchUpdate",
        pb.BatchUpdateRequest(updates=[update_request("u", 1)] * (MAX_BATCH + 1)),
        f"at most {MAX_BATCH}",
    ),
    "requests": (
        "BatchRecommend",
        pb.BatchRecommendRequest(requests=[pb.RecommendRequest()] * (MAX_BATCH + 1)),
        f"at most {MAX_BATCH}",
    ),
    "recent events": ("GetUser", pb.GetUserRequest(user_id="u", recent_events=MAX_EVENTS + 1), f"0 to {MAX_EVENTS}"),
    "page": ("GetHistory", pb.GetHistoryRequest(user_id="u", limit=MAX_EVENTS + 1), f"limit of 1 to {MAX_EVENTS}"),
    "empty page": ("GetHistory", pb.GetHistoryRequest(user_id="u", limit=0), f"limit of 1 to {MAX_EVENTS}"),
    "negative page": ("GetHistory", pb.GetHistoryRequest(user_id="u", limit=-1), f"limit of 1 to {MAX_EVENTS}"),
    "negative recent events": ("GetUser", pb.GetUserRequest(user_id="u", recent_events=-1), f"0 to {MAX_EVENTS}"),
}


@pytest.mark.parametrize(("rpc", "request_", "limit"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_request_over_a_limit_is_an_invalid_argument_that_names_it(
    stub: RecommenderStub, rpc: str, request_: Any, limit: str
) -> None:
    assert limit in refused(getattr(stub, rpc), request_, INVALID)


@pytest.mark.parametrize("item_id", ["", "a\nb", "x" * 401], ids=["empty", "control", "too long"])
def test_bad_item_id_is_an_invalid_argument_that_says_where(stub: RecommenderStub, item_id: str) -> None:
    bad = update_request("bad item", 1, item_id)
    assert "1 to 400 bytes" in refused(stub.Update, bad, INVALID)
    updates = [update_request("other", 1), bad]
    details = refused(stub.BatchUpdate, pb.BatchUpdateRequest(updates=updates), INVALID)
    assert details.startswith("updates[1]: item id ")
    for user in ("bad item", "other"):
        refused(stub.GetUser, pb.GetUserRequest(user_id=user), grpc.StatusCode.NOT_FOUND)
    what_if = pb.RecommendRequest(what_if_events=[pb.Event(item_id=item_id)], candidate_item_ids=[item_id, "7"])
    reply = stub.Recommend(what_if)  # nothing of it is stored: an id like any other that is unknown
    assert (list(reply.unknown_item_ids), [item.item_id for item in reply.items]) == ([item_id] * 2, ["7"])


def test_bad_request_in_a_batch_is_named_by_its_position_and_nothing_is_stored(stub: RecommenderStub) -> None:
    updates = [update_request("batch-a", 1), update_request("batch-b", 1), update_request("", 1)]
    assert refused(stub.BatchUpdate, pb.BatchUpdateRequest(updates=updates), INVALID).startswith("updates[2]: ")
    for user in ("batch-a", "batch-b"):
        refused(stub.GetUser, pb.GetUserRequest(user_id=user), grpc.StatusCode.NOT_FOUND)
    requests = [pb.RecommendRequest(), pb.RecommendRequest(k=0)]
    details = refused(stub.BatchRecommend, pb.BatchRecommendRequest(requests=requests), INVALID)
    assert details.startswith("requests[1]: k is 0")


def test_unknown_user_is_not_found_and_deleting_one_succeeds(stub: RecommenderStub) -> None:
    details = refused(stub.GetUser, pb.GetUserRequest(user_id="nobody"), grpc.StatusCode.NOT_FOUND)
    assert "no user 'nobody'" in details
    assert refused(stub.GetHistory, pb.GetHistoryRequest(user_id="nobody"), grpc.StatusCode.NOT_FOUND) == details
    reply = stub.DeleteUser(pb.DeleteUserRequest(user_id="nobody"))
    assert (reply.existed, reply.event_count) == (False, 0) and reply.bundle_id


def test_bytes_that_are_no_message_are_refused(channel: grpc.Channel) -> None:
    details = refused(channel.unary_unary(f"/{SERVICE_NAME}/Update"), b"\xff\xff\xff", INVALID)
    assert details == "the message is not a dman.v1.UpdateRequest; send what the proto file describes"


# -- replies ---------------------------------------------------------------------------------------------------------


def test_replies_carry_what_the_contract_says(stub: RecommenderStub, tiny: Generation) -> None:
    bundle_id = tiny.bundle_id
    request = update_request("replies", *range(1, 13), "x", request_id="r")
    request.events[0].timestamp = 77
    reply = stub.Update(request)
    assert (reply.bundle_id, reply.event_count, reply.applied, reply.duplicate) == (bundle_id, 12, 12, False)
    assert (reply.history_count, list(reply.unknown_item_ids)) == (13, ["x"])
    again = stub.Update(request)
    assert (again.event_count, again.history_count, again.applied, again.duplicate) == (12, 13, 0, True)

    user = stub.GetUser(pb.GetUserRequest(user_id="replies", recent_events=3))
    assert (user.user_id, user.bundle_id, user.event_count, user.history_count) == ("replies", bundle_id, 12, 13)
    assert (user.segment_fill, user.absorbed_segments, user.integer_item_ids) == (2, 1, True)
    assert [event.item_id for event in user.recent_events] == ["11", "12", "x"]
    assert 0 < user.state_bytes < 24_000
    first = stub.GetUser(pb.GetUserRequest(user_id="replies", recent_events=10_000)).recent_events[0]
    assert (first.item_id, first.timestamp) == ("1", 77)

    answer = stub.Recommend(pb.RecommendRequest(user_id="replies", k=5, exclude_item_ids=["20", "y"]))
    assert answer.source == pb.SOURCE_PERSONALIZED and answer.bundle_id == bundle_id and answer.event_count == 12
    assert [item.title for item in answer.items] == [f"Title {item.item_id}" for item in answer.items]
    assert list(answer.unknown_item_ids) == ["y"] and answer.integer_item_ids
    assert not {item.item_id for item in answer.items} & {str(i) for i in [*range(1, 13), 20]}

    deleted = stub.DeleteUser(pb.DeleteUserRequest(user_id="replies"))
    assert (deleted.existed, deleted.event_count) == (True, 13)
    assert stub.Recommend(pb.RecommendRequest(user_id="replies")).source == pb.SOURCE_POPULAR


def test_a_history_is_read_in_parts_of_any_size(stub: RecommenderStub, tiny: Generation) -> None:
    items = [str(1 + n % 70) for n in range(500)]  # also of items that the bundle does not know
    request = update_request("long", *items)
    for n, event in enumerate(request.events):
        event.timestamp = 1000 + n
    stub.Update(request)

    def page(**fields: int) -> list[tuple[str, int]]:
        reply = stub.GetHistory(pb.GetHistoryRequest(user_id="long", **fields))
        assert (reply.history_count, reply.bundle_id, reply.integer_item_ids) == (500, tiny.bundle_id, True)
        return [*zip(reply.item_ids, reply.timestamps, strict=True)]

    events = [(item, 1000 + n) for n, item in enumerate(items)]
    assert page() == events
    assert page(limit=1) == events[:1] and page(start=499) == events[499:]
    assert page(start=120, limit=FEW) == events[120 : 120 + FEW]  # on the event loop; the others on the bulk thread
    for start in (500, 501, 2**64 - 1):
        assert page(start=start) == []
    for size in (1, 7, 333):
        assert [event for start in range(0, 500, size) for event in page(start=start, limit=size)] == events


def test_a_part_of_10_000_events_with_the_longest_ids_is_one_reply(stub: RecommenderStub) -> None:
    longest = [f"{n:05}" + "ü" * 197 + "!" for n in range(MAX_EVENTS)]
    assert {len(item.encode()) for item in longest} == {400}
    stub.Update(update_request("longest", *longest))
    stub.Update(update_request("longest", 1))
    reply = stub.GetHistory(pb.GetHistoryRequest(user_id="longest"))
    assert (reply.history_count, [*reply.item_ids]) == (MAX_EVENTS + 1, longest)
    assert reply.ByteSize() < MAX_REPLY_BYTES


def test_batches_answer_in_order_and_apply_same_user_updates_in_order(stub: RecommenderStub) -> None:
    updates = [update_request("order", 5), update_request("other", 7), update_request("order", 6, 5)]
    replies = stub.BatchUpdate(pb.BatchUpdateRequest(updates=updates)).replies
    assert [(reply.event_count, reply.applied) for reply in replies] == [(1, 1), (1, 1), (3, 2)]
    events = stub.GetUser(pb.GetUserRequest(user_id="order", recent_events=9)).recent_events
    assert [event.item_id for event in events] == ["5", "6", "5"]
    requests = [pb.RecommendRequest(user_id=user, k=k) for user, k in [("order", 3), ("nobody", 2), ("other", 4)]]
    answers = stub.BatchRecommend(pb.BatchRecommendRequest(requests=requests)).replies
    assert [len(answer.items) for answer in answers] == [3, 2, 4]
    assert [answer.event_count for answer in answers] == [3, 0, 1]
    assert stub.BatchUpdate(pb.BatchUpdateRequest()).replies == []
    assert stub.BatchRecommend(pb.BatchRecommendRequest()).replies == []


def test_updates_of_a_producer_are_applied_once_also_with_sequence_0(stub: RecommenderStub) -> None:
    first = update_request("of a log", 5, producer="log", sequence=0)
    assert [stub.Update(first).duplicate for _ in range(2)] == [False, True]
    batch = pb.BatchUpdateRequest(updates=[first, update_request("of a log", 6, producer="log", sequence=1)])
    assert [reply.duplicate for reply in stub.BatchUpdate(batch).replies] == [True, False]
    stub.DeleteUser(pb.DeleteUserRequest(user_id="of a log"))
    assert [reply.duplicate for reply in stub.BatchUpdate(batch).replies] == [True, True]
    refused(stub.GetUser, pb.GetUserRequest(user_id="of a log"), grpc.StatusCode.NOT_FOUND)


def test_what_takes_long_to_convert_is_converted_on_the_bulk_thread(
    stub: RecommenderStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a batch has few members: their events count."""
    threads = []

    def watched(check: Callable[..., None]) -> Callable[..., None]:
        def checked(*values: Any) -> None:
            threads.append(threading.current_thread().name.partition("_")[0])
            check(*values)

        return checked

    for name in ("check_updates", "check_queries"):
        monkeypatch.setattr(recommender, name, watched(getattr(recommender, name)))
    for events in (2, FEW):
        items = [str(1 + n % 60) for n in range(events)]
        stub.BatchUpdate(pb.BatchUpdateRequest(updates=[update_request("bulk", *items)] * 2))
        query = pb.RecommendRequest(what_if_events=[pb.Event(item_id=item) for item in items])
        stub.BatchRecommend(pb.BatchRecommendRequest(requests=[query] * 2))
    assert [thread == "bulk" for thread in threads] == [False, False, True, True]


# -- failures inside -------------------------------------------------------------------------------------------------


class Served:
    """The service over an engine behind a door, without an app. An async context manager: gives its port."""

    def __init__(self, engine: Engine, batcher: Batcher) -> None:
        self._engine, self._batcher = engine, batcher

    async def __aenter__(self) -> int:
        self._bulk = ThreadPoolExecutor(1)
        self._service = RecommenderService(self._engine, updates=self._batcher, queries=self._batcher, bulk=self._bulk)
        door = Door(
            self._service.methods(),
            admission=Admission(max_requests=100, max_bytes=64 << 20),
            access=Access.open(None),
            limits=Limits(0, 0),
            bulk=self._bulk,
        )
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((door,))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)
        self._service.close()
        self._bulk.shutdown()


@contextmanager
def served(engine: Engine) -> Iterator[RecommenderStub]:
    batcher = Batcher(engine)
    try:
        with running(Served(engine, batcher)) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
            yield RecommenderStub(opened)
    finally:
        batcher.close()


@pytest.fixture
def engine(tiny: Generation, tmp_path: Path) -> Iterator[Engine]:
    with LmdbStore.open(tmp_path / "state", map_size=64 << 20) as store:
        yield Engine(tiny, store)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


ALL_CALLS: dict[str, Any] = {
    "Update": update_request("anna", 1),
    "BatchUpdate": pb.BatchUpdateRequest(updates=[update_request("anna", 1)]),
    "Recommend": pb.RecommendRequest(user_id="anna"),
    "BatchRecommend": pb.BatchRecommendRequest(requests=[pb.RecommendRequest(user_id="anna")]),
    "GetUser": pb.GetUserRequest(user_id="anna"),
    "GetHistory": pb.GetHistoryRequest(user_id="anna"),
    "DeleteUser": pb.DeleteUserRequest(user_id="anna"),
}


@pytest.mark.parametrize("rpc", ALL_CALLS)
def test_broken_engine_is_internal_with_a_reference_to_the_log_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rpc: str
) -> None:
    for method in ("open_updates", "open_queries", "user", "delete"):
        monkeypatch.setattr(engine, method, raising(RuntimeError("secret in /work/secret.py")))
    monkeypatch.setattr(recommender, "history_page", raising(RuntimeError("secret in /work/secret.py")))
    with served(engine) as stub, caplog.at_level(logging.ERROR):
        details = refused(getattr(stub, rpc), ALL_CALLS[rpc], grpc.StatusCode.INTERNAL)
    found = re.fullmatch(r"internal error; the server's log has the cause under reference ([0-9a-f]{12})", details)
    assert found and "secret" not in details
    logged = [record for record in caplog.records if found[1] in record.getMessage()]
    assert len(logged) == 1 and "secret" in str(logged[0].exc_info)  # type: ignore[index]


@pytest.mark.parametrize("rpc", ALL_CALLS)
def test_broken_store_is_unavailable_without_its_path(engine: Engine, tmp_path: Path, rpc: str) -> None:
    with served(engine) as stub:
        engine.store.close()
        details = refused(getattr(stub, rpc), ALL_CALLS[rpc], grpc.StatusCode.UNAVAILABLE)
    assert details.startswith("the state store is unavailable; ") and str(tmp_path) not in details


def test_failing_graphs_are_internal_and_leave_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(engine) as stub:
        with monkeypatch.context() as patch:
            patch.setattr(engine.projection.generation.graphs, "encode", raising(RuntimeError("no memory")))
            refused(stub.Update, ALL_CALLS["Update"], grpc.StatusCode.INTERNAL)
            assert stub.Recommend(ALL_CALLS["Recommend"]).source == pb.SOURCE_POPULAR  # needs no graph
        assert stub.Update(ALL_CALLS["Update"]).event_count == 1


def test_record_that_is_damaged_is_made_anew(engine: Engine) -> None:
    with served(engine) as stub:
        before = stub.Update(update_request("damaged", 1, 2, 3))
        answer = stub.Recommend(pb.RecommendRequest(user_id="damaged"))
        (user,) = engine.store.get_many(["damaged"], engine.projection.number)
        assert user is not None
        engine.store.commit(
            [Write("damaged", user.head.version, {engine.projection.number: b"damaged"}, NOTHING, NOTHING)]
        )
        assert stub.GetUser(pb.GetUserRequest(user_id="damaged")).event_count == before.event_count
        again = stub.Recommend(pb.RecommendRequest(user_id="damaged"))
        assert [item.item_id for item in again.items] == [item.item_id for item in answer.items]
        assert stub.Update(update_request("damaged", 4)).event_count == 4


def test_conflicts_without_end_are_aborted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_LONGEST_PAUSE", 0)
    monkeypatch.setattr(engine.store, "commit", lambda writes: [write.user_id for write in writes])
    with served(engine) as stub:
        assert "try again" in refused(stub.Update, ALL_CALLS["Update"], grpc.StatusCode.ABORTED)


def test_stopping_server_is_unavailable(engine: Engine) -> None:
    batcher = Batcher(engine)
    batcher.close()
    with running(Served(engine, batcher)) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
        details = refused(RecommenderStub(opened).Update, ALL_CALLS["Update"], grpc.StatusCode.UNAVAILABLE)
    assert "stopping" in details


def test_store_errors_of_one_caller_are_told_to_that_caller_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = engine.store.commit

    def failing(writes: Any) -> list[str]:
        if any(write.user_id == "bad" for write in writes):
            raise StoreUnavailableError("of /tmp/somewhere")
        return commit(writes)

    monkeypatch.setattr(engine.store, "commit", failing)
    with served(engine) as stub, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(stub.Update, update_request(f"good-{n}", 1)) for n in range(20)]
        refused(stub.Update, update_request("bad", 1), grpc.StatusCode.UNAVAILABLE)
        assert [call.result(30).event_count for call in calls] == [1] * 20


def test_only_errors_that_a_caller_can_mend_keep_their_words(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By attribute of the error class, so that a new class needs nothing here."""

    class LostError(StoreUnavailableError):
        status, public = "DATA_LOSS", "what was stored is lost"

    class TakenError(StoreUnavailableError):
        status, public = "ALREADY_EXISTS", None

    with served(engine) as stub:
        monkeypatch.setattr(engine, "delete", raising(LostError("/tmp/secret broke", "mend it")))
        details = refused(stub.DeleteUser, ALL_CALLS["DeleteUser"], grpc.StatusCode.DATA_LOSS)
        assert details.startswith("what was stored is lost; the server's log has the cause under reference ")
        monkeypatch.setattr(engine, "delete", raising(TakenError("it is there", "choose another")))
        details = refused(stub.DeleteUser, ALL_CALLS["DeleteUser"], grpc.StatusCode.ALREADY_EXISTS)
        assert details == "it is there; choose another"
