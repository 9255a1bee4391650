"""The one path that reads users, advances them and commits them; updates and recommendations stand on it.

    open_users -> append or merge -> advance (whole, piece by piece, or in other processes) -> commit

A record is a view of the history. One that does not cover all of it, as after a change of bundle, is caught up when its
user is opened; one that is damaged is made anew. Knows neither gRPC nor threads nor files. Requests come through
`batcher`; jobs and tests call this directly.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

import numpy as np

from dman_runtime.errors import ConflictError, RequestError, StoreError, StoreFullError
from dman_runtime.late import LateEvents, Placed, late_ones, place
from dman_runtime.merging import Merged, joined_events, merge_events
from dman_runtime.model.bundle import Bundle
from dman_runtime.model.events import NO_EVENTS
from dman_runtime.model.generation import Generation
from dman_runtime.model.recurrence import without_rest
from dman_runtime.model.state import absorbed_segments, segment_fill
from dman_runtime.opened import (
    OpenQuery,
    OpenUpdates,
    OpenUser,
    by_projection,
    catch_up_updates,
    expected_of,
    read_users,
)
from dman_runtime.projection import Projection
from dman_runtime.queries import open_query, plain_answer
from dman_runtime.ranking import rank
from dman_runtime.repeats import NOTHING_ASKED, Asked, Mark, asked_of, marks_of
from dman_runtime.requests import (
    MAX_EVENTS,
    NOT_LATE,
    Answer,
    LateOutcome,
    Query,
    Update,
    UpdateOutcome,
    UserInfo,
    check_batch_id,
    check_query,
    check_update,
    check_user_id,
)
from dman_runtime.routing import Router
from dman_runtime.store.base import Expected, StateStore

logger = logging.getLogger(__name__)
COMMIT_ATTEMPTS = 50
_LONGEST_PAUSE = 0.25  # seconds before a conflicting commit is tried again


class Engine:
    """Serves generations over one store. On threads see `Encoder`: one at a time on CUDA."""

    def __init__(
        self,
        generation: Generation,
        store: StateStore,
        *,
        follows: bool = False,
        late_events: LateEvents = "arrival",
        reads_only: bool = False,
    ) -> None:
        """Gives the bundle's items their numbers, and the bundle its generation, where the store lacks them.

        An engine that `follows` serves what the roll-out of the store says, as far as its router has loaded it; else it
        serves this generation. `late_events` says what becomes of events of updates that come late (`late`).
        """
        self.store, self.projection = store, Projection(generation, store, reads_only=reads_only)
        self.router = Router(self.projection, store)
        self._follows, self._late_events = follows, late_events
        self.committed: Callable[[], None] = lambda: None  # called after every commit that stored something

    def _projections(self, user_ids: Sequence[str | None]) -> Sequence[Projection]:
        """Which generation serves each of some users."""
        return self.router.of(user_ids) if self._follows else [self.current] * len(user_ids)

    @property
    def current(self) -> Projection:
        """Of the generation that this was made with, with the items that were added by now. Raises StoreError."""
        return self.projection.at(self.store.standing().catalogue_revision)

    def bundle_of(self, user_id: str) -> Bundle:
        """The bundle that serves a user."""
        return self._projections([user_id])[0].bundle

    # -- the path --------------------------------------------------------------------------------------------------

    def open_users(self, user_ids: Sequence[str], asked: Mapping[str, Asked] = NOTHING_ASKED) -> list[OpenUser]:
        """Reads users, new ones included. What their records do not cover yet is left to be advanced.

        Request ids and producers, by user, are looked up in the same snapshot: see `OpenUser.has_applied`.
        """
        projections = self._projections(user_ids)
        with self.store.snapshot() as snapshot:
            if self.store.waits:
                snapshot.expect(expected_of(user_ids, projections, asked))
            users = read_users(snapshot, user_ids, projections)
            for user_id, user in zip(user_ids, users, strict=True):
                if (of_user := asked.get(user_id)) is not None:
                    user.applied = snapshot.applied(user_id, of_user.request_ids)
                    if of_user.producers:
                        user.sequences = snapshot.sequences(user_id, of_user.producers)
        return users

    def merge(self, user: OpenUser, numbers: np.ndarray, timestamps: np.ndarray, *, keep_order: bool = False) -> Merged:
        """Like `OpenUser.append`, for events (N), oldest first, that the history may hold already, or that belong
        before its end: the new ones go to their places by time (`merging`).

        Where that is not behind the history, all of it is left to be advanced again, and will be replaced.
        """
        if not user.history_count:
            return Merged(len(numbers), user.append(numbers, timestamps), rebuilt=False)
        assert user.user_id is not None
        history = user.new_events
        if user.kept:  # read at a later moment than the head: if it has changed since, so has the version
            stored = self.store.history(user.user_id, 0, user.kept)
            history = joined_events(stored, history)
        added, whole = merge_events(history, (numbers, timestamps), keep_order=keep_order)
        if whole is None:
            known = user.append(*added) if len(added[0]) else 0
        else:
            known = len(user.projection.known_indices(added[0]))
            user.rebuild(whole)
        return Merged(len(added[0]), known, rebuilt=whole is not None)

    def advance(self, users: Sequence[OpenUser], rest: Callable[[], None] = without_rest) -> None:
        """Advances the states of different users by all that is left. Calls `rest` from time to time."""
        for projection, group in by_projection(users):
            projection.generation.advance([user.state for user in group], [user.left for user in group], rest)
        for user in users:
            user.left = NO_EVENTS

    def advance_pieces(self, users: Sequence[OpenUser]) -> None:
        """Advances different users, who have events left, by a piece of a segment each."""
        for projection, group in by_projection(users):
            projection.generation.advance_pieces([user.take_piece() for user in group])

    def commit(self, users: Sequence[OpenUser]) -> list[str]:
        """Stores advanced users that have changed, all at once. Returns those that somebody else has changed since
        they were opened: if there are any, nothing is stored; or in a store that does not commit together, only the
        others, which then have nothing left to commit."""
        changed = [user for user in users if user.changed]
        if not changed:
            return []
        try:
            conflicts = self.store.commit([user.write() for user in changed])
        except StoreError as error:
            _note_stored(changed, error.stored)
            raise
        if not self.store.commits_together:
            _note_stored(changed, {user.user_id for user in changed} - set(conflicts))
        if not conflicts:
            self.committed()
        return conflicts

    # -- updates ---------------------------------------------------------------------------------------------------

    def update(self, updates: Sequence[Update], batch_id: str = "") -> list[UpdateOutcome]:
        """Applies updates in order and commits them at once: durable and complete when it returns, or not at all.

        Updates with a `batch_id` are applied once as a whole. Raises RequestError, ConflictError and the errors of the
        store.
        """
        for update in updates:
            check_update(update)
        check_batch_id(batch_id, updates)
        opened = self.open_updates(updates, batch_id)
        for attempt in range(COMMIT_ATTEMPTS):
            self.advance(opened.users)
            if not (conflicts := self.commit(opened.users)):
                return opened.outcomes
            time.sleep(conflict_pause(attempt))
            opened = self.reopen(opened, conflicts, batch_id)
        raise ConflictError("other workers kept changing the same users", "try again")

    def reopen(self, opened: OpenUpdates, user_ids: Collection[str], batch_id: str = "") -> OpenUpdates:
        """Opens some users of updates again, which others have changed; the rest keeps what was computed."""
        again = self.open_updates([one for one in opened.updates if one.user_id in user_ids], batch_id)
        together = self.store.commits_together
        if together and batch_id and any(user.applied for user in again.users):  # others have applied this very batch
            return self.open_updates(opened.updates, batch_id)
        return opened.renewed(again)

    def open_updates(self, updates: Sequence[Update], batch_id: str = "") -> OpenUpdates:
        """Opens the users of checked updates and appends the events that are new.

        If any user knows the `batch_id`, all updates are duplicates; else every user remembers it, and each update is
        new, or a repeat by the sequence of its producer. In a store that does not commit together, the updates of the
        users that know it are: so a batch that was cut off is completed when it is sent again.
        """
        user_ids = list(dict.fromkeys(update.user_id for update in updates))
        marks = marks_of(updates, batch_id)
        users = self.open_users(user_ids, asked_of(updates, marks))
        by_id = dict(zip(user_ids, users, strict=True))
        repeated = bool(batch_id) and self.store.commits_together and any(user.applied for user in users)
        outcomes = [
            self._apply(by_id[update.user_id], update, mark, repeated=repeated)
            for update, mark in zip(updates, marks, strict=True)
        ]
        return OpenUpdates(updates, users, outcomes)

    def _apply(self, user: OpenUser, update: Update, mark: Mark, *, repeated: bool) -> UpdateOutcome:
        """Appends the events of an update to its user, or of a repeat none. `repeated`: the batch is one."""
        bundle, item_ids = user.projection.bundle, update.item_ids
        times = np.array(update.timestamps or [0] * len(item_ids), np.int64)
        duplicate, dropped = repeated or user.has_applied(mark), 0
        if self._late_events == "drop" and not duplicate:
            late = late_ones(user, times, self.store)
            dropped, times = int(late.sum()), times[~late]
            item_ids = [item_id for item_id, one in zip(item_ids, late, strict=True) if not one]
        indices, unknown = bundle.items.indices(item_ids)
        if duplicate:
            return UpdateOutcome(bundle, user.event_count, user.history_count, 0, unknown, duplicate=True)
        if update.item_ids:
            user.remember(mark)
        placed = Placed()
        if item_ids:
            numbers = self.store.add_items(item_ids) if unknown else user.projection.numbers(indices)
            if self._late_events == "place":
                placed = place(user, (numbers, times), self.store)
            else:
                user.append(numbers, times)
        if update.shown:
            user.show(self.store.add_items(update.shown), update.shown_seconds)
        return UpdateOutcome(
            bundle,
            user.event_count,
            user.history_count,
            len(indices) - placed.deferred,
            unknown,
            False,
            LateOutcome(dropped, *placed) if dropped or placed.late else NOT_LATE,
        )

    # -- recommendations -------------------------------------------------------------------------------------------

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """The best items for each query, from one matrix product.

        No graph runs but for what-if events, and where a record has to catch up. Raises RequestError and the errors of
        the store.
        """
        opened = self.open_queries(queries)
        if updates := catch_up_updates(opened):
            with suppress(StoreFullError, ConflictError):  # the answer does not depend on it
                self.update(updates)
            opened = self.open_queries(queries, catch_up=False)
        self.advance([one.user for one in opened if one.user is not None])
        return self.answer(opened)

    def plain_answer(self, query: Query) -> Answer | None:
        """The answer to the most frequent query, a user and k with a current record, by the shortest way; or None.

        This decides the latency of a server.
        """
        special = query.what_if or query.exclude or query.candidates is not None or query.diversity
        if query.user_id is None or special:
            return None
        (projection,) = self._projections((query.user_id,))
        return plain_answer(query, self.store, projection)

    def open_queries(self, queries: Sequence[Query], *, catch_up: bool = True) -> list[OpenQuery]:
        """Reads what queries need. Those that have a `user` need it advanced before `answer`.

        Where a record lags: with `catch_up`, the query says so, and waits for an update that stores the record; else
        its user is to be advanced by what is missing, for this answer only.
        """
        for query in queries:
            check_query(query)
        projections = self._projections([one.user_id for one in queries])
        with self.store.snapshot() as snapshot:  # a user's state and seen items are of one moment
            if self.store.waits:
                snapshot.expect(
                    {
                        query.user_id: Expected(projection.number, ranking=True)
                        for query, projection in zip(queries, projections, strict=True)
                        if query.user_id is not None
                    }
                )
            return [
                open_query(query, projection, snapshot, catch_up=catch_up)
                for query, projection in zip(queries, projections, strict=True)
            ]

    def answer(self, opened: Sequence[OpenQuery]) -> list[Answer]:
        """Ranks for opened queries whose users have been advanced."""
        return rank(opened)

    # -- users -----------------------------------------------------------------------------------------------------

    def user(self, user_id: str, *, recent_events: int = 0) -> UserInfo | None:
        """What is stored about a user, or None. Raises RequestError, StoreError."""
        check_user_id(user_id)
        if not 0 <= recent_events <= MAX_EVENTS:
            raise RequestError(f"recent_events is {recent_events}", f"choose 0 to {MAX_EVENTS}")
        (projection,) = self._projections([user_id])
        with self.store.snapshot() as snapshot:
            (stored,) = snapshot.get_many([user_id], projection.number)
            if stored is None:
                return None
            user = OpenUser.of(snapshot, user_id, projection, stored)
            shape, count = projection.bundle.manifest.state, stored.head.history_count
            items, timestamps = snapshot.history(user_id, max(0, count - recent_events), count)
            recent_item_ids = snapshot.item_ids(items)
        return UserInfo(
            projection.bundle,
            event_count=user.event_count,
            history_count=count,
            segment_fill=segment_fill(user.event_count, shape),
            absorbed_segments=absorbed_segments(user.event_count, shape),
            state_bytes=len(stored.record or b""),
            recent_item_ids=recent_item_ids,
            recent_timestamps=timestamps.tolist(),
            deferred_events=user.state.lacking,
        )

    def delete(self, user_id: str) -> int | None:
        """Forgets a user: the number of events deleted, or None for an unknown user. Durable when it returns."""
        check_user_id(user_id)
        return self.store.delete(user_id)


def _note_stored(users: Sequence[OpenUser], stored: Collection[str | None]) -> None:
    for user in users:
        user.stored = user.stored or user.user_id in stored


def conflict_pause(attempts: int) -> float:
    """Seconds to wait after so many conflicting commits: mostly longer each time, and never as long as others wait."""
    return random.uniform(0, min(_LONGEST_PAUSE, 0.002 * 2.0**attempts))
