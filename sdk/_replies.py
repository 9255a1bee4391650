"""Turns replies into results. ValueError: the reply makes no sense."""

from collections.abc import Callable, Collection, Iterable
from typing import Protocol, TypeVar

from protos.dman.v1 import dman_pb2 as pb
from sdk._types import (
    DeletedUser,
    Event,
    Problem,
    Recommendation,
    Recommendations,
    Source,
    Status,
    UpdateResult,
    User,
)

ReplyT = TypeVar("ReplyT")
ReplyT_co = TypeVar("ReplyT_co", covariant=True)
ResultT = TypeVar("ResultT")


class _Batch(Protocol[ReplyT_co]):
    @property
    def replies(self) -> Collection[ReplyT_co]: ...


def each(parse: Callable[[ReplyT], ResultT], expected: int) -> Callable[[_Batch[ReplyT]], list[ResultT]]:
    """Reads a batch of `expected` replies, each with `parse`."""

    def parse_batch(batch: _Batch[ReplyT]) -> list[ResultT]:
        if len(batch.replies) != expected:
            raise ValueError(f"{len(batch.replies)} replies to {expected} requests")
        return [parse(reply) for reply in batch.replies]

    return parse_batch


def update_result(reply: pb.UpdateReply) -> UpdateResult:
    return UpdateResult(
        event_count=reply.event_count,
        history_count=reply.history_count,
        applied=reply.applied,
        unknown_item_ids=tuple(reply.unknown_item_ids),
        unknown_count=reply.unknown_count,
        duplicate=reply.duplicate,
        dropped_late=reply.dropped_late,
        placed_late=reply.placed_late,
        deferred_late=reply.deferred_late,
        bundle_id=reply.bundle_id,
    )


_SOURCES: dict[int, Source] = {pb.SOURCE_PERSONALIZED: "personalized", pb.SOURCE_POPULAR: "popular"}


def recommendations(reply: pb.RecommendReply) -> Recommendations:
    item_id = _item_id_reader(reply.integer_item_ids)
    return Recommendations(
        items=tuple([Recommendation(item_id(item.item_id), item.score, item.title) for item in reply.items]),
        source=_SOURCES.get(reply.source, "unknown"),
        event_count=reply.event_count,
        unknown_item_ids=tuple(reply.unknown_item_ids),
        unknown_count=reply.unknown_count,
        bundle_id=reply.bundle_id,
    )


def events(stored: Iterable[tuple[str, int]], *, integer_item_ids: bool) -> list[Event]:
    """Ids and times of a history, which may hold ids that the bundle does not know."""
    item_id = _integer_or_text if integer_item_ids else str
    return [Event(item_id(text), timestamp) for text, timestamp in stored]


def user(reply: pb.GetUserReply) -> User:
    recent = [(event.item_id, event.timestamp) for event in reply.recent_events]
    return User(
        user_id=reply.user_id,
        event_count=reply.event_count,
        history_count=reply.history_count,
        deferred_events=reply.deferred_events,
        segment_fill=reply.segment_fill,
        absorbed_segments=reply.absorbed_segments,
        state_bytes=reply.state_bytes,
        recent_events=tuple(events(recent, integer_item_ids=reply.integer_item_ids)),
        bundle_id=reply.bundle_id,
    )


def deleted_user(reply: pb.DeleteUserReply) -> DeletedUser:
    return DeletedUser(existed=reply.existed, event_count=reply.event_count, bundle_id=reply.bundle_id)


def status(reply: pb.GetStatusReply) -> Status:
    return Status(
        ready=reply.ready,
        problems=tuple(Problem(one.name, one.detail, one.seconds, one.blocking) for one in reply.problems),
        bundle_id=reply.bundle_id,
        workers=reply.workers,
        workers_ready=reply.workers_ready,
        restarts=reply.restarts,
        uptime_seconds=reply.uptime_seconds,
        requests=reply.requests,
        bytes_in_flight=reply.bytes_in_flight,
        version=reply.version,
    )


def _item_id_reader(integer_item_ids: bool) -> Callable[[str], int | str]:
    return int if integer_item_ids else str


def _integer_or_text(text: str) -> int | str:
    """An id of an integer catalogue; what is not written as one stays text."""
    try:
        number = int(text)
    except ValueError:
        return text
    return number if str(number) == text else text
