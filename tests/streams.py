"""Clients that never stop, and the check that a store holds exactly what they were told it holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from conftest import TINY_ITEMS

from dman_runtime.engine import Engine
from dman_runtime.model.generation import Generation
from dman_runtime.store.lmdb import LmdbStore
from sdk import CallError, Client, UpdateResult

TOLERANCE = 1e-4  # of exact_bundle, whose states are float32; see test_engine.py
StoredEvents = dict[str, list[tuple[str, int]]]  # (item id, time) by user, oldest first


def error_of(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected value."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def assert_states_are_replays(generation: Generation, state: Path) -> StoredEvents:
    """The store is whole: every record is what the stored history replays to. Returns the events by user."""
    events: StoredEvents = {}
    with LmdbStore.open(state, readonly=True) as store:
        engine = Engine(generation, store)
        for user_id in store.scan():
            (stored,) = store.get_many([user_id], engine.projection.number)
            assert stored is not None and stored.record is not None
            numbers, times = store.history(user_id)
            assert stored.head.history_count == len(numbers)
            found, known = generation.unpack(stored.record), engine.projection.known_events((numbers, times))
            assert (found.history_count, found.event_count) == (len(numbers), len(known))
            (expected,) = generation.replay([known])
            used = expected.context_length
            assert found.recent[:used].tolist() == known.items[len(known) - used :].tolist()
            assert error_of(found.hidden[:, :used], expected.hidden[:, :used]) < TOLERANCE
            assert error_of(found.memory, expected.memory) < TOLERANCE
            assert error_of(found.user_embedding, expected.user_embedding) < TOLERANCE
            events[user_id] = list(zip(store.item_ids(numbers), times.tolist(), strict=True))
    return events


def item_of(number: int) -> str:
    """The item id of event `number` of every stream; 7 and 60 have no common factor."""
    return str(1 + 7 * number % TINY_ITEMS)


@dataclass
class Stream:
    """A client that never stops: it feeds one user after the other with updates of 1 to 3 events, numbered by their
    timestamps, so that an event that is lost, doubled or out of order shows."""

    name: str
    acknowledged: dict[str, int] = field(default_factory=dict)  # events by user
    unanswered: tuple[str, int] | None = None  # user and size of an update that was sent and not answered
    repeats_found: int = 0  # unanswered updates that had been applied
    failures: list[str] = field(default_factory=list)

    @property
    def events(self) -> int:
        return sum(self.acknowledged.values())

    def run(self, address: str) -> None:
        """Sends until the server is gone."""
        with Client(address, retries=0, timeout=10) as client:
            try:
                if self.unanswered:
                    self._resume(client, *self.unanswered)
                while not self.failures:
                    # The memory of a random model is chaotic: rounding grows tenfold in some 60 events. So users stay
                    # short, for the comparison of states.
                    user = f"{self.name}, {self.events // 60}"
                    self._send(client, user, 1 + self.events % 3)
            except CallError:
                pass
            except Exception as error:
                self.failures.append(repr(error))

    def _resume(self, client: Client, user: str, size: int) -> None:
        """After a crash: the unanswered update is there whole or not at all, and a repeat does not apply it twice."""
        before = self.acknowledged.get(user, 0)
        found = client.recommend(user).event_count
        duplicate = self._send(client, user, size).duplicate
        self.repeats_found += duplicate
        if (found, duplicate) not in ((before, False), (before + size, True)):
            self.failures.append(f"after {before} events and {size} unanswered: {found}, {duplicate=}")

    def _send(self, client: Client, user: str, size: int) -> UpdateResult:
        first, self.unanswered = self.acknowledged.get(user, 0), (user, size)
        result = client.update(
            user,
            [item_of(n) for n in range(first, first + size)],
            timestamps=range(first, first + size),
            request_id=f"{user} from {first}",
        )
        self.acknowledged[user], self.unanswered = first + size, None
        if result.event_count != first + size:
            self.failures.append(f"{first + size} acknowledged, the server has {result.event_count}")
        return result

    def check(self, stored: StoredEvents) -> None:
        """Acknowledged events are stored once, in order; an unanswered update whole or not at all."""
        possible = {user: {count} for user, count in self.acknowledged.items()}
        if self.unanswered:
            user, size = self.unanswered
            possible.setdefault(user, {0}).add(self.acknowledged.get(user, 0) + size)
        for user, counts in possible.items():
            events = stored.pop(user, [])
            assert events == [(item_of(n), n) for n in range(len(events))]
            assert len(events) in counts


def run_streams(streams: list[Stream], address: str, stop: Callable[[], None]) -> None:
    """All streams at once, until `stop` has made the server go."""
    threads = [threading.Thread(target=stream.run, args=(address,)) for stream in streams]
    for thread in threads:
        thread.start()
    try:
        stop()
    finally:
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert [failure for stream in streams for failure in stream.failures] == []
