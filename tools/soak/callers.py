"""Honest callers in a process of their own, so that an attack in this one does not slow them down."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Self

import grpc

from sdk import Client, DmanError
from tools.bench.servers import connect
from tools.faults.honest import health, status_of

PAUSE_SECONDS = 0.005  # between the calls of one caller: they are there to measure, not to load
CALL_SECONDS, RETRIES = 10.0, 5
USERS, EVENTS = 200, 40
_END_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One call: when it began, as time.monotonic() says; how long it took; the error's name, or "" for none."""

    call: str
    began: float
    milliseconds: float
    error: str = ""


class HonestCallers:
    """`threads` callers with their own connections: recommend, update and health checks in turn, until the block ends.

    `samples` holds all calls then.
    """

    def __init__(self, address: str, items: Sequence[str], *, threads: int = 4, updates: bool = True) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(address, items, threads, updates, theirs), daemon=True)
        self.samples: list[Sample] = []

    def __enter__(self) -> Self:
        self._process.start()
        if self._pipe.recv() != "ready":
            raise RuntimeError("the honest callers did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send("enough")
        if self._pipe.poll(_END_SECONDS):
            self.samples = self._pipe.recv()
        self._process.join(_END_SECONDS)


def _run(address: str, items: Sequence[str], threads: int, updates: bool, pipe: Connection) -> None:
    samples: list[Sample] = []
    over = threading.Event()
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(address, timeout=CALL_SECONDS, retries=RETRIES)) for _ in range(threads)]
        chooser = random.Random(0)
        for start in range(0, USERS, 50):
            users = range(start, min(start + 50, USERS))
            clients[0].update_many([(f"honest {n}", chooser.choices(items, k=EVENTS)) for n in users], timeout=60)
        running = [
            threading.Thread(target=_calls, args=(client, number, items, updates, over, samples))
            for number, client in enumerate(clients)
        ]
        for thread in running:
            thread.start()
        pipe.send("ready")
        pipe.recv()
        over.set()
        for thread in running:
            thread.join()
    pipe.send(samples)


def _calls(
    client: Client, number: int, items: Sequence[str], updates: bool, over: threading.Event, samples: list[Sample]
) -> None:
    chooser = random.Random(number)
    with connect(client.target) as channel:
        calls: dict[str, Callable[[], object]] = {
            "recommend": lambda: client.recommend(f"honest {chooser.randrange(USERS)}"),
            "update": lambda: client.update(f"honest {chooser.randrange(USERS)}", [chooser.choice(items)]),
            "health": lambda: _health(channel),
        }
        if not updates:
            del calls["update"]
        while not over.is_set():
            for name, call in calls.items():
                samples.append(_timed(name, call))
                time.sleep(PAUSE_SECONDS)


def _health(channel: grpc.Channel) -> None:
    """Tries again where a connection breaks, as the SDK does."""
    for tries_left in reversed(range(RETRIES + 1)):
        try:
            health(channel, CALL_SECONDS)
        except grpc.RpcError as error:
            if not tries_left or error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(0.1)
        else:
            return


def _timed(name: str, call: Callable[[], object]) -> Sample:
    began, error = time.monotonic(), ""
    try:
        call()
    except grpc.RpcError as failure:
        error = failure.code().name
    except (DmanError, ValueError) as failure:
        error = type(failure).__name__
    return Sample(name, began, 1000 * (time.monotonic() - began), error)


def ready(address: str, *, seconds: float) -> bool:
    """Whether the server says within so many seconds that it serves."""
    deadline = time.monotonic() + seconds
    while status_of(address, health) != "OK":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
