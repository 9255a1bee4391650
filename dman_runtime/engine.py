"""Updates and recommendations, knowing neither gRPC nor files: what the service, batch jobs and tests call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dman_runtime.errors import ConflictError, RequestError
from dman_runtime.model.bundle import Bundle
from dman_runtime.model.recurrence import Graphs, advance
from dman_runtime.model.state import (
    REQUEST_IDS,
    StateBatch,
    absorbed_segments,
    head_bytes,
    read_user_embedding,
    request_hash,
)
from dman_runtime.retrieval.exact import NO_ITEMS, ExactRetriever, search_scores
from dman_runtime.store.lmdb import StateStore, StoredUser, Write, user_key

MAX_K = 1000
MAX_EVENTS = 10_000  # per update, and of what-if events per query
MAX_REQUEST_ID_BYTES = 128
_COMMIT_ATTEMPTS = 50


@dataclass(frozen=True, slots=True)
class Update:
    """New events of one user, oldest first."""

    user_id: str
    item_ids: Sequence[str]
    timestamps: Sequence[int] = ()  # seconds since the epoch, 0 unknown; empty or one per item
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class UpdateOutcome:
    event_count: int  # of the user, this update included
    applied: int
    unknown_item_ids: list[str]
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Query:
    """What to recommend for. No user id: an anonymous user, described by `what_if` alone."""

    user_id: str | None
    k: int = 10
    include_seen: bool = False
    exclude: Sequence[str] = ()
    candidates: Sequence[str] | None = None
    what_if: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    item_indices: np.ndarray  # (n) int64, best first, n <= k
    scores: np.ndarray  # (n)
    popular: bool  # the user has no events: most popular items, scored by their share of training events
    event_count: int
    unknown_item_ids: list[str]


@dataclass(frozen=True, slots=True)
class UserInfo:
    event_count: int
    segment_fill: int
    absorbed_segments: int
    state_bytes: int
    recent_items: np.ndarray  # (n) item indices, oldest first
    recent_timestamps: np.ndarray  # (n) int64


@dataclass(slots=True)
class _Pending:
    """What a batch of updates does to one user."""

    event_count: int
    request_ids: list[int]  # remembered ones, oldest first
    items: list[np.ndarray] = field(default_factory=list)
    timestamps: list[np.ndarray] = field(default_factory=list)


class Engine:
    """Serves one bundle over one state store. `update` and what-if queries run the graphs; see `Encoder` on threads."""

    def __init__(self, bundle: Bundle, graphs: Graphs, store: StateStore) -> None:
        self.bundle, self.store = bundle, store
        self._graphs = graphs
        self._retriever = ExactRetriever(bundle.item_embeddings)
        self._head_bytes = head_bytes(bundle.manifest.state)

    # -- updates ---------------------------------------------------------------------------------------------------

    def check_update(self, update: Update) -> None:
        """Raises RequestError for an update that can never be applied."""
        _check_user_id(update.user_id)
        if len(update.item_ids) > MAX_EVENTS:
            raise RequestError(f"{len(update.item_ids)} events in one update; send at most {MAX_EVENTS} at a time")
        if len(update.timestamps) not in (0, len(update.item_ids)):
            raise RequestError("timestamps must be one per item, or none")
        if len(update.request_id.encode()) > MAX_REQUEST_ID_BYTES:
            raise RequestError(f"request_id is longer than {MAX_REQUEST_ID_BYTES} bytes; use a UUID")

    def update(self, updates: Sequence[Update]) -> list[UpdateOutcome]:
        """Applies updates in order and commits them at once: durable and complete when it returns, or not at all.

        Raises RequestError, ConflictError and the errors of the store.
        """
        for update in updates:
            self.check_update(update)
        user_ids = list(dict.fromkeys(update.user_id for update in updates))
        for _ in range(_COMMIT_ATTEMPTS):
            stored = self.store.get_many(user_ids)
            states = StateBatch.from_records(self.bundle, [user.record if user else None for user in stored])
            pending = [
                _Pending(int(count), ids) for count, ids in zip(states.event_counts, states.request_ids, strict=True)
            ]
            by_user = dict(zip(user_ids, pending, strict=True))
            outcomes = [self._merge(by_user[update.user_id], update) for update in updates]
            writes = self._writes(user_ids, stored, states, pending)
            if not writes or self.store.commit(writes):
                return outcomes
        raise ConflictError("other workers kept changing the same users; try again")

    def _merge(self, user: _Pending, update: Update) -> UpdateOutcome:
        """Appends an update to what its user gets, unless it has been applied already."""
        items, unknown = self.bundle.items.indices(update.item_ids)
        request = request_hash(update.request_id) if update.request_id else None
        if request is not None and request in user.request_ids:
            return UpdateOutcome(user.event_count, 0, unknown, duplicate=True)
        if len(items):
            timestamps = np.array(update.timestamps or [0] * len(update.item_ids), np.int64)
            if unknown:
                timestamps = timestamps[[item_id in self.bundle.items.index for item_id in update.item_ids]]
            user.items.append(items)
            user.timestamps.append(timestamps)
            user.event_count += len(items)
            if request is not None:
                user.request_ids = [*user.request_ids, request][-REQUEST_IDS:]
        return UpdateOutcome(user.event_count, len(items), unknown, duplicate=False)

    def _writes(
        self,
        user_ids: Sequence[str],
        stored: Sequence[StoredUser | None],
        states: StateBatch,
        pending: Sequence[_Pending],
    ) -> list[Write]:
        """Advances the states and packs those that changed."""
        items = [np.concatenate(user.items) if user.items else NO_ITEMS for user in pending]
        advance(states, items, bundle=self.bundle, graphs=self._graphs)
        states.request_ids = [user.request_ids for user in pending]
        return [
            Write(
                user_id=user_ids[row],
                expected_version=before.version if before else 0,
                record=states.to_record(row, self.bundle),
                items=items[row],
                timestamps=np.concatenate(pending[row].timestamps),
            )
            for row, before in enumerate(stored)
            if len(items[row])
        ]

    # -- recommendations -------------------------------------------------------------------------------------------

    def check_query(self, query: Query) -> None:
        """Raises RequestError for a query that can never be answered."""
        if query.user_id is not None:
            _check_user_id(query.user_id)
        if not 1 <= query.k <= MAX_K:
            raise RequestError(f"k is {query.k}; choose 1 to {MAX_K}")
        if len(query.what_if) > MAX_EVENTS:
            raise RequestError(f"{len(query.what_if)} what-if events; send at most {MAX_EVENTS}")

    def recommend(self, query: Query) -> Answer:
        """The best items for one user. Runs no graph unless there are what-if events.

        Raises RequestError, and the errors of store and state.
        """
        self.check_query(query)
        what_if, unknown = self.bundle.items.indices(query.what_if)
        found = None
        if query.user_id is not None:  # only what-if events need more than the head of the record
            needed = None if len(what_if) else self._head_bytes
            found = self.store.get_with_seen(query.user_id, record_bytes=needed)
        stored, seen = found if found else (None, NO_ITEMS)
        embedding, event_count = self._user_embedding(stored, what_if)
        excluded, unknown_excluded = self.bundle.items.indices(query.exclude)
        candidates, unknown_candidates = (
            (None, []) if query.candidates is None else self.bundle.items.indices(query.candidates)
        )
        if not query.include_seen:
            excluded = np.concatenate([excluded, seen, what_if]) if len(excluded) or len(what_if) else seen
        if event_count:
            indices, scores = self._retriever.search(embedding, query.k, exclude=excluded, candidates=candidates)
        else:
            popularity = self.bundle.items.popularity
            indices, scores = search_scores(popularity, query.k, exclude=excluded, candidates=candidates)
        return Answer(
            indices, scores, event_count == 0, event_count, [*unknown, *unknown_excluded, *unknown_candidates]
        )

    def _user_embedding(self, stored: StoredUser | None, what_if: np.ndarray) -> tuple[np.ndarray, int]:
        if len(what_if):
            states = StateBatch.from_records(self.bundle, [stored.record if stored else None])
            advance(states, [what_if], bundle=self.bundle, graphs=self._graphs)
            return states.user_embeddings[0], int(states.event_counts[0])
        if stored is None:
            return np.zeros(self.bundle.manifest.state.width, np.float32), 0
        return read_user_embedding(stored.record, self.bundle)

    # -- users -----------------------------------------------------------------------------------------------------

    def user(self, user_id: str, *, recent_events: int = 0) -> UserInfo | None:
        """What is stored about a user, or None. Raises RequestError, StoreError."""
        _check_user_id(user_id)
        if not 0 <= recent_events <= MAX_EVENTS:
            raise RequestError(f"recent_events is {recent_events}; choose 0 to {MAX_EVENTS}")
        stored = self.store.get(user_id)
        if stored is None:
            return None
        shape = self.bundle.manifest.state
        items, timestamps = self.store.history(user_id, limit=recent_events)
        return UserInfo(
            event_count=stored.event_count,
            segment_fill=stored.event_count % shape.segment_length,
            absorbed_segments=absorbed_segments(stored.event_count, shape),
            state_bytes=len(stored.record),
            recent_items=items,
            recent_timestamps=timestamps,
        )

    def delete(self, user_id: str) -> int | None:
        """Forgets a user: the number of events deleted, or None for an unknown user. Durable when it returns."""
        _check_user_id(user_id)
        return self.store.delete(user_id)


def _check_user_id(user_id: str) -> None:
    try:
        user_key(user_id)
    except ValueError as error:
        raise RequestError(str(error)) from None
