"""The gRPC service: protobuf in, requests to the batcher, protobuf out; the only module that knows protobuf."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import grpc

from dman_runtime.batcher import Batcher
from dman_runtime.engine import Engine
from dman_runtime.errors import DmanError, RequestError, UserNotFoundError
from dman_runtime.requests import Answer, Query, Update, UpdateOutcome, check_query, check_update
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderServicer

logger = logging.getLogger(__name__)
MAX_BATCH = 1000  # requests in one batch call
MAX_LISTED_IDS = 10_000  # exclusions or candidates in one request
DEFAULT_K = 10
Handler = TypeVar("Handler", bound=Callable[..., Any])


def _guarded(handler: Handler) -> Handler:
    """Turns exceptions into statuses. What a caller cannot mend is logged here and named by a reference only."""

    @functools.wraps(handler)
    def guarded(self: RecommenderService, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return handler(self, request, context)
        except DmanError as error:
            status = grpc.StatusCode[error.status]
            if error.public is None:
                context.abort(status, str(error))
            _abort_with_reference(context, status, error.public)
        except Exception:
            _abort_with_reference(context, grpc.StatusCode.INTERNAL, "internal error")

    return guarded  # type: ignore[return-value]


def _abort_with_reference(context: grpc.ServicerContext, status: grpc.StatusCode, what: str) -> NoReturn:
    reference = uuid.uuid4().hex[:12]
    logger.exception("%s, reference %s", what, reference)
    context.abort(status, f"{what}; the server's log has the cause under reference {reference}")
    raise AssertionError  # abort raises


class RecommenderService(RecommenderServicer):
    """`dman.v1.Recommender`. The batcher decides what runs where and when."""

    def __init__(self, engine: Engine, batcher: Batcher) -> None:
        self._engine, self._batcher = engine, batcher
        items = engine.bundle.items
        self._item_ids, self._titles = items.item_ids, items.titles
        self._bundle_id = engine.bundle.bundle_id
        self._integer_item_ids = engine.bundle.manifest.integer_item_ids

    @_guarded
    def Update(self, request: pb.UpdateRequest, context: grpc.ServicerContext) -> pb.UpdateReply:
        return self._update_reply(self._batcher.update([_update(request)])[0])

    @_guarded
    def BatchUpdate(self, request: pb.BatchUpdateRequest, context: grpc.ServicerContext) -> pb.BatchUpdateReply:
        _check_batch(len(request.updates))
        updates = [_update(one) for one in request.updates]
        for position, update in enumerate(updates):
            _named(f"updates[{position}]", check_update, update)
        outcomes = self._batcher.update(updates)
        return pb.BatchUpdateReply(replies=[self._update_reply(outcome) for outcome in outcomes])

    @_guarded
    def Recommend(self, request: pb.RecommendRequest, context: grpc.ServicerContext) -> pb.RecommendReply:
        return self._recommend_reply(self._batcher.recommend([_query(request)])[0])

    @_guarded
    def BatchRecommend(
        self, request: pb.BatchRecommendRequest, context: grpc.ServicerContext
    ) -> pb.BatchRecommendReply:
        _check_batch(len(request.requests))
        queries = [_named(f"requests[{position}]", _query, one) for position, one in enumerate(request.requests)]
        for position, query in enumerate(queries):
            _named(f"requests[{position}]", check_query, query)
        answers = self._batcher.recommend(queries)
        return pb.BatchRecommendReply(replies=[self._recommend_reply(answer) for answer in answers])

    @_guarded
    def GetUser(self, request: pb.GetUserRequest, context: grpc.ServicerContext) -> pb.GetUserReply:
        info = self._engine.user(request.user_id, recent_events=request.recent_events)
        if info is None:
            raise UserNotFoundError(f"no user {request.user_id!r}", "one exists from its first update on")
        events = zip(info.recent_item_ids, info.recent_timestamps, strict=True)
        return pb.GetUserReply(
            user_id=request.user_id,
            bundle_id=self._bundle_id,
            event_count=info.event_count,
            history_count=info.history_count,
            segment_fill=info.segment_fill,
            absorbed_segments=info.absorbed_segments,
            state_bytes=info.state_bytes,
            recent_events=[pb.Event(item_id=item_id, timestamp=time) for item_id, time in events],
            integer_item_ids=self._integer_item_ids,
        )

    @_guarded
    def DeleteUser(self, request: pb.DeleteUserRequest, context: grpc.ServicerContext) -> pb.DeleteUserReply:
        deleted = self._engine.delete(request.user_id)
        return pb.DeleteUserReply(bundle_id=self._bundle_id, existed=deleted is not None, event_count=deleted or 0)

    def _update_reply(self, outcome: UpdateOutcome) -> pb.UpdateReply:
        return pb.UpdateReply(
            bundle_id=self._bundle_id,
            event_count=outcome.event_count,
            applied=outcome.applied,
            unknown_item_ids=outcome.unknown_item_ids,
            duplicate=outcome.duplicate,
            history_count=outcome.history_count,
        )

    def _recommend_reply(self, answer: Answer) -> pb.RecommendReply:
        reply = pb.RecommendReply(
            source=pb.SOURCE_POPULAR if answer.popular else pb.SOURCE_PERSONALIZED,
            bundle_id=self._bundle_id,
            event_count=answer.event_count,
            unknown_item_ids=answer.unknown_item_ids,
            integer_item_ids=self._integer_item_ids,
        )
        add, item_ids, titles = reply.items.add, self._item_ids, self._titles  # adding in place copies no message
        for item, score in zip(answer.item_indices.tolist(), answer.scores.tolist(), strict=True):
            add(item_id=item_ids[item], score=score, title=titles[item])
        return reply


def _update(request: pb.UpdateRequest) -> Update:
    return Update(
        user_id=request.user_id,
        item_ids=[event.item_id for event in request.events],
        timestamps=[event.timestamp for event in request.events],
        request_id=request.request_id,
    )


def _query(request: pb.RecommendRequest) -> Query:
    for name, ids in (("exclude", request.exclude_item_ids), ("candidate", request.candidate_item_ids)):
        if len(ids) > MAX_LISTED_IDS:
            raise RequestError(f"{len(ids)} {name}_item_ids", f"send at most {MAX_LISTED_IDS}")
    return Query(
        user_id=request.user_id or None,
        k=request.k if request.HasField("k") else DEFAULT_K,
        include_seen=request.include_seen,
        exclude=request.exclude_item_ids,
        candidates=request.candidate_item_ids or None,
        what_if=[event.item_id for event in request.what_if_events] if request.what_if_events else (),
    )


def _check_batch(size: int) -> None:
    if size > MAX_BATCH:
        raise RequestError(f"{size} requests in one batch", f"send at most {MAX_BATCH} at a time")


def _named(which: str, check: Callable[[Any], Any], value: Any) -> Any:
    """`check(value)`; an error says which one of a batch it is about."""
    try:
        return check(value)
    except RequestError as error:
        raise RequestError(f"{which}: {error.cause}", error.remedy) from None
