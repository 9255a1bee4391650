"""Exactly once from a topic, while ingesters are killed and share partitions with others that come and go."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dman_runtime.engine import Engine
from dman_runtime.model.generation import Generation
from dman_runtime.model.state import State
from dman_runtime.store.lmdb import LmdbStore
from tools.bench.life_checks import history_of
from tools.bench.report import Claim, Section
from tools.faults.jobs import run_job
from tools.faults.kafka import Event, IngestProcess, Topic, group_settings, messages_of, tansu
from tools.soak.exactly_once import TOLERANCE
from tools.soak.rollover import relative_error
from tools.soak.setting import Effort, Soak

USERS, BAD_SHARE = 500, 0.01
MOMENT = 1_600_000_000  # time of the first event; each comes a second after the one before
_BATCH_EVENTS = 200  # small, so that kills come within batches
_SPEED = 4000  # events a second, about, of an ingester


def made_events(count: int, items: Sequence[str]) -> list[Event]:
    """Events of users by chance, in the order of their times."""
    choose = random.Random(0)
    return [(f"u{choose.randrange(USERS)}", choose.choice(items), MOMENT + number) for number in range(count)]


@dataclass
class _Run:
    """Ingesters of one topic, and what was done to them."""

    topic: Topic
    bundle: Path
    state: Path
    options: Sequence[str]
    kills: int = 0
    rebalances: int = 0  # times that a running ingester gave up its partitions and got some again
    bad: set[str] = field(default_factory=set)  # messages written that are no events
    failures: list[str] = field(default_factory=list)

    def start(self, *options: str) -> IngestProcess:
        return IngestProcess(self.topic.url, self.bundle, self.state, *self.options, *options)

    def write(self, events: Sequence[Event], choose: random.Random) -> None:
        for event in events:
            self.topic.add(*event)
            if choose.random() < BAD_SHARE:
                self.bad.add(f"no event {len(self.bad)}")
                self.topic.put(f"no event {len(self.bad) - 1}".encode(), key=event[0])
        self.topic.flush()

    def expect(self, fine: bool, failure: str) -> None:
        if not fine:
            self.failures.append(failure)

    def kill(self, process: IngestProcess, seconds: float) -> IngestProcess:
        time.sleep(seconds)
        process.close()
        self.kills += 1
        return self.start()

    def rebalance(self, process: IngestProcess) -> None:
        """A second ingester takes a share of the partitions, and is stopped."""
        given = process.given()
        with self.start() as other:
            self.expect(other.reads() and process.reads(times=given + 1), "partitions are not shared")
            status, line = other.stop()
        self.expect(not status, f"stopped by SIGTERM: {line}")
        self.expect(process.reads(times=given + 2), "partitions do not come back")
        self.rebalances += process.given() - given


def ingestion(soak: Soak) -> Section:
    """All events of a topic, against an import of the same events."""
    effort, bundle, scratch = soak.effort, soak.exact_bundle(), soak.scratch
    events = made_events(effort.ingested, soak.items())
    ingested, imported = scratch / "ingested", scratch / "imported"
    options = ["--dead-letters", "bad", "--batch-events", str(_BATCH_EVENTS), "--batch-ms", "50"]
    options += ["--kafka-options", str(group_settings(scratch / "group.properties"))]
    with tansu() as address:
        run = _Run(Topic(address, "events"), bundle, ingested, options)
        Topic(address, "bad")
        last = _ingest(run, events, effort)
        letters = [value.decode() for value, _ in messages_of(address, "bad")]
    log = scratch / "events.csv"
    log.write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in events), encoding="utf-8")
    status, line = run_job("import", "--bundle", bundle, "--state", imported, "--input", log, "--provider", "cpu")
    run.expect(not status, f"import: {line}")
    wrong, errors = compare_stores(ingested, imported, bundle)
    worst = max(errors, default=float("nan"))
    return Section(
        "Exactly once from a topic",
        f"{len(events)} events of {USERS} users, and {len(run.bad)} messages that are no events, were written to a "
        f"topic of 4 partitions (broker: tansu). Meanwhile its ingester got {run.kills} SIGKILLs, and a second one "
        f"came and was stopped by SIGTERM until the partitions had changed hands {run.rebalances} times. A last "
        f"ingester read the rest: {last}. Then the store was compared with one into which the events were imported.",
        [
            Claim.at_least("SIGKILLs", run.kills, effort.ingester_kills),
            Claim.at_least("rebalances", run.rebalances, effort.rebalances),
            Claim("commands that failed", "; ".join(run.failures[:5]) or "none", "none", not run.failures),
            Claim("users with an event lost, doubled or out of order", str(len(wrong)), "none", not wrong),
            Claim(
                "worst difference of a state from the imported one",
                f"{worst:.1e} of {len(errors)} states",
                f"<= {TOLERANCE:g}",
                bool(worst <= TOLERANCE),
            ),
            Claim(
                "messages that are no events, and no dead letters",
                str(len(run.bad - set(letters))),
                "none",
                run.bad == set(letters),
            ),
            Claim("dead letters that came twice", str(len(letters) - len(set(letters)))),
        ],
        ("users that are wrong",) if wrong else (),
        [[text] for text in wrong[:20]],
    )


def _ingest(run: _Run, events: list[Event], effort: Effort) -> str:
    """Writes the events in parts, and does something to the ingesters during each; then has the rest read. Returns what
    the last ingester printed."""
    choose = random.Random(1)
    joins = (effort.rebalances + 1) // 2  # each gives two rebalances
    deeds = ["kill"] * effort.ingester_kills + ["rebalance"] * joins
    choose.shuffle(deeds)
    size = -(-len(events) // len(deeds))
    process = run.start()
    try:
        for number, deed in enumerate(deeds):
            run.expect(process.reads(), "an ingester reads nothing")
            run.write(events[number * size : (number + 1) * size], choose)
            if deed == "kill":
                process = run.kill(process, choose.uniform(0.1, 0.1 + 2 * size / _SPEED))
            else:
                run.rebalance(process)
        run.expect(process.reads(), "an ingester reads nothing")
        status, line = process.stop()
        run.expect(not status, f"stopped by SIGTERM: {line}")
    finally:
        process.close()
    with run.start("--once", "--partitions", "0,1,2,3") as last:  # of a group, a killed member may still have some
        status, line = last.finished()
    run.expect(not status and line.endswith("lag 0 events"), f"the last ingester: {line}")
    return line


def compare_stores(found: Path, expected: Path, bundle: Path) -> tuple[list[str], list[float]]:
    """Users whose histories differ, and for each user the largest difference of the states, relative to the largest
    value; infinite where only one store has a state."""
    generation = Generation.open(bundle, provider="cpu")
    with LmdbStore.open(found) as store, LmdbStore.open(expected) as other:
        ours, theirs = Engine(generation, store), Engine(generation, other)
        users = sorted({*store.scan(), *other.scan()})
        wrong = [user for user in users if history_of(store, user) != history_of(other, user)]
        return wrong, [_difference(_state(ours, user), _state(theirs, user)) for user in users]


def _state(engine: Engine, user: str) -> State | None:
    (stored,) = engine.store.get_many([user], engine.projection.number)
    return engine.projection.generation.unpack(stored.record) if stored and stored.record else None


def _difference(one: State | None, other: State | None) -> float:
    if one is None or other is None or (one.event_count, one.history_count) != (other.event_count, other.history_count):
        return float("inf")
    pairs = [(one.memory, other.memory), (one.user_embedding, other.user_embedding)]
    return max(relative_error(found, expected) for found, expected in pairs)
