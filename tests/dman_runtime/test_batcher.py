"""The batcher over a real engine: shared work, slices of long work, separate failures, an orderly end.

No test looks at a clock: a gate holds a commit or a graph run, what should wait is queued, and a log of runs and
commits tells the order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from conftest import STORES, TINY_ITEMS, assert_close, ids, new_store

from dman_runtime import batcher as batcher_module
from dman_runtime import engine as engine_module
from dman_runtime.batcher import SLICE_EVENTS, Batcher
from dman_runtime.engine import COMMIT_ATTEMPTS, Engine
from dman_runtime.errors import ConflictError, ExpiredError, RequestError, StoppedError, StoreFullError
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query, Update, UpdateOutcome
from dman_runtime.retrieval.base import Hits
from dman_runtime.store.base import StateStore, Write

WAIT = 60  # seconds; nothing here takes that long unless it hangs
T = 5  # the tiny model's segment length
LARGEST_SLICE = SLICE_EVENTS + T - 1  # the last piece of a slice may begin with one event left to the slice
BROKEN_ITEM = TINY_ITEMS - 1  # no graph runs with it


@dataclass
class Run:
    """One run of the encoder."""

    rows: int
    events: int
    thread: str


@dataclass
class Commit:
    user_ids: list[str]


class Log(list[Run | Commit]):
    """What happened, in order."""

    @property
    def runs(self) -> list[Run]:
        return [entry for entry in self if isinstance(entry, Run)]

    @property
    def commits(self) -> list[list[str]]:
        return [entry.user_ids for entry in self if isinstance(entry, Commit)]

    def position(self, user_id: str) -> int:
        """Where a user was committed first."""
        return next(i for i, entry in enumerate(self) if isinstance(entry, Commit) and user_id in entry.user_ids)


@dataclass
class Gate:
    """Holds the thread that comes through as the `at`-th from now on, until it is opened."""

    at: int | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def close(self, at: int = 1) -> None:
        self.reached.clear()
        self.opened.clear()
        self.at = at

    def open(self) -> None:
        self.at = None
        self.opened.set()

    def wait_until_reached(self) -> None:
        assert self.reached.wait(WAIT)

    def pass_through(self) -> None:
        if self.at is None:
            return
        self.at -= 1
        if self.at == 0:
            self.at = None
            self.reached.set()
            assert self.opened.wait(WAIT)


class GatedStore:
    """A real store that logs commits, and lets tests hold or fail them."""

    def __init__(self, store: StateStore, log: Log) -> None:
        self._store, self._log = store, log
        self.gate = Gate()
        self.failing: Callable[[str], bool] = lambda user_id: False
        self.meanwhile: Callable[[list[str]], None] = lambda user_ids: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, writes: Sequence[Write]) -> list[str]:
        user_ids = [write.user_id for write in writes]
        self.gate.pass_through()
        self._log.append(Commit(user_ids))
        if any(self.failing(user_id) for user_id in user_ids):
            raise OSError("the disk broke")
        self.meanwhile(user_ids)
        return self._store.commit(writes)


class GatedGraphs:
    """The real graphs; logs runs, lets tests hold one, and fails for BROKEN_ITEM."""

    def __init__(self, generation: Generation, log: Log) -> None:
        self._generation, self._log = generation, log
        self.provider, self.on_cuda = generation.graphs.provider, generation.graphs.on_cuda
        self._broken = generation.bundle.item_embeddings[BROKEN_ITEM]
        self.gate = Gate()
        self.searched: list[int] = []

    def encode(self, *arrays: Any) -> tuple[np.ndarray, np.ndarray]:
        self._log.append(Run(len(arrays[0]), int(arrays[1].sum()), threading.current_thread().name))
        self.gate.pass_through()
        if (arrays[0] == self._broken).all(axis=-1).any():
            raise RuntimeError("the graph broke")
        return self._generation.graphs.encode(*arrays)

    def abstract(self, *arrays: np.ndarray) -> np.ndarray:
        return self._generation.graphs.abstract(*arrays)

    def read_at_request(self, *arrays: np.ndarray) -> np.ndarray:
        return self._generation.graphs.read_at_request(*arrays)

    def search(self, users: np.ndarray, k: int, **options: Any) -> list[Hits]:
        self.searched.append(len(users))
        return self._generation.retriever.search(users, k, **options)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, log: Log) -> Iterator[GatedStore]:
    with new_store(request.param) as opened:
        yield GatedStore(opened, log)


@pytest.fixture
def graphs(exact: Generation, log: Log) -> GatedGraphs:
    return GatedGraphs(exact, log)


@pytest.fixture
def engine(exact: Generation, graphs: GatedGraphs, store: GatedStore) -> Engine:
    return Engine(replace(exact, graphs=graphs, retriever=graphs), store)  # type: ignore[arg-type]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40, thread_name_prefix="caller") as pool:
        yield pool


@pytest.fixture
def batcher(engine: Engine, store: GatedStore, graphs: GatedGraphs, pool: ThreadPoolExecutor) -> Iterator[Batcher]:
    batcher = Batcher(engine)
    yield batcher
    store.gate.open()
    graphs.gate.open()
    batcher.close()


def hold(batcher: Batcher, gate: Gate, pool: ThreadPoolExecutor, user_id: str = "first") -> Future[Any]:
    """Occupies the turn with an update of one event, so that what follows queues up until the gate is opened."""
    gate.close()
    first = pool.submit(batcher.update, [Update(user_id, ["1"])])
    gate.wait_until_reached()
    return first


def queued(batcher: Batcher, count: int) -> None:
    """Waits until that many requests are queued."""
    until = time.monotonic() + WAIT
    while len(batcher._queue) < count:
        assert time.monotonic() < until
        time.sleep(0.002)


def queue_updates(batcher: Batcher, pool: ThreadPoolExecutor, updates: Sequence[Update]) -> list[Future[Any]]:
    """Queues updates in this very order, while the turn is held."""
    futures, already = [], len(batcher._queue)
    for count, update in enumerate(updates, start=already + 1):
        futures.append(pool.submit(batcher.update, [update]))
        queued(batcher, count)
    return futures


def first_outcomes(futures: Sequence[Future[Any]]) -> list[UpdateOutcome]:
    return [future.result(WAIT)[0] for future in futures]


def stored_items(engine: Engine, user_id: str) -> list[str]:
    return engine.store.item_ids(engine.store.history(user_id)[0])


def many(count: int) -> list[str]:
    """External ids of that many events, none of BROKEN_ITEM."""
    return ids(7 * n % BROKEN_ITEM for n in range(count))


# -- short requests ----------------------------------------------------------------------------------------------------


def test_batcher_shares_one_run_and_one_commit_among_concurrent_callers(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor, log: Log
) -> None:
    first = hold(batcher, store.gate, pool)
    others = [pool.submit(batcher.update, [Update(f"user {n}", ["1", "2"])]) for n in range(30)]
    queued(batcher, 30)
    store.gate.open()
    assert [outcome.event_count for outcome in first_outcomes([first, *others])] == [1] + [2] * 30
    assert [len(user_ids) for user_ids in log.commits] == [1, 30]
    assert [run.rows for run in log.runs] == [1, 30]
    assert engine.user("user 29").event_count == 2  # type: ignore[union-attr]


def test_batcher_serves_a_lone_caller_at_once(batcher: Batcher, log: Log) -> None:
    for number in range(1, 4):
        assert batcher.update([Update("u", ["1"])])[0].event_count == number
    assert log.commits == [["u"]] * 3
    assert batcher.update([]) == [] and batcher.recommend([]) == []


def test_batcher_commits_the_updates_of_one_request_together_and_in_order(
    batcher: Batcher, engine: Engine, log: Log
) -> None:
    updates = [Update("u", ["1"]), Update("v", ["2"]), Update("u", ["3", "4"])]
    assert [outcome.event_count for outcome in batcher.update(updates)] == [1, 1, 3]
    assert log.commits == [["u", "v"]]
    assert stored_items(engine, "u") == ["1", "3", "4"]


def test_batcher_bounds_the_events_of_one_turn(
    batcher: Batcher, store: GatedStore, pool: ThreadPoolExecutor, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "SHORT_EVENTS_PER_TURN", 10)
    first = hold(batcher, store.gate, pool)
    others = queue_updates(batcher, pool, [Update(f"user {n}", ["1"] * 5) for n in range(6)])
    store.gate.open()
    first_outcomes([first, *others])
    assert [len(user_ids) for user_ids in log.commits] == [1, 2, 2, 2]


def test_batcher_applies_updates_of_one_user_in_order_of_arrival_and_lets_others_pass(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor, log: Log
) -> None:
    first = hold(batcher, store.gate, pool)
    updates = [Update("u", [str(n)]) for n in range(1, 11)]
    others = queue_updates(batcher, pool, [*updates, Update("v", ["1"])])
    store.gate.open()
    assert [outcome.event_count for outcome in first_outcomes([first, *others])] == [1, *range(1, 11), 1]
    assert stored_items(engine, "u") == [str(n) for n in range(1, 11)]
    assert log.position("v") <= log.position("u")


def test_batcher_answers_what_if_queries_among_updates(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor
) -> None:
    batcher.update([Update("u", ["1", "2"])])
    first = hold(batcher, store.gate, pool)
    good = pool.submit(batcher.recommend, [Query("u", k=60, what_if=["5"], include_seen=True)])
    queued(batcher, 1)
    with pytest.raises(RequestError, match="k is 0"):
        batcher.recommend([Query("u", k=0, what_if=["5"])])
    other = pool.submit(batcher.update, [Update("second", ["1"])])
    queued(batcher, 2)
    store.gate.open()
    first.result(WAIT)
    (found,) = good.result(WAIT)
    assert (found.event_count, len(found.item_indices)) == (3, 60)
    (expected,) = engine.recommend([Query("u", k=60, what_if=["5"], include_seen=True)])
    assert found.item_indices.tolist() == expected.item_indices.tolist()
    assert_close(found.scores, expected.scores, 1e-4)
    assert other.result(WAIT)[0].applied == 1


def test_batcher_runs_what_ifs_of_many_callers_in_one_run_a_round_and_one_search(
    batcher: Batcher, graphs: GatedGraphs, store: GatedStore, pool: ThreadPoolExecutor, log: Log
) -> None:
    first = hold(batcher, store.gate, pool)
    calls = [pool.submit(batcher.recommend, [Query(None, k=3, what_if=many(T * 3 - n))]) for n in range(12)]
    queued(batcher, 12)
    before = len(log.runs)
    store.gate.open()
    assert [call.result(WAIT)[0].event_count for call in calls] == [T * 3 - n for n in range(12)]
    first.result(WAIT)
    assert [run.rows for run in log.runs[before:]] == [12, 10, 5]  # 12 to 15, 7 to 15 and 4 to 15 have a round to run
    assert graphs.searched == [12]


def test_batcher_runs_one_request_of_many_what_ifs_in_one_run_a_round_and_one_search(
    batcher: Batcher, graphs: GatedGraphs, log: Log
) -> None:
    batcher.update([Update("u", ["1", "2"])])
    before = len(log.runs)
    queries = [Query(None, k=3, what_if=many(n)) for n in range(1, 9)]
    answers = batcher.recommend([*queries, Query("u", k=4), Query("nobody", k=2)])
    assert [answer.event_count for answer in answers] == [*range(1, 9), 2, 0]
    assert [len(answer.item_indices) for answer in answers] == [3] * 8 + [4, 2]
    assert [run.rows for run in log.runs[before:]] == [8, 3]
    assert graphs.searched == [9]


def test_queries_are_answered_while_a_commit_of_their_writer_is_held(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor
) -> None:
    batcher.update([Update("u", ["1", "2"])])
    queries = Batcher(engine, writer=batcher)
    try:
        first = hold(batcher, store.gate, pool)
        asked = [Query("u"), Query(None), Query("u", what_if=["3"])]
        answers = pool.submit(queries.recommend, asked).result(WAIT)
        assert [answer.event_count for answer in answers] == [2, 0, 3]
        assert not first.done()
        store.gate.open()
        first.result(WAIT)
    finally:
        queries.close()


def test_writer_brings_the_records_up_to_date_that_queries_find_lagging(
    batcher: Batcher, engine: Engine, log: Log
) -> None:
    batcher.update([Update("u", many(300))])
    engine.store.drop_records(engine.projection.number)
    log.clear()
    queries = Batcher(engine, writer=batcher)
    try:
        assert [queries.recommend([Query("u")])[0].event_count for _ in range(2)] == [300, 300]
    finally:
        queries.close()
    assert log.commits == [["u"]] and sum(run.events for run in log.runs) == 300


def test_query_of_a_user_who_lacks_few_events_is_answered_before_they_are_stored(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor, log: Log
) -> None:
    batcher.update([Update("u", many(20))])
    engine.store.drop_records(engine.projection.number)
    queries = Batcher(engine, writer=batcher)
    try:
        first = hold(batcher, store.gate, pool)
        assert pool.submit(queries.recommend, [Query("u")]).result(WAIT)[0].event_count == 20
        assert not first.done()
        log.clear()
        store.gate.open()
        assert first_outcomes([first])[0].event_count == 1
        assert batcher.update([Update("v", ["1"])])[0].event_count == 1  # behind what the query asked for
    finally:
        queries.close()
    assert ["u"] in log.commits, "the record was stored all the same"
    log.clear()
    assert engine.recommend([Query("u")])[0].event_count == 20 and not log.runs


def test_queries_ask_a_busy_writer_for_a_bounded_number_of_records(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "_MAX_CATCH_UPS", 2)
    batcher.update([Update("u", many(20))])
    engine.store.drop_records(engine.projection.number)
    queries = Batcher(engine, writer=batcher)
    try:
        first = hold(batcher, store.gate, pool)
        for _ in range(5):
            assert pool.submit(queries.recommend, [Query("u")]).result(WAIT)[0].event_count == 20
        assert batcher.queue_depth == 2
        store.gate.open()
        first.result(WAIT)
    finally:
        queries.close()


def test_every_graph_runs_on_the_thread_of_the_batcher(batcher: Batcher, engine: Engine, log: Log) -> None:
    batcher.update([Update("u", ["1"])])
    batcher.recommend([Query("u", what_if=["2"]), Query(None, what_if=many(300))])
    engine.store.drop_records(engine.projection.number)
    batcher.recommend([Query("u")])
    assert {run.thread for run in log.runs} == {"batcher"}


# -- requests that nobody waits for any more ---------------------------------------------------------------------------


def test_request_that_is_cancelled_or_expired_while_it_waits_is_never_started(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor, log: Log
) -> None:
    first = hold(batcher, store.gate, pool)
    cancelled = batcher.submit_updates([Update("cancelled", ["1"])])
    expired = batcher.submit_updates([Update("expired", ["1"])], deadline=time.monotonic())
    in_time = batcher.submit_updates([Update("in time", ["1"])], deadline=time.monotonic() + WAIT)
    assert cancelled.cancel()
    store.gate.open()
    first.result(WAIT)
    assert in_time.result(WAIT)[0].event_count == 1
    with pytest.raises(ExpiredError):
        expired.result(WAIT)
    assert engine.user("cancelled") is None and engine.user("expired") is None
    assert log.commits == [["first"], ["in time"]]


def test_long_request_that_is_cancelled_stops_at_the_next_slice(
    batcher: Batcher, engine: Engine, graphs: GatedGraphs, log: Log
) -> None:
    graphs.gate.close(3)
    calls = [
        batcher.submit_updates([Update("u", many(5000))]),
        batcher.submit_queries([Query(None, what_if=many(5000))]),
    ]
    graphs.gate.wait_until_reached()
    assert all(call.cancel() for call in calls)
    graphs.gate.open()
    assert batcher.update([Update("u", ["1"])])[0].event_count == 1  # and its user is free again
    assert sum(run.events for run in log.runs) <= 4 * LARGEST_SLICE


def test_update_whose_deadline_passes_while_it_is_computed_is_not_committed(
    batcher: Batcher, engine: Engine, graphs: GatedGraphs
) -> None:
    graphs.gate.close(1)
    late = batcher.submit_updates([Update("u", ["1"])], deadline=time.monotonic() + 0.1)
    graphs.gate.wait_until_reached()
    time.sleep(0.15)
    graphs.gate.open()
    with pytest.raises(ExpiredError):
        late.result(WAIT)
    assert engine.user("u") is None


# -- long requests -----------------------------------------------------------------------------------------------------


def long_events_before_commit(log: Log, start: int, user_id: str, own: int = 1) -> int:
    """Events that were encoded from log entry `start` on until a user of `own` new events was committed."""
    return sum(entry.events for entry in log[start : log.position(user_id)] if isinstance(entry, Run)) - own


@pytest.mark.slow
@pytest.mark.parametrize(("count", "events"), [(1, 10_000), (30, 700)])
def test_long_what_ifs_hold_up_an_update_by_one_slice_at_most(
    batcher: Batcher, graphs: GatedGraphs, pool: ThreadPoolExecutor, log: Log, count: int, events: int
) -> None:
    graphs.gate.close(20)
    calls = [pool.submit(batcher.recommend, [Query(None, what_if=many(events))]) for _ in range(count)]
    for n in range(5):
        graphs.gate.wait_until_reached()  # a slice is under way
        start = len(log) - 1
        assert isinstance(log[start], Run)
        update = pool.submit(batcher.update, [Update(f"user {n}", ["1"])])
        queued(batcher, 1)
        gate, graphs.gate = graphs.gate, Gate()
        graphs.gate.close(10 + n)
        gate.open()
        assert update.result(WAIT)[0].event_count == 1
        assert long_events_before_commit(log, start, f"user {n}") <= LARGEST_SLICE
    assert not any(call.done() for call in calls)
    graphs.gate.open()
    answers = [call.result(WAIT)[0] for call in calls]
    assert [answer.event_count for answer in answers] == [events] * count
    assert sum(run.events for run in log.runs) == count * events + 5  # nothing was encoded twice
    assert max(run.events for run in log.runs) <= LARGEST_SLICE


def test_long_request_gives_what_the_engine_gives_at_once(batcher: Batcher, engine: Engine) -> None:
    batcher.update([Update("u", ["1", "2", "3"])])
    query = Query("u", k=TINY_ITEMS, what_if=many(SLICE_EVENTS + 3), include_seen=True)
    (found,), (expected,) = batcher.recommend([query]), engine.recommend([query])
    assert found.event_count == expected.event_count == SLICE_EVENTS + 6
    assert found.item_indices.tolist() == expected.item_indices.tolist()
    assert_close(found.scores, expected.scores, 1e-4)
    (outcome,) = batcher.update([Update("u", query.what_if)])
    assert (outcome.event_count, outcome.applied) == (SLICE_EVENTS + 6, SLICE_EVENTS + 3)
    assert stored_items(engine, "u") == ["1", "2", "3", *query.what_if]


def test_long_update_of_many_users_is_sliced_and_committed_at_once(batcher: Batcher, engine: Engine, log: Log) -> None:
    updates = [Update(f"user {n}", many(n)) for n in range(1, 40)]
    assert [outcome.event_count for outcome in batcher.update(updates)] == list(range(1, 40))
    assert [len(user_ids) for user_ids in log.commits] == [39]
    assert max(run.events for run in log.runs) <= LARGEST_SLICE
    assert stored_items(engine, "user 39") == many(39)


@pytest.mark.slow
def test_updates_of_a_user_wait_behind_a_long_one_and_those_of_others_do_not(
    batcher: Batcher, engine: Engine, graphs: GatedGraphs, pool: ThreadPoolExecutor, log: Log
) -> None:
    graphs.gate.close(3)
    long = pool.submit(batcher.update, [Update("u", many(1000))])
    graphs.gate.wait_until_reached()
    after = queue_updates(batcher, pool, [Update("u", ["1"]), Update("u", ["2", "3"]), Update("v", ["4"])])
    graphs.gate.open()
    outcomes = first_outcomes([long, *after])
    assert [outcome.event_count for outcome in outcomes] == [1000, 1001, 1003, 1]
    assert stored_items(engine, "u") == [*many(1000), "1", "2", "3"]
    assert log.commits == [["v"], ["u"], ["u"], ["u"]]


@pytest.mark.slow
def test_long_requests_take_turns_so_that_the_shorter_is_done_first(
    batcher: Batcher, graphs: GatedGraphs, pool: ThreadPoolExecutor, log: Log
) -> None:
    graphs.gate.close(3)
    longer = pool.submit(batcher.update, [Update("longer", many(1500))])
    graphs.gate.wait_until_reached()
    (shorter,) = queue_updates(batcher, pool, [Update("shorter", many(300))])
    graphs.gate.open()
    assert [outcome.applied for outcome in first_outcomes([longer, shorter])] == [1500, 300]
    assert log.commits == [["shorter"], ["longer"]]


def test_batcher_bounds_how_many_long_requests_are_open(
    batcher: Batcher, store: GatedStore, pool: ThreadPoolExecutor, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "MAX_LONG_USERS", 2)
    first = hold(batcher, store.gate, pool)
    others = queue_updates(batcher, pool, [Update(f"user {n}", many(200)) for n in range(5)])
    store.gate.open()
    assert [outcome.applied for outcome in first_outcomes([first, *others])] == [1] + [200] * 5
    assert max(run.rows for run in log.runs) == 2
    assert [user_id for user_ids in log.commits[1:] for user_id in user_ids] == [f"user {n}" for n in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize("call", ["recommend", "what-if", "update"])
def test_record_of_a_long_history_catches_up_in_slices(
    batcher: Batcher,
    engine: Engine,
    graphs: GatedGraphs,
    pool: ThreadPoolExecutor,
    log: Log,
    exact: Generation,
    call: str,
) -> None:
    Engine(exact, engine.store).update([Update("u", many(900))])
    engine.store.drop_records(engine.projection.number)
    log.clear()
    calls: dict[str, Callable[[], int]] = {
        "recommend": lambda: batcher.recommend([Query("u")])[0].event_count,
        "what-if": lambda: batcher.recommend([Query("u", what_if=["1"])])[0].event_count,
        "update": lambda: batcher.update([Update("u", ["1"])])[0].event_count,
    }
    graphs.gate.close(5)
    lagging = pool.submit(calls[call])
    graphs.gate.wait_until_reached()
    start = len(log) - 1
    (update,) = queue_updates(batcher, pool, [Update("v", ["1"])])
    graphs.gate.open()
    assert update.result(WAIT)[0].event_count == 1
    assert long_events_before_commit(log, start, "v") <= LARGEST_SLICE
    total = 900 + (call != "recommend")
    assert lagging.result(WAIT) == total
    assert sum(run.events for run in log.runs) == total + 1
    assert log.commits == [["v"], ["u"]]


def test_record_that_cannot_catch_up_as_the_store_is_full_is_advanced_for_the_answer_in_slices(
    batcher: Batcher, engine: Engine, store: GatedStore, log: Log, exact: Generation
) -> None:
    Engine(exact, engine.store).update([Update("u", many(300))])
    (expected,) = engine.recommend([Query("u")])
    engine.store.drop_records(engine.projection.number)
    log.clear()

    def full(user_ids: list[str]) -> None:
        raise StoreFullError("the store is full")

    store.meanwhile = full
    (found,) = batcher.recommend([Query("u")])
    assert (found.event_count, found.popular) == (300, False)
    assert found.item_indices.tolist() == expected.item_indices.tolist()
    assert max(run.events for run in log.runs) <= LARGEST_SLICE


# -- conflicts and failures --------------------------------------------------------------------------------------------


def test_conflicting_updates_are_repeated_and_the_others_committed(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor, log: Log, exact: Generation
) -> None:
    other_worker, left = Engine(exact, store._store), [2]

    def meanwhile(user_ids: list[str]) -> None:
        if "contended" in user_ids and left[0]:
            left[0] -= 1
            other_worker.update([Update("contended", ["9"])])

    first = hold(batcher, store.gate, pool)
    updates = [Update("contended", ["1", "2"]), Update("u", ["3"]), Update("v", ["4"])]
    others = queue_updates(batcher, pool, updates)
    store.meanwhile = meanwhile
    store.gate.open()
    assert [outcome.event_count for outcome in first_outcomes([first, *others])] == [1, 4, 1, 1]
    assert stored_items(engine, "contended") == ["9", "9", "1", "2"]
    assert [sorted(user_ids) for user_ids in log.commits] == [
        ["first"], ["contended", "u", "v"], ["u", "v"], ["contended"], ["contended"],
    ]  # fmt: skip


def test_only_the_users_in_conflict_are_computed_again(
    batcher: Batcher, engine: Engine, store: GatedStore, exact: Generation, log: Log
) -> None:
    left = [5]

    def meanwhile(user_ids: list[str]) -> None:
        if left[0]:
            left[0] -= 1
            Engine(exact, store._store).update([Update("busy", ["9"])])

    store.meanwhile = meanwhile
    updates = [*(Update(f"user {n}", many(30)) for n in range(20)), Update("busy", ["1", "2"]), Update("user 3", ["5"])]
    outcomes = batcher.update(updates)
    assert [outcome.event_count for outcome in outcomes] == [30] * 20 + [7, 31]
    assert stored_items(engine, "busy") == ["9"] * 5 + ["1", "2"] and stored_items(engine, "user 3") == [*many(30), "5"]
    assert sum(run.events for run in log.runs) == 20 * 30 + 1 + 6 * 2
    assert len(log.commits) == 6 and all(len(user_ids) == 21 for user_ids in log.commits)


def test_conflicting_update_waits_outside_while_others_are_served(
    batcher: Batcher, store: GatedStore, exact: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "conflict_pause", lambda attempts: 0.5)
    left = [1]

    def meanwhile(user_ids: list[str]) -> None:
        if user_ids == ["u"] and left[0]:
            left[0] -= 1
            Engine(exact, store._store).update([Update("u", ["9"])])

    store.meanwhile = meanwhile
    waiting = batcher.submit_updates([Update("u", ["1"])])
    behind = batcher.submit_updates([Update("u", ["2"])])
    while left[0]:
        time.sleep(0.002)
    assert [batcher.update([Update("v", ["1"])])[0].event_count for _ in range(3)] == [1, 2, 3]
    assert not waiting.done() and not behind.done()
    assert (waiting.result(WAIT)[0].event_count, behind.result(WAIT)[0].event_count) == (2, 3)


def test_batcher_sleeps_while_an_update_waits_behind_one_in_conflict(
    batcher: Batcher, store: GatedStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "conflict_pause", lambda attempts: 0.3)
    admit, looks = batcher._admit, 0

    def counted() -> list[Any]:
        nonlocal looks
        looks += 1
        return admit()

    conflicts = iter([True])
    commit = store.commit
    monkeypatch.setattr(store, "commit", lambda writes: ["u"] if next(conflicts, False) else commit(writes))
    monkeypatch.setattr(batcher, "_admit", counted)
    first = pool.submit(batcher.update, [Update("u", ["1"])])
    behind = pool.submit(batcher.update, [Update("u", ["2"])])
    assert sorted(outcome.event_count for outcome in first_outcomes([first, behind])) == [1, 2]
    assert looks < 400  # once a millisecond at most, and not as often as it can


def test_requests_that_nobody_waits_for_do_not_pile_up_while_a_commit_is_held(
    batcher: Batcher, store: GatedStore, pool: ThreadPoolExecutor
) -> None:
    first = hold(batcher, store.gate, pool)
    patient = batcher.submit_updates([Update("patient", ["1"])])
    late = batcher.submit_updates([Update("late", ["1"])], deadline=time.monotonic())
    for n in range(5000):
        assert batcher.submit_updates([Update(f"user {n}", ["1"])]).cancel()
    assert len(batcher._queue) <= 2000
    store.gate.open()
    assert [outcome.event_count for outcome in first_outcomes([first, patient])] == [1, 1]
    with pytest.raises(ExpiredError):
        late.result(WAIT)


def test_long_update_that_meets_a_conflict_is_sliced_again(
    batcher: Batcher, engine: Engine, store: GatedStore, exact: Generation, log: Log
) -> None:
    left = [1]

    def meanwhile(user_ids: list[str]) -> None:
        if left[0]:
            left[0] -= 1
            Engine(exact, store._store).update([Update("u", ["9"])])

    store.meanwhile = meanwhile
    assert batcher.update([Update("u", many(300))])[0].event_count == 301
    assert stored_items(engine, "u") == ["9", *many(300)]
    assert max(run.events for run in log.runs) <= LARGEST_SLICE


def test_update_that_meets_conflicts_without_end_is_given_up_and_others_go_on(
    batcher: Batcher, store: GatedStore, exact: Generation, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_LONGEST_PAUSE", 0)
    other_worker = Engine(exact, store._store)
    store.meanwhile = lambda user_ids: None if user_ids != ["u"] else other_worker.update([Update("u", ["9"])]) and None
    with pytest.raises(ConflictError, match="try again"):
        batcher.update([Update("u", ["1"])])
    assert log.commits == [["u"]] * COMMIT_ATTEMPTS
    assert batcher.update([Update("v", ["1"])])[0].event_count == 1


BAD: dict[str, tuple[str, list[str], type[Exception]]] = {
    "refused request": ("", ["1"], RequestError),
    "failing commit": ("bad", ["1"], OSError),
    "failing graph": ("poor", ids([BROKEN_ITEM]), RuntimeError),
    "failing graph of a long request": ("poor", [*many(200), *ids([BROKEN_ITEM])], RuntimeError),
}


@pytest.mark.parametrize(("user_id", "items", "error"), BAD.values(), ids=BAD)
def test_failure_of_one_request_fails_nobody_elses(
    batcher: Batcher,
    engine: Engine,
    store: GatedStore,
    pool: ThreadPoolExecutor,
    user_id: str,
    items: list[str],
    error: type[Exception],
) -> None:
    store.failing = lambda user_id: user_id == "bad"
    first = hold(batcher, store.gate, pool)
    good = queue_updates(batcher, pool, [Update(f"user {n}", ["1"]) for n in range(5)])
    what_if = pool.submit(batcher.recommend, [Query(None, what_if=["1", "2"])])
    queued(batcher, 6)
    bad = pool.submit(batcher.update, [Update("innocent", ["1"]), Update(user_id, items)])
    if error is not RequestError:  # that is refused on the caller's thread
        queued(batcher, 7)
    more = [pool.submit(batcher.update, [Update(f"user {n}", ["2"])]) for n in range(5)]
    queued(batcher, 12 if error is not RequestError else 11)
    store.gate.open()
    with pytest.raises(error):
        bad.result(WAIT)
    assert [outcome.event_count for outcome in first_outcomes([first, *good, *more])] == [1, *[1] * 5, *[2] * 5]
    assert what_if.result(WAIT)[0].event_count == 2
    assert engine.user("innocent") is None  # its own request failed: all or nothing
    for n in range(5):  # not twice, though tried twice
        assert stored_items(engine, f"user {n}") == ["1", "2"]


def test_failing_what_if_fails_alone(
    batcher: Batcher, store: GatedStore, graphs: GatedGraphs, pool: ThreadPoolExecutor
) -> None:
    first = hold(batcher, store.gate, pool)
    bad = pool.submit(batcher.recommend, [Query(None, what_if=ids([BROKEN_ITEM])), Query(None, what_if=["1"])])
    good = [pool.submit(batcher.recommend, [Query(None, what_if=["1", "2"])]) for _ in range(3)]
    queued(batcher, 4)
    store.gate.open()
    with pytest.raises(RuntimeError, match="the graph broke"):
        bad.result(WAIT)
    assert [call.result(WAIT)[0].event_count for call in good] == [2] * 3
    first.result(WAIT)


def test_failing_search_is_told_to_those_who_asked_and_updates_go_on(
    batcher: Batcher, store: GatedStore, graphs: GatedGraphs, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> list[Hits]:
        raise MemoryError

    monkeypatch.setattr(graphs, "search", fail)
    first = hold(batcher, store.gate, pool)
    what_if = pool.submit(batcher.recommend, [Query(None, what_if=["1"])])
    other = pool.submit(batcher.update, [Update("u", ["1"])])
    queued(batcher, 2)
    store.gate.open()
    with pytest.raises(MemoryError):
        what_if.result(WAIT)
    assert [outcome.applied for outcome in first_outcomes([first, other])] == [1, 1]


def test_batcher_goes_on_after_an_error(batcher: Batcher, store: GatedStore) -> None:
    store.failing = lambda user_id: user_id == "bad"
    with pytest.raises(OSError):
        batcher.update([Update("bad", ["1"])])
    assert batcher.update([Update("u", ["1"])])[0].applied == 1


# -- the end -----------------------------------------------------------------------------------------------------------


def test_close_finishes_what_waits_and_what_is_long_and_then_refuses(
    batcher: Batcher, engine: Engine, store: GatedStore, pool: ThreadPoolExecutor
) -> None:
    first = hold(batcher, store.gate, pool)
    others = [pool.submit(batcher.update, [Update(f"user {n}", ["1"])]) for n in range(20)]
    long = pool.submit(batcher.update, [Update("long", many(400)), Update("late 2", ["1"])])
    what_if = pool.submit(batcher.recommend, [Query(None, what_if=many(300))])
    queued(batcher, 22)
    closing = pool.submit(batcher.close)
    until = time.monotonic() + WAIT
    while not batcher._closed:
        assert time.monotonic() < until
        time.sleep(0.002)
    with pytest.raises(StoppedError):
        batcher.update([Update("late", ["1"])])
    with pytest.raises(StoppedError):
        batcher.recommend([Query(None, what_if=["1"])])
    assert not closing.done()
    store.gate.open()
    closing.result(WAIT)
    assert [outcome.applied for outcome in first_outcomes([first, *others])] == [1] * 21
    assert [outcome.applied for outcome in long.result(WAIT)] == [400, 1]
    assert what_if.result(WAIT)[0].event_count == 300
    assert engine.user("late") is None
    batcher.close()  # a second time is no error
