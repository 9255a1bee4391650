"""The types of arguments and results."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeAlias, overload

from sdk._times import Time

Id: TypeAlias = str | SupportsIndex
"""A user or an item: text, or an integer of any kind (NumPy's too). Integers are sent as decimal text."""

Source: TypeAlias = Literal["personalized", "popular", "unknown"]
"""How items were chosen. "unknown": the server is newer than this SDK and names a source that the SDK does not know."""


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One interaction. `timestamp` is its time; 0 means unknown.

    In results it is in whole seconds since 1970. You may give any `Time`: a number, or a `datetime` with a time zone.
    The call that sends the event has a `unit` for numbers.
    """

    item_id: int | str
    timestamp: int = 0

    if TYPE_CHECKING:  # more can be given than results hold

        def __init__(self, item_id: int | str, timestamp: Time = 0) -> None: ...


Items: TypeAlias = Id | Event | Iterable[Id | Event]
"""One item or several, oldest first, each an id or an `Event`."""

Ids: TypeAlias = Id | Iterable[Id]
"""One id or several."""


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did.

    `event_count` counts the events of the user that the model has seen, this update included. `history_count` counts
    all stored events of the user: those of items that the bundle does not know (`unknown_item_ids`) are stored too,
    so that a later bundle can use them. `unknown_count` counts those events; where they are many, `unknown_item_ids`
    names only the first ones. `applied` is what this update added to `event_count`. `duplicate` is True when the
    server already had an update with this request id, or had this sequence or a later one of its producer; then
    nothing was added.

    A server may treat late events, of before the end of the history, by a rule of its own: `dropped_late` events were
    not stored, and `placed_late` events were put into their places by time. `deferred_late` of those are seen by the
    model when the user's state is made anew.
    """

    event_count: int
    history_count: int
    applied: int
    unknown_item_ids: tuple[str, ...]
    unknown_count: int
    duplicate: bool
    bundle_id: str
    dropped_late: int = 0
    placed_late: int = 0
    deferred_late: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendation:
    """One item. A larger score is better, within one reply only. `title` is empty when the bundle has none."""

    item_id: int | str
    score: float
    title: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendations(Sequence[Recommendation]):
    """The best items for one user, best first. An immutable sequence that also says how it was made.

    `event_count` is the number of events that the scores reflect, `what_if` included. `unknown_item_ids` are the ids
    of the request that the bundle does not know; they were ignored. `unknown_count` counts them; where they are many,
    `unknown_item_ids` has only the first ones. A slice keeps these attributes.
    """

    items: tuple[Recommendation, ...]
    source: Source
    event_count: int
    unknown_item_ids: tuple[str, ...]
    unknown_count: int
    bundle_id: str

    @property
    def is_popular(self) -> bool:
        """True when the user has no events: these are the most popular items."""
        return self.source == "popular"

    @property
    def item_ids(self) -> tuple[int | str, ...]:
        """Only the ids, best first."""
        return tuple(item.item_id for item in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Recommendation]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Recommendation: ...
    @overload
    def __getitem__(self, index: slice) -> "Recommendations": ...
    def __getitem__(self, index: int | slice) -> "Recommendation | Recommendations":
        if isinstance(index, slice):
            return dataclasses.replace(self, items=self.items[index])
        return self.items[index]


@dataclasses.dataclass(frozen=True, slots=True)
class User:
    """What is stored about a user. `recent_events` are oldest first.

    `event_count` counts the events that the model has seen, `history_count` all stored events, also those of items
    that the bundle does not know. `segment_fill` events are in the open segment, and `absorbed_segments` segments
    are in the memory. `state_bytes` is the size of the state record without the history. `deferred_events` came late
    and are seen by the model when the user's state is made anew.
    """

    user_id: str
    event_count: int
    history_count: int
    segment_fill: int
    absorbed_segments: int
    state_bytes: int
    recent_events: tuple[Event, ...]
    bundle_id: str
    deferred_events: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class DeletedUser:
    """What a deletion removed. `event_count` counts all stored events that were deleted.

    For an unknown user `existed` is False and `event_count` is 0.
    """

    existed: bool
    event_count: int
    bundle_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a server.

    `name` is one word for programs, such as "disk_full". `detail` says what is wrong and what to do, for people.
    `seconds` have passed since it was found. While a `blocking` problem lasts, the server does not serve.
    """

    name: str
    detail: str
    seconds: float
    blocking: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """How a server is. `ready` is what its health checks say: it takes work.

    `workers` processes were asked for, `workers_ready` of them serve, and `restarts` counts those that were started
    again. The worker that answered has run for `uptime_seconds` and holds `requests` with `bytes_in_flight` bytes of
    messages and replies. `version` is that of the server's distribution.
    """

    ready: bool
    problems: tuple[Problem, ...]
    bundle_id: str
    workers: int
    workers_ready: int
    restarts: int
    uptime_seconds: float
    requests: int
    bytes_in_flight: int
    version: str
