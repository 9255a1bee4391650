"""Bounded closed-loop load on a `Recommender`, with an empty echo measured in the same run.

    python -m tools.loadgen --target localhost:50051 --users 100 --requests 5000 --concurrency 8

Blocks of echo, recommend and update calls take turns, so that all three see the same machine. Every thread sends its
next request when the last one was answered; a wrong answer counts as an error. Updates are really stored, under user
ids that begin with --prefix. Targets are loopback addresses only: load is for one's own server.
"""

from __future__ import annotations

import argparse
import functools
import ipaddress
import random
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import open_bundle
from dman_runtime.options import Parser, print_json, require_positive, run_command
from dman_runtime.requests import MAX_K
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.blocks import Block, Operation, Plan, Summary, run_in_processes, split, summary
from tools.bench.servers import ECHO_METHOD, ECHO_SERVICE, connect, echo_server

CALL_SECONDS, SETUP_SECONDS = 10.0, 60.0  # deadlines of one measured call and of one call that prepares users
USERS_PER_SETUP_CALL, MAX_EVENTS_PER_SETUP_CALL = 100, 10_000
MIX = "recommend=0.8,update=0.2"


# -- the three operations --------------------------------------------------------------------------------------------


def echo_operation(channel: grpc.Channel) -> Operation:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{ECHO_SERVICE}/{ECHO_METHOD}")
    return Operation("echo", lambda: b"", functools.partial(call, timeout=CALL_SECONDS), lambda _, reply: reply == b"")


def recommend_operation(channel: grpc.Channel, choose_user: Callable[[], str], *, k: int) -> Operation:
    stub = RecommenderStub(channel)
    return Operation(
        "recommend",
        lambda: pb.RecommendRequest(user_id=choose_user(), k=k),
        functools.partial(stub.Recommend, timeout=CALL_SECONDS),
        lambda _, reply: reply.source == pb.SOURCE_PERSONALIZED,
    )


def update_operation(
    channel: grpc.Channel, choose_user: Callable[[], str], choose_item: Callable[[], str]
) -> Operation:
    """One event, with a request id as the SDK sends it."""
    stub = RecommenderStub(channel)
    return Operation(
        "update",
        lambda: pb.UpdateRequest(
            user_id=choose_user(), events=[pb.Event(item_id=choose_item(), timestamp=1)], request_id=uuid.uuid4().hex
        ),
        functools.partial(stub.Update, timeout=CALL_SECONDS),
        lambda _, reply: reply.applied == 1,
    )


def add_events(channel: grpc.Channel, histories: Mapping[str, Sequence[str]], *, since: int = 0) -> None:
    """Stores events for users before a measurement, many at a time; a minute apart from a second on, 0 for no times."""
    stub = RecommenderStub(channel)
    waiting: list[pb.UpdateRequest] = []
    for user, items in histories.items():
        for start in range(0, len(items), MAX_EVENTS_PER_SETUP_CALL):
            part = items[start : start + MAX_EVENTS_PER_SETUP_CALL]
            times = range(since + 60 * start, since + 60 * (start + len(part)), 60) if since else [0] * len(part)
            events = [pb.Event(item_id=item, timestamp=at) for item, at in zip(part, times, strict=True)]
            waiting.append(pb.UpdateRequest(user_id=user, events=events))
            if len(waiting) == USERS_PER_SETUP_CALL or len(events) == MAX_EVENTS_PER_SETUP_CALL:
                stub.BatchUpdate(pb.BatchUpdateRequest(updates=waiting), timeout=SETUP_SECONDS)
                waiting = []
    stub.BatchUpdate(pb.BatchUpdateRequest(updates=waiting), timeout=SETUP_SECONDS)


# -- the load --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What to send where; picklable, since every process opens its own channels."""

    target: str
    echo: str  # address of the empty echo
    users: Sequence[str]
    items: Sequence[str]
    plan: Plan
    k: int = 10


def run_load(load: Load, *, processes: int = 1) -> dict[str, list[Block]]:
    """All blocks by operation, in the order in which they ran."""
    return run_in_processes(load.plan, functools.partial(_operations, load), processes)


def _operations(load: Load, stack: ExitStack, thread: int, names: Sequence[str]) -> list[Operation]:
    """The operations of one client thread, each thread with its own connections and its own random choices."""
    chooser = random.Random(thread)
    target, echo = (stack.enter_context(connect(address)) for address in (load.target, load.echo))
    choose_user = functools.partial(chooser.choice, load.users)
    choose_item = functools.partial(chooser.choice, load.items)
    operations = {
        "echo": echo_operation(echo),
        "recommend": recommend_operation(target, choose_user, k=load.k),
        "update": update_operation(target, choose_user, choose_item),
    }
    return [operations[name] for name in names]


def load_plan(mix: Mapping[str, float], *, requests: int, concurrency: int, seconds: float = 3600.0) -> Plan:
    """`requests` shared out by `mix`, and as many echoes as the most frequent operation."""
    counts = dict(zip(mix, split(requests, list(mix.values())), strict=True))
    counts = {name: count for name, count in counts.items() if count}
    return Plan({"echo": max(counts.values()), **counts}, concurrency=concurrency, seconds=seconds)


# -- the command -----------------------------------------------------------------------------------------------------


def loopback_target(text: str) -> str:
    """HOST:PORT, where HOST is localhost or a loopback address. Raises UsageError for all else."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--target is {text!r}; give HOST:PORT, such as localhost:50051")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UsageError(f"--target is {text!r}; load is sent to this machine only: localhost, 127.0.0.1 or [::1]")
    return text


def parse_mix(text: str) -> dict[str, float]:
    """`recommend=0.8,update=0.2` as shares that add up to 1. Raises UsageError."""
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if name not in ("recommend", "update") or name in mix or not 0 <= value < float("inf"):
            raise UsageError(f"--mix is {text!r}; give shares such as {MIX}")
        mix[name] = value
    total = sum(mix.values())
    if not total:
        raise UsageError(f"--mix is {text!r}; give at least one share above 0")
    return {name: value / total for name, value in mix.items()}


def _parser() -> Parser:
    p = Parser(prog="python -m tools.loadgen", description="Bounded closed-loop load on a server on this machine.")
    p.add_argument("--target", default="localhost:50051", help="the server; loopback addresses only")
    p.add_argument("--users", type=int, default=100, help="users to send requests for")
    p.add_argument("--events", type=int, default=40, help="events that every user is given before the measurement")
    p.add_argument("--prefix", default="loadgen-", help="what the ids of these users begin with")
    p.add_argument("--requests", type=int, default=2000, help="requests to the server; echoes come on top")
    p.add_argument("--concurrency", type=int, default=8, help="client threads, of all processes together")
    p.add_argument("--processes", type=int, default=1, help="client processes")
    p.add_argument("--seconds", type=float, default=60.0, help="stop this long after the warm-up at the latest")
    p.add_argument("--mix", default=MIX, help="shares of the operations")
    p.add_argument("--k", type=int, default=10, help="items per recommendation")
    p.add_argument("--bundle", type=Path, default=None, help="sample the items of this bundle; else popular items")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def _check(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "users", "events", "requests", "concurrency", "processes")
    if not 1 <= arguments.k <= MAX_K:
        raise UsageError(f"--k is {arguments.k}; choose 1 to {MAX_K}")
    if not 0 < arguments.seconds <= 86_400:
        raise UsageError(f"--seconds is {arguments.seconds}; choose more than 0 and at most 86400")
    if arguments.processes > arguments.concurrency:
        raise UsageError("--processes is larger than --concurrency; every process needs a thread")


def _prepare(target: str, arguments: argparse.Namespace, users: Sequence[str]) -> list[str]:
    """Gives every user a history; returns the item ids to send. Raises UsageError when the server does not answer."""
    with connect(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CALL_SECONDS)
            if arguments.bundle is not None:
                items = open_bundle(arguments.bundle).items.item_ids
            else:
                popular = RecommenderStub(channel).Recommend(pb.RecommendRequest(k=MAX_K), timeout=CALL_SECONDS)
                items = [item.item_id for item in popular.items]
            chooser = random.Random(0)
            add_events(channel, {user: chooser.choices(items, k=arguments.events) for user in users})
        except grpc.FutureTimeoutError:
            raise UsageError(f"no server answers on {target}; start one with dman-runtime serve") from None
        except grpc.RpcError as error:
            raise UsageError(f"the server on {target} refused to store users: {_details(error)}") from None
    return items


def _details(error: Any) -> str:
    return f"{error.code().name}: {error.details()}"


def _table(summaries: Sequence[Summary]) -> str:
    floor = next(one.p50 for one in summaries if one.name == "echo")
    heads = ("p50 ms", "p90 ms", "p99 ms", "max ms", "p50/echo")
    lines = [f"{'':10}{'count':>9}{'errors':>8}{'req/s':>9}" + "".join(f"{head:>10}" for head in heads)]
    for one in summaries:
        counts = f"{one.name:10}{one.count:9}{sum(one.errors.values()):8}{one.per_second:9.0f}"
        times = (one.p50, one.p90, one.p99, one.max)
        lines.append(counts + "".join(f"{value:10.3f}" for value in times) + f"{one.p50 / floor:10.2f}")
    for one in summaries:
        lines += [f"{one.name}: {count} x {status}" for status, count in sorted(one.errors.items())]
    return "\n".join(lines)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    _check(arguments)
    target, mix = loopback_target(arguments.target), parse_mix(arguments.mix)
    plan = load_plan(mix, requests=arguments.requests, concurrency=arguments.concurrency, seconds=arguments.seconds)
    users = [f"{arguments.prefix}{number}" for number in range(arguments.users)]
    items = _prepare(target, arguments, users)
    with echo_server() as echo:
        load = Load(target, echo.address, users, items, plan, k=arguments.k)
        blocks = run_load(load, processes=arguments.processes)
    summaries = [summary(name, of_name) for name, of_name in blocks.items()]
    print(_table(summaries))
    if arguments.json:
        print_json({one.name: one.as_json() for one in summaries})
    return 1 if any(one.errors for one in summaries) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a call failed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
