"""What records must be after a job, and a store that something happens to in the middle of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from conftest import assert_close

from dman_runtime.engine import Engine
from dman_runtime.store.base import StateStore, Write

EXACT = 1e-4  # relative, in root mean square


def check_records(engine: Engine) -> None:
    """Every record of the engine's bundle covers its history, and is what a replay of the known events gives."""
    for user_id in engine.store.scan():
        (stored,) = engine.store.get_many([user_id], engine.projection.number)
        assert stored is not None and stored.record is not None
        state = engine.projection.generation.unpack(stored.record)
        assert state.history_count == stored.head.history_count
        history = engine.projection.known_events(engine.store.history(user_id))
        (expected,) = engine.projection.generation.replay([history])
        assert state.event_count == len(history)
        assert_close(state.memory, expected.memory, EXACT)
        assert_close(state.user_embedding, expected.user_embedding, EXACT)


class HookedStore:
    """The real store; `before` sees the number of each commit before it happens."""

    def __init__(self, store: StateStore, before: Callable[[int], object]) -> None:
        self._store, self._before, self.commits = store, before, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, writes: Sequence[Write]) -> list[str]:
        self.commits += 1
        self._before(self.commits)
        return self._store.commit(writes)
