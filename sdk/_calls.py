"""The methods of both clients: what each sends, whether it may be sent again, and what reads its reply.

Nothing here does I/O. `_client` makes a method from each function, with the signature and docstring given here.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, SupportsIndex, TypeVar

from protos.dman.v1 import dman_pb2 as pb
from sdk import _replies, _wire
from sdk._exceptions import InvalidArgumentError
from sdk._filters import Diversity, Filter, diversity_messages, filter_message
from sdk._times import Time, Unit, checked_unit, whole_seconds
from sdk._types import DeletedUser, Id, Ids, Items, Recommendations, Status, UpdateResult, User

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Call(Generic[RequestT, ReplyT, ResultT]):
    """One call to make. `parse` raises ValueError for a reply that makes no sense."""

    rpc: str
    request: RequestT
    parse: Callable[[ReplyT], ResultT]
    repeatable: bool  # sending it twice has the same effect and the same answer as sending it once
    timeout: float | None  # seconds; None for the client's
    request_id: str | None = None  # of an update: its errors carry it
    user_id: str | None = None  # the one user that it is about
    receive: Callable[[Iterator[Any]], ReplyT | None] | None = None  # the reply from a stream; None: there is none


def update(
    user_id: Id,
    items: Items = (),
    *,
    timestamps: Time | Iterable[Time] | None = None,
    unit: Unit = "s",
    shown: Ids = (),
    shown_seconds: SupportsIndex | None = None,
    request_id: str | None = None,
    producer: str | None = None,
    sequence: SupportsIndex | None = None,
    timeout: float | None = None,
) -> Call[pb.UpdateRequest, pb.UpdateReply, UpdateResult]:
    """Appends events to a user's history. They are on disk when this returns.

    Retried while the server is unavailable. The request id lets the server recognise a repeat: within 24 hours it
    applies an id only once. Errors carry the id, so that a failed update can be repeated safely:

        try:
            client.update("anna", items)
        except sdk.CallError as error:
            client.update("anna", items, request_id=error.request_id)

    Updates from a log or a topic have an order already: with `producer` and `sequence`, what is at or below the last
    one that was applied to the user is a repeat, for ever, so the log can be read again from any point. No request id
    is generated then, and errors carry none.

    Args:
        user_id: Text or an integer.
        items: One item or several, oldest first: ids, or `Event`s where the time is known.
        timestamps: One time for each id: numbers since 1970, or `datetime`s with a time zone. Stored in whole seconds.
        unit: What numbers count, in `timestamps` and in `Event`s: "s", "ms", "us" or "ns".
        shown: Items that the user was shown, up to 1000: no events, but left out of recommendations for a time.
        shown_seconds: For how long, up to 30 days; None: an hour.
        request_id: Names this update, up to 128 bytes; else generated. Pass your own where a task may be cancelled.
        producer: Names the log that this update is from, and its partition if it has several: up to 128 bytes.
        sequence: The position of this update in it, 0 to 2^64 - 1, such as its offset; with a producer only.
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        InvalidArgumentError: An id, an item or a time is not valid; nothing was stored.
        CallError: The call failed. Repeat the update with the `request_id` of the error.
    """
    request = _update_request(user_id, items, timestamps, unit=unit)
    request.shown_item_ids.extend(_wire.id_texts(shown, "shown"))
    if shown_seconds is not None:
        request.shown_seconds = _wire.integer(shown_seconds, "shown_seconds")
    _set_producer(request, producer, sequence)
    request.request_id = _request_id(request_id, producer)
    return Call("Update", request, _replies.update_result, True, timeout, request.request_id or None, request.user_id)


def update_many(
    updates: Mapping[Any, Items] | Iterable[tuple[Id, Items]],  # Any: Mapping[int, ...] is no Mapping[Id, ...]
    *,
    unit: Unit = "s",
    request_id: str | None = None,
    producer: str | None = None,
    sequences: Iterable[SupportsIndex] | None = None,
    timeout: float | None = None,
) -> Call[pb.BatchUpdateRequest, pb.BatchUpdateReply, list[UpdateResult]]:
    """Appends events to several histories in one commit: all are stored, or none, and only once.

    Retried as `update` is. The batch has one request id, and errors carry it:

        try:
            client.update_many(updates)
        except sdk.CallError as error:
            client.update_many(updates, request_id=error.request_id)

    With a `producer`, each update has its own sequence, as for `update`: those that are repeats are left out, and the
    others are stored. No request id is generated then.

    Args:
        updates: A mapping of user ids to items, or pairs of user id and items; items as for `update`. A user may
            occur in several pairs, which apply in the order given.
        unit: What the times of `Event`s count that are numbers: "s", "ms", "us" or "ns".
        request_id: Names this batch, up to 128 bytes. Generated by default, unless there is a producer. Repeat it with
            the same updates only.
        producer: Names the log that all these updates are from, and its partition if it has several.
        sequences: The position of each update in it, in the order given; with a producer only.
        timeout: Seconds for the whole call, retries included; the client's by default.

    Returns:
        One result for each update, in the order given.

    Raises:
        InvalidArgumentError: One of the updates is not valid; nothing was stored.
        CallError: The call failed; see `update`. All updates are stored, or none.
    """
    requests = [
        _update_request(user_id, items, unit=unit, where=f"updates[{position}].")
        for position, (user_id, items) in enumerate(_pairs(updates))
    ]
    for position, (one, sequence) in enumerate(zip(requests, _sequences(sequences, len(requests)), strict=True)):
        _set_producer(one, producer, sequence, where=f"sequences[{position}]")
    request = pb.BatchUpdateRequest(updates=requests, request_id=_request_id(request_id, producer))
    parse = _replies.each(_replies.update_result, len(requests))
    return Call("BatchUpdate", request, parse, True, timeout, request.request_id or None)


def recommend(
    user_id: Id | None = None,
    k: SupportsIndex = 10,
    *,
    exclude: Ids = (),
    include_seen: bool = False,
    candidates: Ids | None = None,
    what_if: Items = (),
    at: Time | None = None,
    filter: Filter | None = None,
    diversity: Diversity | Iterable[Diversity] = (),
    timeout: float | None = None,
) -> Call[pb.RecommendRequest, pb.RecommendReply, Recommendations]:
    """The best items for a user, best first; for a user without events, the most popular ones.

    Args:
        user_id: Text or an integer. None for an anonymous user, described by `what_if` alone.
        k: How many items, 1 to 1000. The answer has fewer when fewer are left.
        exclude: Items to leave out.
        include_seen: Whether items of the user's history may be recommended. Only a model that was trained with
            `seen_items="keep"` ranks them well.
        candidates: Rank these items only; None ranks all.
        what_if: Events on top of the user's history, as for `update`, for this answer only: nothing is stored.
        at: The moment that the answer is for; None: now. Only a model that sees times uses it.
        filter: Which items may be recommended, by their attributes; also among popular items. See `has` and `between`.
        diversity: How many of the first items may have the same value of an attribute; up to 4 such rules.
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        InvalidArgumentError: An argument is not valid, or `candidates` is empty.
        CallError: The call failed, after retries if the server was unavailable.
    """
    request = _recommend_request(k, exclude, include_seen, candidates, what_if, at, filter, diversity)
    if user_id is not None:
        request.user_id = _wire.id_text(user_id, "user_id")
    return Call("Recommend", request, _replies.recommendations, True, timeout, user_id=request.user_id or None)


def recommend_many(
    user_ids: Ids,
    k: SupportsIndex = 10,
    *,
    exclude: Ids = (),
    include_seen: bool = False,
    candidates: Ids | None = None,
    what_if: Items = (),
    at: Time | None = None,
    filter: Filter | None = None,
    diversity: Diversity | Iterable[Diversity] = (),
    timeout: float | None = None,
) -> Call[pb.BatchRecommendRequest, pb.BatchRecommendReply, list[Recommendations]]:
    """The best items for each of several users, in one round trip.

    Args:
        user_ids: The users.
        k: How many items for each user, 1 to 1000.
        exclude: Items to leave out. This and the following options apply to every user.
        include_seen: Whether items of a user's history may be recommended; see `recommend`.
        candidates: Rank these items only; None ranks all.
        what_if: Events on top of each user's history, for this answer only: nothing is stored.
        at: The moment that the answers are for; None: now.
        filter: Which items may be recommended; see `recommend`.
        diversity: How many of the first items may have the same value of an attribute; see `recommend`.
        timeout: Seconds for the whole call, retries included; the client's by default.

    Returns:
        One answer for each user, in the order given.

    Raises:
        InvalidArgumentError: An argument is not valid, or `candidates` is empty.
        CallError: The call failed, after retries if the server was unavailable.
    """
    template = _recommend_request(k, exclude, include_seen, candidates, what_if, at, filter, diversity)
    batch = pb.BatchRecommendRequest()
    for user_id in _wire.id_texts(user_ids, "user_ids"):
        request = batch.requests.add()
        request.CopyFrom(template)
        request.user_id = user_id
    parse = _replies.each(_replies.recommendations, len(batch.requests))
    return Call("BatchRecommend", batch, parse, True, timeout)


def user(
    user_id: Id,
    *,
    recent_events: SupportsIndex = 20,
    timeout: float | None = None,
) -> Call[pb.GetUserRequest, pb.GetUserReply, User]:
    """What is stored about a user.

    Args:
        user_id: Text or an integer.
        recent_events: How many of the latest events to include, 0 to 10000.
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        UserNotFoundError: Nothing is stored about the user.
        InvalidArgumentError: An argument is not valid.
        CallError: The call failed, after retries if the server was unavailable.
    """
    request = pb.GetUserRequest(
        user_id=_wire.id_text(user_id, "user_id"), recent_events=_wire.integer(recent_events, "recent_events")
    )
    return Call("GetUser", request, _replies.user, True, timeout, user_id=request.user_id)


def delete_user(
    user_id: Id,
    *,
    timeout: float | None = None,
) -> Call[pb.DeleteUserRequest, pb.DeleteUserReply, DeletedUser]:
    """Deletes everything stored about a user. An unknown user is not an error.

    Never retried: after a lost answer, a repeat would report `existed` as False. Calling again does no harm.

    Args:
        user_id: Text or an integer.
        timeout: Seconds for the whole call; the client's by default.

    Raises:
        InvalidArgumentError: The id is not valid.
        CallError: The call failed. The user may or may not be deleted: call again to be sure.
    """
    request = pb.DeleteUserRequest(user_id=_wire.id_text(user_id, "user_id"))
    return Call("DeleteUser", request, _replies.deleted_user, False, timeout, user_id=request.user_id)


def status(
    *,
    timeout: float | None = None,
) -> Call[pb.GetStatusRequest, pb.GetStatusReply, Status]:
    """Whether the server takes work, and what is wrong with it. For those who run the server.

    Args:
        timeout: Seconds for the whole call, retries included; the client's by default.

    Raises:
        CallError: The call failed, after retries if the server was unavailable.
    """
    return Call("GetStatus", pb.GetStatusRequest(), _replies.status, True, timeout)


def _update_request(
    user_id: Id, items: Items, timestamps: object = None, *, unit: Unit, where: str = ""
) -> pb.UpdateRequest:
    return pb.UpdateRequest(
        user_id=_wire.id_text(user_id, f"{where}user_id"),
        events=_wire.events(items, timestamps, name=f"{where}items", unit=checked_unit(unit)),
    )


def _request_id(given: str | None, producer: str | None) -> str:
    """Never empty without a producer: the server would not check for repeats, and a retry would count twice."""
    if given is None:
        return uuid.uuid4().hex if producer is None else ""
    return _wire.id_text(given, "request_id")


def _set_producer(request: pb.UpdateRequest, producer: str | None, sequence: object, where: str = "sequence") -> None:
    if (producer is None) != (sequence is None):
        raise InvalidArgumentError("producer and sequence go together: give both, or none.")
    if producer is not None:
        request.producer = _wire.id_text(producer, "producer")
        request.sequence = _wire.natural(sequence, where)


def _sequences(given: Iterable[SupportsIndex] | None, updates: int) -> list[SupportsIndex | None]:
    if given is None:
        return [None] * updates
    sequences: list[SupportsIndex | None] = list(given)
    if len(sequences) != updates:
        raise InvalidArgumentError(f"sequences must have one for each update: {len(sequences)} for {updates}.")
    return sequences


def _pairs(updates: Mapping[Any, Items] | Iterable[tuple[Id, Items]]) -> list[tuple[Id, Items]]:
    pairs = list(updates.items() if isinstance(updates, Mapping) else updates)
    for position, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidArgumentError(f"updates[{position}] must be a pair of user id and items.")
    return pairs


def _recommend_request(
    k: SupportsIndex,
    exclude: Ids,
    include_seen: bool,
    candidates: Ids | None,
    what_if: Items,
    at: Time | None,
    filter: Filter | None,
    diversity: Diversity | Iterable[Diversity],
) -> pb.RecommendRequest:
    request = pb.RecommendRequest(
        k=_wire.integer(k, "k"),
        include_seen=bool(include_seen),
        exclude_item_ids=_wire.id_texts(exclude, "exclude"),
        candidate_item_ids=() if candidates is None else _wire.id_texts(candidates, "candidates"),
        what_if_events=_wire.events(what_if, name="what_if"),
        at=None if at is None else whole_seconds(at, "at", None),
        filter=filter_message(filter),
        diversity=diversity_messages(diversity),
    )
    if candidates is not None and not request.candidate_item_ids:
        raise InvalidArgumentError("candidates must not be empty; None ranks all items.")
    return request
