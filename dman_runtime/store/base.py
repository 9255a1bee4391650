"""What the engine needs of a state store, whatever database is behind it.

**The history is the truth.** A store keeps every event of every user, by item number, and knows nothing of models. What
a model makes of a history is a *record*: a view that can be dropped and rebuilt. The bundles that a store serves or has
served are its *generations*; each user has at most one record of each.

| what | key | holds |
|---|---|---|
| items | external id | item number, from 0; it never goes to another item while a history or a process may hold it |
| head | user | version, number of events, the generation that wrote a record last |
| history | user | (item number, time) of every event |
| seen | user | the item numbers of the history, as a set |
| record | user, generation | bytes that the store does not read |
| shown | user | the items that the user was shown lately, and until when that counts |
| request ids | user | hashes of the ids of applied updates, for a day, also after the user is deleted |
| catalogue | item number | whether the item is switched off, and what it is if it was added; outlives every bundle |
| sequences | user, producer | the last one that was applied, for ever, also after the user is deleted |
| id types | | whether the ids of users and of items are integers or text, once a bundle has decided it |

All methods may be called from many threads. Everything written is durable when a method returns, in stores that are
durable at all. User ids and item ids follow the rule of `data.ids`; another id is a ValueError.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from secrets import randbits
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.catalogue import Addition, Catalogue, Standing
from dman_runtime.store.rollout import Rollout

REMEMBER_SECONDS = 24 * 3600  # the id of an applied update is remembered at least so long
MAX_SHOWN = 1000  # items of one user that were shown and count
Events = tuple[NDArray[np.uint32], NDArray[np.int64]]  # item numbers (N) and timestamps (N), oldest first
NO_EVENTS: Events = (np.zeros(0, np.uint32), np.zeros(0, np.int64))
NOTHING_SHOWN = NO_EVENTS


class Head(NamedTuple):
    """What outlives every model."""

    version: int  # unique in the store: changes with every commit, and never comes again, even for a re-created user
    history_count: int  # events stored
    generation: int  # that last wrote a record of this user


class Step(NamedTuple):
    """What a write does to the sequence of a producer."""

    before: int | None  # the last one applied to the user before it; None: there is none yet
    last: int  # the last one of the write: above that, 0 to 2^64 - 1


class StoredUser(NamedTuple):
    """A user at one moment."""

    head: Head
    record: bytes | None  # of the generation that was asked for; None where that has none


class StoredRecord(NamedTuple):
    """A record, as a listing of them shows it."""

    user_id: str
    generation: int
    history_count: int  # events stored of the user
    size: int  # bytes of the record
    start: bytes  # its first bytes, as many as were asked for


class Expected(NamedTuple):
    """What will be read of a user."""

    generation: int = 0  # whose record; 0: none
    whole: bool = False  # all of the record, and not only the bytes that a recommendation needs
    ranking: bool = False  # what `ranking_view` and `seen` need
    request_ids: tuple[int, ...] = ()  # that `applied` will be asked about
    producers: tuple[int, ...] = ()  # that `sequences` will be asked about


class RankingView(NamedTuple):
    """What a plain recommendation needs of a user, at one moment."""

    history_count: int
    record: bytes | None  # its first bytes, as many as were asked for
    seen: NDArray[np.uint32]  # item numbers of the whole history, and `shown` ones; in no order, some may come twice


class IdTypes(NamedTuple):
    """What the ids of a store are, where they leave it: INTEGER, TEXT, or UNKNOWN as long as no bundle has said it."""

    users: str
    items: str


UNKNOWN = ""
UNKNOWN_TYPES = IdTypes(UNKNOWN, UNKNOWN)


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """What a commit changes of one user.

    `items` (N) are item numbers of this store and `timestamps` (N) 64-bit integers: the new events, oldest first; N may
    be 0. `expected_version` is the version that the records were computed from; 0: the user must not exist yet.
    `request_ids` are 64-bit hashes of the ids of the updates that make up this write, none of which was `applied`
    before. `sequences` holds a step for each producer, by a 64-bit hash, whose updates are among them. `records` holds
    new records by generation; those of other generations stay as they are.

    `shown` (M) are item numbers, and for how many seconds from the commit on each counts as shown, the latest last. Of
    all that count, the MAX_SHOWN latest stay. A write of nothing else leaves head and version as they are, and makes no
    user.

    With `replace_from`, the events stand in place of the stored ones from that position on, which must not be more; 0
    replaces the whole history. Records of generations that `records` lacks are removed, as they are views of the old
    history. Request ids and sequences stay.

    `token` tells this write from all others. Where an answer can be lost on the way, as from servers, a store that gets
    the same write again stores it once; elsewhere that is a conflict.
    """

    user_id: str
    expected_version: int
    records: Mapping[int, bytes]
    items: NDArray[np.integer]
    timestamps: NDArray[np.integer]
    request_ids: Sequence[int] = ()
    replace_from: int | None = None
    sequences: Mapping[int, Step] = field(default_factory=dict)
    shown: Events = NOTHING_SHOWN
    token: int = field(default_factory=lambda: 1 + randbits(63))

    @property
    def only_shows(self) -> bool:
        changes = self.items, self.records, self.request_ids, self.sequences
        return len(self.shown[0]) > 0 and self.replace_from is None and not any(map(len, changes))


@dataclass(frozen=True)
class StoreStats:
    """`bytes_used` counts what is live, `file_bytes` also what was freed for reuse; both 0 where unknown.

    `producer_users` are the users, deleted ones included, of whom the sequences of producers are kept.
    """

    users: int
    items: int
    producer_users: int = 0
    bytes_used: int = 0
    file_bytes: int = 0
    map_size: int = 0


class Snapshot(Protocol):
    """One moment of a store, to be read by one thread. What it returns may be kept.

    In a store that does not commit together, one moment of each user: a reading that is too late raises ConflictError.
    """

    def expect(self, users: Mapping[str, Expected]) -> None:
        """Says what will be read of some users, so that a store over a network fetches it in one go."""

    def find_items(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """The numbers (N) of items, -1 where unknown."""
        ...

    def item_ids(self, numbers: Sequence[int] | NDArray[np.integer]) -> list[str]:
        """The external ids of item numbers. ValueError for a number that was never given."""
        ...

    def get_many(
        self, user_ids: Sequence[str], generation: int, record_bytes: int | None = None
    ) -> list[StoredUser | None]:
        """Heads, and the records of a generation, or their first `record_bytes`; None for an unknown user."""
        ...

    def ranking_view(self, user_id: str, generation: int, record_bytes: int) -> RankingView | None:
        """The first `record_bytes` of the record and the seen items; None for an unknown user."""
        ...

    def history(self, user_id: str, start: int = 0, stop: int | None = None) -> Events:
        """The events from position `start` to before `stop`, counted from the oldest; as many of them as there are.

        ValueError for negative positions.
        """
        ...

    def seen(self, user_id: str) -> NDArray[np.uint32]:
        """The distinct item numbers (N) of the history, ascending; empty for an unknown user."""
        ...

    def shown(self, user_id: str) -> Events:
        """The items that the user, known or not, was shown and that still count, distinct and the latest last; and the
        seconds since 1970 until which each counts.
        """
        ...

    def applied(self, user_id: str, request_ids: Collection[int]) -> set[int]:
        """Those of some request ids that commits of the user have carried: all of the last REMEMBER_SECONDS, and maybe
        older ones, also where the user was deleted since.

        Whoever commits new ids asks here in the snapshot that gave the version.
        """
        ...

    def sequences(self, user_id: str, producers: Collection[int]) -> dict[int, int]:
        """The last sequences of some producers that commits of the user have carried, also where the user was deleted
        since. A producer without any is not in the answer.
        """
        ...


class StateStore(Snapshot, Protocol):
    """See the module. Each reading method of `Snapshot` answers from one moment; two calls may answer from two.

    Every method raises a StoreError where the store cannot serve.
    """

    commits_together: bool  # a commit of several users is stored as a whole or not at all; else that holds for each
    waits: bool  # readings wait for a network, so they do not belong on an event loop

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """One moment for several readings. Keep it short: what it sees is not reused while it lasts."""
        ...

    # -- items and generations -------------------------------------------------------------------------------------

    def add_items(self, item_ids: Sequence[str]) -> NDArray[np.uint32]:
        """The numbers (N) of items; unknown ones are appended in the order given, and are on disk on return."""
        ...

    def add_generation(self, bundle_id: str) -> int:
        """The number of the generation of a bundle, from 1; a new one is on disk on return."""
        ...

    def generations(self) -> dict[str, int]:
        """Generation numbers by bundle id, oldest first."""
        ...

    def drop_records(self, generation: int) -> int:
        """Removes all records of a generation, and returns how many. The generation keeps its number."""
        ...

    def id_types(self) -> IdTypes:
        """What was remembered last; UNKNOWN_TYPES before that."""
        ...

    def remember_id_types(self, types: IdTypes) -> None:
        """Says what the ids are from now on; on disk on return. ValueError for what is no type."""
        ...

    def standing(self) -> Standing:
        """The roll-out, and the revision of the catalogue. Every request of a server asks: keep it fast."""
        ...

    def rollout(self) -> Rollout:
        """What was set last; NO_ROLLOUT before that."""
        ...

    def set_rollout(self, rollout: Rollout) -> bool:
        """Sets it, on disk on return, if its revision is the next one; else somebody has changed it meanwhile, and
        nothing is set. Returns whether it was. ValueError for what is none.
        """
        ...

    def catalogue(self) -> Catalogue:
        """All that was changed of the items; of revision 0 before the first change."""
        ...

    def switch_items(self, numbers: Sequence[int] | NDArray[np.integer], *, off: bool) -> int:
        """Switches items off or on, all at once and on disk on return; how many were not so already.

        If there are any, the revision of the catalogue is one more. ValueError for a number that was never given.
        """
        ...

    def append_additions(self, additions: Sequence[Addition]) -> int:
        """Adds items to the catalogue, all at once and on disk on return, in the next slots; returns how many there
        are now.

        If there are any, the revision of the catalogue is one more. ValueError for a number that was never given, for
        an item that cannot be stored (`data.added_items`), and for more than MAX_ADDED of them.
        """
        ...

    # -- users -----------------------------------------------------------------------------------------------------

    def commit(self, writes: Sequence[Write]) -> list[str]:
        """Stores all writes at once. Returns the users whose version is not the expected one: if there are any,
        nothing is stored, and the caller reads those again. A new user one of whose request ids was applied in an
        earlier life counts as such, and so does a user one of whose producers is not where its step begins.

        Where the store does not commit together, the other users are stored all the same: see also `StoreError.stored`.

        ValueError for unusable events, a step that does not go forward, a user named twice, or a history replaced by a
        shorter one; StoreFullError where there is no room; TooManyRequestIdsError where a user has more request ids
        than can be remembered (documented by the store, and never below 100,000 in 6 hours); TooManyProducersError
        where a user has more producers than that (never below 4,096). Nothing is stored of such a write then either.
        """
        ...

    def delete(self, user_id: str, *, expected_version: int | None = None) -> int | None:
        """Removes head, history, seen set, all records and what was shown; how many events, or None if unknown.

        With an `expected_version`, a user who has another one is left alone, and None is returned.

        The request ids stay until they expire, so that a retry that comes late does not bring the user back, and the
        sequences of producers stay for ever, so that a log that is read again does not.
        """
        ...

    def scan(self, partition: int = 0, partitions: int = 1) -> Iterator[str]:
        """The user ids of one of `partitions` disjoint parts that together are all users.

        Users that come or go meanwhile may be missed or named. Holds no snapshot between two ids.
        """
        ...

    def records(self, record_bytes: int) -> Iterator[StoredRecord]:
        """Every record of every generation, those of a user together, with its first bytes; as `scan` for changes."""
        ...

    # -- the store itself ------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats: ...

    def maintain(self) -> int:
        """What a server does every few seconds: frees the snapshots of dead processes, whose number it returns, and
        some of the expired request ids and of what was shown long ago."""
        ...

    def flush(self) -> None:
        """Syncs what is not on disk. Commits are, so nothing depends on it."""
        ...

    def close(self) -> None:
        """Releases everything; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...
