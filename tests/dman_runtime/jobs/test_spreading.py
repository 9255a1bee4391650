"""Work spread over processes: in order, to the same results, whatever becomes of the processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from dman_runtime.errors import InputError, UsageError
from dman_runtime.jobs import spreading
from dman_runtime.jobs.processes import AHEAD, MAX_DEATHS
from dman_runtime.jobs.spreading import FEW_EVENTS, Here, Processes, RayCluster, Spread, spread

pytestmark = pytest.mark.slow
WAIT = 120


@dataclass(frozen=True)
class Squares:
    """Squares, with what may go wrong on the way."""

    folder: Path  # what processes leave behind for the test
    dies_at: int = -1
    dies_always: bool = False
    fails_at: int = -1

    def open(self) -> Callable[[int], int]:
        (self.folder / f"opened-{os.getpid()}").touch()
        return self._square

    def _square(self, number: int) -> int:
        time.sleep(0.02 * (number % 3))  # they end in another order than they begin
        if number == self.fails_at:
            raise InputError("the batch is bad", "mend it", parameter="input")
        died = self.folder / "died"
        if number == self.dies_at and (self.dies_always or not died.exists()):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number


ENGINES = [pytest.param(lambda: Processes(2), id="processes"), pytest.param(RayCluster, id="ray")]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Spread:
    if request.param is RayCluster:
        request.getfixturevalue("ray_cluster")
    made: Spread = request.param()
    return made


def test_results_come_in_order_from_several_processes_that_open_the_work_once(engine: Spread, tmp_path: Path) -> None:
    assert list(engine.results(Squares(tmp_path), range(40))) == [n * n for n in range(40)]
    opened = list(tmp_path.glob("opened-*"))
    assert 1 <= len(opened) <= 2 and f"opened-{os.getpid()}" not in {path.name for path in opened}


def test_no_batches_give_no_results(engine: Spread, tmp_path: Path) -> None:
    assert list(engine.results(Squares(tmp_path), [])) == []


def test_killed_process_costs_its_batches_and_nothing_else(engine: Spread, tmp_path: Path) -> None:
    assert list(engine.results(Squares(tmp_path, dies_at=7), range(20))) == [n * n for n in range(20)]
    assert (tmp_path / "died").exists()


def test_batch_that_kills_each_process_ends_the_work(engine: Spread, tmp_path: Path) -> None:
    results = engine.results(Squares(tmp_path, dies_at=3, dies_always=True), range(20))
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(UsageError, match=f"were killed {MAX_DEATHS} times in a row") as caught:
        next(results)
    assert caught.value.parameter == "processes"


def test_error_of_the_work_is_that_of_the_caller(engine: Spread, tmp_path: Path) -> None:
    results = engine.results(Squares(tmp_path, fails_at=2), range(20))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(InputError) as caught:
        next(results)
    assert (str(caught.value), caught.value.parameter) == ("the batch is bad; mend it", "input")


def test_only_some_batches_are_made_before_their_results_are_taken(engine: Spread, tmp_path: Path) -> None:
    made = []

    def batches() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    results = engine.results(Squares(tmp_path), batches())
    for _ in range(5):
        next(results)
    assert len(made) <= 5 + 2 * AHEAD
    results.close()  # type: ignore[attr-defined]


def test_processes_are_gone_when_the_results_are(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    results = Processes(2).results(Squares(tmp_path), range(100))
    next(results)
    assert set(psutil.Process().children(recursive=True)) - before
    results.close()  # type: ignore[attr-defined]
    left = set(psutil.Process().children(recursive=True)) - before
    assert all("resource_tracker" in " ".join(process.cmdline()) for process in left)


def test_small_jobs_stay_here_and_large_ones_use_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "cores", lambda: 4)
    assert spread("local", 0, events=FEW_EVENTS).name == "in this process"
    assert spread("local", 0, events=FEW_EVENTS + 1).name == "by 4 processes"
    assert spread("local", 3, events=1).name == "by 3 processes"
    assert isinstance(spread("local", 1, events=10**9), Here)
    assert spread("local", 0, events=None).name == "by 4 processes"
    with pytest.raises(UsageError, match="-1 processes are not possible"):
        spread("local", -1, events=1)


def test_graphs_on_cuda_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "cores", lambda: 4)
    assert isinstance(spread("local", 0, events=None, on_cuda=True), Here)
    for engine, processes in (("local", 2), ("ray", 0)):
        with pytest.raises(UsageError, match="the graphs run on CUDA, and so in this process only") as caught:
            spread(engine, processes, events=None, on_cuda=True)
        assert caught.value.parameter == "provider"


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"the library Ray is not installed; install dman\[ray\]"):
        spread("ray", 0, events=1)
