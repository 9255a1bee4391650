"""Random use of each store, crashes included, beside a model of plain dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from contract.stores import HARNESSES, Crash, Harness, fresh_directory, request_id_limit
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dman_runtime.errors import TooManyRequestIdsError
from dman_runtime.store.base import REMEMBER_SECONDS, Head, StateStore, Step, Write
from dman_runtime.store.history import CHUNK_EVENTS, RECENT_IDS

USERS = ("a", "ab", "ü", "z" * 400)
ITEMS = ("0", "1", "i" * 400, "\U0001f600", *(f"item-{number}" for number in range(2, 40)))
GENERATIONS = (1, 2, 300)
EVENTS = 2 * CHUNK_EVENTS + 2


@dataclass
class Known:
    """What the model holds of a user."""

    version: int = 0
    events: list[tuple[int, int]] = field(default_factory=list)
    generation: int = 0
    records: dict[int, bytes] = field(default_factory=dict)

    @property
    def head(self) -> Head:
        return Head(self.version, len(self.events), self.generation)


@dataclass
class Model:
    items: list[str] = field(default_factory=list)
    bundles: list[str] = field(default_factory=list)
    users: dict[str, Known] = field(default_factory=dict)
    ids: dict[str, dict[int, float]] = field(default_factory=lambda: {user_id: {} for user_id in USERS})  # and when
    sequences: dict[str, dict[int, int]] = field(default_factory=lambda: {user_id: {} for user_id in USERS})

    def commit(self, writes: list[Write], now: float, *, together: bool) -> list[str]:
        conflicts = [
            w.user_id
            for w in writes
            if w.expected_version != self.version_of(w.user_id)
            or any(self.sequences[w.user_id].get(one) != step.before for one, step in w.sequences.items())
        ]
        if conflicts:
            writes = [] if together else [write for write in writes if write.user_id not in conflicts]
        for write in writes:
            user = self.users.setdefault(write.user_id, Known())
            user.version = -1  # a new one, that the store chooses
            if write.replace_from is not None:
                user.events, user.records = user.events[: write.replace_from], {}
            user.events += zip(np.asarray(write.items).tolist(), np.asarray(write.timestamps).tolist(), strict=True)
            self.ids[write.user_id] |= dict.fromkeys(write.request_ids, now)
            self.sequences[write.user_id] |= {one: step.last for one, step in write.sequences.items()}
            user.records |= write.records
            user.generation = max(write.records, default=user.generation)
        return conflicts

    def take_users(self, other: Model, user_ids: set[str]) -> None:
        """Has some users as another model has them."""
        for user_id in user_ids:
            self.ids[user_id], self.sequences[user_id] = other.ids[user_id], other.sequences[user_id]
            if user_id in other.users:
                self.users[user_id] = other.users[user_id]
            else:
                self.users.pop(user_id, None)

    def version_of(self, user_id: str) -> int:
        return self.users[user_id].version if user_id in self.users else 0


VERSIONS = ["right"] * 10 + ["zero", "stale"]
EVENT_COUNTS = [0, 1, 2, CHUNK_EVENTS - 1, CHUNK_EVENTS, CHUNK_EVENTS, EVENTS]
RECORDS = [{}, {1: b"one"}, {2: b"two"}, {1: b"ONE", 300: b""}, {2: b"long" * 1500}]
REQUEST_ID_COUNTS = [0, 1, RECENT_IDS // 2, RECENT_IDS + 3]
REPLACE = ["nothing", "nothing", "nothing", "all", "the end", "the end by others"]
SEQUENCES = ["none", "none", "none", "right", "right", "wrong"]
PRODUCERS = (1, 2, 2**64 - 1)
ID_LIMIT = 40  # request ids of a user in 6 hours
HOUR = 3600


class Change(NamedTuple):
    """What one user's part of a commit is made from, before there is a version or an item table."""

    version: str
    events: int
    records: dict[int, bytes]
    request_ids: int
    replace: str
    sequences: str
    seed: int

    @classmethod
    def of(cls, number: int) -> Change:
        """The change with a number: one number is drawn much faster than five parts."""
        choices = []
        for options in (VERSIONS, EVENT_COUNTS, RECORDS, REQUEST_ID_COUNTS, REPLACE, SEQUENCES):
            number, index = divmod(number, len(options))
            choices.append(options[index])
        return cls(*choices, seed=number)


batches = st.dictionaries(st.sampled_from(USERS), st.integers(0, 2**26).map(Change.of), min_size=1, max_size=3)
positions = st.integers(0, 3 * EVENTS)


class StoreMachine(RuleBasedStateMachine):
    """Whatever happens, the store holds what the model holds."""

    def __init__(self, harness: type[Harness]) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        self.harness = harness(self.cleanup.enter_context(fresh_directory()))
        self.cleanup.enter_context(request_id_limit(ID_LIMIT))
        self.now = self.latest = 1_800_000_000.0  # the clock may go back
        self.harness.clock = lambda: self.now
        self.store: StateStore = self.harness.open()
        self.model = Model()
        self.versions = {0}  # all ever given

    def teardown(self) -> None:
        with self.cleanup:
            self.store.close()
            assert self.harness.problems() == []

    @initialize()
    def start(self) -> None:
        self.add_items(list(ITEMS[:6]))

    # -- writes --------------------------------------------------------------------------------------------------------

    @rule(item_ids=st.lists(st.sampled_from(ITEMS), max_size=4))
    def add_items(self, item_ids: list[str]) -> None:
        self.model.items += [item for item in dict.fromkeys(item_ids) if item not in self.model.items]
        numbers = self.store.add_items(item_ids)
        assert numbers.tolist() == [self.model.items.index(item) for item in item_ids]

    @rule(bundle=st.sampled_from(["one", "two", "three"]))
    def add_generation(self, bundle: str) -> None:
        self.model.bundles += [bundle] if bundle not in self.model.bundles else []
        assert self.store.add_generation(bundle) == self.model.bundles.index(bundle) + 1

    @rule(batch=batches)
    def commit_more(self, batch: dict[str, Change]) -> None:
        """A rule of its own, as commits are what makes the rest interesting."""
        self.commit(batch)

    @rule(batch=batches)
    def commit(self, batch: dict[str, Change]) -> None:
        self.commit_writes(self.writes(batch))

    def commit_writes(self, writes: list[Write]) -> None:
        try:
            conflicts = self.store.commit(writes)
        except TooManyRequestIdsError as error:
            assert self.has_many_ids(writes)
            stored = [write for write in writes if write.user_id in error.stored]
            assert self.model.commit(stored, self.now, together=self.harness.together) == []
            self.take_new_versions()
            return
        assert sorted(conflicts) == sorted(self.model.commit(writes, self.now, together=self.harness.together))
        self.take_new_versions()

    @rule(user_id=st.sampled_from(USERS), count=st.sampled_from([5, RECENT_IDS + 1, 25]), seed=st.integers(0, 5))
    def commit_request_ids(self, user_id: str, count: int, seed: int) -> None:
        """Many of one user, some of them again and again."""
        ids = [10_000 * seed + number for number in range(count)]
        applied = self.store.applied(user_id, ids)
        new = [one for one in ids if one not in applied]
        self.commit_writes([Write(user_id, self.model.version_of(user_id), {}, np.zeros(0), np.zeros(0), new)])

    @rule(user_id=st.sampled_from(USERS))
    def delete(self, user_id: str) -> None:
        known = self.model.users.pop(user_id, None)
        assert self.store.delete(user_id) == (None if known is None else len(known.events))

    @rule(generation=st.sampled_from(GENERATIONS))
    def drop_records(self, generation: int) -> None:
        dropped = [user.records.pop(generation, None) for user in self.model.users.values()]
        assert self.store.drop_records(generation) == sum(record is not None for record in dropped)

    @rule(hours=st.sampled_from([31, 7, 5, 0.1, -2]))
    def time_passes(self, hours: float) -> None:
        self.now += hours * HOUR
        self.latest = max(self.now, self.latest)

    @rule()
    def maintain(self) -> None:
        assert self.store.maintain() == 0

    @precondition(lambda self: self.harness.durable)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.harness.open()

    # -- crashes -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.harness.durable)
    @rule(batch=batches, percent=st.integers(0, 99))
    def crash_in_a_commit(self, batch: dict[str, Change], percent: int) -> None:
        writes = self.writes(batch)
        puts = [len(w.records) + len(w.items) // CHUNK_EVENTS + (len(w.request_ids) > RECENT_IDS) * 3 for w in writes]
        steps = (
            sum(puts)
            + 2 * len(puts)
            + 2
            + sum(2 * (write.replace_from is not None) + bool(write.sequences) for write in writes)
        )
        if not self.harness.together:
            steps = len(writes) + 2
        self.crash(
            steps * percent // 100,
            lambda: self.store.commit(writes),
            lambda after: after.commit(writes, self.now, together=self.harness.together),
            may_refuse=self.has_many_ids(writes),
        )

    @precondition(lambda self: self.harness.durable and self.model.users)
    @rule(number=st.integers(0, len(USERS) - 1), percent=st.integers(0, 99))
    def crash_in_a_deletion(self, number: int, percent: int) -> None:
        user_id, known = list(self.model.users.items())[number % len(self.model.users)]
        steps = 2 + len(known.records) + len(known.events) // CHUNK_EVENTS + 2
        self.crash(steps * percent // 100, lambda: self.store.delete(user_id), lambda after: after.users.pop(user_id))

    def crash(
        self,
        step: int,
        write: Callable[[], object],
        in_model: Callable[[Model], object],
        *,
        may_refuse: bool = False,
    ) -> None:
        """After a crash before a step, the store holds all of the write or nothing; after a return, all of it.

        The rules above guess how many steps there are, so that about every step comes up.
        """
        after = deepcopy(self.model)
        in_model(after)
        try:
            with self.harness.at_step(step, self.harness.crash):
                write()
            self.model = after
        except Crash:
            self.store = self.harness.recover(self.store)
            if not self.harness.together:
                self.model.take_users(after, self.changed_users())
            elif self.changed_users():
                self.model = after
        except TooManyRequestIdsError as error:
            assert may_refuse
            self.model.take_users(after, set(error.stored))
        self.take_new_versions()

    def changed_users(self) -> set[str]:
        """Of whom the store has another version than the model. `everything_agrees` compares the rest."""
        stored = dict(zip(USERS, self.store.get_many(USERS, 1), strict=True))
        return {
            one for one in USERS if self.model.version_of(one) != (user.head.version if (user := stored[one]) else 0)
        }

    # -- reads ---------------------------------------------------------------------------------------------------------

    @rule(user_id=st.sampled_from(USERS), start=positions, stop=st.none() | positions)
    def read_a_part_of_a_history(self, user_id: str, start: int, stop: int | None) -> None:
        known = self.model.users.get(user_id, Known())
        assert pairs(self.store.history(user_id, start, stop)) == known.events[start:stop]

    @invariant()
    def everything_agrees(self) -> None:
        model, store = self.model, self.store
        assert store.item_ids(range(len(model.items))) == model.items
        numbers = [model.items.index(item) if item in model.items else -1 for item in ITEMS]
        assert store.find_items(ITEMS).tolist() == numbers
        assert list(store.generations()) == model.bundles
        stats = store.stats()
        assert (stats.users, stats.items) == (len(model.users), len(model.items))
        parts = [set(store.scan(partition, 2)) for partition in range(2)]
        assert parts[0] | parts[1] == set(model.users) and not parts[0] & parts[1]
        for generation in GENERATIONS:
            for user_id, stored in zip(USERS, store.get_many(USERS, generation), strict=True):
                known = model.users.get(user_id)
                assert stored == (known and (known.head, known.records.get(generation)))
        for user_id in USERS:
            known = model.users.get(user_id)
            view = store.ranking_view(user_id, 2, 4)
            events = known.events if known else []
            seen = sorted({item for item, _ in events})
            ids = model.ids[user_id]
            applied = store.applied(user_id, [*ids, 1, 2, 3])
            assert {one for one, when in ids.items() if when >= self.latest - REMEMBER_SECONDS} <= applied <= set(ids)
            assert store.sequences(user_id, PRODUCERS) == model.sequences[user_id]
            assert pairs(store.history(user_id)) == events
            assert store.seen(user_id).tolist() == seen
            assert (view is None) == (known is None)
            if known and view:
                record = known.records.get(2)
                assert (view.history_count, view.record) == (len(events), record and record[:4])
                assert sorted(set(view.seen.tolist())) == seen

    # -- helpers -------------------------------------------------------------------------------------------------------

    def writes(self, batch: dict[str, Change]) -> list[Write]:
        writes = []
        for user_id, change in batch.items():
            right = self.model.version_of(user_id)
            # stale: of an earlier moment, maybe of an earlier life
            version = {"right": right, "zero": 0, "stale": max(self.versions - {right}, default=1)}[change.version]
            random = np.random.default_rng(change.seed)
            some = random.permutation(len(self.model.items))[:2]  # few, so that seen sets differ
            items = random.choice(some, change.events).astype(np.uint32)
            times = random.integers(-(2**63), 2**63 - 1, change.events, endpoint=True)
            request_ids = random.integers(0, 2**64 - 1, change.request_ids, np.uint64, endpoint=True).tolist()
            applied = self.store.applied(user_id, request_ids)  # the same number gives the same ids: a retry
            new = [one for one in request_ids if one not in applied]
            start = None
            if change.replace != "nothing" and user_id in self.model.users:
                old = np.array(self.model.users[user_id].events, object).reshape(-1, 2)
                start = 0 if change.replace == "all" else int(random.integers(0, len(old), endpoint=True))
                order = random.permutation(len(old) - start + len(items))
                replaced = old[start:, 0].astype(np.uint32)
                if change.replace == "the end by others":
                    replaced = random.choice(some, len(replaced)).astype(np.uint32)
                items = np.concatenate([replaced, items])[order]
                times = np.concatenate([old[start:, 1].astype(np.int64), times])[order]
            steps = self.steps(user_id, change.sequences, random)
            writes.append(Write(user_id, version, change.records, items, times, new, start, sequences=steps))
        return writes

    def steps(self, user_id: str, kind: str, random: np.random.Generator) -> dict[int, Step]:
        """Of some producers, from where they are, or from somewhere else."""
        steps = {}
        for index in random.permutation(len(PRODUCERS))[:2] if kind != "none" else ():
            producer = PRODUCERS[index]
            before = self.model.sequences[user_id].get(producer)
            if kind == "wrong":
                before = None if before is not None else 0
            steps[producer] = Step(before, (-1 if before is None else before) + int(random.integers(1, 4)))
        return steps

    def has_many_ids(self, writes: list[Write]) -> bool:
        """Whether there may be a user of whom more request ids than the limit move within 6 hours.

        The last ones of a head may be older, and move when others come.
        """

        def moving(write: Write) -> int:
            new = [when > self.latest - 30 * HOUR for when in self.model.ids[write.user_id].values()]
            return len(write.request_ids) + sum(new) + min(RECENT_IDS, len(new) - sum(new))

        return any(moving(write) > ID_LIMIT for write in writes)

    def take_new_versions(self) -> None:
        """Versions of what was just written were never given before; the model learns them."""
        new = [user_id for user_id, known in self.model.users.items() if known.version < 0]
        found = {stored.head.version for stored in self.store.get_many(new, 1) if stored}
        assert not found & self.versions
        self.versions |= found
        for user_id, stored in zip(new, self.store.get_many(new, 1), strict=True):
            assert stored is not None
            self.model.users[user_id].version = stored.head.version


def pairs(events: tuple[Any, Any]) -> list[tuple[int, int]]:
    items, timestamps = events
    assert items.dtype == np.uint32 and timestamps.dtype == np.int64
    return list(zip(items.tolist(), timestamps.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "examples"),
    [(name, 30 if harness.together else 8) for name, harness in HARNESSES.items()]
    + [pytest.param("lmdb", 100, marks=pytest.mark.slow)],
)
def test_store_holds_what_the_model_holds(name: str, examples: int) -> None:
    run_state_machine_as_test(
        lambda: StoreMachine(HARNESSES[name]),
        settings=settings(
            max_examples=examples,
            stateful_step_count=16,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
