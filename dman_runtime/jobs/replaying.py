"""Whether the records of a store are what its histories give under their bundle."""

from __future__ import annotations

import heapq
import random

import numpy as np

from dman_runtime.engine import Engine
from dman_runtime.errors import StateError, UsageError
from dman_runtime.model.generation import Generation
from dman_runtime.model.state import State
from dman_runtime.store.base import Events, StateStore
from dman_runtime.store.lmdb_verify import Problems

# What a user embedding may differ from that of a replay, relative to the largest value. Rounding of what is stored
# travels along the memory, so it shows how a history was split into updates.
EXACT_TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 5e-2


def verify_records(store: StateStore, generation: Generation, problems: Problems, *, sample: int) -> dict[str, int]:
    """Reads every record of a generation as a server does, and compares those of `sample` users, drawn by chance, with
    replays of their histories, unless they lack late events. Returns how many records were read, and how many of them
    replayed.

    Raises UsageError for a bundle that the store was never served with, StoreError.
    """
    known = store.generations()
    if generation.bundle_id not in known:
        raise UsageError(
            f"the store was never served with bundle {generation.bundle_id}",
            f"name one of these: {', '.join(known) or 'none yet'}",
            parameter="bundle",
        )
    engine = Engine(generation, store, reads_only=True)
    chosen = set(heapq.nsmallest(sample, store.scan(), key=lambda _: random.random()))
    counts = {"records_read": 0, "records_replayed": 0}
    for user_id in store.scan():
        try:
            if (found := _read_record(engine, user_id)) is None:
                continue
            counts["records_read"] += 1
            if user_id in chosen and not found[0].lacking:  # which is what late events that await a rebuild make
                counts["records_replayed"] += 1
                _compare(engine, *found)
        except StateError as error:
            problems.add(f"user {user_id!r}: {error.cause}")
    return counts


def _read_record(engine: Engine, user_id: str) -> tuple[State, Events] | None:
    """The state in a record and the events that it covers, of one moment; None where there is no record.

    Raises StateError.
    """
    with engine.store.snapshot() as snapshot:
        (stored,) = snapshot.get_many([user_id], engine.projection.number)
        if stored is None or stored.record is None:
            return None
        state = engine.projection.generation.unpack(stored.record)
        if state.history_count > stored.head.history_count:
            raise StateError("a state record covers more than the history")
        return state, snapshot.history(user_id, 0, state.history_count)


def _compare(engine: Engine, state: State, events: Events) -> None:
    """StateError where a state is not what a replay gives."""
    (expected,) = engine.projection.generation.replay([engine.projection.known_events(events)])
    if state.event_count != expected.event_count:
        raise StateError(f"the record has seen {state.event_count} events, a replay {expected.event_count}")
    difference = float(np.abs(state.user_embedding - expected.user_embedding).max())
    exact = state.shape.dtype == "float32" and state.shape.closed == "full"
    tolerance = EXACT_TOLERANCE if exact else ROUNDED_TOLERANCE
    if not difference <= tolerance * float(np.abs(expected.user_embedding).max()):
        raise StateError(f"the user embedding differs by {difference:.1e} from that of a replay")
