"""What was read for a request and is on its way: open users, updates and queries. Plain values; `engine` fills them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Self, TypeVar

import numpy as np

from dman_runtime.model.attributes import Field
from dman_runtime.model.bundle import Items
from dman_runtime.model.events import NO_EVENTS, KnownEvents
from dman_runtime.model.generation import Answering
from dman_runtime.model.recurrence import Piece, next_piece
from dman_runtime.model.state import State
from dman_runtime.projection import Projection
from dman_runtime.repeats import Asked, Mark
from dman_runtime.requests import Query, Update, UpdateOutcome
from dman_runtime.retrieval.base import Allowed
from dman_runtime.store.base import Events, Expected, Head, Snapshot, Step, StoredUser, Write

NEW_USER = Head(version=0, history_count=0, generation=0)


@dataclass(slots=True, eq=False)
class OpenUser:
    """A user between reading and committing."""

    user_id: str | None  # None: an anonymous user, who is never committed
    head: Head
    projection: Projection  # that serves the user
    state: State
    left: KnownEvents  # what the state has yet to be advanced by
    record_lags: bool  # the stored record does not cover the stored history
    items: list[np.ndarray] = field(default_factory=list)  # item numbers of new events, oldest first
    timestamps: list[np.ndarray] = field(default_factory=list)
    request_ids: list[int] = field(default_factory=list)  # of the new events, to be remembered
    shown: list[Events] = field(default_factory=list)  # item numbers, and for how many seconds each counts
    applied: Set[int] = frozenset()  # request ids that were asked for, and have been applied before
    sequences: dict[int, int] = field(default_factory=dict)  # last ones, as stored, of producers asked for
    advanced: dict[int, int] = field(default_factory=dict)  # last ones of the new events, to be remembered
    replace_from: int | None = None  # `items` and `timestamps` are in place of the stored events from there on
    stored: bool = False  # in a store that commits each user by itself: this one is done, though another is not
    prepared: Write | None = None  # what a commit changes, once all that was left is in the state

    @classmethod
    def of(cls, snapshot: Snapshot, user_id: str, projection: Projection, stored: StoredUser | None) -> Self:
        """A user as stored in the snapshot, or a new one."""
        head, record = stored or (NEW_USER, None)
        return cls(user_id, head, projection, *projection.read(snapshot, user_id, head, record))

    @classmethod
    def anonymous(cls, projection: Projection) -> Self:
        return cls(None, NEW_USER, projection, projection.empty(), NO_EVENTS, record_lags=False)

    @property
    def history_count(self) -> int:
        """Events stored, once this user is committed."""
        return self.kept + sum(map(len, self.items))

    @property
    def kept(self) -> int:
        """Stored events that stay: those before `items`."""
        return self.head.history_count if self.replace_from is None else self.replace_from

    @property
    def new_events(self) -> Events:
        return _joined(self.items, np.uint32), _joined(self.timestamps, np.int64)

    @property
    def event_count(self) -> int:
        """Events that the model has seen, once this user is advanced."""
        return self.state.event_count + len(self.left)

    @property
    def changed(self) -> bool:
        """Whether there is anything to commit."""
        changes = self.items or self.shown or self.record_lags or self.request_ids or self.advanced
        return bool(changes) and not self.stored

    def has_applied(self, mark: Mark) -> bool:
        """Whether an update is a repeat, of one before or of one that is on its way."""
        if mark.request is not None and (
            mark.request in self.applied or (mark.request in self.request_ids and not mark.of_batch)
        ):
            return True
        if mark.producer is None:
            return False
        last = self.advanced.get(mark.producer, self.sequences.get(mark.producer))
        return last is not None and mark.sequence <= last

    def remember(self, mark: Mark) -> None:
        """Has the commit remember that an update was applied."""
        if mark.request is not None and mark.request not in self.request_ids:
            self.request_ids.append(mark.request)
        if mark.producer is not None:
            self.advanced[mark.producer] = mark.sequence

    def append(self, numbers: np.ndarray, timestamps: np.ndarray) -> int:
        """Appends events (N) to what will be stored; returns how many of them the model knows."""
        known = self.projection.known_events((numbers, timestamps))
        self.prepared = None
        self.items.append(numbers)
        self.timestamps.append(timestamps)
        self.left += known
        return len(known)

    def show(self, numbers: np.ndarray, seconds: int) -> None:
        """Has items (N) count as shown to the user, for so long from the commit on."""
        self.shown.append((numbers, np.full(len(numbers), seconds, np.int64)))
        self.prepared = None

    def put_from(self, start: int, events: Events) -> None:
        """Puts events (N) in place of those of the history from a position on, the new ones included."""
        if start >= self.kept:
            items, timestamps = self.new_events
            events = (
                _joined([items[: start - self.kept], events[0]], np.uint32),
                _joined([timestamps[: start - self.kept], events[1]], np.int64),
            )
        else:
            self.replace_from = start
        (numbers, moments), self.prepared = events, None
        self.items, self.timestamps = [numbers], [moments]

    def renew(self, history: Events) -> None:
        """Has the record made anew from a whole history (N)."""
        self.state, self.left = self.projection.empty(), self.projection.known_events(history)
        self.record_lags, self.prepared = True, None

    def rebuild(self, history: Events) -> None:
        """Puts a whole history (N) in place of the stored one: all of it is left to be advanced by."""
        self.put_from(0, history)
        self.replace_from = 0
        self.renew(history)

    def take(self, record: bytes) -> None:
        """Takes over what `left` makes of the state, as `write` would pack it. Raises StateError."""
        self.state, self.left = self.projection.generation.unpack(record), NO_EVENTS
        self.prepared = self._write(record)

    def write(self) -> Write:
        """What a commit of this user, advanced by all that was left, changes.

        Made once: where a batch is committed again, as somebody else has changed one of its users, the others must not
        take time in which that happens again.
        """
        if self.prepared is None:
            assert not len(self.left)
            self.state.history_count = self.history_count
            self.prepared = self._write(None)
        return self.prepared

    def _write(self, record: bytes | None) -> Write:
        """`record`: of the state, if it is packed already."""
        assert self.user_id is not None
        records: dict[int, bytes] = {}
        if self.items or self.record_lags:
            records[self.projection.number] = record or self.projection.generation.pack(self.state)
        items, timestamps = self.new_events
        shown, seconds = [one[0] for one in self.shown], [one[1] for one in self.shown]
        return Write(
            self.user_id,
            self.head.version,
            records,
            items,
            timestamps,
            self.request_ids,
            replace_from=self.replace_from,
            sequences=self._steps(),
            shown=(_joined(shown, np.uint32), _joined(seconds, np.int64)),
        )

    def _steps(self) -> dict[int, Step]:
        return {producer: Step(self.sequences.get(producer), last) for producer, last in self.advanced.items()}

    @property
    def piece_events(self) -> int:
        """How many events the next piece has."""
        return len(next_piece(self.state, self.left).events)

    def take_piece(self) -> Piece:
        """Removes the next piece from what is left."""
        piece = next_piece(self.state, self.left)
        self.left = self.left[len(piece.events) :]
        return piece


@dataclass(slots=True, eq=False)
class OpenUpdates:
    """Updates that are committed together: all of them, or none."""

    updates: Sequence[Update]
    users: list[OpenUser]
    outcomes: list[UpdateOutcome]

    def renewed(self, again: OpenUpdates) -> OpenUpdates:
        """The same, where some users, with all of their updates, were opened again."""
        users, outcomes = {user.user_id: user for user in again.users}, iter(again.outcomes)
        return OpenUpdates(
            self.updates,
            [users.get(user.user_id, user) for user in self.users],
            [
                next(outcomes) if update.user_id in users else outcome
                for update, outcome in zip(self.updates, self.outcomes, strict=True)
            ],
        )


@dataclass(slots=True, eq=False)
class OpenQuery:
    """A query with what was read for it."""

    query: Query
    projection: Projection  # that answers
    seen: np.ndarray  # item indices of the history, in no order
    event_count: int
    record: Answering | None  # of a user who need not be advanced
    user: OpenUser | None  # to be advanced: by what-if events, or because the record lags
    what_if: KnownEvents
    unknown: list[str]
    allowed: Allowed | None = None  # the items that the query may get; None: all
    fields: Sequence[Field] = ()  # one for each of its rules
    lags: bool = False  # the user's record does not cover the history: catch up first, then open the query again

    @property
    def quick(self) -> bool:
        """Whether the search is so short that others may wait for it, as in `Retriever`."""
        listed = self.query.candidates is not None
        return listed or self.projection.generation.retriever.quick(self.allowed)


def read_users(snapshot: Snapshot, user_ids: Sequence[str], projections: Sequence[Projection]) -> list[OpenUser]:
    """Users as stored, or new ones, each for its projection: one reading for all users of a generation."""
    stored: dict[Projection, Iterator[StoredUser | None]] = {}
    for projection in dict.fromkeys(projections):
        own = [user_id for user_id, one in zip(user_ids, projections, strict=True) if one is projection]
        stored[projection] = iter(snapshot.get_many(own, projection.number))
    return [
        OpenUser.of(snapshot, user_id, projection, next(stored[projection]))
        for user_id, projection in zip(user_ids, projections, strict=True)
    ]


def expected_of(
    user_ids: Sequence[str], projections: Sequence[Projection], asked: Mapping[str, Asked]
) -> dict[str, Expected]:
    """What will be read of users before they are updated."""
    return {
        user_id: Expected(
            projection.number,
            whole=True,
            request_ids=tuple(asked[user_id].request_ids) if user_id in asked else (),
            producers=tuple(asked[user_id].producers) if user_id in asked else (),
        )
        for user_id, projection in zip(user_ids, projections, strict=True)
    }


Opened = TypeVar("Opened", OpenUser, OpenQuery)


def by_projection(opened: Sequence[Opened]) -> Iterable[tuple[Projection, Sequence[Opened]]]:
    """What was opened, by the generation that serves it. There is mostly one."""
    if all(one.projection is opened[0].projection for one in opened):
        return [(opened[0].projection, opened)] if opened else []
    groups: dict[Projection, list[Opened]] = {}
    for one in opened:
        groups.setdefault(one.projection, []).append(one)
    return groups.items()


def what_if_events(query: Query, items: Items) -> tuple[KnownEvents, list[str]]:
    """The what-if events of a query that the bundle knows, and the ids of the others."""
    if not query.what_if:
        return NO_EVENTS, []
    indices, unknown = items.indices(query.what_if)
    times, missing = query.what_if_times or [0] * len(query.what_if), set(unknown)
    known = [time for item, time in zip(query.what_if, times, strict=True) if item not in missing]
    return KnownEvents(indices, np.array(known, np.int64)), unknown


def catch_up_updates(opened: Sequence[OpenQuery]) -> list[Update]:
    """Empty updates, which bring the records that lag up to their histories."""
    user_ids = dict.fromkeys(one.query.user_id for one in opened if one.lags and one.query.user_id)
    return [Update(user_id, ()) for user_id in user_ids]


def _joined(parts: list[np.ndarray], kind: type) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, kind)
