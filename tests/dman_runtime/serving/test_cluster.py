"""The pipe between a supervisor and a worker: nobody ever waits, and nobody gets half a message."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from dman_runtime.errors import BundleError, UsageError
from dman_runtime.problems import ClusterStatus, Problem
from dman_runtime.serving.cluster import Assignment, Beat, Ready, WorkerPipe, drain, offer

STATUS = ClusterStatus(2, 1, 3, (Problem("worker_down", "worker 1: killed by SIGKILL", 12.5),))


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with ours, theirs:
        yield ours, theirs


def worker_pipe(connection: Connection) -> WorkerPipe:
    return WorkerPipe(connection, Assignment(0))


def test_what_a_worker_says_arrives_in_order(ends: tuple[Connection, Connection]) -> None:
    pipe = worker_pipe(ends[1])
    pipe.ready("one", "cpu", "two")
    pipe.beat({"requests": 3})
    pipe.failed(UsageError("a cause", "a remedy", parameter="port"))
    messages, ended = drain(ends[0])
    assert messages[:2] == [Ready("one", "cpu", "two"), Beat({"requests": 3})] and not ended
    assert isinstance(messages[2], UsageError) and messages[2].parameter == "port"
    assert drain(ends[0]) == ([], False)


def test_a_worker_gets_the_newest_status_only(ends: tuple[Connection, Connection]) -> None:
    pipe = worker_pipe(ends[1])
    assert pipe.receive() is None
    for restarts in range(3):
        assert offer(ends[0], ClusterStatus(2, 2, restarts, ()))
    assert offer(ends[0], STATUS)
    assert pipe.receive() == STATUS and pipe.receive() is None


def test_beats_into_a_full_pipe_are_left_out_at_once_and_those_before_are_whole(
    ends: tuple[Connection, Connection],
) -> None:
    pipe = worker_pipe(ends[1])
    started = time.monotonic()
    for number in range(2000):  # a megabyte or more: no pipe holds that
        pipe.beat({"number": number, "text": "x" * 1000})
    assert time.monotonic() - started < 5
    messages, ended = drain(ends[0])
    assert [beat.status["number"] for beat in messages] == list(range(len(messages))) and not ended
    assert 0 < len(messages) < 2000
    pipe.beat({"number": -1})  # there is room again
    assert drain(ends[0])[0] == [Beat({"number": -1})]


def test_a_message_that_may_not_fit_whole_is_left_out(ends: tuple[Connection, Connection]) -> None:
    worker_pipe(ends[1]).beat({"text": "x" * 9000})
    assert drain(ends[0]) == ([], False)


def test_a_long_error_arrives_short(ends: tuple[Connection, Connection]) -> None:
    error = BundleError("\N{GRINNING FACE}" * 5000, "\N{GRINNING FACE}" * 5000)
    worker_pipe(ends[1]).failed(error)
    (found,), _ = drain(ends[0])
    assert isinstance(found, BundleError) and error.cause.startswith(found.cause) and len(found.cause) >= 500


def test_the_end_of_a_pipe_is_noticed_after_what_came_before(ends: tuple[Connection, Connection]) -> None:
    supervisor, worker = ends
    pipe = worker_pipe(worker)
    offer(supervisor, STATUS)
    supervisor.close()
    assert pipe.receive() == STATUS
    with pytest.raises(EOFError):
        pipe.receive()
    pipe.beat({})  # nobody is there to hear it
    pipe.ready("one", "cpu", "two")


def test_half_a_message_of_a_killed_worker_is_its_end(ends: tuple[Connection, Connection]) -> None:
    os.write(ends[1].fileno(), b"\0\0\0\x10half")
    ends[1].close()
    assert drain(ends[0]) == ([], True)


def test_bytes_that_are_no_message_are_the_end(ends: tuple[Connection, Connection]) -> None:
    for data in (b"\xffnot a pickle", b"cno.such.module\nname\n.", b""):
        ends[1].send_bytes(data)
        assert drain(ends[0]) == ([], True)


def test_status_and_assignment_survive_the_way_to_another_process() -> None:
    for value in (STATUS, Assignment(3, "one", Path("metrics"))):
        assert pickle.loads(pickle.dumps(value)) == value


def test_a_bundle_is_checked_against_what_the_others_serve() -> None:
    Assignment(0).check_bundle(Path("bundle"), "any")
    Assignment(0, "one").check_bundle(Path("bundle"), "one")
    with pytest.raises(BundleError) as caught:
        Assignment(0, "one").check_bundle(Path("bundle"), "two")
    assert str(caught.value) == (
        "the bundle at bundle is now two, the server serves one; "
        "restart the server to serve it, or put the old one back"
    )
