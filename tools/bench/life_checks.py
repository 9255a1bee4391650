"""What must be true after a roll-over: replies and states are what the bundles make of the histories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from dman_runtime.engine import Engine
from dman_runtime.model.events import KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.opened import OpenUser
from dman_runtime.store.lmdb import LmdbStore
from tools.bench.steady import Kept

BATCH_USERS = 128


def reply_errors(state: Path, generations: Mapping[str, Generation], kept: Sequence[Kept]) -> list[float]:
    """Computes replies again, from the histories as they were, under the bundles that the replies name.

    For each: the largest difference of its scores, by the largest score; infinite where the history never was so.
    """
    errors: list[float] = []
    with LmdbStore.open(state) as store:
        for bundle_id, generation in generations.items():
            projection = Engine(generation, store).projection
            replies = [one for one in kept if one.bundle_id == bundle_id]
            for first in range(0, len(replies), BATCH_USERS):
                part = replies[first : first + BATCH_USERS]
                histories = [projection.known_events(store.history(one.user_id))[: one.event_count] for one in part]
                errors += _score_errors(generation, part, histories)
    return errors + [float("inf")] * sum(one.bundle_id not in generations for one in kept)


def _score_errors(generation: Generation, replies: Sequence[Kept], histories: Sequence[KnownEvents]) -> Iterator[float]:
    index = generation.bundle.items.index
    for reply, events, state in zip(replies, histories, generation.replay(histories), strict=True):
        if len(events) != reply.event_count or not reply.scores.keys() <= index.keys():
            yield float("inf")
            continue
        (embedding,), (added,) = generation.asked([state], [reply.at])
        items = np.array([index[item_id] for item_id in reply.scores])
        expected = generation.bundle.item_embeddings[items] @ embedding
        if added is not None:
            more = dict(zip(added.items.tolist(), added.scores.tolist(), strict=True))
            expected = expected + [more.get(item, 0.0) for item in items.tolist()]
        found = np.array(list(reply.scores.values()))
        yield float(np.abs(found - expected).max() / np.abs(expected).max())


@dataclass
class Comparison:
    """Two stores under one bundle, user by user."""

    errors: dict[str, float] = field(default_factory=dict)  # of states: relative, in root mean square
    other_histories: list[str] = field(default_factory=list)  # users whose histories are not the same


def compared(generation: Generation, state: Path, fresh: Path) -> Comparison:
    """The states of all users of a store, beside those of a store that was imported from the same histories."""
    found = Comparison()
    with LmdbStore.open(state) as left, LmdbStore.open(fresh) as right:
        engines = Engine(generation, left), Engine(generation, right)
        users = left.scan()
        while user_ids := list(islice(users, BATCH_USERS)):
            for user_id, one, other in zip(user_ids, *(_advanced(e, user_ids) for e in engines), strict=True):
                if history_of(left, user_id) != history_of(right, user_id):
                    found.other_histories.append(user_id)
                found.errors[user_id] = max(
                    _relative(one.state.memory, other.state.memory),
                    _relative(one.state.user_embedding, other.state.user_embedding),
                )
    return found


def wrong_counts(state: Path, before: Mapping[str, int], added: Counter[str]) -> list[str]:
    """Users whose histories have not as many events as before, and those that were acknowledged."""
    with LmdbStore.open(state, readonly=True) as store:
        counts = history_counts(store)
    return [user_id for user_id, count in counts.items() if count != before.get(user_id, 0) + added[user_id]]


def history_counts(store: LmdbStore) -> dict[str, int]:
    """Events by user."""
    counts, users = dict[str, int](), store.scan()
    while user_ids := list(islice(users, BATCH_USERS)):
        stored = store.get_many(user_ids, 0, 0)
        counts |= {user_id: one.head.history_count for user_id, one in zip(user_ids, stored, strict=True) if one}
    return counts


def _advanced(engine: Engine, user_ids: Sequence[str]) -> list[OpenUser]:
    users = engine.open_users(user_ids)
    engine.advance(users)
    return users


def history_of(store: LmdbStore, user_id: str) -> tuple[list[str], list[int]]:
    """Item ids and times, oldest first."""
    numbers, times = store.history(user_id)
    return store.item_ids(numbers), times.tolist()


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-12))
