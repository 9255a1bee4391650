"""Histories are read page by page, and never in a mixture of two versions."""

import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from protos.dman.v1 import dman_pb2 as pb
from sdk import (
    AsyncClient,
    Client,
    ClientClosedError,
    ConflictError,
    Event,
    InternalError,
    InvalidArgumentError,
    UserNotFoundError,
)
from sdk._history import OVERLAP

from .awaited import Awaited
from .fake_server import Recorder

pytestmark = pytest.mark.timeout(30)
PAGE = 100  # events that the server of these tests sends at once
Stored = list[tuple[str, int]]


def stored(count: int, *, items: int = 9) -> Stored:
    return [(f"item {n % items}", n // 3) for n in range(count)]


def page(request: pb.GetHistoryRequest, history: Stored) -> pb.GetHistoryReply:
    part = history[request.start : request.start + PAGE]
    return pb.GetHistoryReply(
        history_count=len(history), item_ids=[item for item, _ in part], timestamps=[time for _, time in part]
    )


def serve(recorder: Recorder, *histories: Stored) -> None:
    """Each call is answered from the next history; all further ones from the last."""

    def answer(number: int) -> Any:
        history = histories[min(number, len(histories) - 1)]
        return lambda: page(recorder.seen[-1].request, history)

    recorder.script.extend(answer(number) for number in range(100))


async def events(client: Awaited, *args: Any, **kwargs: Any) -> list[Event]:
    read = client.client.history(*args, **kwargs)  # type: ignore[union-attr]
    return list(read) if isinstance(read, Iterator) else [event async for event in read]


async def test_a_history_comes_back_with_its_ids_and_times(client: Awaited, recorder: Recorder) -> None:
    assert await events(client, 42) == [Event("7", 100), Event("8"), Event("x", 5)]
    assert recorder.request == pb.GetHistoryRequest(user_id="42")
    reply = pb.GetHistoryReply(history_count=2, item_ids=["7", "007"], timestamps=[1, 2], integer_item_ids=True)
    recorder.script.append(reply)
    assert await events(client, 42) == [Event(7, 1), Event("007", 2)]


@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - OVERLAP, 777])
@pytest.mark.parametrize("items", [1, 9])
async def test_a_history_of_any_length_is_read_once_and_in_order(
    client: Awaited, recorder: Recorder, count: int, items: int
) -> None:
    history = stored(count, items=items)
    serve(recorder, history)
    expected = [Event(*event) for event in history]
    assert await events(client, "anna") == expected
    assert len(recorder.seen) <= 1 + count // (PAGE - OVERLAP)
    for start in (0, 5, count):
        if start <= count:
            assert await events(client, "anna", start) == expected[start:]


async def test_nothing_is_asked_before_it_is_needed(client: Awaited, recorder: Recorder) -> None:
    serve(recorder, stored(PAGE + 1))
    read: Any = client.client.history("anna")
    assert not recorder.seen
    for n in range(PAGE + 1):
        event = next(read) if isinstance(read, Iterator) else await anext(read)
        assert event == Event(*stored(PAGE + 1)[n]) and len(recorder.seen) == 1 + n // PAGE


async def test_events_that_arrive_meanwhile_are_read_too(client: Awaited, recorder: Recorder) -> None:
    serve(recorder, stored(250), stored(251), stored(400))
    assert await events(client, "anna") == [Event(*event) for event in stored(400)]


OLDER: dict[str, Stored] = {
    "one event before the rest": [("older", 0), *stored(250)],
    "one event at the end of the first page": [*stored(99), ("older", 32), *stored(250)[99:]],
    "the same user again": [("other", n) for n in range(250)],
    "another time": [(item, time + 1) for item, time in stored(250)],
    "fewer events": stored(60),
    "exactly as many as were read, others": [("older", 0), *stored(99)],
    "none": [],
}


@pytest.mark.parametrize("after", OLDER.values(), ids=OLDER)
async def test_a_history_that_is_rewritten_while_it_is_read_is_a_conflict(
    client: Awaited, recorder: Recorder, after: Stored
) -> None:
    serve(recorder, stored(250), after)
    with pytest.raises(ConflictError, match=r"history of 'anna' has .*Read the history again from its start"):
        await events(client, "anna")
    assert len(recorder.seen) == 2


async def test_a_start_behind_the_end_is_a_conflict(client: Awaited, recorder: Recorder) -> None:
    serve(recorder, stored(5))
    with pytest.raises(ConflictError, match="has 5 events, and 6 were expected at least"):
        await events(client, "anna", start=6)


async def test_a_user_who_is_unknown_or_gone_is_not_found(client: Awaited, recorder: Recorder) -> None:
    not_found = grpc.StatusCode.NOT_FOUND
    recorder.script.append(not_found)
    with pytest.raises(UserNotFoundError):
        await events(client, "nobody")
    recorder.script.extend([page(pb.GetHistoryRequest(), stored(250)), not_found])
    with pytest.raises(UserNotFoundError):
        await events(client, "anna")


async def test_every_page_is_retried(client: Awaited, recorder: Recorder) -> None:
    serve(recorder, stored(150))
    recorder.script.insert(1, grpc.StatusCode.UNAVAILABLE)
    recorder.script.insert(0, grpc.StatusCode.UNAVAILABLE)
    assert await events(client, "anna") == [Event(*event) for event in stored(150)]
    assert len(recorder.seen) == 4


@pytest.mark.parametrize(
    "reply",
    [
        pb.GetHistoryReply(history_count=2, item_ids=["a", "b"], timestamps=[1]),
        pb.GetHistoryReply(history_count=2),
    ],
)
async def test_a_page_that_makes_no_sense_is_an_internal_error(
    client: Awaited, recorder: Recorder, reply: pb.GetHistoryReply
) -> None:
    recorder.script.append(reply)
    with pytest.raises(InternalError, match="unreadable reply"):
        await events(client, "anna")


def test_bad_arguments_are_refused_before_the_first_event_is_asked_for() -> None:
    for client in (Client(), AsyncClient()):
        for arguments, complaint in [
            (("",), "user_id must not be empty"),
            (("anna", -1), "start must not be negative"),
            (("anna", "0"), "start must be an integer, not str"),
            (("anna", 2**63), "start is out of range"),
        ]:
            with pytest.raises(InvalidArgumentError, match=complaint):
                client.history(*arguments)  # type: ignore[arg-type]


async def test_a_closed_client_reads_no_history(client: Awaited) -> None:
    await client.close()
    with pytest.raises(ClientClosedError):
        await events(client, "anna")


def test_both_clients_document_the_same_history() -> None:
    sync, async_ = inspect.signature(Client.history), inspect.signature(AsyncClient.history)
    assert [*sync.parameters.values()] == [*async_.parameters.values()]
    assert [*sync.parameters] == ["self", "user_id", "start", "timeout"]
    assert (sync.return_annotation, async_.return_annotation) == (Iterator[Event], AsyncIterator[Event])
    assert inspect.getdoc(Client.history) == inspect.getdoc(AsyncClient.history)
    for parameter in ("user_id", "start", "timeout"):
        assert f"    {parameter}: " in (Client.history.__doc__ or "")
