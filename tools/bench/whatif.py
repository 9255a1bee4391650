"""How much long what-if requests slow down the updates of other users.

A what-if sends events with a `Recommend` request. The server applies them for that request only. With 10,000 events it
takes long, and the updates of other users must not wait for all of it.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import grpc

from dman_runtime.errors import UsageError
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.blocks import WARM_UP_CALLS, Block, Spread, beside, clean, run_block, summary
from tools.bench.report import Claim, Section
from tools.bench.servers import connect
from tools.bench.setting import CLIENTS, QUICK, Bench, K, Sizes
from tools.loadgen import update_operation

WHAT_IFS = 10  # at once
MAX_RATIO = 3.0  # update p99 during what-ifs by quiet update p99
CALL_SECONDS = 120.0  # deadline of one call: a server that never interrupts a what-if lets updates wait for seconds
READY_SECONDS = 120.0  # for the process that sends what-ifs to start and connect
SETTLE_SECONDS = 0.3  # from sending the what-ifs until the server certainly works on them
CLIENT_COUNTS = (1, CLIENTS)
HEADS = ("clients", "phase", "updates", "p50 ms", "p99 ms", "max ms", "p99 by quiet p99")
METHOD = (
    "Quiet phases alternate with phases in which {what_ifs} what-ifs of {events} events are always running: when one "
    "is answered, it is sent again. They come from a process of their own, so that they do not take the Python lock "
    "of the clients whose updates are timed. All processes share {cores} cores. Each round has both phases, with one "
    "client and with {clients}; a phase ends after {calls} updates, or after {seconds:g} s and the updates then "
    "running. The users who are updated send no what-ifs."
)


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 5
    calls: int = 300  # updates in a phase, all clients together
    seconds: float = 20.0  # no update starts later than this in a phase
    events: int = 10_000  # in one what-if

    @staticmethod
    def of(sizes: Sizes) -> Effort:
        return QUICK_EFFORT if sizes == QUICK else Effort()


QUICK_EFFORT = Effort(rounds=2, calls=40, seconds=2.0, events=1000)


@dataclass
class Found:
    """What was measured on one server. Lists have one block per round."""

    quiet: dict[int, list[Block]] = field(default_factory=lambda: {clients: [] for clients in CLIENT_COUNTS})
    during: dict[int, list[Block]] = field(default_factory=lambda: {clients: [] for clients in CLIENT_COUNTS})
    what_if_seconds: list[float] = field(default_factory=list)

    def ratio(self, clients: int) -> Spread:
        """Update p99 during what-ifs by quiet update p99, round by round."""
        pairs = zip(self.during[clients], self.quiet[clients], strict=True)
        return Spread(tuple(during.p99 / quiet.p99 for during, quiet in pairs))

    def checked(self) -> Found:
        """Raises UsageError when an update failed."""
        clean({f"update with {clients} clients": blocks for clients, blocks in self.quiet.items()})
        clean({f"update during what-ifs, {clients} clients": blocks for clients, blocks in self.during.items()})
        return self


def updates_during_what_ifs(bench: Bench) -> Section:
    """Updates of other users while ten long what-ifs run, against updates of a quiet server."""
    effort = Effort.of(bench.sizes)
    with bench.server("what-ifs") as server:
        found = measure(bench, {"server": server.address}, effort)["server"]
    return Section(
        "Updates during what-ifs",
        f"{method(effort)} {what_if_text(found)}",
        claims(found, effort),
        HEADS,
        rows(found),
        data(found),
    )


# -- the measurement -------------------------------------------------------------------------------------------------


def measure(bench: Bench, addresses: Mapping[str, str], effort: Effort) -> dict[str, Found]:
    """Measures servers by name. They take turns, so that all of them see the same machine.

    Raises UsageError when a call fails.
    """
    found = {name: Found() for name in addresses}
    with ExitStack() as stack:
        opened = {name: stack.enter_context(_opened(bench, address, effort)) for name, address in addresses.items()}
        for turn in range(effort.rounds):
            names = list(addresses)[:: 1 if turn % 2 == 0 else -1]
            for clients in CLIENT_COUNTS:
                for name in names:
                    opened[name].round(found[name], clients, effort, quiet_first=turn % 2 == 0)
    return {name: one.checked() for name, one in found.items()}


@dataclass(frozen=True)
class _Opened:
    """A server with connected clients and a process that sends what-ifs."""

    clients: Mapping[int, Callable[[int, float], Block]]  # client threads -> (calls, seconds) -> block
    what_ifs: WhatIfSender

    def round(self, found: Found, clients: int, effort: Effort, *, quiet_first: bool) -> None:
        update = self.clients[clients]
        if quiet_first:
            found.quiet[clients].append(update(effort.calls, effort.seconds))
        with self.what_ifs.running(found.what_if_seconds):
            found.during[clients].append(update(effort.calls, effort.seconds))
        if not quiet_first:
            found.quiet[clients].append(update(effort.calls, effort.seconds))


@contextmanager
def _opened(bench: Bench, address: str, effort: Effort) -> Iterator[_Opened]:
    users = bench.ordinary_users(address)
    senders, others = users[:WHAT_IFS], users[WHAT_IFS:]
    histories = {user: bench.history(f"what-if of {user}", effort.events) for user in senders}
    with ExitStack() as stack:
        what_ifs = stack.enter_context(what_if_sender(address, histories))
        clients = {count: _clients(stack, bench, address, others, count) for count in CLIENT_COUNTS}
        yield _Opened(clients, what_ifs)


def _clients(
    stack: ExitStack, bench: Bench, address: str, users: Sequence[str], count: int
) -> Callable[[int, float], Block]:
    """Client threads that are connected and warm; the result runs updates with them."""
    operations = []
    for number in range(count):
        chooser, channel = random.Random(number), stack.enter_context(connect(address))
        update = update_operation(
            channel, functools.partial(chooser.choice, users), functools.partial(chooser.choice, bench.items)
        )
        send = functools.partial(RecommenderStub(channel).Update, timeout=CALL_SECONDS)
        operations.append(replace(update, send=send))
    pool = stack.enter_context(ThreadPoolExecutor(count)) if count > 1 else None

    def run(calls: int, seconds: float) -> Block:
        return run_block(operations, calls, time.perf_counter() + seconds, pool)

    run(WARM_UP_CALLS * count, CALL_SECONDS)
    return run


# -- the process that sends what-ifs ---------------------------------------------------------------------------------


class WhatIfSender:
    """A process that keeps one what-if per user running while it is told to."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    @contextmanager
    def running(self, seconds: list[float]) -> Iterator[None]:
        """What-ifs run inside the block. Afterwards the server is quiet, and `seconds` has the time of each what-if.

        Raises UsageError when a what-if fails.
        """
        self._ask("start", READY_SECONDS)
        time.sleep(SETTLE_SECONDS)
        try:
            yield
        finally:
            answer = self._ask("stop", 2 * CALL_SECONDS)
        seconds.extend(answer)

    def _ask(self, word: str, seconds: float) -> list[float]:
        """The answer of the process: the seconds of each what-if, once these have stopped."""
        try:
            self._pipe.send(word)
            answer = self._pipe.recv() if self._pipe.poll(seconds) else f"no answer after {seconds:g} s"
        except (OSError, EOFError):
            answer = "the process that sends them has died"
        if isinstance(answer, str):
            raise UsageError(f"what-ifs failed while measuring: {answer}")
        return answer


@contextmanager
def what_if_sender(address: str, histories: Mapping[str, Sequence[str]]) -> Iterator[WhatIfSender]:
    """Starts the process; `histories` has the item ids of one what-if per user."""
    with beside(_send_what_ifs, address, histories) as pipe:
        yield WhatIfSender(pipe)


def _send_what_ifs(pipe: Connection, address: str, histories: Mapping[str, Sequence[str]]) -> None:
    """Main function of the process. Between "start" and "stop" all what-ifs are sent again and again."""
    stopped = threading.Event()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(histories)))
        stack.callback(stopped.set)  # runs before the pool waits for its threads
        try:
            sends = [_connected(stack, address, user, items) for user, items in histories.items()]
            while pipe.recv() == "start":
                stopped.clear()
                waiting = [pool.submit(_repeat, send, stopped) for send in sends]
                pipe.send([])
                pipe.recv()
                stopped.set()
                pipe.send([seconds for future in waiting for seconds in future.result()])
        except (EOFError, BrokenPipeError):
            pass  # the parent has finished or died
        except grpc.FutureTimeoutError:
            pipe.send(f"no server answers on {address}")
        except grpc.RpcError as error:
            pipe.send(f"{error.code().name}: {error.details()}")


def _connected(stack: ExitStack, address: str, user: str, items: Sequence[str]) -> Callable[[], object]:
    """Sends one what-if, over a connection of its own that is open already."""
    channel = stack.enter_context(connect(address))
    grpc.channel_ready_future(channel).result(timeout=READY_SECONDS / 2)
    events = [pb.Event(item_id=item) for item in items]
    request = pb.RecommendRequest(user_id=user, k=K, what_if_events=events)
    return functools.partial(RecommenderStub(channel).Recommend, request, timeout=CALL_SECONDS)


def _repeat(send: Callable[[], object], stopped: threading.Event) -> list[float]:
    """Seconds of each what-if; at least one is sent."""
    taken: list[float] = []
    while not (taken and stopped.is_set()):
        began = time.perf_counter()
        send()
        taken.append(time.perf_counter() - began)
    return taken


# -- what it says ----------------------------------------------------------------------------------------------------


def method(effort: Effort) -> str:
    return METHOD.format(
        what_ifs=WHAT_IFS,
        events=f"{effort.events:,}",
        cores=len(os.sched_getaffinity(0)),
        clients=CLIENTS,
        calls=effort.calls,
        seconds=effort.seconds,
    )


def what_if_text(found: Found) -> str:
    seconds = Spread(tuple(found.what_if_seconds))
    return f"{len(seconds.values)} what-ifs were answered; seconds of one: {seconds}."


def claims(found: Found, effort: Effort) -> list[Claim]:
    """One claim for one client, one for several."""
    made = []
    for clients in CLIENT_COUNTS:
        ratio = found.ratio(clients)
        during, quiet = (summary("", blocks) for blocks in (found.during[clients], found.quiet[clients]))
        measured = f"{ratio.median:.2f}x ({during.p99:.1f} ms by {quiet.p99:.1f} ms)"
        if during.count < effort.rounds * effort.calls:
            measured += f", of the {during.count} updates that the time allowed"
        made.append(
            Claim(
                f"update p99 during ten what-ifs of {effort.events:,} events by quiet p99, {_clients_text(clients)}",
                measured,
                f"<= {MAX_RATIO:g}x",
                ratio.median <= MAX_RATIO,
            )
        )
    return made


def rows(found: Found) -> list[list[str]]:
    """One row per number of clients and phase."""
    made = []
    for clients in CLIENT_COUNTS:
        phases = {"quiet": found.quiet[clients], "during what-ifs": found.during[clients]}
        for phase, blocks in phases.items():
            one = summary(phase, blocks)
            times = [f"{value:.2f}" for value in (one.p50, one.p99, one.max)]
            made.append([str(clients), phase, str(one.count), *times, "1" if phase == "quiet" else ""])
        made[-1][-1] = str(found.ratio(clients))
    return made


def data(found: Found) -> dict[str, Any]:
    return {
        "what_if_seconds": found.what_if_seconds,
        "clients": {
            str(clients): {
                "ratio": found.ratio(clients).values,
                "quiet": summary("quiet", found.quiet[clients]).as_json(),
                "during": summary("during", found.during[clients]).as_json(),
            }
            for clients in CLIENT_COUNTS
        },
    }


def _clients_text(clients: int) -> str:
    return f"{clients} client{'s' * (clients > 1)}"
