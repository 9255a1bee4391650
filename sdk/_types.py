"""What goes into a client and what comes out of it."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, SupportsIndex, TypeAlias, overload

Id: TypeAlias = str | SupportsIndex
"""A user or an item: text, or an integer of any kind (NumPy's too), which travels as decimal text."""

Source: TypeAlias = Literal["personalized", "popular", "unknown"]
"""How items were chosen. "unknown": the server is newer than this SDK and names a source it does not know."""


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One interaction. `timestamp` is in whole seconds since the epoch; 0 means unknown."""

    item_id: int | str
    timestamp: int = 0


Items: TypeAlias = Id | Event | Iterable[Id | Event]
"""One item or several, oldest first, each an id or an `Event`."""

Ids: TypeAlias = Id | Iterable[Id]
"""One id or several."""


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did.

    `event_count` is the user's total after it and `applied` the events it added. `duplicate` is True when the
    server had applied this request id before; nothing was added then. Unknown items were dropped.
    """

    event_count: int
    applied: int
    unknown_item_ids: tuple[str, ...]
    duplicate: bool
    bundle_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendation:
    """One item. A larger score is better, within one reply only; `title` is empty when the bundle has none."""

    item_id: int | str
    score: float
    title: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendations(Sequence[Recommendation]):
    """The best items for one user, best first: an immutable sequence that says where it came from.

    `event_count` is the number of events the scores reflect, `what_if` included. `unknown_item_ids` are those of
    the request that the bundle does not know; they were ignored. A slice keeps these attributes.
    """

    items: tuple[Recommendation, ...]
    source: Source
    event_count: int
    unknown_item_ids: tuple[str, ...]
    bundle_id: str

    @property
    def is_popular(self) -> bool:
        """True when the user has no events and these are simply the most popular items."""
        return self.source == "popular"

    @property
    def item_ids(self) -> tuple[int | str, ...]:
        """The ids alone, best first."""
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

    `segment_fill` events are in the segment still open and `absorbed_segments` segments are in the memory;
    `state_bytes` is the size of the state record without the history.
    """

    user_id: str
    event_count: int
    segment_fill: int
    absorbed_segments: int
    state_bytes: int
    recent_events: tuple[Event, ...]
    bundle_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class DeletedUser:
    """What a deletion removed. `existed` is False, and `event_count` 0, when the user was not known."""

    existed: bool
    event_count: int
    bundle_id: str
