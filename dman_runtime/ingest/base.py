"""What ingestion needs of a source of events, whatever is behind it: a topic, or a file that grows.

A source has *partitions*, each an order of its own. A message has a place in its partition, its `sequence`, and is
known by that and by the `producer` of the partition for ever. So the store recognises a message that is read again, and
positions may be committed after the state, and be lost: nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol


class Message(NamedTuple):
    """What was read, unchecked."""

    producer: str  # name of the order that the sequence is in, at most 128 bytes
    partition: int
    sequence: int
    after: int  # the position behind it: what is committed once all up to here is settled
    key: bytes | None
    value: bytes | None


class Rejected(NamedTuple):
    """A message that cannot be stored, and never will be."""

    message: Message
    reason: str


class Source(Protocol):
    """Used by one thread. Every method raises SourceUnavailableError where it cannot do its work for now, and another
    SourceError where somebody must help.
    """

    unit: str  # of positions and lags, in the plural
    leaving: Callable[[Collection[int]], None]  # called in `read` and `wait` before partitions go to somebody else

    def read(self, count: int, seconds: float) -> Sequence[Message]:
        """The next messages, at most `count`, of each partition in its order; waits at most `seconds` for so many."""
        ...

    def wait(self, seconds: float) -> None:
        """Lets time pass without reading, and stays alive for others: the source goes on where it was."""
        ...

    def reject(self, rejected: Sequence[Rejected]) -> None:
        """Puts messages where they can be found, durably on return, with the reasons."""
        ...

    def commit(self, positions: Mapping[int, int]) -> None:
        """Remembers, by partition, that everything before these positions is settled. What gets lost of it is only
        read again.
        """
        ...

    def place(self, message: Message) -> str:
        """Where a message stands, for people."""
        ...

    def lags(self) -> Mapping[str, int]:
        """By name of the partition: how much is not settled yet. Cheap."""
        ...

    @property
    def ended(self) -> bool:
        """Whether all was read that was to be read."""
        ...

    def close(self) -> None:
        """Gives up everything. What was not committed is read again, by whoever comes next."""
        ...
