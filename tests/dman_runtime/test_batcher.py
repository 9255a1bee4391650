"""The inference thread over a real engine: shared commits, separate failures, an orderly end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dman_runtime import batcher as batcher_module
from dman_runtime.batcher import Batcher, Stopped
from dman_runtime.engine import Engine, Query, Update
from dman_runtime.errors import RequestError
from dman_runtime.model.bundle import open_bundle
from dman_runtime.model.encoder import Encoder
from dman_runtime.store.lmdb import StateStore, Write

WAIT = 20  # seconds; nothing here takes that long unless it hangs


class GatedStore:
    """The real store; counts commits, and the first one waits until the gate is opened."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.commits: list[list[str]] = []
        self.failing: Callable[[str], bool] = lambda user_id: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, writes: Sequence[Write]) -> bool:
        self.waiting.set()
        assert self.gate.wait(WAIT)
        self.commits.append([write.user_id for write in writes])
        if any(self.failing(write.user_id) for write in writes):
            raise OSError("the disk broke")
        return self._store.commit(writes)


@pytest.fixture
def store(tiny_bundle: Path, tmp_path: Path) -> Iterator[GatedStore]:
    bundle = open_bundle(tiny_bundle)
    with StateStore.open(
        tmp_path / "state", bundle_id=bundle.bundle_id, item_ids=bundle.items.item_ids, map_size=32 << 20
    ) as opened:
        yield GatedStore(opened)


@pytest.fixture
def engine(tiny_bundle: Path, store: GatedStore) -> Engine:
    return Engine(open_bundle(tiny_bundle), Encoder(tiny_bundle, provider="cpu"), store)  # type: ignore[arg-type]


@pytest.fixture
def batcher(engine: Engine, store: GatedStore) -> Iterator[Batcher]:
    batcher = Batcher(engine)
    yield batcher
    store.gate.set()
    batcher.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


def hold(batcher: Batcher, store: GatedStore, pool: ThreadPoolExecutor) -> Future[Any]:
    """Occupies the inference thread with an update of the user "first", so that what follows queues up."""
    first = pool.submit(batcher.update, [Update("first", ["1"])])
    assert store.waiting.wait(WAIT)
    return first


def queued(batcher: Batcher, count: int) -> None:
    """Waits until that many requests are queued."""
    until = time.monotonic() + WAIT
    while len(batcher._queue) < count:
        assert time.monotonic() < until
        time.sleep(0.002)


def test_batcher_shares_one_commit_among_concurrent_callers(
    batcher: Batcher, store: GatedStore, pool: ThreadPoolExecutor
) -> None:
    first = hold(batcher, store, pool)
    others = [
        pool.submit(batcher.update, [Update(f"user {n}", ["1", "2"]), Update("shared", ["3"])]) for n in range(30)
    ]
    queued(batcher, 30)
    store.gate.set()
    assert first.result(WAIT)[0].applied == 1
    outcomes = [other.result(WAIT) for other in others]
    assert len(store.commits) == 2
    assert [one.event_count for one, _ in outcomes] == [2] * 30
    assert sorted(shared.event_count for _, shared in outcomes) == list(range(1, 31))  # merged one by one
    assert store.get("shared").event_count == 30


def test_batcher_serves_a_lone_caller_at_once(batcher: Batcher, store: GatedStore) -> None:
    store.gate.set()
    for number in range(1, 4):
        assert batcher.update([Update("u", ["1"])])[0].event_count == number
    assert len(store.commits) == 3


def test_batcher_bounds_the_events_of_one_batch(
    batcher: Batcher, store: GatedStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "MAX_EVENTS_PER_BATCH", 10)
    first = hold(batcher, store, pool)
    others = [pool.submit(batcher.update, [Update(f"user {n}", ["1"] * 5)]) for n in range(6)]
    queued(batcher, 6)
    store.gate.set()
    for job in (first, *others):
        job.result(WAIT)
    assert [len(users) for users in store.commits] == [1, 2, 2, 2]


@pytest.mark.parametrize("kind", ["refused request", "failing commit"])
def test_batcher_failure_of_one_request_fails_nobody_elses(
    batcher: Batcher, store: GatedStore, pool: ThreadPoolExecutor, kind: str
) -> None:
    store.failing = lambda user_id: user_id == "bad"
    first = hold(batcher, store, pool)
    bad_id = "bad" if kind == "failing commit" else ""
    good = [pool.submit(batcher.update, [Update(f"user {n}", ["1"])]) for n in range(5)]
    queued(batcher, 5)
    bad = pool.submit(batcher.update, [Update("innocent", ["1"]), Update(bad_id, ["1"])])
    queued(batcher, 6)
    more = [pool.submit(batcher.update, [Update(f"user {n}", ["2"])]) for n in range(5)]
    queued(batcher, 11)
    store.gate.set()
    with pytest.raises(OSError if kind == "failing commit" else RequestError):
        bad.result(WAIT)
    assert [job.result(WAIT)[0].event_count for job in [first, *good, *more]] == [1, *[1] * 5, *[2] * 5]
    assert store.get("innocent") is None  # its own request failed: all or nothing
    assert [store.get(f"user {n}").event_count for n in range(5)] == [2] * 5  # not twice, though tried twice


def test_batcher_answers_what_if_queries_among_updates(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor
) -> None:
    threads = set()
    plain = engine.recommend

    def recommend(query: Query) -> Any:
        threads.add(threading.current_thread().name)
        return plain(query)

    engine.recommend = recommend  # type: ignore[method-assign]
    first = hold(batcher, store, pool)
    good = pool.submit(batcher.recommend, Query("first", k=60, what_if=["5"], include_seen=True))
    bad = pool.submit(batcher.recommend, Query("first", k=0, what_if=["5"]))
    other = pool.submit(batcher.update, [Update("second", ["1"])])
    queued(batcher, 3)
    store.gate.set()
    first.result(WAIT)
    assert (good.result(WAIT).event_count, len(good.result(WAIT).item_indices)) == (2, 60)
    with pytest.raises(RequestError, match="k is 0"):
        bad.result(WAIT)
    assert other.result(WAIT)[0].applied == 1
    assert threads == {"inference"}


def test_batcher_close_finishes_the_queued_work_and_then_refuses(
    batcher: Batcher, store: GatedStore, pool: ThreadPoolExecutor
) -> None:
    first = hold(batcher, store, pool)
    others = [pool.submit(batcher.update, [Update(f"user {n}", ["1"])]) for n in range(20)]
    queued(batcher, 20)
    closing = pool.submit(batcher.close)
    until = time.monotonic() + WAIT
    while not batcher._closed:
        assert time.monotonic() < until
        time.sleep(0.002)
    with pytest.raises(Stopped):
        batcher.update([Update("late", ["1"])])
    with pytest.raises(Stopped):
        batcher.recommend(Query(None, what_if=["1"]))
    assert not closing.done()
    store.gate.set()
    closing.result(WAIT)
    assert [job.result(WAIT)[0].applied for job in [first, *others]] == [1] * 21
    assert store.get("late") is None
    batcher.close()  # a second time is no error


def test_batcher_goes_on_after_an_error(batcher: Batcher, store: GatedStore) -> None:
    store.gate.set()
    store.failing = lambda user_id: user_id == "bad"
    with pytest.raises(OSError):
        batcher.update([Update("bad", ["1"])])
    assert batcher.update([Update("u", ["1"])])[0].applied == 1


def test_batcher_without_a_thread_of_its_own_runs_a_lone_request_on_the_caller(
    engine: Engine, store: GatedStore, pool: ThreadPoolExecutor
) -> None:
    threads = []
    plain = engine.update

    def update(updates: Any) -> Any:
        threads.append(threading.current_thread().name)
        return plain(updates)

    engine.update = update  # type: ignore[method-assign]
    batcher = Batcher(engine, one_thread=False)
    store.gate.set()
    assert batcher.update([Update("lone", ["1"])])[0].event_count == 1
    assert threads == [threading.current_thread().name]
    store.gate.clear()
    store.waiting.clear()
    first = hold(batcher, store, pool)
    others = [pool.submit(batcher.update, [Update(f"user {n}", ["1"])]) for n in range(4)]
    queued(batcher, 4)  # what arrives while a batch runs shares the next one
    store.gate.set()
    assert [job.result(WAIT)[0].event_count for job in [first, *others]] == [1] * 5
    assert [len(users) for users in store.commits] == [1, 1, 4]
    assert threads[2:] == ["inference"]
    batcher.close()
    with pytest.raises(Stopped):
        batcher.update([Update("late", ["1"])])
