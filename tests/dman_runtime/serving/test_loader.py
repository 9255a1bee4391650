"""A server loads what the roll-out of its store names, tells who asks, and drops what is no longer named."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dman_runtime.data.added_items import AddedItem
from dman_runtime.engine import Engine
from dman_runtime.errors import BundleError
from dman_runtime.jobs.adding import add_items
from dman_runtime.model.generation import Generation
from dman_runtime.presence import Presence, Present, present
from dman_runtime.problems import Problems
from dman_runtime.projection import Projection
from dman_runtime.routing import Router
from dman_runtime.serving.loader import PROBLEM, Loader
from dman_runtime.store.memory import MemoryStore
from dman_runtime.store.rollout import Rollout
from tools.faults.servers import wait_until


class Serving:
    """What a worker has of all this: bundles are "opened" by name."""

    def __init__(self, own: Generation, others: dict[str, Generation], state: Path) -> None:
        self.store, self.state, self.problems, self.opened = MemoryStore(), state, Problems(), list[str]()
        self.others, self.may_open = others, threading.Event()
        self.may_open.set()
        self.own, self.revision = own, 0
        self.router: Router = Engine(own, self.store, follows=True).router
        self.loads = 0
        self.loader = Loader(
            self.router,
            self.store,
            open_bundle=self._open,
            presence=Presence(state),
            problems=self.problems,
            pid=7,
            loaded=self._loaded,
        )

    def _loaded(self) -> None:
        self.loads += 1

    def _open(self, path: Path) -> Generation:
        assert self.may_open.wait(20)
        self.opened.append(path.name)
        found = self.others.get(path.name)
        if found is None:
            raise BundleError(f"{path} is not a bundle", "export it again")
        return found

    def set(self, **changes: object) -> None:
        bundles = {self.own.bundle_id: "", **{one.bundle_id: f"/{name}" for name, one in self.others.items()}}
        self.revision += 1
        assert self.store.set_rollout(Rollout(self.revision, bundles=bundles)._replace(**changes))  # type: ignore[arg-type]

    def told(self) -> Present:
        (one,) = present(self.state)
        return one

    def serving_now(self) -> Projection:
        """What a user gets."""
        return self.router.of(["u"])[0]

    def becomes(self, true: Callable[[Present], bool]) -> bool:
        def looked() -> bool:
            self.loader.look()
            return true(self.told())

        return wait_until(looked, seconds=20, pause=0.01)


@pytest.fixture
def serving(exact: Generation, renamed: Generation, tmp_path: Path) -> Iterator[Serving]:
    serving = Serving(exact, {"renamed": renamed}, tmp_path)
    yield serving
    serving.may_open.set()
    serving.loader.close()
    assert present(tmp_path) == []


def test_server_tells_what_it_was_started_with(serving: Serving, exact: Generation) -> None:
    serving.loader.load()
    own = exact.bundle_id
    assert serving.told() == Present(7, own, str(exact.bundle.path.resolve()), [own], {})
    assert serving.becomes(lambda one: one.loaded == [own]) and serving.opened == []


def test_prepared_bundle_is_loaded_while_the_others_answer_and_dropped_afterwards(
    serving: Serving, exact: Generation, renamed: Generation
) -> None:
    serving.loader.load()
    serving.may_open.clear()
    serving.set(prepared=renamed.bundle_id)
    serving.loader.look()
    assert serving.serving_now() is serving.router.own  # it does not wait
    serving.loader.look()
    serving.may_open.set()
    assert serving.becomes(lambda one: sorted(one.loaded) == sorted([exact.bundle_id, renamed.bundle_id]))
    assert serving.opened == ["renamed"] and serving.loads > 0
    serving.set(active=renamed.bundle_id)
    assert serving.serving_now().bundle is renamed.bundle
    serving.set(active=exact.bundle_id)
    assert serving.becomes(lambda one: one.loaded == [exact.bundle_id])
    assert list(serving.router.loaded) == [exact.bundle_id]


def test_server_that_starts_again_answers_with_the_active_bundle_at_once(serving: Serving, renamed: Generation) -> None:
    serving.set(active=renamed.bundle_id)
    serving.loader.load()
    assert serving.serving_now().bundle is renamed.bundle and serving.router.bundle_id == renamed.bundle_id


@pytest.mark.parametrize(
    ("path", "cause"),
    [("/gone", "/gone is not a bundle"), ("", "does not know where it is"), ("/other", "/other holds bundle")],
)
def test_bundle_that_cannot_be_loaded_is_told_and_changes_nothing(
    serving: Serving, exact: Generation, renamed: Generation, path: str, cause: str
) -> None:
    serving.others["other"] = exact
    serving.loader.load()
    bundles = {exact.bundle_id: "", renamed.bundle_id: path}
    serving.set(prepared=renamed.bundle_id, bundles=bundles)
    assert serving.becomes(lambda one: cause in one.failed.get(renamed.bundle_id, ""))
    assert [(one.name, one.blocking) for one in serving.problems.now()] == [(PROBLEM, False)]
    assert serving.serving_now() is serving.router.own
    serving.set(bundles=bundles)
    assert serving.becomes(lambda one: not one.failed) and not list(serving.problems.now())
    serving.set(active=renamed.bundle_id, bundles=bundles)
    assert serving.becomes(lambda one: renamed.bundle_id in one.failed)
    assert [one.blocking for one in serving.problems.now()] == [True]  # others may have it
    with pytest.raises(BundleError, match=cause):  # a server that starts with it does not start
        serving.loader.load()


def test_server_whose_bundle_takes_no_part_loads_nothing(serving: Serving, renamed: Generation) -> None:
    serving.loader.load()
    serving.set(active=renamed.bundle_id, bundles={renamed.bundle_id: "/renamed"})
    assert serving.becomes(lambda one: True) and serving.opened == []


def test_fault_while_loading_harms_no_other_bundle(
    serving: Serving, renamed: Generation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.loader.load()
    monkeypatch.setattr(serving.loader, "_open_bundle", lambda path: 1 / 0)
    serving.set(prepared=renamed.bundle_id, bundles={serving.own.bundle_id: "", renamed.bundle_id: "/broken"})
    assert serving.becomes(lambda one: "division by zero" in one.failed.get(renamed.bundle_id, ""))
    assert f"loading bundle {renamed.bundle_id} failed" in caplog.text


def test_items_that_were_added_are_ready_before_a_request_needs_them(serving: Serving, exact: Generation) -> None:
    serving.loader.load()
    serving.loader.look()
    add_items(serving.store, exact.bundle, {"999": AddedItem(like=("5",))})
    before = serving.loads
    assert serving.becomes(lambda _: serving.router.own._newest is not None)
    assert serving.serving_now() is serving.router.own._newest
    assert "999" in serving.serving_now().bundle.items.index
    assert serving.becomes(lambda _: serving.loads > before)


def test_dropped_bundles_and_former_catalogues_are_freed_without_the_garbage_collector(exact_bundle: Path) -> None:
    """A worker keeps what it has loaded out of the collections, so a circle of references would stay for ever."""
    gc.disable()
    try:
        with MemoryStore() as store:
            projection = Projection(Generation.open(exact_bundle, provider="cpu"), store)
            bundle, generation = projection.bundle, weakref.ref(projection.generation)
            catalogues = []
            for item_id in ("998", "999"):
                add_items(store, bundle, {item_id: AddedItem(like=("5",))})
                catalogues.append(weakref.ref(projection.at(store.standing().catalogue_revision).generation))
            former, latest = catalogues
            assert former() is None and latest() is not None
            del projection
            assert generation() is None and latest() is None
    finally:
        gc.enable()
