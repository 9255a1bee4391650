"""The step of the one path that takes long, advancing users, in other processes: histories in, records out.

Users are read, merged and committed by the engine of this process. What the others do depends on nothing but a bundle,
the items added to it, and what they are given, so any of them may do it, and do it again.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from dman_runtime.engine import Engine
from dman_runtime.jobs.spreading import Here, Spread
from dman_runtime.model.events import KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.model.recurrence import without_rest
from dman_runtime.model.state import State
from dman_runtime.opened import OpenUser
from dman_runtime.projection import Projection


class Throttle:
    """Keeps this process to a share of one core, by resting after each piece of work."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._used, self._since = time.process_time(), time.monotonic()

    def rest(self) -> None:
        """Sleeps for as long as the work since the last rest asks for."""
        pause = (time.process_time() - self._used) / self.share - (time.monotonic() - self._since)
        if pause > 0:
            time.sleep(pause)
        self._used, self._since = time.process_time(), time.monotonic()


class Opened(Protocol):
    """A batch of users who were opened."""

    @property
    def users(self) -> Sequence[OpenUser]: ...


Batch = TypeVar("Batch", bound=Opened)


class Unencoded(NamedTuple):
    """A user on the way to a record."""

    state: State | None  # None: that of an empty history
    events: KnownEvents  # by which it is to be advanced
    history_count: int  # events that the record will cover

    @classmethod
    def of(cls, user: OpenUser) -> Unencoded:
        empty = not (user.state.event_count or user.state.lacking)
        return cls(None if empty else user.state, user.left, user.history_count)


def encode(generation: Generation, rest: Callable[[], None], users: Sequence[Unencoded]) -> list[bytes]:
    """The records of users. Depends on the arguments only, to the bit."""
    states = [generation.unpack(None) if user.state is None else user.state for user in users]
    generation.advance(states, [user.events for user in users], rest)
    for state, user in zip(states, users, strict=True):
        state.history_count = user.history_count
    records = [generation.pack(state) for state in states]
    rest()
    return records


@dataclass(frozen=True)
class Encoding:
    """What is done with each batch: a `spreading.Work`, which opens the bundle in each process."""

    bundle: Path
    bundle_id: str
    threads: int
    max_share: float | None  # of one core; None: as much as it gets
    added_hash: str
    added: np.ndarray = field(compare=False, repr=False)  # (n, D) embeddings of items that were added to the bundle

    @classmethod
    def of(cls, projection: Projection, *, threads: int, max_share: float | None) -> Encoding:
        bundle = projection.bundle
        added = bundle.item_embeddings[len(bundle.item_embeddings) - bundle.added :]
        path = bundle.path.resolve()  # processes of a cluster have directories of their own
        return cls(path, bundle.bundle_id, threads, max_share, hashlib.sha256(added.tobytes()).hexdigest(), added)

    def open(self) -> Callable[[Sequence[Unencoded]], list[bytes]]:
        """Raises BundleError, EncoderError."""
        generation = Generation.open(
            self.bundle, provider="cpu", threads=self.threads, expected_bundle_id=self.bundle_id
        )
        rest = Throttle(self.max_share).rest if self.max_share else without_rest
        return partial(encode, generation.encoding(self.added) if len(self.added) else generation, rest)


def advanced(
    engine: Engine,
    batches: Iterable[Batch],
    spread: Spread,
    *,
    threads: int = 1,
    throttle: Throttle | None = None,
) -> Generator[Batch, None, None]:
    """The same batches, in order, once the users of each are advanced by all that was left.

    In this process, or in others, each with so many `threads` in a graph run and the share of `throttle`; some batches
    are opened ahead then. The records are the same to the bit. Close it where it is not read to its end. Raises the
    errors of `Spread.results`, and StateError.
    """
    rest = throttle.rest if throttle else without_rest
    if isinstance(spread, Here):
        for batch in batches:
            engine.advance(batch.users, rest)
            yield batch
        return
    projection, under_way = engine.current, deque[Batch]()

    def unencoded() -> Iterator[list[Unencoded]]:
        for batch in batches:
            under_way.append(batch)
            here = any(user.projection.bundle.added > projection.bundle.added for user in batch.users)
            yield [] if here else [Unencoded.of(user) for user in batch.users]

    work = Encoding.of(projection, threads=threads, max_share=throttle.share if throttle else None)
    with closing(spread.results(work, unencoded())) as results:
        for records in results:
            batch = under_way.popleft()
            if records:
                for user, record in zip(batch.users, records, strict=True):
                    user.take(record)
            else:  # items were added since the processes began, or there is nothing to do
                engine.advance(batch.users, rest)
            yield batch
