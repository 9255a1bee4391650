"""A request that waits or runs in a batcher, with what was opened for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dman_runtime.errors import ExpiredError
from dman_runtime.opened import OpenQuery, OpenUpdates, OpenUser
from dman_runtime.requests import Query, Update

NO_DEADLINE = float("inf")


@dataclass(slots=True, eq=False)
class Job:
    """One request of a batcher."""

    updates: Sequence[Update] = ()
    batch_id: str = ""
    queries: Sequence[Query] = ()  # instead of updates
    deadline: float = NO_DEADLINE  # of time.monotonic()
    result: Future[Any] = field(default_factory=Future)
    attempts: int = 0
    not_before: float = 0.0  # of time.monotonic()
    conflicts: set[str] = field(default_factory=set)  # users to open again, because others have changed them
    alone: bool = False  # failed together with others: runs by itself now
    caught_up: bool = False  # the records that its queries need were brought up to date, or cannot be
    afterwards: Sequence[Update] = ()  # to be stored once its queries are answered
    opened: OpenUpdates | None = None
    opened_queries: list[OpenQuery] = field(default_factory=list)
    waiting: deque[OpenUser] = field(default_factory=deque)  # users that have events left

    @property
    def user_ids(self) -> set[str]:
        """The users that this changes."""
        return {update.user_id for update in self.updates}

    @property
    def users(self) -> list[OpenUser]:
        if self.opened is not None:
            return self.opened.users
        return [one.user for one in self.opened_queries if one.user is not None]

    @property
    def events(self) -> int:
        """Events to encode, as far as it is known before the users are opened."""
        return sum(len(update.item_ids) for update in self.updates) + sum(len(query.what_if) for query in self.queries)

    def is_dead(self) -> bool:
        """Whether nobody waits for the result any more."""
        if time.monotonic() > self.deadline:
            self.fail(ExpiredError("the deadline passed before the request was done", "allow more time"))
        return self.result.done()

    def finish(self, result: Any) -> None:
        with suppress(InvalidStateError):  # cancelled
            self.result.set_result(result)

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            self.result.set_exception(error)
