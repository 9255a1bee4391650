"""Workers that die, hang, or cannot start again: the others go on."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tools.faults.attacks import StoppedWorker
from tools.faults.honest import recommend, status_of
from tools.faults.servers import wait_until

from .conftest import Start

pytestmark = pytest.mark.slow


def test_a_worker_that_cannot_start_again_leaves_the_others_serving(start: Start, own_bundle: Path) -> None:
    """The bundle on disk has become one that does not open."""
    began = time.monotonic()
    server = start("--workers 2", bundle=own_bundle)
    eleven_starts = 13 * (time.monotonic() - began)  # a supervisor without pauses gives up by then
    victim, healthy = server.workers()
    own_bundle.rename(own_bundle.with_name("moved"))
    victim.kill()
    deadline = time.monotonic() + max(12.0, eleven_starts)
    while time.monotonic() < deadline:
        assert server.running() and healthy.is_running()
        assert wait_until(lambda: status_of(server.address, recommend) == "OK", seconds=2)
        time.sleep(0.2)


def test_a_worker_that_hangs_is_replaced(start: Start) -> None:
    server = start("--workers 2")
    hung, _ = server.workers()

    def replaced() -> bool:
        return not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE

    with StoppedWorker(hung.pid):
        assert wait_until(replaced, seconds=25)
        assert wait_until(lambda: len(server.workers()) == 2, seconds=20)
        served = [status_of(server.address, recommend, seconds=5) for _ in range(10)]  # each on its own connection
    assert served == ["OK"] * 10
