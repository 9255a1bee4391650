"""What is wrong now: what is kept, in which order, and what the log says of it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dman_runtime.problems import Problems


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_a_problem_is_logged_once_when_it_comes_and_once_when_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems()
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            problems.set("disk_full", "free some")
        for _ in range(5):
            problems.set("disk_full", "")
    assert lines(caplog) == [(logging.ERROR, "disk_full: free some"), (logging.INFO, "disk_full is over")]
    assert [record.problem for record in caplog.records] == ["disk_full"] * 2  # type: ignore[attr-defined]
    assert problems.now() == []


def test_a_problem_whose_detail_changes_is_the_same_problem(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems()
    problems.set("disk_full", "9 MiB left")
    (before,) = problems.now()
    time.sleep(0.01)
    problems.set("disk_full", "8 MiB left")
    (after,) = problems.now()
    assert (after.detail, after.since) == ("8 MiB left", before.since)
    assert len(caplog.records) == 1


def test_a_problem_may_begin_to_block_and_end_to(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems()
    for blocking in (False, True, False):
        problems.set("store_damaged", "the same words", blocking=blocking)
        assert problems.blocking == blocking


def test_blocking_problems_come_first_and_then_the_oldest() -> None:
    problems = Problems()
    assert not problems.blocking
    for name, blocking in (("old", False), ("new", False), ("old_block", True), ("new_block", True)):
        problems.set(name, "x", blocking=blocking)
        time.sleep(0.002)
    assert [problem.name for problem in problems.now()] == ["old_block", "new_block", "old", "new"]
    assert problems.blocking


def test_the_end_of_what_was_no_problem_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Problems().set("disk_full", "")
    assert caplog.records == []


def test_problems_come_and_go_on_many_threads(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems()

    def work(number: int) -> None:
        for n in range(200):
            problems.set(f"p{number}", "x" if n % 2 == 0 else "", blocking=True)
            problems.now()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert problems.now() == []
