"""What the engine is asked and what it answers, with the limits on both. Knows neither gRPC nor files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from dman_runtime.data.ids import RULE, id_problem
from dman_runtime.diversity import Rule, check_rules
from dman_runtime.errors import RequestError
from dman_runtime.item_filters import Filter, check_filter, count_parts
from dman_runtime.model.bundle import Bundle
from dman_runtime.store.base import MAX_SHOWN

Checked = TypeVar("Checked")
MAX_K = 1000
MAX_EVENTS = 10_000  # per update, and of what-if events per query
MAX_REQUEST_ID_BYTES = 128
MAX_PRODUCER_BYTES = 128
MAX_REQUEST_EVENTS = 100_000  # in all updates or what-ifs of one request
MAX_REQUEST_IDS = 100_000  # exclusions, candidates, values of filters and shown items, in all parts of one request
MAX_LISTED_IDS = 10_000  # exclusions or candidates of one query
MAX_BATCH = 1000  # updates or queries in one request
SHOWN_SECONDS, MAX_SHOWN_SECONDS = 3600, 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Update:
    """New events of one user, oldest first, and what the user was shown."""

    user_id: str
    item_ids: Sequence[str]
    timestamps: Sequence[int] = ()  # seconds since the epoch, 0 unknown; empty or one per item
    request_id: str = ""
    producer: str = ""  # whose order the sequence is of
    sequence: int | None = None  # 0 to 2^64 - 1, if there is a producer
    shown: Sequence[str] = ()  # items that the user was shown, which are no events
    shown_seconds: int = SHOWN_SECONDS  # for how long they are left out of the user's recommendations


class LateOutcome(NamedTuple):
    """What became of the events of an update that came late."""

    dropped: int = 0  # not stored
    placed: int = 0  # stored in their places
    deferred: int = 0  # of those: the model sees them when the record is made anew


NOT_LATE = LateOutcome()


@dataclass(frozen=True, slots=True)
class UpdateOutcome:
    bundle: Bundle  # whose model the numbers are of
    event_count: int  # events of the user that the model has seen, this update included
    history_count: int  # events of the user that are stored, also those of items unknown to the model
    applied: int  # events of this update that the model has seen
    unknown_item_ids: list[str]  # stored, but unknown to the model
    duplicate: bool
    late: LateOutcome = NOT_LATE

    @property
    def unknown_count(self) -> int:
        return len(self.unknown_item_ids)


@dataclass(frozen=True, slots=True)
class Query:
    """What to recommend for. No user id: an anonymous user, described by `what_if` alone."""

    user_id: str | None
    k: int = 10
    include_seen: bool = False
    exclude: Sequence[str] = ()
    candidates: Sequence[str] | None = None
    what_if: Sequence[str] = ()
    what_if_times: Sequence[int] = ()  # seconds since the epoch, 0 unknown; empty or one per item
    at: int | None = None  # seconds since the epoch: the time that the answer is for; None: unknown
    filter: Filter | None = None  # the items that may be recommended; None: all
    diversity: Sequence[Rule] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    bundle: Bundle  # whose model answers
    item_indices: np.ndarray  # (n) int64, best first, n <= k
    scores: np.ndarray  # (n)
    popular: bool  # the model has seen no events: most popular items, scored by their share of training events
    event_count: int
    unknown_item_ids: list[str]


@dataclass(frozen=True, slots=True)
class UserInfo:
    bundle: Bundle  # whose model the numbers are of
    event_count: int  # events that the model has seen
    history_count: int  # events stored
    segment_fill: int
    absorbed_segments: int
    state_bytes: int
    recent_item_ids: list[str]  # (n) oldest first
    recent_timestamps: list[int]  # (n)
    deferred_events: int = 0  # that the model knows, and sees when the record is made anew


def check_update(update: Update) -> None:
    """Raises RequestError for an update that can never be applied."""
    check_user_id(update.user_id)
    if len(update.item_ids) > MAX_EVENTS:
        raise RequestError(f"{len(update.item_ids)} events in one update", f"send at most {MAX_EVENTS} at a time")
    if len(update.shown) > MAX_SHOWN:
        raise RequestError(f"{len(update.shown)} shown_item_ids in one update", f"send at most {MAX_SHOWN}")
    if not 1 <= update.shown_seconds <= MAX_SHOWN_SECONDS:
        raise RequestError(f"shown_seconds is {update.shown_seconds}", f"choose 1 to {MAX_SHOWN_SECONDS}")
    for item_id in (*update.item_ids, *update.shown):
        if (problem := id_problem(item_id)) is not None:
            raise RequestError(f"item id {item_id!r:.80} {problem}", RULE)
    if len(update.timestamps) not in (0, len(update.item_ids)):
        raise RequestError("timestamps do not match the items", "send one per item, or none")
    _check_request_id(update.request_id)
    _check_producer(update)


def check_updates(updates: Sequence[Update], batch_id: str = "") -> None:
    """`check_update` for a batch. Raises RequestError, which names the update."""
    listed = sum(len(update.shown) for update in updates)
    check_size(len(updates), sum(len(update.item_ids) for update in updates), listed)
    check_batch_id(batch_id, updates)
    for position, update in enumerate(updates):
        named(f"updates[{position}]", check_update, update)


def check_queries(queries: Sequence[Query]) -> None:
    """`check_query` for a batch. Raises RequestError, which names the query."""
    listed = sum(len(query.exclude) + len(query.candidates or ()) for query in queries)
    check_size(len(queries), sum(len(query.what_if) for query in queries), listed)
    for position, query in enumerate(queries):
        named(f"requests[{position}]", check_query, query)


def check_size(parts: int, events: int, listed: int = 0) -> None:
    """Raises RequestError where a request is too much. `listed` are its other ids and values."""
    if parts > MAX_BATCH:
        raise RequestError(f"{parts} requests in one batch", f"send at most {MAX_BATCH} at a time")
    if events > MAX_REQUEST_EVENTS:
        raise RequestError(f"{events} events in one request", f"send at most {MAX_REQUEST_EVENTS} at a time")
    if listed > MAX_REQUEST_IDS:
        raise RequestError(
            f"{listed} exclusions, candidates and values of filters in one request", f"send at most {MAX_REQUEST_IDS}"
        )


def named(which: str, check: Callable[[Checked], object], value: Checked) -> None:
    """`check(value)`; an error says which one of a batch it is about."""
    try:
        check(value)
    except RequestError as error:
        raise RequestError(f"{which}: {error.cause}", error.remedy) from None


def check_batch_id(batch_id: str, updates: Sequence[Update]) -> None:
    """Raises RequestError where updates that are applied as a whole, or not at all, cannot have this id."""
    _check_request_id(batch_id)
    if batch_id and any(update.request_id for update in updates):
        raise RequestError("the batch has a request_id, and so has an update in it", "give only the batch one")


def _check_request_id(request_id: str) -> None:
    if len(request_id) * 4 > MAX_REQUEST_ID_BYTES < len(request_id.encode()):
        raise RequestError(f"request_id is longer than {MAX_REQUEST_ID_BYTES} bytes", "use a UUID")


def _check_producer(update: Update) -> None:
    producer, sequence = update.producer, update.sequence
    if bool(producer) != (sequence is not None):
        raise RequestError("an update has a producer or a sequence, and not the other", "give both, or none")
    if len(producer) * 4 > MAX_PRODUCER_BYTES < len(producer.encode()):
        raise RequestError(f"producer is longer than {MAX_PRODUCER_BYTES} bytes", "name the log and its partition")
    if sequence is not None and not 0 <= sequence < 1 << 64:
        raise RequestError(f"sequence is {sequence}", "choose 0 to 2^64 - 1")


def check_query(query: Query) -> None:
    """Raises RequestError for a query that can never be answered."""
    if query.user_id is not None:
        check_user_id(query.user_id)
    if not 1 <= query.k <= MAX_K:
        raise RequestError(f"k is {query.k}", f"choose 1 to {MAX_K}")
    if len(query.what_if) > MAX_EVENTS:
        raise RequestError(f"{len(query.what_if)} what-if events", f"send at most {MAX_EVENTS}")
    if len(query.what_if_times) not in (0, len(query.what_if)):
        raise RequestError("times do not match the what-if events", "send one per item, or none")
    for name, listed in (("exclude", query.exclude), ("candidate", query.candidates or ())):
        if len(listed) > MAX_LISTED_IDS:
            raise RequestError(f"{len(listed)} {name}_item_ids", f"send at most {MAX_LISTED_IDS}")
    if query.filter is not None:
        check_filter(query.filter)
    if query.diversity:
        check_rules(query.diversity, MAX_K)


def passes(query: Query) -> int:
    """How often all items are looked at for a query, beside its search."""
    return len(query.diversity) + (0 if query.filter is None else count_parts(query.filter))


def check_user_id(user_id: str) -> None:
    if (problem := id_problem(user_id)) is not None:
        raise RequestError(f"user id {user_id!r:.80} {problem}", RULE)


def name_hash(name: str) -> int:
    """The 64 bits that a store remembers of a request id or of a producer."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
