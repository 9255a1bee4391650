"""Where the time of one request goes, by kind: measured inside a server, beside what its client sees."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter_ns

import grpc
import numpy as np

from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.blocks import WARM_UP_CALLS, Operation
from tools.bench.messages import NOW
from tools.bench.report import Section
from tools.bench.servers import connect, traced_server
from tools.bench.setting import Bench, K
from tools.bench.traced import HANDLER, NAMES
from tools.loadgen import CALL_SECONDS, echo_operation, recommend_operation, update_operation

WHAT_IF_EVENTS, BATCH = 10, 64
OUTSIDE, REST = "gRPC, kernel and client", "the rest of the handler"


@dataclass
class Kind:
    """One kind of request: what its client saw, and where the server's time went. Microseconds."""

    round_trip: float  # p50
    stages: Mapping[str, float]  # p50 of each stage, over the calls


def breakdown(bench: Bench) -> Section:
    """One request of each kind, taken apart."""
    trace = bench.scratch / "trace.npy"
    calls = bench.sizes.kind_calls
    seen = dict[str, list[tuple[int, int]]]()
    with traced_server(bench.bundle.path, bench.scratch / "traced", trace, "--provider", bench.provider) as server:
        users = bench.ordinary_users(server.address)
        with connect(server.address) as channel, connect(bench.echo) as echo:
            kinds = _kinds(channel, bench, users)
            for operation in (*kinds, echo_operation(echo)):
                _calls(operation, WARM_UP_CALLS)
                seen[operation.name] = _calls(operation, calls)
    found = np.load(trace)
    taken_apart = {kind.name: _taken_apart(found, seen[kind.name]) for kind in kinds}
    stages = [name for name in NAMES if name != HANDLER and any(kind.stages[name] for kind in taken_apart.values())]
    echo_us = _p50(seen["echo"])
    return Section(
        "Where the time goes",
        "One request at a time, by a client in Python, to a server whose functions are timed (`tools.bench.traced`): "
        f"medians of {calls} calls in microseconds. Each line is what its functions take themselves; timing them takes "
        "about a microsecond each, so this server is a little slower than the others here. Medians do not add up "
        f"exactly. {REST.capitalize()} is Python between the stages, the event loop, and handing over between threads; "
        f"{OUTSIDE} is what the client saw beyond the handler. An empty echo takes {echo_us:.0f} microseconds in all.",
        [],
        ("stage", *taken_apart),
        [[stage, *(f"{kind.stages[stage]:.0f}" for kind in taken_apart.values())] for stage in (*stages, REST, OUTSIDE)]
        + [["**what the client sees**", *(f"**{kind.round_trip:.0f}**" for kind in taken_apart.values())]],
        {name: {"round_trip": kind.round_trip, **kind.stages} for name, kind in taken_apart.items()},
    )


def _kinds(channel: grpc.Channel, bench: Bench, users: list[str]) -> list[Operation]:
    stub, chooser, half = RecommenderStub(channel), random.Random(0), len(users) // 2
    idle, active = users[:half], users[half:]

    def send(request: pb.RecommendRequest) -> pb.RecommendReply:
        return stub.Recommend(request, timeout=CALL_SECONDS)

    update = update_operation(channel, lambda: chooser.choice(active), lambda: chooser.choice(bench.items))
    later = itertools.count(NOW)

    def after_update() -> pb.RecommendRequest:
        sent = update.prepare()
        sent.events[0].timestamp = next(later)
        update.send(sent)
        return pb.RecommendRequest(user_id=sent.user_id, k=K)

    def what_if() -> pb.RecommendRequest:
        events = [pb.Event(item_id=chooser.choice(bench.items), timestamp=NOW) for _ in range(WHAT_IF_EVENTS)]
        return pb.RecommendRequest(user_id=chooser.choice(idle), k=K, what_if_events=events)

    def batch() -> pb.BatchRecommendRequest:
        chosen = chooser.choices(idle, k=BATCH)
        return pb.BatchRecommendRequest(requests=[pb.RecommendRequest(user_id=user, k=K) for user in chosen])

    return [
        recommend_operation(channel, lambda: chooser.choice(idle), k=K),
        Operation("first after an update", after_update, send),
        update,
        Operation(f"what-if of {WHAT_IF_EVENTS} events", what_if, send),
        Operation(f"batch of {BATCH}", batch, lambda one: stub.BatchRecommend(one, timeout=CALL_SECONDS)),
    ]


def _calls(operation: Operation, count: int) -> list[tuple[int, int]]:
    """Begin and end of each call, by `perf_counter_ns`, which all processes share."""
    found = []
    for _ in range(count):
        request = operation.prepare()
        began = perf_counter_ns()
        operation.send(request)
        found.append((began, perf_counter_ns()))
    return found


def _p50(calls: list[tuple[int, int]]) -> float:
    return float(np.median([end - begin for begin, end in calls]) / 1000)


def _taken_apart(trace: np.ndarray, calls: list[tuple[int, int]]) -> Kind:
    """The stages (n, 3) of a server, by the calls that its only client made one after the other."""
    begins, ends = (np.array(times) for times in zip(*calls, strict=True))
    number = np.searchsorted(begins, trace[:, 1], side="right") - 1  # of the call that a stage began in
    inside = (number >= 0) & (trace[:, 1] < ends[number])
    of_stage = np.zeros((len(NAMES), len(calls)))
    np.add.at(of_stage, (trace[inside, 0], number[inside]), trace[inside, 2] / 1000)
    handler = of_stage[NAMES.index(HANDLER)]
    stages = {name: float(np.median(times)) for name, times in zip(NAMES, of_stage, strict=True)}
    rest = handler - of_stage[: NAMES.index(HANDLER)].sum(axis=0)
    outside = (ends - begins) / 1000 - handler
    return Kind(_p50(calls), stages | {REST: float(np.median(rest)), OUTSIDE: float(np.median(outside))})
