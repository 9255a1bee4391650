"""Activation changes all or nothing, and waits for every server that takes part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dman_runtime.errors import BundleError, ConflictError, UsageError
from dman_runtime.jobs.activating import activate
from dman_runtime.presence import Presence, Present
from dman_runtime.store.memory import MemoryStore
from dman_runtime.store.rollout import NO_ROLLOUT, Rollout
from tools.faults.background import Background

NEW = Path("/bundles/new")


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    with MemoryStore() as store:
        store.add_generation("old")
        yield store


class Server(Background):
    """Says that it is there, and after a time what it has loaded, as a real one does."""

    def __init__(self, state: Path, store: MemoryStore, pid: int, *, own: str = "old", fails: str = "") -> None:
        super().__init__()
        self._presence, self._store, self._pid, self._own = Presence(state), store, pid, own
        self._fails, self.seen = fails, list[Rollout]()
        self._say([own])

    def _say(self, loaded: list[str], failed: dict[str, str] | None = None) -> None:
        self._presence.tell(Present(self._pid, self._own, f"/bundles/{self._own}", loaded, failed or {}))

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self._presence.close()

    def run(self) -> None:
        while not self.over.wait(0.02):
            rollout = self._store.rollout()
            if rollout.prepared and rollout not in self.seen:
                time.sleep(0.1)
                failed = {rollout.prepared: self._fails} if self._fails else {}
                self._say([self._own] if failed else [self._own, rollout.prepared], failed)
                self.seen.append(rollout)


def test_bundle_is_active_once_all_servers_have_loaded_it(store: MemoryStore, tmp_path: Path) -> None:
    with Server(tmp_path, store, 1) as first, Server(tmp_path, store, 2) as second:
        result = activate(store, tmp_path, "new", NEW, wait=20)
        bundles = {"old": "/bundles/old", "new": str(NEW)}
        assert store.rollout() == result.rollout == Rollout(2, "new", bundles=bundles)
        assert first.seen == second.seen == [Rollout(1, prepared="new", bundles=bundles)]
        assert result.summary() == "bundle new answers instead of old; in 2 running server processes"
        again = activate(store, tmp_path, "old", Path("/bundles/old"), wait=20, catch_up=lambda: 3)
        assert again.summary().endswith("processes; 3 records were brought up to date first")
        assert again.rollout == Rollout(4, "old", bundles=bundles) and again.before == "new"


def test_records_are_caught_up_when_all_servers_have_loaded_the_bundle(store: MemoryStore, tmp_path: Path) -> None:
    found = list[Rollout]()

    def catch_up() -> int:
        found.append(store.rollout())
        return 0

    with Server(tmp_path, store, 1) as server:
        result = activate(store, tmp_path, "new", NEW, wait=20, catch_up=catch_up)
        assert server.seen == found and not found[0].active
    assert result.summary() == "bundle new answers instead of old; in 1 running server process"


def test_activation_that_is_interrupted_at_any_moment_leaves_nothing_prepared(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = store.set_rollout

    def interrupted(rollout: Rollout) -> bool:
        monkeypatch.undo()
        assert change(rollout)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "set_rollout", interrupted)
    with pytest.raises(KeyboardInterrupt):
        activate(store, tmp_path, "new", NEW)
    assert not store.rollout().prepared and not store.rollout().active


def test_without_servers_the_next_ones_answer_with_it(store: MemoryStore, tmp_path: Path) -> None:
    result = activate(store, tmp_path, "new", NEW)
    assert store.rollout() == Rollout(2, "new", bundles={"old": "", "new": str(NEW)})
    assert result.summary() == "bundle new answers; no server runs now"


def test_share_of_the_users_is_a_trial_and_can_grow_and_end(store: MemoryStore, tmp_path: Path) -> None:
    with Server(tmp_path, store, 1):
        bundles = {"old": "/bundles/old", "new": str(NEW)}
        result = activate(store, tmp_path, "new", NEW, share=0.1, wait=20)
        assert result.rollout == Rollout(2, "old", "new", 0.1, bundles=bundles)
        assert (
            result.summary()
            == "bundle new answers 10.00% of the users, and old the others; in 1 running server process"
        )
        assert activate(store, tmp_path, "new", NEW, share=0.5).rollout == Rollout(
            4, "old", "new", 0.5, bundles=bundles
        )
        assert activate(store, tmp_path, "old", Path("/bundles/old")).rollout == Rollout(6, "old", bundles=bundles)
        with pytest.raises(UsageError, match="needs another bundle for the rest, and old is active"):
            activate(store, tmp_path, "old", Path("/bundles/old"), share=0.5)


def test_share_without_a_bundle_for_the_rest_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="and none is active"):
        activate(store, tmp_path, "new", NEW, share=0.5)
    assert store.rollout() == NO_ROLLOUT


def test_server_that_cannot_load_the_bundle_leaves_everything_as_it_was(store: MemoryStore, tmp_path: Path) -> None:
    with Server(tmp_path, store, 1), Server(tmp_path, store, 2, fails="it is damaged"):
        with pytest.raises(BundleError, match="the server process 2 cannot load bundle new: it is damaged") as caught:
            activate(store, tmp_path, "new", NEW, wait=20)
        assert "nothing was changed" in caught.value.remedy
        assert (store.rollout().active, store.rollout().prepared) == ("", "")


def test_server_that_says_nothing_in_time_leaves_everything_as_it_was(store: MemoryStore, tmp_path: Path) -> None:
    silent = Presence(tmp_path)
    silent.tell(Present(3, "old", "/bundles/old", ["old"]))
    with pytest.raises(BundleError, match=r"processes 3 have not loaded bundle new within 0\.3 s"):
        activate(store, tmp_path, "new", NEW, wait=0.3)
    assert (store.rollout().active, store.rollout().prepared) == ("", "")
    silent.close()
    assert activate(store, tmp_path, "new", NEW).servers == 0


def test_servers_of_different_bundles_are_no_one_roll_out(store: MemoryStore, tmp_path: Path) -> None:
    with (
        Server(tmp_path, store, 1),
        Server(tmp_path, store, 2, own="other"),
        pytest.raises(UsageError, match="different bundles: old, other"),
    ):
        activate(store, tmp_path, "new", NEW)
    assert store.rollout() == NO_ROLLOUT


def test_change_by_others_is_kept_and_endless_change_refused(store: MemoryStore, tmp_path: Path) -> None:
    busy = iter([True, False, True, False, *[True] * 100])
    real = store.set_rollout

    def interrupted(rollout: Rollout) -> bool:
        if next(busy):
            before = store.rollout()
            assert real(before._replace(revision=before.revision + 1, bundles={**before.bundles, "x": "/x"}))
        return real(rollout)

    store.set_rollout = interrupted  # type: ignore[method-assign]
    assert activate(store, tmp_path, "new", NEW).rollout.bundles == {"old": "", "new": str(NEW), "x": "/x"}
    with pytest.raises(ConflictError, match="others keep changing"):
        activate(store, tmp_path, "old", NEW)
