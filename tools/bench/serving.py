"""Recommendations of a real server: round trips against the empty echo, and long histories against short ones."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from dman_runtime.model.bundle import StateShape
from dman_train.config import ModelConfig
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.blocks import Block, Operation, Plan, Spread, clean, p50s, ratios, run_in_processes
from tools.bench.report import BLOCK_HEADS, Claim, Section, block_data, block_rows
from tools.bench.servers import connect
from tools.bench.setting import CLIENTS, Bench, K
from tools.loadgen import (
    CALL_SECONDS,
    Load,
    add_events,
    echo_operation,
    recommend_operation,
    run_load,
    update_operation,
)

SIZES = ("segment_length", "memory_slots", "layers", "width")
MAX_RECORD_BYTES = 24_000  # at the sizes of the default preset


def round_trips(bench: Bench) -> Section:
    """recommend against the empty echo, by one client and by several."""
    sizes = bench.sizes
    with bench.server("round-trips") as server:
        users = bench.ordinary_users(server.address)

        def blocks_of(clients: int) -> Mapping[str, Sequence[Block]]:
            calls = sizes.rounds * sizes.calls * clients
            plan = Plan({"echo": calls, "recommend": calls}, concurrency=clients, rounds=sizes.rounds)
            return clean(run_load(Load(server.address, bench.echo, users, bench.items, plan, k=K)))

        one, many = blocks_of(1), blocks_of(CLIENTS)
    ratio = ratios(one["recommend"], one["echo"])
    p50, floor = p50s(one["recommend"]).median, p50s(one["echo"]).median
    per_second = {name: Spread(tuple(block.per_second for block in many[name])).median for name in many}
    rows = [
        [f"{row[0]}, {clients} client{'s' * (clients > 1)}", *row[1:]]
        for clients, blocks in ((1, one), (CLIENTS, many))
        for row in block_rows(blocks)
    ]
    return Section(
        "Round trips",
        f"One worker, {sizes.users} users with about {sizes.events} events, k={K}. The empty echo is a server of the "
        "same thread pool and gRPC options that returns the bytes it gets; client and servers share the cores. "
        f"p50 of recommend by p50 of the echo, one client thread: {ratio}.",
        [
            Claim(
                "recommend by empty echo, p50, 1 client",
                f"{ratio.median:.2f}x ({p50:.3f} ms by {floor:.3f} ms)",
                "<= 1.5x",
                ratio.median <= 1.5,
            ),
            Claim(
                f"recommend requests/s, {CLIENTS} clients",
                f"{per_second['recommend']:.0f} (echo: {per_second['echo']:.0f})",
            ),
        ],
        BLOCK_HEADS,
        rows,
        {"ratio": ratio.values, "one_client": block_data(one), f"{CLIENTS}_clients": block_data(many)},
    )


def history_length(bench: Bench) -> Section:
    """recommend for a user with a long history against one with a short one, in the same server."""
    sizes, shape = bench.sizes, bench.bundle.manifest.state
    limited = has_default_sizes(shape)
    lengths = {f"{count} events": count for count in (sizes.events, sizes.long_history)}
    with bench.server("history") as server:
        with connect(server.address) as channel:
            add_events(channel, {name: bench.history(name, count) for name, count in lengths.items()})

        def opened(stack: ExitStack, thread: int, names: Sequence[str]) -> list[Operation]:
            echo, target = (stack.enter_context(connect(address)) for address in (bench.echo, server.address))
            by_user = {name: recommend_operation(target, functools.partial(str, name), k=K) for name in lengths}
            return [echo_operation(echo), *(replace(by_user[name], name=name) for name in names[1:])]

        calls = sizes.rounds * sizes.calls
        plan = Plan(dict.fromkeys(["echo", *lengths], calls), concurrency=1, rounds=sizes.rounds)
        blocks = clean(run_in_processes(plan, opened))
        bytes_by_count = _record_bytes(bench, server.address, ["grows from nothing", list(lengths)[-1]])
    short, long = (blocks[name] for name in lengths)
    ratio, (largest_at, largest) = ratios(long, short), max(bytes_by_count.items(), key=lambda entry: entry[1])
    limit = f"<= {MAX_RECORD_BYTES} B" if limited else f"none at these sizes ({MAX_RECORD_BYTES} B at default)"
    return Section(
        "History length",
        f"Two users of one server, {sizes.events} and {sizes.long_history} events, items of both from a random half of "
        f"the catalogue, k={K}. p50 of the long history by p50 of the short one: {ratio}. State record bytes were "
        f"read after every event of a user who grows from nothing to {5 * shape.segment_length} events with a request "
        f"id each, and of the user with the long history over {2 * shape.segment_length} events more: "
        f"{_few(bytes_by_count, shape.segment_length)}.",
        [
            Claim(
                f"recommend at {sizes.long_history} by {sizes.events} events, p50",
                f"{ratio.median:.2f}x ({p50s(long).median:.3f} ms by {p50s(short).median:.3f} ms)",
                "<= 1.1x",
                ratio.median <= 1.1,
            ),
            Claim(
                "state record of a user, largest",
                f"{largest} B (at {largest_at} events)",
                limit,
                largest <= MAX_RECORD_BYTES if limited else None,
            ),
        ],
        BLOCK_HEADS,
        block_rows(blocks),
        {
            "ratio": ratio.values,
            "recommend": block_data(blocks),
            "largest_record_bytes": largest,
            "record_bytes_by_events": bytes_by_count,
        },
    )


def has_default_sizes(shape: StateShape) -> bool:
    """Whether states are of the default preset, which limits of bytes hold for."""
    default = ModelConfig()
    same = all(getattr(shape, name) == getattr(default, name) for name in SIZES)
    return same and shape.dtype == "float16" and shape.closed == default.closed_states


def _record_bytes(bench: Bench, address: str, users: Sequence[str]) -> dict[int, int]:
    """State record bytes by event count, over single-event updates of users old and new."""
    segment, found = bench.bundle.manifest.state.segment_length, {}
    with connect(address) as channel:
        stub = RecommenderStub(channel)
        for user, updates in zip(users, (5 * segment, 2 * segment), strict=True):
            update = update_operation(channel, functools.partial(str, user), itertools.cycle(bench.items).__next__)
            for _ in range(updates):
                update.send(update.prepare())
                reply = stub.GetUser(pb.GetUserRequest(user_id=user), timeout=CALL_SECONDS)
                found[reply.event_count] = reply.state_bytes
    return found


def _few(bytes_by_count: Mapping[int, int], segment: int) -> str:
    """The sizes where a segment is about to close, is closed, or the memory begins."""
    shown = [count for count in bytes_by_count if count % segment in (0, segment - 1)]
    return ", ".join(f"{bytes_by_count[count]} B at {count}" for count in shown)
