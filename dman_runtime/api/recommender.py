"""The recommender's service: protobuf in, requests to engine and batchers, protobuf out.

What is short is done on the event loop; what needs a graph or a commit goes to a batcher; what is large is converted on
the `bulk` thread, piece by piece.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from dman_runtime.api.conditions import filter_of, rules_of, weight_of_queries, weight_of_updates
from dman_runtime.api.door import LARGE_BYTES, Call, Method, rest_since
from dman_runtime.batcher import Batcher
from dman_runtime.engine import Engine
from dman_runtime.errors import RefusedError, UserNotFoundError
from dman_runtime.history import history_page
from dman_runtime.metrics import NO_METRICS, Metrics
from dman_runtime.requests import (
    MAX_EVENTS,
    SHOWN_SECONDS,
    Answer,
    Query,
    Update,
    UpdateOutcome,
    UserInfo,
    check_queries,
    check_query,
    check_size,
    check_update,
    check_updates,
    check_user_id,
    passes,
)
from protos.dman.v1 import dman_pb2 as pb

SERVICE_NAME, DEFAULT_K = "dman.v1.Recommender", 10
MAX_REPLY_BYTES = 16 << 20
MAX_NAMED_BYTES = 1 << 20  # of unknown item ids that one reply names
READERS = 8  # calls at a time that wait for a store on servers
FEW = 200  # ids or events that are handled on the event loop
_CHUNK_QUERIES, _CHUNK_IDS = 64, 10_000  # of a BatchRecommend that are answered together
_IDS_PER_PASS = 100  # listed ids that a pass over all items counts as
Result = TypeVar("Result")


class RecommenderService:
    """`dman.v1.Recommender`."""

    def __init__(
        self, engine: Engine, *, updates: Batcher, queries: Batcher, bulk: Executor, metrics: Metrics = NO_METRICS
    ) -> None:
        """`bulk` has one thread; close it after the last call."""
        self._engine, self._updates, self._queries, self._bulk = engine, updates, queries, bulk
        self._metrics = metrics
        self._reads = ThreadPoolExecutor(READERS, thread_name_prefix="reads")  # of a store that is asked over a network
        self._deletions = ThreadPoolExecutor(1, thread_name_prefix="deletions")  # a commit may wait for the disk

    def methods(self) -> list[Method]:
        """One for each method of the proto file; a test compares them."""

        def method(name: str, request: type[Any], weigh: Callable[[Any], int], part: type[Any] | None = None) -> Method:
            return Method(
                f"/{SERVICE_NAME}/{name}",
                request,
                getattr(self, name),
                weigh,
                parse=None if part is None else functools.partial(_parse_batch, part, weigh),
                commits=name in ("Update", "BatchUpdate", "DeleteUser"),
            )

        query = pb.RecommendRequest
        return [
            method("Update", pb.UpdateRequest, lambda request: weight_of_updates([request])),
            method("BatchUpdate", pb.BatchUpdateRequest, lambda one: weight_of_updates(one.parts), pb.UpdateRequest),
            method("Recommend", query, lambda request: weight_of_queries([request])),
            method("BatchRecommend", pb.BatchRecommendRequest, lambda one: weight_of_queries(one.parts), query),
            method("GetUser", pb.GetUserRequest, lambda request: max(0, request.recent_events) // 100),
            method("GetHistory", pb.GetHistoryRequest, lambda request: max(0, _limit(request)) // 100),
            method("DeleteUser", pb.DeleteUserRequest, lambda _: 1),
        ]

    # -- the methods -----------------------------------------------------------------------------------------------

    async def Update(self, request: pb.UpdateRequest, call: Call) -> pb.UpdateReply:
        update = _update(request)
        await self._on(self._bulk, len(update.item_ids) + len(update.shown) > FEW, check_update, update)
        (outcome,) = await _result(self._updates.submit_updates([update], deadline=call.deadline))
        return self._update_reply(outcome, _Names())

    async def BatchUpdate(self, request: _Batch, call: Call) -> pb.BatchUpdateReply:
        def read() -> list[Update]:
            updates = [_update(one) for one in request.parts]
            check_updates(updates, request.request_id)
            return updates

        updates = await self._on(self._bulk, len(request.parts) + call.weight > FEW, read)
        submitted = self._updates.submit_updates(updates, batch_id=request.request_id, deadline=call.deadline)
        outcomes, names = await _result(submitted), _Names()
        return pb.BatchUpdateReply(replies=[self._update_reply(outcome, names) for outcome in outcomes])

    async def Recommend(self, request: pb.RecommendRequest, call: Call) -> pb.RecommendReply:
        query = _query(request)
        check_query(query)
        listed = len(query.exclude) + len(query.candidates or ()) + len(query.what_if)
        away = self._engine.store.waits
        answer = await self._on(self._reads, away, self._at_once, query, call) if listed <= FEW else None
        if answer is None:
            (answer,) = await _result(self._queries.submit_queries([query], deadline=call.deadline))
        return self._recommend_reply(answer, _Names())

    async def BatchRecommend(self, request: _Batch, call: Call) -> bytes:
        """Chunk by chunk: no more users are open at a time, and others get their turns in between."""

        def read() -> list[Query]:
            queries = [_query(one) for one in request.parts]
            check_queries(queries)
            return queries

        queries = await self._on(self._bulk, call.weight > FEW, read)
        parts, size, names = [], 0, _Names()
        for chunk in _chunks(queries):
            answers = await _result(self._queries.submit_queries(chunk, deadline=call.deadline))
            rows = sum(len(answer.item_indices) for answer in answers)
            parts.append(await self._on(self._bulk, rows > FEW, self._batch_reply, answers, names))
            size += len(parts[-1])
            call.held.add(len(parts[-1]))
            if size > MAX_REPLY_BYTES:
                raise RefusedError(
                    f"the reply would be larger than {MAX_REPLY_BYTES >> 20} MiB", "ask for less at a time"
                )
        return b"".join(parts)  # messages with repeated fields are joined by joining their bytes

    async def GetUser(self, request: pb.GetUserRequest, call: Call) -> pb.GetUserReply:
        check_user_id(request.user_id)
        few = 0 <= request.recent_events <= FEW and not self._engine.store.waits
        info = await self._on(self._bulk, not few, self._user, request)
        if info is None:
            raise _no_user(request.user_id)
        events = zip(info.recent_item_ids, info.recent_timestamps, strict=True)
        return pb.GetUserReply(
            user_id=request.user_id,
            bundle_id=info.bundle.bundle_id,
            event_count=info.event_count,
            history_count=info.history_count,
            deferred_events=info.deferred_events,
            segment_fill=info.segment_fill,
            absorbed_segments=info.absorbed_segments,
            state_bytes=info.state_bytes,
            recent_events=[pb.Event(item_id=item_id, timestamp=time) for item_id, time in events],
            integer_item_ids=info.bundle.manifest.integer_item_ids,
        )

    async def GetHistory(self, request: pb.GetHistoryRequest, call: Call) -> pb.GetHistoryReply:
        limit = _limit(request)
        read = functools.partial(history_page, self._engine.store, request.user_id, start=request.start, limit=limit)
        page = await self._on(self._bulk, limit > FEW or self._engine.store.waits, read)
        if page is None:
            raise _no_user(request.user_id)
        bundle = self._engine.bundle_of(request.user_id)
        return pb.GetHistoryReply(
            bundle_id=bundle.bundle_id,
            history_count=page.history_count,
            item_ids=page.item_ids,
            timestamps=page.timestamps,
            integer_item_ids=bundle.manifest.integer_item_ids,
        )

    async def DeleteUser(self, request: pb.DeleteUserRequest, call: Call) -> pb.DeleteUserReply:
        bundle_id = self._engine.bundle_of(request.user_id).bundle_id  # first: a deletion must not end in an error
        deleted = await self._on(self._deletions, True, self._engine.delete, request.user_id)
        return pb.DeleteUserReply(bundle_id=bundle_id, existed=deleted is not None, event_count=deleted or 0)

    def _at_once(self, query: Query, call: Call) -> Answer | None:
        """The answer to a query that needs no graph and no pass over all attributes; None for others."""
        if time.monotonic() > call.deadline:  # it may have waited for a thread
            return None  # the batcher, which is asked next, says so
        answer = self._engine.plain_answer(query)
        if answer is None and not query.what_if and query.filter is None and not query.diversity:
            opened = self._engine.open_queries([query])
            if not opened[0].lags and opened[0].quick:
                (answer,) = self._engine.answer(opened)
        return answer

    # -- replies ---------------------------------------------------------------------------------------------------

    def _user(self, request: pb.GetUserRequest) -> UserInfo | None:
        return self._engine.user(request.user_id, recent_events=request.recent_events)

    def _update_reply(self, outcome: UpdateOutcome, names: _Names) -> pb.UpdateReply:
        return pb.UpdateReply(
            bundle_id=outcome.bundle.bundle_id,
            event_count=outcome.event_count,
            applied=outcome.applied,
            unknown_item_ids=names.first(outcome.unknown_item_ids),
            unknown_count=len(outcome.unknown_item_ids),
            duplicate=outcome.duplicate,
            history_count=outcome.history_count,
            dropped_late=outcome.late.dropped,
            placed_late=outcome.late.placed,
            deferred_late=outcome.late.deferred,
        )

    def _batch_reply(self, answers: Sequence[Answer], names: _Names) -> bytes:
        replies = [self._recommend_reply(answer, names) for answer in answers]
        return pb.BatchRecommendReply(replies=replies).SerializeToString()

    def _recommend_reply(self, answer: Answer, names: _Names) -> pb.RecommendReply:
        reply = pb.RecommendReply(
            source=pb.SOURCE_POPULAR if answer.popular else pb.SOURCE_PERSONALIZED,
            bundle_id=answer.bundle.bundle_id,
            event_count=answer.event_count,
            unknown_item_ids=names.first(answer.unknown_item_ids),
            unknown_count=len(answer.unknown_item_ids),
            integer_item_ids=answer.bundle.manifest.integer_item_ids,
        )
        if answer.popular:
            self._metrics.fallback()
        items, add = answer.bundle.items, reply.items.add  # adding in place copies no message
        item_ids, titles = items.item_ids, items.titles
        for item, score in zip(answer.item_indices.tolist(), answer.scores.tolist(), strict=True):
            add(item_id=item_ids[item], score=score, title=titles[item])
        return reply

    @staticmethod
    async def _on(executor: Executor, there: bool, work: Callable[..., Result], *values: Any) -> Result:
        """`work(*values)` on a thread of the executor, or right here."""
        if not there:
            return work(*values)
        return await asyncio.get_running_loop().run_in_executor(executor, work, *values)

    def close(self) -> None:
        for threads in (self._reads, self._deletions):
            threads.shutdown()


class _Batch(NamedTuple):
    """A BatchUpdateRequest or a BatchRecommendRequest."""

    parts: list[Any]  # UpdateRequest or RecommendRequest
    request_id: str


def _parse_batch(part: type[Any], weigh: Callable[[_Batch], int], message: bytes) -> _Batch:
    """Parses a batch part by part: little is parsed of what is too much, and a large one rests in between.

    Raises DecodeError, RequestError.
    """
    outline = pb.BatchParts.FromString(message)
    check_size(len(outline.parts), 0)
    batch, since, began = _Batch([], outline.request_id), 0, time.perf_counter()
    for encoded in outline.parts:
        batch.parts.append(part.FromString(encoded))
        since += len(encoded)
        if since > LARGE_BYTES:  # never on the event loop
            weigh(batch)
            rest_since(began)
            since, began = 0, time.perf_counter()
    return batch


class _Names:
    """Names unknown items in one reply, as far as there is room: a reply must never be too large to be sent."""

    def __init__(self) -> None:
        self._left = MAX_NAMED_BYTES

    def first(self, item_ids: Sequence[str]) -> Sequence[str]:
        for count, item_id in enumerate(item_ids):
            self._left -= 4 * len(item_id) + 4
            if self._left < 0:
                return item_ids[:count]
        return item_ids


async def _result(submitted: Future[Result]) -> Result:
    """The result of a future; cancelling the call cancels the work."""
    return await asyncio.wrap_future(submitted)


def _update(request: pb.UpdateRequest) -> Update:
    return Update(
        user_id=request.user_id,
        item_ids=[event.item_id for event in request.events],
        timestamps=[event.timestamp for event in request.events],
        request_id=request.request_id,
        producer=request.producer,
        sequence=request.sequence if request.HasField("sequence") else None,
        shown=request.shown_item_ids,
        shown_seconds=request.shown_seconds if request.HasField("shown_seconds") else SHOWN_SECONDS,
    )


def _query(request: pb.RecommendRequest) -> Query:
    k = request.k if request.HasField("k") else DEFAULT_K
    return Query(
        user_id=request.user_id or None,
        k=k,
        include_seen=request.include_seen,
        exclude=request.exclude_item_ids,
        candidates=request.candidate_item_ids or None,
        what_if=[event.item_id for event in request.what_if_events] if request.what_if_events else (),
        what_if_times=[event.timestamp for event in request.what_if_events] if request.what_if_events else (),
        at=request.at if request.HasField("at") else int(time.time()),
        filter=filter_of(request.filter) if request.HasField("filter") else None,
        diversity=rules_of(request.diversity, k) if request.diversity else (),
    )


def _limit(request: pb.GetHistoryRequest) -> int:
    return request.limit if request.HasField("limit") else MAX_EVENTS


def _no_user(user_id: str) -> UserNotFoundError:
    return UserNotFoundError(f"no user {user_id!r}", "one exists from its first update on")


def _chunks(queries: Sequence[Query]) -> list[list[Query]]:
    """Few enough queries, with few enough listed ids and passes over all items, to be answered together."""
    chunks: list[list[Query]] = []
    ids = 0
    for query in queries:
        listed = len(query.exclude) + len(query.candidates or ()) + _IDS_PER_PASS * passes(query)
        if not chunks or len(chunks[-1]) >= _CHUNK_QUERIES or ids + listed > _CHUNK_IDS:
            chunks.append([])
            ids = 0
        chunks[-1].append(query)
        ids += listed
    return chunks
