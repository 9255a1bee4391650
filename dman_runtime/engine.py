"""The one path that reads users, advances them and commits them; updates and recommendations stand on it.

    open_users -> append -> advance (whole, or piece by piece) -> commit

A record that does not cover the whole history, as after a change of bundle, is caught up from the history when its user
is opened. Knows neither gRPC nor threads nor files. Requests come through `batcher`; jobs and tests call this directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dman_runtime.errors import ConflictError, RequestError
from dman_runtime.model.generation import Generation
from dman_runtime.model.record import head_bytes, read_head
from dman_runtime.model.recurrence import Piece, next_piece
from dman_runtime.model.state import State, absorbed_segments
from dman_runtime.requests import (
    MAX_EVENTS,
    Answer,
    Query,
    Update,
    UpdateOutcome,
    UserInfo,
    check_query,
    check_update,
    check_user_id,
    request_hash,
)
from dman_runtime.retrieval.base import NO_ITEMS, Hits
from dman_runtime.retrieval.exact import search_scores
from dman_runtime.store.base import Head, StateStore, Write

COMMIT_ATTEMPTS = 50
_NEW_USER = Head(version=0, history_count=0, request_ids=(), generation=0)


@dataclass(slots=True, eq=False)
class OpenUser:
    """A user between reading and committing."""

    user_id: str | None  # None: an anonymous user, who is never committed
    head: Head
    state: State
    left: np.ndarray  # (n) item indices that the state has yet to be advanced by, oldest first
    record_lags: bool  # the stored record does not cover the stored history
    items: list[np.ndarray] = field(default_factory=list)  # item numbers of new events, oldest first
    timestamps: list[np.ndarray] = field(default_factory=list)
    request_ids: list[int] = field(default_factory=list)  # remembered ones, oldest first

    @property
    def history_count(self) -> int:
        """Events stored, once this user is committed."""
        return self.head.history_count + sum(map(len, self.items))

    @property
    def event_count(self) -> int:
        """Events that the model has seen, once this user is advanced."""
        return self.state.event_count + len(self.left)

    def add_left(self, indices: np.ndarray) -> None:
        self.left = np.concatenate([self.left, indices]) if len(self.left) else indices

    def take_piece(self) -> Piece:
        """Removes the next piece from what is left."""
        piece = next_piece(self.state, self.left)
        self.left = self.left[len(piece.items) :]
        return piece


@dataclass(slots=True, eq=False)
class OpenUpdates:
    """Updates that are committed together: all of them, or none."""

    updates: Sequence[Update]
    users: list[OpenUser]
    outcomes: list[UpdateOutcome]


@dataclass(slots=True, eq=False)
class OpenQuery:
    """A query with what was read for it."""

    query: Query
    seen: np.ndarray  # item indices of the history, in no order
    embedding: np.ndarray  # (D); zero while `user` has to be advanced first
    event_count: int
    user: OpenUser | None  # advanced by the what-if events
    what_if: np.ndarray
    unknown: list[str]
    lags: bool = False  # the user's record does not cover the history


class Engine:
    """Serves one generation over one store. On threads see `Encoder`: one at a time on CUDA."""

    def __init__(self, generation: Generation, store: StateStore) -> None:
        """Gives the bundle's items their numbers, and the bundle its generation, where the store lacks them."""
        self.generation, self.store, self.bundle = generation, store, generation.bundle
        item_ids = self.bundle.items.item_ids
        numbers = store.find_items(item_ids)
        self._numbers = store.add_items(item_ids) if (numbers < 0).any() else numbers.astype(np.uint32)  # (V)
        # Item index by item number; -1, also at the end, for numbers that the bundle does not know.
        self._indices = np.full(int(self._numbers.max(initial=0)) + 2, -1, np.int64)
        self._indices[self._numbers] = np.arange(len(self._numbers))
        known = store.generations()
        self.number = known.get(self.bundle.bundle_id) or store.add_generation(self.bundle.bundle_id)
        self._head_bytes = head_bytes(self.bundle.manifest.state)
        self._no_embedding = np.zeros(self.bundle.manifest.state.width, np.float32)

    def known_indices(self, numbers: np.ndarray) -> np.ndarray:
        """Item indices (int64) of the item numbers that the bundle knows, in order."""
        indices = self._indices[np.minimum(numbers, len(self._indices) - 1)]
        return indices[indices >= 0]

    # -- the path --------------------------------------------------------------------------------------------------

    def open_users(self, user_ids: Sequence[str]) -> list[OpenUser]:
        """Reads users, new ones included. What their records do not cover yet is left to be advanced."""
        return [
            self._open(user_id, stored.head, stored.record) if stored else self._open(user_id, _NEW_USER, None)
            for user_id, stored in zip(user_ids, self.store.get_many(user_ids, self.number), strict=True)
        ]

    def _open(self, user_id: str, head: Head, record: bytes | None) -> OpenUser:
        state = self.generation.unpack(record)
        lags = state.history_count != head.history_count
        left = NO_ITEMS
        if lags:  # a deletion in between gives fewer events, and then the commit a conflict
            items, _ = self.store.history(user_id, state.history_count, head.history_count)
            left = self.known_indices(items)
        return OpenUser(user_id, head, state, left, lags, request_ids=list(head.request_ids))

    def append(self, user: OpenUser, numbers: np.ndarray, timestamps: np.ndarray) -> int:
        """Appends events (N) to what will be stored; returns how many of them the model knows."""
        indices = self.known_indices(numbers)
        user.items.append(numbers)
        user.timestamps.append(timestamps)
        user.add_left(indices)
        return len(indices)

    def advance(self, users: Sequence[OpenUser]) -> None:
        """Advances the states of different users by all that is left."""
        self.generation.advance([user.state for user in users], [user.left for user in users])
        for user in users:
            user.left = NO_ITEMS

    def commit(self, users: Sequence[OpenUser]) -> list[str]:
        """Stores advanced users that have changed, all at once. Returns those that somebody else has changed since
        they were opened: if there are any, nothing is stored."""
        changed = [user for user in users if user.items or user.record_lags]
        return self.store.commit([self._write(user) for user in changed]) if changed else []

    def _write(self, user: OpenUser) -> Write:
        assert user.user_id is not None and not len(user.left)
        user.state.history_count = user.history_count
        return Write(
            user_id=user.user_id,
            expected_version=user.head.version,
            records={self.number: self.generation.pack(user.state)},
            items=_joined(user.items, np.uint32),
            timestamps=_joined(user.timestamps, np.int64),
            request_ids=user.request_ids,
        )

    # -- updates ---------------------------------------------------------------------------------------------------

    def update(self, updates: Sequence[Update]) -> list[UpdateOutcome]:
        """Applies updates in order and commits them at once: durable and complete when it returns, or not at all.

        Raises RequestError, ConflictError and the errors of the store.
        """
        for update in updates:
            check_update(update)
        for _ in range(COMMIT_ATTEMPTS):
            opened = self.open_updates(updates)
            self.advance(opened.users)
            if not self.commit(opened.users):
                return opened.outcomes
        raise ConflictError("other workers kept changing the same users", "try again")

    def open_updates(self, updates: Sequence[Update]) -> OpenUpdates:
        """Opens the users of checked updates and appends the events that are new."""
        user_ids = list(dict.fromkeys(update.user_id for update in updates))
        users = self.open_users(user_ids)
        by_id = dict(zip(user_ids, users, strict=True))
        return OpenUpdates(updates, users, [self._merge(by_id[update.user_id], update) for update in updates])

    def _merge(self, user: OpenUser, update: Update) -> UpdateOutcome:
        """Appends an update to its user, unless it has been applied already."""
        indices, unknown = self.bundle.items.indices(update.item_ids)
        request = request_hash(update.request_id) if update.request_id else None
        if request is not None and request in user.request_ids:
            return UpdateOutcome(user.event_count, user.history_count, 0, unknown, duplicate=True)
        if update.item_ids:
            numbers = self.store.add_items(update.item_ids) if unknown else self._numbers[indices]
            times = np.array(update.timestamps or [0] * len(numbers), np.int64)
            self.append(user, numbers, times)
            if request is not None:
                user.request_ids.append(request)
        return UpdateOutcome(user.event_count, user.history_count, len(indices), unknown, duplicate=False)

    # -- recommendations -------------------------------------------------------------------------------------------

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """The best items for each query, from one matrix product.

        No graph runs but for what-if events, and where a record has to catch up. Raises RequestError, ConflictError and
        the errors of store and state.
        """
        opened = self.open_queries(queries, self.update)
        self.advance([one.user for one in opened if one.user is not None])
        return self.answer(opened)

    def open_queries(self, queries: Sequence[Query], catch_up: Callable[[Sequence[Update]], object]) -> list[OpenQuery]:
        """Reads what queries need. Those with what-if events have a user to be advanced before `answer`.

        `catch_up` gets an empty update for each user whose record does not cover the history, and applies it.
        """
        for query in queries:
            check_query(query)
        for _ in range(COMMIT_ATTEMPTS):
            opened = [self._open_query(query) for query in queries]
            lagging = dict.fromkeys(one.query.user_id for one in opened if one.lags)
            if not lagging:
                return opened
            catch_up([Update(user_id, ()) for user_id in lagging if user_id])
        raise ConflictError("servers of other bundles kept changing the same users", "try again")

    def _open_query(self, query: Query) -> OpenQuery:
        what_if, unknown = self.bundle.items.indices(query.what_if)
        opened = OpenQuery(query, NO_ITEMS, self._no_embedding, len(what_if), None, what_if, unknown)
        view = None
        if query.user_id is not None:
            view = self.store.ranking_view(query.user_id, self.number, self._head_bytes)
        if view is not None:
            opened.seen = self.known_indices(view.seen)
            head = read_head(view.record, self.bundle) if view.record is not None else None
            if head is None or head.history_count != view.history_count:
                opened.lags = True
            elif not len(what_if):
                opened.embedding, opened.event_count = head.user_embedding, head.event_count
        if len(what_if) and not opened.lags:
            opened.user = self.open_users([query.user_id])[0] if view and query.user_id else self._anonymous()
            opened.user.add_left(what_if)
            opened.event_count = opened.user.event_count
        return opened

    def _anonymous(self) -> OpenUser:
        return OpenUser(None, _NEW_USER, self.generation.unpack(None), NO_ITEMS, record_lags=False)

    def answer(self, opened: Sequence[OpenQuery]) -> list[Answer]:
        """Ranks for opened queries whose users have been advanced."""
        excluded, candidates = [], []
        for one in opened:
            if one.user is not None:
                one.embedding = one.user.state.user_embedding
            exclude, unknown_excluded = self.bundle.items.indices(one.query.exclude)
            if not one.query.include_seen:
                seen = one.seen
                exclude = np.concatenate([exclude, seen, one.what_if]) if len(exclude) or len(one.what_if) else seen
            limit, unknown_candidates = None, list[str]()
            if one.query.candidates is not None:
                limit, unknown_candidates = self.bundle.items.indices(one.query.candidates)
            excluded.append(exclude)
            candidates.append(limit)
            one.unknown += [*unknown_excluded, *unknown_candidates]
        hits = self._search(opened, excluded, candidates)
        return [
            Answer(found.items, found.scores, one.event_count == 0, one.event_count, one.unknown)
            for one, found in zip(opened, hits, strict=True)
        ]

    def _search(
        self, opened: Sequence[OpenQuery], excluded: Sequence[np.ndarray], candidates: Sequence[np.ndarray | None]
    ) -> list[Hits]:
        """The hits of each query: by its user embedding, or by popularity where the model has seen no event."""
        personal = [row for row, one in enumerate(opened) if one.event_count]
        hits: dict[int, Hits] = {}
        if personal:
            found = self.generation.retriever.search(
                np.stack([opened[row].embedding for row in personal]),
                max(opened[row].query.k for row in personal),
                exclude=[excluded[row] for row in personal],
                candidates=[candidates[row] for row in personal],
            )
            for row, one in zip(personal, found, strict=True):
                k = opened[row].query.k
                hits[row] = Hits(one.items[:k], one.scores[:k])
        for row in set(range(len(opened))) - set(personal):
            hits[row] = search_scores(
                self.bundle.items.popularity,
                opened[row].query.k,
                exclude=excluded[row],
                candidates=candidates[row],
            )
        return [hits[row] for row in range(len(opened))]

    # -- users -----------------------------------------------------------------------------------------------------

    def lagging(self, user_id: str) -> bool:
        """Whether the user's record does not cover the whole history. Raises RequestError."""
        check_user_id(user_id)
        (stored,) = self.store.get_many([user_id], self.number)
        if stored is None or stored.record is None:
            return stored is not None
        return read_head(stored.record, self.bundle).history_count != stored.head.history_count

    def user(self, user_id: str, *, recent_events: int = 0) -> UserInfo | None:
        """What is stored about a user, or None. Raises RequestError, ConflictError, StoreError, StateError."""
        if not 0 <= recent_events <= MAX_EVENTS:
            raise RequestError(f"recent_events is {recent_events}", f"choose 0 to {MAX_EVENTS}")
        if self.lagging(user_id):
            self.update([Update(user_id, ())])
        (stored,) = self.store.get_many([user_id], self.number)
        if stored is None:
            return None
        (count, record), shape = (stored.head.history_count, stored.record), self.bundle.manifest.state
        event_count = read_head(record, self.bundle).event_count if record is not None else 0
        items, timestamps = self.store.history(user_id, max(0, count - recent_events), count)
        return UserInfo(
            event_count=event_count,
            history_count=count,
            segment_fill=event_count % shape.segment_length,
            absorbed_segments=absorbed_segments(event_count, shape),
            state_bytes=len(record or b""),
            recent_item_ids=self.store.item_ids(items),
            recent_timestamps=timestamps.tolist(),
        )

    def delete(self, user_id: str) -> int | None:
        """Forgets a user: the number of events deleted, or None for an unknown user. Durable when it returns."""
        check_user_id(user_id)
        return self.store.delete(user_id)


def _joined(parts: list[np.ndarray], kind: type) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, kind)
