"""Exactly once, while the bundle of the servers changes and changes back all the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from dman_runtime.engine import Engine
from dman_runtime.errors import StateError
from dman_runtime.model.generation import Generation
from dman_runtime.model.state import State
from dman_runtime.store.base import StoredUser
from dman_runtime.store.lmdb import LmdbStore
from tools.bench.report import Claim, Section
from tools.faults.jobs import RollOvers, finished, start_rebuild
from tools.soak.exactly_once import (
    CLIENTS,
    TOLERANCE,
    Writer,
    claims_of_writers,
    what_was_written,
    write_under_fire,
    wrong_histories,
)
from tools.soak.setting import Soak

_BATCH_USERS = 64


@dataclass
class Records:
    """The records of one bundle beside replays of the events that they cover."""

    errors: list[float] = field(default_factory=list)  # of each: the largest difference, by the largest value
    missing: int = 0  # users without a record
    lagging: int = 0  # records that do not cover all of the history


def compare_records(state: Path, bundle: Path) -> Records:
    """Replays the histories of a store, as far as its records say that they cover them. A damaged record is infinitely
    far off."""
    found = Records()
    with LmdbStore.open(state) as store:
        engine = Engine(Generation.open(bundle, provider="cpu"), store)
        users = store.scan()
        while user_ids := list(islice(users, _BATCH_USERS)):
            stored = store.get_many(user_ids, engine.projection.number)
            found.missing += sum(one is not None and one.record is None for one in stored)
            for lags, error in _differences(engine, dict(zip(user_ids, stored, strict=True))):
                found.lagging += lags
                found.errors.append(error)
    return found


def _differences(engine: Engine, stored: dict[str, StoredUser | None]) -> Iterator[tuple[bool, float]]:
    """For each record: whether it lags, and how far it is from the replay of what it covers."""
    projection, generation = engine.projection, engine.projection.generation
    records = {user_id: one for user_id, one in stored.items() if one is not None and one.record is not None}
    states = dict[str, State]()
    for user_id, one in records.items():
        try:
            states[user_id] = generation.unpack(one.record)
        except StateError:
            yield False, float("inf")
    histories = [
        projection.known_events(engine.store.history(user_id, 0, state.history_count))
        for user_id, state in states.items()
    ]
    for (user_id, state), events, expected in zip(states.items(), histories, generation.replay(histories), strict=True):
        error = float("inf")
        if state.event_count == len(events):
            pairs = [(state.memory, expected.memory), (state.user_embedding, expected.user_embedding)]
            error = max(relative_error(one, other) for one, other in pairs)
        yield state.history_count != records[user_id].head.history_count, error


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, by the largest expected value."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.abs(found - expected).max(initial=0) / max(float(np.abs(expected).max(initial=0)), 1e-12))


def while_bundles_change(soak: Soak, workers: int) -> Section:
    """Acknowledged updates under lost replies and kills, during rebuilds, activations and roll-backs."""
    old, new = soak.exact_bundle(), soak.other_bundle()
    writers = [Writer(number, soak.items()) for number in range(CLIENTS)]
    with soak.server(f"roll-overs-{workers}", f"--workers {workers}", bundle=old) as server:
        with RollOvers(server.state, old, new) as changes:
            fire = write_under_fire(
                server, writers, soak.effort, lambda: changes.rounds() >= 1 or bool(changes.failures)
            )
        wrong = wrong_histories(server.address, writers)
    as_left = [compare_records(server.state, bundle) for bundle in (old, new)]
    for bundle in (old, new):
        status, line = finished(start_rebuild(bundle, server.state, share=1))
        if status:
            changes.failures.append(f"the last rebuild: {line}")
    rebuilt = [compare_records(server.state, bundle) for bundle in (old, new)]
    killed = "two workers and their supervisor" if workers > 1 else "the server"
    done = ", ".join(f"{count} times {what}" for what, count in sorted(changes.done.items()))
    return Section(
        f"Exactly once while bundles change, {workers} worker{'s' if workers > 1 else ''}",
        f"{what_was_written(writers, fire)} while {killed} got {fire.kills} SIGKILLs, and the bundle of the servers "
        f"was changed and changed back all the time: {done}; {changes.killed} rebuilds were killed, too. The other "
        "bundle has another catalogue. Then each history was read and compared with what was acknowledged, and each "
        "record of both bundles with a replay of the events that it covers; and again after a last rebuild of both, "
        "when all records must cover their histories.",
        [
            *claims_of_writers(writers, fire, soak.effort, wrong),
            Claim("whole rounds of rebuild, activate and back", str(changes.rounds()), ">= 1", changes.rounds() >= 1),
            Claim("commands that failed", "; ".join(changes.failures[:5]) or "none", "none", not changes.failures),
            *_record_claims("as they were left", as_left, current=False),
            *_record_claims("after a last rebuild", rebuilt, current=True),
        ],
        ("users that are wrong",) if wrong else (),
        [[text] for text in wrong[:20]],
    )


def _record_claims(when: str, found: list[Records], *, current: bool) -> Iterator[Claim]:
    errors = [error for records in found for error in records.errors]
    worst = max(errors, default=float("nan"))
    claim = f"worst difference of a record from a replay, {when}"
    yield Claim(claim, f"{worst:.1e} of {len(errors)} records", f"<= {TOLERANCE:g}", bool(worst <= TOLERANCE))
    if current:
        behind = sum(records.missing + records.lagging for records in found)
        yield Claim(f"histories that a record does not cover, {when}", str(behind), "none", not behind)
