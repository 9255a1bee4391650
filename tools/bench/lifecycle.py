"""A roll-over and a roll-back of a real server under constant load, and what its callers see."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import Bundle
from dman_runtime.model.generation import Generation
from tools.bench.servers import dman_server
from tools.bench.steady import Found, Load, Sample, SteadyLoad
from tools.faults.jobs import finished, kill_when_encoded, start_job, start_rebuild

JOB_SECONDS = 7200.0


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    seconds: float = 60.0  # of the load before everything, and after
    settle_seconds: float = 30.0  # of the load behind each change
    kills: int = 5
    per_second: float = 200.0  # calls
    clients: int = 8
    speed_repeats: int = 3
    keep_every: int = 20  # recommendations: of so many, one is computed again
    max_share: float = 0.5  # of a core, for the rebuild under load: the default of the command


QUICK = Effort(seconds=3, settle_seconds=2, kills=2, per_second=60, speed_repeats=1, keep_every=3, max_share=0.2)


@dataclass(frozen=True)
class Pair:
    """The bundle that a store was imported under, and the one that it is rolled over to; opened and checked."""

    old: Generation
    new: Generation

    @property
    def common_items(self) -> list[str]:
        return [item for item in self.old.bundle.items.item_ids if item in self.new.bundle.items.index]

    @property
    def by_id(self) -> dict[str, Generation]:
        return {self.old.bundle_id: self.old, self.new.bundle_id: self.new}


@dataclass(frozen=True)
class Setting:
    """What every measurement needs."""

    log: Path
    pair: Pair
    scratch: Path  # an empty directory on the file system to measure
    effort: Effort


class Phase(NamedTuple):
    """A part of the run; times as time.monotonic() says."""

    name: str
    began: float
    ended: float


class Change(NamedTuple):
    """An activation: between the moments, either bundle may answer; behind them, only this one."""

    began: float
    ended: float
    bundle_id: str


@dataclass
class Course:
    """What was done to a server under load, and what its callers saw."""

    phases: list[Phase] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)  # the first one: what answered at the start
    kills: int = 0  # of the rebuild
    found: Found = field(default_factory=Found)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in the block is a phase of this name."""
        began = time.monotonic()
        yield
        self.phases.append(Phase(name, began, time.monotonic()))

    def allowed(self, sample: Sample) -> set[str]:
        """The bundles that may have answered a call."""
        begun = [change for change in self.changes if change.began <= sample.ended]
        last = max(number for number, change in enumerate(begun) if change.ended <= sample.began)
        return {change.bundle_id for change in begun[last:]}

    def wrong_bundle(self) -> list[Sample]:
        """Calls that a bundle answered which did not serve then."""
        return [one for one in self.found.samples if one.bundle_id and one.bundle_id not in self.allowed(one)]

    def failed(self) -> Counter[str]:
        """Calls without the right answer, by kind and error."""
        return Counter(f"{sample.call}: {sample.error}" for sample in self.found.samples if sample.error)

    def ratio(self, phase: Phase, call: str) -> float:
        """p99 of a phase by that of the first one; NaN where no call succeeded in one of them."""
        return self.percentile(phase, call, 99) / self.percentile(self.phases[0], call, 99)

    def percentile(self, phase: Phase, call: str, percent: float) -> float:
        """Milliseconds, of calls that succeeded; NaN where there is none."""
        times = [one.milliseconds for one in self.calls(phase, call) if not one.error]
        return float(np.percentile(times, percent)) if times else float("nan")

    def calls(self, phase: Phase, call: str) -> list[Sample]:
        """Those that were sent in a phase."""
        return [one for one in self.found.samples if one.call == call and phase.began <= one.began < phase.ended]


def roll_over(setting: Setting, state: Path, users: Sequence[str], workers: int) -> Course:
    """Serves a store that was imported under the old bundle; rebuilds, activates, rolls back and activates again."""
    course, pair, effort = Course(), setting.pair, setting.effort
    old, new = pair.old.bundle, pair.new.bundle
    course.changes.append(Change(0.0, 0.0, old.bundle_id))
    catalogues = {bundle_id: frozenset(one.bundle.items.item_ids) for bundle_id, one in pair.by_id.items()}
    with dman_server(old.path, state, "--provider", "cpu", "--workers", str(workers)) as server:
        load = Load(
            server.address,
            users,
            pair.common_items,
            catalogues,
            clients=effort.clients,
            per_second=effort.per_second,
            keep_every=effort.keep_every,
        )
        with SteadyLoad(load) as steady:
            time.sleep(min(5.0, effort.seconds))  # what is new is slow
            with course.phase("before"):
                time.sleep(effort.seconds)
            with course.phase("rebuild"):
                course.kills = _rebuild(new, state, effort)
            for name, bundle in (("activate", new), ("roll back", old), ("activate again", new)):
                with course.phase(name):
                    began = time.monotonic()
                    run("activate", "--bundle", bundle.path, "--state", state, "--provider", "cpu")
                    course.changes.append(Change(began, time.monotonic(), bundle.bundle_id))
                    time.sleep(effort.settle_seconds)
            with course.phase("after"):
                time.sleep(effort.seconds)
        course.found = steady.found
    return course


def _rebuild(bundle: Bundle, state: Path, effort: Effort) -> int:
    """Kills rebuilds after equal parts of the work, and lets a last one go to its end. Returns how many were killed."""
    killed = 0
    for number in range(effort.kills):
        job = start_rebuild(bundle.path, state, share=effort.max_share)
        killed += kill_when_encoded(job, 1 / (effort.kills + 1 - number))
    status, line = finished(start_rebuild(bundle.path, state, share=effort.max_share), seconds=JOB_SECONDS)
    if status:
        raise UsageError(f"rebuild failed: {line}")
    return killed


def run(command: str, *options: str | Path) -> dict[str, Any]:
    """The result of a command. Raises UsageError where it fails."""
    status, line = finished(start_job(command, *options, "--json"), seconds=JOB_SECONDS)
    if status:
        raise UsageError(f"{command} failed: {line}")
    result: dict[str, Any] = json.loads(line)
    return result
