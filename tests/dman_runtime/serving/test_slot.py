"""The supervisor and its slots, with real processes that need no model: what a restart costs, whom it disturbs."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from conftest import serve_config
from fake_workers import give, notes, obedient, stubborn

from dman_runtime.errors import DmanError, UsageError
from dman_runtime.metrics import Metrics
from dman_runtime.problems import ClusterStatus
from dman_runtime.serving.config import ServeConfig
from dman_runtime.serving.slot import Run, State, Timing
from dman_runtime.serving.supervisor import Supervisor

FAST = Timing(heartbeat=1.5, start=20.0, first_pause=0.05, longest_pause=0.4, settled=60.0, tick=0.01)


class Recorded(Metrics):
    """What the supervisor reports."""

    def __init__(self) -> None:
        self.restarted, self.names, self.numbers = 0, list[str](), (0, 0)

    def restarts(self, workers: int) -> None:
        self.restarted += workers

    def workers(self, asked: int, ready: int) -> None:
        self.numbers = (asked, ready)

    def problems(self, names: Iterable[str]) -> None:
        self.names = list(names)


def config_in(path: Path, *, workers: int = 2, grace: float = 1.0) -> ServeConfig:
    (path / "orders").mkdir()
    (path / "bundle").write_text("one")
    return serve_config(path / "bundle", path / "orders", workers=workers, grace=grace, port=1)


@contextmanager
def supervised(config: ServeConfig, run: Run = obedient, timing: Timing = FAST) -> Iterator[Supervisor]:
    """A supervisor that the test steps by `until`. All its processes are gone afterwards."""
    supervisor = Supervisor(config, run, metrics=Recorded(), timing=timing)
    try:
        yield supervisor
    finally:
        for slot in supervisor.slots:
            slot.kill()
        supervisor.stop_workers()


def until(supervisor: Supervisor, done: Callable[[], bool], *, seconds: float = 30.0) -> float:
    """Steps until `done`, and returns the longest step, in seconds."""
    deadline, longest = time.monotonic() + seconds, 0.0
    while not done():
        assert time.monotonic() < deadline, supervisor.status
        started = time.monotonic()
        supervisor.step(started)
        longest = max(longest, time.monotonic() - started)
        time.sleep(0.005)
    return longest


def for_seconds(supervisor: Supervisor, seconds: float) -> float:
    end = time.monotonic() + seconds
    return until(supervisor, lambda: time.monotonic() >= end)


def pid_of(supervisor: Supervisor, slot: int) -> int:
    process = supervisor.slots[slot]._process
    assert process is not None and process.pid is not None
    return process.pid


def names_of(supervisor: Supervisor) -> list[str]:
    return [problem.name for problem in supervisor.status.problems]


def longest_silence(config: ServeConfig, slot: int) -> float:
    """Between two beats, in seconds."""
    beats = [float(line) for line in notes(config, f"beats-{slot}")]
    return max(later - earlier for earlier, later in pairwise(beats))


def last_told(config: ServeConfig, slot: int) -> str:
    return (notes(config, f"told-{slot}") or [""])[-1]


# -- starting --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_workers_start_at_once_and_are_announced_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, workers=3)
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 3)
        until(supervisor, lambda: "ready=3" in last_told(config, 2))
        assert supervisor.status == ClusterStatus(workers=3, ready=3, restarts=0, problems=())
    assert capsys.readouterr().out == "serving bundle one on 127.0.0.1:1 (fake, 3 workers)\n"


@pytest.mark.slow
def test_the_admin_service_stays_with_a_worker_until_that_dies(tmp_path: Path) -> None:
    config = replace(config_in(tmp_path), admin_port=7)
    with supervised(config) as supervisor:
        assert supervisor.status.admin is None
        until(supervisor, lambda: supervisor.status.ready == 2)
        first = supervisor.status.admin
        assert first in (0, 1)
        until(supervisor, lambda: f"admin={first}" in last_told(config, first))
        os.kill(pid_of(supervisor, first), signal.SIGKILL)
        until(supervisor, lambda: supervisor.status.admin == 1 - first)
        until(supervisor, lambda: supervisor.status.ready == 2)
        assert supervisor.status.admin == 1 - first  # it does not go back


def test_the_supervisor_ends_with_the_reason_when_no_worker_can_be_started(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_in(tmp_path)
    for slot in range(2):
        give(config, slot, "refuse")
    with supervised(config) as supervisor, pytest.raises(UsageError) as caught:
        until(supervisor, lambda: False)
    assert (caught.value.cause, caught.value.parameter) == ("the fake has no wish to start", "state")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []  # the command says it


@pytest.mark.parametrize(
    ("how", "reason"),
    [("exit", "exit status 3"), ("raise", "exit status 1"), ("9", "killed by SIGKILL"), ("40", "killed by signal 40")],
)
def test_workers_that_die_without_a_word_at_the_start_end_in_one_line(tmp_path: Path, how: str, reason: str) -> None:
    config = config_in(tmp_path)
    for slot in range(2):
        give(config, slot, how)
    with supervised(config) as supervisor, pytest.raises(DmanError) as caught:
        until(supervisor, lambda: False)
    assert str(caught.value) == f"no worker could be started: {reason}; see the messages above"


@pytest.mark.slow
def test_one_worker_that_cannot_start_does_not_keep_the_other_from_serving(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = config_in(tmp_path)
    give(config, 1, "refuse")
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 1 and len(notes(config, "starts-1")) >= 3)
        assert names_of(supervisor) == ["worker_down"]
        assert "the fake has no wish to start" in supervisor.status.problems[0].detail
        line = "worker 1 did not start: the fake has no wish to start; ask it kindly"
        assert any(record.getMessage().startswith(line) for record in caplog.records)
        give(config, 1, "serve")
        until(supervisor, lambda: supervisor.status.ready == 2)
        assert supervisor.status.problems == ()
    assert capsys.readouterr().out.count("serving bundle") == 1


@pytest.mark.slow
def test_a_worker_that_never_becomes_ready_is_killed_and_started_again(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    give(config, 1, "never ready")
    timing = Timing(heartbeat=5.0, start=3.0, first_pause=0.05, longest_pause=0.1, tick=0.01)
    with supervised(config, timing=timing) as supervisor:
        longest = until(supervisor, lambda: len(notes(config, "starts-1")) == 2)
        assert "worker_hung" in names_of(supervisor) and supervisor.status.ready == 1
        assert "is not ready after 3 s" in supervisor.status.problems[0].detail
        give(config, 1, "serve")
        until(supervisor, lambda: supervisor.status.ready == 2)
    first, second = (float(line.split()[1]) for line in notes(config, "starts-1")[:2])
    assert second - first >= 2.0  # it had its time
    assert longest < 1.0 and longest_silence(config, 0) < 1.5  # nobody waited for it


# -- dying -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_killed_again_and_again_comes_back_after_growing_pauses_and_the_other_goes_on(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 2)
        healthy, pauses = pid_of(supervisor, 0), []
        for _ in range(12):  # eleven restarts used to be the end of all
            before = len(notes(config, "starts-1"))
            os.kill(pid_of(supervisor, 1), signal.SIGKILL)
            until(supervisor, lambda: supervisor.slots[1].state is State.WAITING)
            pauses.append(supervisor.slots[1]._next_start - time.monotonic())
            until(supervisor, lambda before=before: len(notes(config, "starts-1")) > before)  # type: ignore[misc]
            until(supervisor, lambda: supervisor.status.ready == 2)
        assert pid_of(supervisor, 0) == healthy and len(notes(config, "starts-0")) == 1
        assert supervisor.status.restarts == 12 and supervisor.status.problems == ()
        until(supervisor, lambda: "ready=2, restarts=12, problems=()" in last_told(config, 0))
        metrics = supervisor._metrics
        assert isinstance(metrics, Recorded)
        assert (metrics.restarted, metrics.names, metrics.numbers) == (12, [], (2, 2))
    assert pauses[0] < 0.07 and all(0.25 < pause < 0.51 for pause in pauses[5:])
    assert longest_silence(config, 0) < 1.5


@pytest.mark.slow
def test_while_one_of_two_crashes_in_a_loop_the_other_serves_all_the_time(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 2)
        give(config, 1, "crash")
        longest = for_seconds(supervisor, 4.0)
        assert len(notes(config, "starts-1")) >= 4
        assert names_of(supervisor) in (["worker_down"], [])  # it serves a moment each time
        assert supervisor.slots[0].state is State.READY and supervisor.slots[0].starts == 1
        assert any("worker_down" in line and "SIGKILL" in line for line in notes(config, "told-0"))
        give(config, 1, "serve")
        until(supervisor, lambda: supervisor.status.ready == 2)
    assert longest < 1.0 and longest_silence(config, 0) < 1.5


def test_pauses_double_up_to_the_longest_and_are_never_twice_the_same() -> None:
    timing = Timing()
    for failures, middle in [(1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (1000, 30.0)]:
        drawn = {timing.pause(failures) for _ in range(50)}
        assert len(drawn) > 40 and min(drawn) >= 0.75 * middle and max(drawn) <= 1.25 * middle


def test_a_worker_that_has_served_for_long_starts_again_after_the_first_pause(tmp_path: Path) -> None:
    config = config_in(tmp_path, workers=1)
    timing = Timing(heartbeat=5.0, first_pause=0.02, longest_pause=5.0, settled=0.3, tick=0.01)
    with supervised(config, timing=timing) as supervisor:
        slot = supervisor.slots[0]
        until(supervisor, lambda: slot.state is State.READY)
        slot.failures = 9  # a bad time, long ago
        for_seconds(supervisor, 0.4)
        os.kill(pid_of(supervisor, 0), signal.SIGKILL)
        until(supervisor, lambda: slot.state is State.WAITING)
        assert slot.failures == 1
        until(supervisor, lambda: slot.state is State.READY)
        os.kill(pid_of(supervisor, 0), signal.SIGKILL)
        until(supervisor, lambda: slot.state is State.WAITING)
        assert slot.failures == 2


@pytest.mark.slow
def test_restarts_leave_no_descriptor_and_no_process_behind(tmp_path: Path) -> None:
    config = config_in(tmp_path, workers=1)
    timing = Timing(first_pause=0.01, longest_pause=0.01, tick=0.01)
    with supervised(config, timing=timing) as supervisor:
        own = psutil.Process()
        until(supervisor, lambda: supervisor.status.ready == 1)
        before = (own.num_fds(), len(own.children()))
        for _ in range(8):
            os.kill(pid_of(supervisor, 0), signal.SIGKILL)
            until(supervisor, lambda: supervisor.status.ready == 0)
            until(supervisor, lambda: supervisor.status.ready == 1)
        assert (own.num_fds(), len(own.children())) == before


def test_a_system_without_processes_left_is_a_failed_start_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 2)

        def refuse(*_: object, **__: object) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        with monkeypatch.context() as patch:
            patch.setattr("multiprocessing.util.spawnv_passfds", refuse)
            os.kill(pid_of(supervisor, 1), signal.SIGKILL)
            until(supervisor, lambda: supervisor.slots[1].failures >= 3)
            assert "cannot start a process: Resource temporarily unavailable" in supervisor.status.problems[0].detail
        until(supervisor, lambda: supervisor.status.ready == 2)


# -- hanging ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGSTOP", "silent"])
def test_a_worker_without_heartbeats_is_killed_and_replaced(tmp_path: Path, how: str) -> None:
    config = config_in(tmp_path)
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 2)
        hung, healthy = pid_of(supervisor, 1), pid_of(supervisor, 0)
        if how == "SIGSTOP":
            os.kill(hung, signal.SIGSTOP)
        else:
            give(config, 1, "silent")
        until(supervisor, lambda: supervisor.slots[1].state is not State.READY, seconds=5)
        assert names_of(supervisor) == ["worker_hung"]
        give(config, 1, "serve")
        until(supervisor, lambda: supervisor.status.ready == 2)
        assert not psutil.pid_exists(hung) and pid_of(supervisor, 0) == healthy
        until(supervisor, lambda: "ready=2, restarts=1, problems=()" in last_told(config, 0))
    assert any("worker_hung" in line and "no sign of life" in line for line in notes(config, "told-0"))


@pytest.mark.slow
def test_a_supervisor_that_was_stopped_itself_kills_nobody(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 2)
        pids = [pid_of(supervisor, slot) for slot in range(2)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # as when a whole container is frozen
        supervisor.step(time.monotonic())  # nothing that they said before is left
        time.sleep(2.7)
        supervisor.step(time.monotonic())
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        for_seconds(supervisor, 1.7)
        assert [pid_of(supervisor, slot) for slot in range(2)] == pids and supervisor.status.restarts == 0


# -- the bundle ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_restarts_only_with_the_bundle_that_the_others_serve(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 2)
        config.bundle.write_text("two")
        os.kill(pid_of(supervisor, 1), signal.SIGKILL)
        until(supervisor, lambda: len(notes(config, "starts-1")) >= 4)
        until(supervisor, lambda: "bundle_changed" in last_told(config, 0))
        problem = supervisor.status.problems[0]
        assert (problem.name, len(supervisor.status.problems)) == ("bundle_changed", 1)
        assert problem.detail == (
            f"the bundle at {config.bundle} is now two, the server serves one; "
            "restart the server to serve it, or put the old one back"
        )
        assert supervisor.status.ready == 1 and len(notes(config, "starts-0")) == 1
        since = problem.since
        failures = supervisor.slots[1].failures
        until(supervisor, lambda: supervisor.slots[1].failures > failures)
        assert supervisor.status.problems[0].since == since  # the same problem, not a new one
        config.bundle.write_text("one")
        until(supervisor, lambda: supervisor.status.ready == 2 and not supervisor.status.problems)
    assert longest_silence(config, 0) < 1.5


@pytest.mark.slow
def test_of_workers_that_started_with_different_bundles_the_first_one_counts(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    give(config, 1, "impostor")  # as if the bundle were replaced while the two start
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 1 and names_of(supervisor) == ["bundle_changed"])
        serving = next(slot for slot in supervisor.slots if slot.state is State.READY)
        assert serving.ready is not None and serving.ready.bundle_id == supervisor.bundle_id
        for_seconds(supervisor, 0.5)
        assert supervisor.status.ready == 1 and serving.starts == 1


# -- stopping --------------------------------------------------------------------------------------------------------


def run_in_thread(supervisor: Supervisor) -> tuple[threading.Thread, threading.Event]:
    """`run`, with an event in place of a signal."""
    stop = threading.Event()
    thread = threading.Thread(target=supervisor.run, args=(stop,))
    thread.start()
    return thread, stop


@pytest.mark.slow
def test_workers_that_do_not_stop_are_killed_after_the_grace_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dman_runtime.serving.supervisor.EXTRA_GRACE", 0.5)
    config = config_in(tmp_path, grace=0.5)
    with supervised(config, stubborn) as supervisor:
        thread, stop = run_in_thread(supervisor)
        deadline = time.monotonic() + 20
        while supervisor.status.ready < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        pids = [pid_of(supervisor, slot) for slot in range(2)]
        asked = time.monotonic()
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
        assert 0.9 < time.monotonic() - asked < 3.0  # for both together, not for each
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert alive == []


def test_workers_that_stop_are_not_waited_for(tmp_path: Path) -> None:
    config = config_in(tmp_path, grace=60.0)
    with supervised(config) as supervisor:
        thread, stop = run_in_thread(supervisor)
        deadline = time.monotonic() + 20
        while supervisor.status.ready < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        asked = time.monotonic()
        stop.set()
        thread.join(10)
        assert not thread.is_alive() and time.monotonic() - asked < 3.0


# -- logs ------------------------------------------------------------------------------------------------------------


def test_workers_write_in_the_format_of_the_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = replace(config_in(tmp_path), log_format="json")
    give(config, 0, "log")
    give(config, 1, "raise")
    with supervised(config) as supervisor:
        until(supervisor, lambda: supervisor.status.ready == 1 and supervisor.slots[1].failures > 1)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert any(line["message"] == "a line" and line["event"] == "faked" for line in lines)
    assert any(line["level"] == "CRITICAL" and "ValueError: two\nlines" in line["exception"] for line in lines)
