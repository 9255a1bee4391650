"""What can go wrong under a running worker, and what the monitor says of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from dman_runtime.errors import (
    DmanError,
    InputError,
    RequestError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
    StoreGoneError,
)
from dman_runtime.metrics import Metrics
from dman_runtime.problems import Problems
from dman_runtime.serving import monitor as module
from dman_runtime.serving.monitor import BLOCKED_SECONDS, FULL_SECONDS, ROOM_SECONDS, Monitor


class Counted(Metrics):
    def __init__(self) -> None:
        self.named: list[list[str]] = []
        self.stale: list[int] = []

    def problems(self, names: Iterable[str]) -> None:
        self.named.append(list(names))

    def stale_readers(self, cleared: int) -> None:
        self.stale.append(cleared)


class World:
    """What a monitor looks at, and a clock."""

    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.problems, self.metrics = Problems(), Counted()
        self.bundle_changed, self.busy_since = "", list[float | None]([None, None])
        self.tokens: DmanError | None = None
        self.store: Callable[[], None] = lambda: None
        self.maintained: Callable[[], int] = lambda: 3
        self.now = 1000.0
        self.free = 1 << 40
        self.used = 1
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.os, "statvfs", self._statvfs)
        self.monitor = Monitor(
            self.problems,
            state=state,
            check_store=lambda: self.store(),  # noqa: PLW0108  # tests put another one there
            maintain_store=lambda: self.maintained(),  # noqa: PLW0108
            store_sizes=lambda: (self.used, 900, 1000),
            bundle_changed=lambda: self.bundle_changed,
            reload_tokens=lambda: self.tokens,
            busy_since=[lambda: self.busy_since[0], lambda: self.busy_since[1]],
            metrics=self.metrics,
        )

    def _statvfs(self, path: Path) -> Any:
        if self.free < 0:
            raise OSError("gone")
        return type("Disk", (), {"f_bavail": self.free // 4096, "f_frsize": 4096})()

    def found(self) -> list[str]:
        """The names of the problems after one more look."""
        self.monitor.look()
        self.monitor.look_at_clock()
        return [problem.name for problem in self.problems.now()]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def raising(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def test_a_healthy_worker_has_no_problem_and_its_store_is_maintained(world: World) -> None:
    assert world.found() == []
    assert (world.metrics.named, world.metrics.stale) == ([[]], [3])


def test_a_changed_bundle_and_unusable_tokens_are_problems_while_they_last(world: World) -> None:
    world.bundle_changed, world.tokens = "items.jsonl was replaced", InputError("line 3 is bad", "mend it")
    assert sorted(world.found()) == ["bundle_changed", "tokens_unusable"]
    details = {one.name: one.detail for one in world.problems.now()}
    assert details["tokens_unusable"] == "line 3 is bad; mend it"
    assert details["bundle_changed"].startswith("in the bundle, items.jsonl was replaced; ")
    assert not world.problems.blocking
    world.bundle_changed, world.tokens = "", None
    assert world.found() == []


def test_a_store_that_is_gone_blocks_and_the_look_goes_on(world: World) -> None:
    world.store = raising(StoreGoneError("removed", "restore it"))
    assert world.found() == ["store_gone"]
    assert world.problems.blocking
    assert world.metrics.named[-1] == ["store_gone"]
    world.store = lambda: None
    assert world.found() == ["store_gone"]  # for good: the process must be started again


def test_damage_that_a_call_met_is_a_problem_that_does_not_block(world: World) -> None:
    world.monitor.saw(StoreDamagedError("a checksum is wrong", "run verify"))
    assert world.found() == ["store_damaged"]
    assert not world.problems.blocking


def test_errors_of_callers_are_no_problems(world: World) -> None:
    for error in (RequestError("x"), ValueError("x"), StoreError("x")):
        world.monitor.saw(error)
    assert world.found() == []


def test_a_full_store_is_a_problem_for_a_while(world: World) -> None:
    world.monitor.saw(StoreFullError("the map is full", "enlarge it"))
    assert world.found() == ["disk_full"]
    world.now += FULL_SECONDS - 1
    assert world.found() == ["disk_full"]
    world.now += 1
    assert world.found() == []


def test_a_full_store_has_room_again_soon_after_a_commit(world: World) -> None:
    world.monitor.saw(StoreFullError("the map is full", "enlarge it"))
    world.monitor.committed()
    assert world.found() == ["disk_full"]
    world.now += ROOM_SECONDS
    assert world.found() == []


def test_commits_that_fit_beside_those_that_do_not_keep_the_problem_and_the_log_short(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(60):
        world.monitor.saw(StoreFullError("the map is full", "enlarge it"))
        world.monitor.committed()
        assert world.found() == ["disk_full"]
        world.now += 1
    assert len(caplog.records) == 1


def test_a_disk_with_little_room_is_a_problem_before_it_is_full(world: World) -> None:
    world.free = 10 << 20
    assert world.found() == ["disk_full"]
    assert "10 MiB left" in world.problems.now()[0].detail
    world.free = 1 << 30
    assert world.found() == []


def test_a_directory_that_cannot_be_looked_at_does_not_end_the_look(world: World) -> None:
    world.free = -1
    assert world.found() == []
    assert world.metrics.stale == [3]


@pytest.mark.parametrize("which", [0, 1])
def test_a_turn_that_takes_long_is_a_problem_and_keeps_the_store_from_being_maintained(
    world: World, which: int
) -> None:
    world.busy_since[which] = world.now - BLOCKED_SECONDS - 1
    assert world.found() == ["commits_blocked"]
    assert world.metrics.stale == []
    world.busy_since[which] = None
    assert world.found() == []


def test_a_store_is_maintained_while_turns_are_short(world: World) -> None:
    """A busy server is never between two turns."""
    world.busy_since[0] = world.now - 0.05
    assert world.found() == []
    assert world.metrics.stale == [3]


def test_a_store_that_cannot_be_maintained_is_seen(world: World) -> None:
    world.maintained = raising(StoreGoneError("removed", "restore it"))
    assert world.found() == ["store_gone"]


def test_a_look_that_hangs_is_a_problem_and_turns_are_still_watched(world: World) -> None:
    hangs, entered = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        assert hangs.wait(30)

    world.store = hang
    looking = threading.Thread(target=world.monitor.look)
    looking.start()
    try:
        assert entered.wait(30)
        world.monitor.look_at_clock()
        assert world.problems.now() == []
        world.now += module.HANGING_SECONDS + 1
        world.busy_since[0] = world.now - BLOCKED_SECONDS - 1
        world.monitor.look_at_clock()
        assert {problem.name for problem in world.problems.now()} == {"disk_hangs", "commits_blocked"}
    finally:
        hangs.set()
        looking.join(30)
    world.busy_since[0] = None
    world.monitor.look_at_clock()
    assert world.problems.now() == []


def test_store_that_fills_its_map_is_a_problem_before_it_is_full(world: World) -> None:
    found = []
    for world.used in (799, 800, 949, 950, 1000, 800, 1):
        found.append(world.found())
    filling, nearly = ["store_filling"], ["store_nearly_full"]
    assert found == [[], filling, filling, nearly, nearly, filling, []]
    world.used = 960
    world.found()
    assert world.problems.now()[0].detail.startswith("the state store uses 96% of its map of 0 MiB; restart all")
