"""What each method sends and what it returns."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from protos.dman.v1 import dman_pb2 as pb
from sdk import (
    DeletedUser,
    Event,
    InternalError,
    InvalidArgumentError,
    Problem,
    Recommendation,
    Recommendations,
    Status,
    UpdateResult,
    User,
)

from .awaited import Awaited
from .fake_server import Recorder

pytestmark = pytest.mark.timeout(30)


async def test_update_returns_what_the_server_did(client: Awaited) -> None:
    assert await client.update(42, [1, 2]) == UpdateResult(
        event_count=42,
        history_count=52,
        applied=2,
        unknown_item_ids=("x", "9"),
        unknown_count=3,
        duplicate=False,
        bundle_id="b1",
    )


async def test_update_reports_what_became_of_late_events(client: Awaited, recorder: Recorder) -> None:
    recorder.script.append(pb.UpdateReply(dropped_late=1, placed_late=5, deferred_late=2))
    result = await client.update("anna", "alien")
    assert (result.dropped_late, result.placed_late, result.deferred_late) == (1, 5, 2)
    recorder.script.append(pb.GetUserReply(deferred_events=3))
    assert (await client.user("anna")).deferred_events == 3


async def test_update_reports_a_duplicate(client: Awaited, recorder: Recorder) -> None:
    recorder.script.append(pb.UpdateReply(duplicate=True, event_count=3))
    result = await client.update("anna", "alien", request_id="order-17")
    assert result.duplicate and result.applied == 0
    assert recorder.request.request_id == "order-17"


async def test_update_of_a_producer_has_its_sequence_and_no_request_id_of_ours(
    client: Awaited, recorder: Recorder
) -> None:
    await client.update("anna", 1, producer="orders/3", sequence=np.uint64(2**64 - 1))
    request = recorder.request
    assert (request.producer, request.sequence, request.request_id) == ("orders/3", 2**64 - 1, "")
    await client.update("anna", 1, producer="orders/3", sequence=0, request_id="mine")
    await client.update("anna", 1)
    with_both, with_neither = recorder.seen[1].request, recorder.seen[2].request
    assert with_both.HasField("sequence") and with_both.request_id == "mine"
    assert not with_neither.HasField("sequence") and with_neither.request_id


async def test_updates_of_a_producer_have_a_sequence_each(client: Awaited, recorder: Recorder) -> None:
    await client.update_many([("anna", 1), ("bob", [2, 3]), ("anna", 4)], producer="orders", sequences=range(7, 10))
    batch = recorder.request
    assert [(one.producer, one.sequence) for one in batch.updates] == [("orders", 7), ("orders", 8), ("orders", 9)]
    assert batch.request_id == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"producer": "p"}, "go together"),
        ({"sequence": 0}, "go together"),
        ({"producer": "", "sequence": 0}, "producer must not be empty"),
        ({"producer": "p", "sequence": -1}, "sequence is out of range"),
        ({"producer": "p", "sequence": 2**64}, "sequence is out of range"),
        ({"producer": "p", "sequence": True}, "must be an integer"),
        ({"producer": "p", "sequence": 1.0}, "must be an integer"),
    ],
)
async def test_producer_and_sequence_that_cannot_be_are_refused(
    client: Awaited, recorder: Recorder, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        await client.update("anna", 1, **options)
    many = options | {"sequences": [options["sequence"]]} if "sequence" in options else options
    with pytest.raises(InvalidArgumentError):
        await client.update_many({"anna": 1}, **{name: value for name, value in many.items() if name != "sequence"})
    assert not recorder.seen


async def test_sequences_are_as_many_as_updates(client: Awaited) -> None:
    with pytest.raises(InvalidArgumentError, match="one for each update: 1 for 2"):
        await client.update_many({"anna": 1, "bob": 2}, producer="p", sequences=[1])


async def test_update_many_answers_in_order(client: Awaited, recorder: Recorder) -> None:
    for updates in ({"anna": [1, 2, 3], "bob": 4}, iter([("anna", [1, 2, 3]), ("bob", Event(4))])):
        results = await client.update_many(updates)
        assert [result.applied for result in results] == [3, 1]
    assert [one.user_id for one in recorder.seen[0].request.updates] == ["anna", "bob"]


async def test_recommend_returns_items_best_first_with_their_origin(client: Awaited) -> None:
    answer = await client.recommend(42, k=2)
    assert list(answer) == [Recommendation(30, 0.75, "Alien"), Recommendation(4, 0.5)]
    assert answer == Recommendations(
        items=tuple(answer),
        source="personalized",
        event_count=7,
        unknown_item_ids=("nope",),
        unknown_count=2,
        bundle_id="b1",
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
        history_count=47,
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


async def test_user_keeps_ids_of_unknown_items_as_they_are_written(client: Awaited, recorder: Recorder) -> None:
    """A history holds what was sent, also what no integer catalogue knows."""
    events = [pb.Event(item_id=text) for text in ("7", "007", "alien", "-3")]
    recorder.script.append(pb.GetUserReply(recent_events=events, integer_item_ids=True))
    assert [event.item_id for event in (await client.user("anna")).recent_events] == [7, "007", "alien", -3]


async def test_recommend_sends_every_option(client: Awaited, recorder: Recorder) -> None:
    await client.recommend(
        7, np.int64(3), exclude={1}, include_seen=True, candidates=("a", 2), what_if=[3, Event(4, 5)], at=1_700_000_000
    )
    assert recorder.request == pb.RecommendRequest(
        user_id="7",
        k=3,
        exclude_item_ids=["1"],
        include_seen=True,
        candidate_item_ids=["a", "2"],
        what_if_events=[pb.Event(item_id="3"), pb.Event(item_id="4", timestamp=5)],
        at=1_700_000_000,
    )


async def test_moment_of_a_recommendation_is_in_whole_seconds_and_absent_unless_given(
    client: Awaited, recorder: Recorder
) -> None:
    await client.recommend("anna")
    moments = (1_700_049_600, 1_700_049_600.9, datetime(2023, 11, 15, 12, tzinfo=UTC), 0)
    for at in moments:
        await client.recommend("anna", at=at)
    await client.recommend_many(["anna", "bob"], at=7)
    absent, *given, many = (seen.request for seen in recorder.seen)
    assert not absent.HasField("at")
    assert [request.at for request in given] == [1_700_049_600] * 3 + [0] and given[-1].HasField("at")
    assert [request.at for request in many.requests] == [7, 7]
    with pytest.raises(InvalidArgumentError, match="at"):
        await client.recommend("anna", at="soon")


async def test_recommend_without_a_user_is_anonymous(client: Awaited, recorder: Recorder) -> None:
    await client.recommend(what_if="alien")
    assert recorder.request == pb.RecommendRequest(k=10, what_if_events=[pb.Event(item_id="alien")])


async def test_every_update_and_every_batch_gets_its_own_request_id(client: Awaited, recorder: Recorder) -> None:
    await client.update("anna", [1])
    await client.update("anna", [1])
    await client.update_many([("anna", 1), ("anna", 1)])
    await client.update_many([("anna", 1), ("anna", 1)])
    ids = [seen.request.request_id for seen in recorder.seen]
    assert len(set(ids)) == 4 and all(ids)


async def test_a_batch_has_one_request_id_and_its_updates_have_none(client: Awaited, recorder: Recorder) -> None:
    await client.update_many([("anna", 1), ("bob", 2)], request_id="orders of Monday")
    assert recorder.request.request_id == "orders of Monday"
    assert [one.request_id for one in recorder.request.updates] == ["", ""]


async def test_status_says_what_is_wrong(client: Awaited, recorder: Recorder) -> None:
    assert await client.status() == Status(
        ready=False,
        problems=(Problem("disk_full", "no space; free some", seconds=2.5, blocking=True),),
        bundle_id="b1",
        workers=4,
        workers_ready=3,
        restarts=2,
        uptime_seconds=60.5,
        requests=5,
        bytes_in_flight=1000,
        version="0.1.0",
    )
    assert recorder.request == pb.GetStatusRequest()


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


async def test_shown_items_are_sent_with_events_and_alone(client: Awaited, recorder: Recorder) -> None:
    await client.update("anna", shown=[1, "b"], request_id="r")
    await client.update("anna", "c", shown="b", shown_seconds=np.int64(60), request_id="s")
    alone, together = (seen.request for seen in recorder.seen)
    assert alone == pb.UpdateRequest(user_id="anna", shown_item_ids=["1", "b"], request_id="r")
    assert together == pb.UpdateRequest(
        user_id="anna", events=[pb.Event(item_id="c")], shown_item_ids=["b"], shown_seconds=60, request_id="s"
    )
    with pytest.raises(InvalidArgumentError, match=r"shown\[0\] must be str or int"):
        await client.update("anna", shown=[None])
    with pytest.raises(InvalidArgumentError, match="shown_seconds must be an integer"):
        await client.update("anna", shown=1, shown_seconds=1.5)
