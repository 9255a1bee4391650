"""What a store on servers costs beside one in a directory, all on this machine.

    python -m tools.bench.cluster --bundle BUNDLE

A server over a directory, one over one Valkey, one over a cluster of three, and two over that cluster are asked in
turns by h2load; the round trip to Valkey is measured beside them.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dman_runtime.model.bundle import open_bundle
from dman_runtime.options import run_command
from dman_runtime.store.base import Expected
from dman_runtime.store.place import ServerAddress, parse_place
from dman_runtime.store.redis import RedisStore
from tools.bench import h2load
from tools.bench.blocks import Block, Spread, p50s, rates, summary
from tools.bench.h2load import Group, Load
from tools.bench.messages import check, recommend_calls, update_calls
from tools.bench.report import Claim, Section, block_data, machine, show, write_report
from tools.bench.servers import Running, echo_server
from tools.bench.setting import QUICK, Bench, Clock, Sizes, bench_parser, end_with, scratch_directory
from tools.faults.redis_servers import Cluster, RedisServer

DIRECTORY, ONE, THREE, TWO_OVER_THREE = "directory", "one Valkey", "cluster of three", "two servers, cluster of three"
CLIENTS = (1, 8)
READ_TRIPS, WRITE_TRIPS = 1, 2
HEADS = ("state", "call", "clients", "calls", "calls/s", "p50 ms", "p99 ms")
DURABLE = ("--appendonly", "yes", "--appendfsync", "everysec")


def measure(bench: Bench) -> Section:
    sizes = bench.sizes
    with ExitStack() as stack:
        alone = stack.enter_context(RedisServer(bench.scratch / "valkey", *DURABLE))
        cluster = stack.enter_context(Cluster(bench.scratch / "nodes", options=DURABLE))
        places = {DIRECTORY: "", ONE: f"redis://{alone.address}/bench", THREE: f"redis://{cluster.address}/bench"}
        servers = {
            name: stack.enter_context(bench.server(f"state-{number}", address=place))
            for number, (name, place) in enumerate(places.items())
        }
        second = stack.enter_context(bench.server("state-second", address=places[THREE]))
        for server in servers.values():
            users = bench.ordinary_users(server.address)
        reads, updates = recommend_calls(users[:8]), update_calls(bench, users[-8:])
        for server in (*servers.values(), second):
            check(server, [*reads, *updates])
        found: dict[tuple[str, int], list[Block]] = {}
        trips: list[float] = []
        for clients in CLIENTS:
            for _ in range(sizes.block_rounds):
                for name, blocks in _round(servers, reads, updates, clients, sizes).items():
                    found.setdefault((name, clients), []).extend(blocks)
                if clients == 1:
                    trips.append(_round_trip(places[ONE], users[:8]))
        for _ in range(sizes.block_rounds):
            for name, blocks in _together(servers[THREE], second, reads, updates, sizes).items():
                found.setdefault((name, 2 * CLIENTS[-1]), []).extend(blocks)
    return _section(found, Spread(tuple(trips)))


def _round(
    servers: Mapping[str, Running],
    reads: Sequence[h2load.Call],
    updates: Sequence[h2load.Call],
    clients: int,
    sizes: Sizes,
) -> dict[str, list[Block]]:
    loads = [
        Load(server, {f"{name}|{kind}": Group(calls, clients)})
        for name, server in servers.items()
        for kind, calls in (("recommend", reads), ("update", updates))
    ]
    return h2load.in_turns(loads, rounds=1, seconds=sizes.block_seconds)


def _together(
    first: Running, second: Running, reads: Sequence[h2load.Call], updates: Sequence[h2load.Call], sizes: Sizes
) -> dict[str, list[Block]]:
    """Two servers at once, each with half of the clients and of the users."""
    from concurrent.futures import ThreadPoolExecutor

    found: dict[str, list[Block]] = {}
    for kind, calls in (("recommend", reads), ("update", updates)):
        halves = [calls[::2], calls[1::2]]
        loads = [
            Load(server, {f"{TWO_OVER_THREE}|{kind}": Group(half, CLIENTS[-1])})
            for server, half in zip((first, second), halves, strict=True)
        ]
        with ThreadPoolExecutor(2) as threads:
            blocks = list(threads.map(lambda load: h2load.run(load, seconds=sizes.block_seconds), loads))
        for one in blocks:
            for name, block in one.items():
                found.setdefault(name, []).append(block)
    return found


def _round_trip(place: str, users: Sequence[str]) -> float:
    """Milliseconds of the median reading of a user by the store itself, without a server of ours."""
    address = parse_place(place)
    assert isinstance(address, ServerAddress)
    times = []
    with RedisStore.open(address) as store:
        for number in range(400):
            began = time.perf_counter()
            with store.snapshot() as snapshot:
                snapshot.expect({users[number % len(users)]: Expected(1, ranking=True)})
            times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times[100:]))


def _section(found: Mapping[tuple[str, int], list[Block]], trip: Spread) -> Section:
    def p50(state: str, kind: str) -> float:
        return p50s(found[f"{state}|{kind}", 1]).median

    def rate(state: str, kind: str, clients: int, servers: int = 1) -> float:
        return servers * rates(found[f"{state}|{kind}", clients]).median

    claims = [Claim("round trip to Valkey, by the client of the store", f"{trip} ms")]
    for kind, most in (("recommend", READ_TRIPS), ("update", WRITE_TRIPS)):
        for state in (ONE, THREE):
            more = p50(state, kind) - p50(DIRECTORY, kind)
            claims.append(
                Claim(
                    f"p50 of {kind}, {state}, beyond that of the directory, one client",
                    f"{more:.2f} ms = {more / trip.median:.1f} round trips",
                    f"<= {most} round trip{'s' * (most > 1)}",
                    more <= most * trip.median,
                )
            )
    for kind in ("recommend", "update"):
        both = rate(TWO_OVER_THREE, kind, 2 * CLIENTS[-1], 2)
        single = rate(THREE, kind, CLIENTS[-1])
        claims.append(
            Claim(
                f"{kind}s of two servers over one cluster, {CLIENTS[-1]} clients each, by those of one",
                f"{both:,.0f}/s, {both / single:.2f} times",
            )
        )
    rows = []
    for (name, clients), blocks in found.items():
        state, kind = name.split("|")
        one = summary("", blocks)
        many = 2 if state == TWO_OVER_THREE else 1
        rate_of_all, p50_ms = many * rates(blocks).median, p50s(blocks).median
        counts = str(clients), str(one.count), f"{rate_of_all:,.0f}"
        rows.append([state, kind, *counts, f"{p50_ms:.3f}", f"{one.p99:.3f}"])
    return Section(
        "A store on servers",
        "h2load asks each server in turns; users have about 100 events. Directory: LMDB, a sync of the disk for each "
        "commit. Valkey: `appendonly yes`, `appendfsync everysec`, durability local. Servers, Valkey and clients share "
        "the cores of this machine, so a cluster cannot be faster here; two servers and three Valkeys need five cores.",
        claims,
        HEADS,
        rows,
        {f"{name}, {clients}": block_data({name: blocks}) for (name, clients), blocks in found.items()},
    )


def _main(argv: Sequence[str] | None) -> int:
    parser = bench_parser(
        "tools.bench.cluster", "Measure a store on servers beside one in a directory.", Path("reports/cluster-speed.md")
    )
    arguments = parser.parse_args(argv)
    clock = Clock()
    bundle = open_bundle(arguments.bundle.resolve())
    with scratch_directory(arguments.scratch) as scratch, echo_server() as echo:
        sizes = QUICK if arguments.quick else Sizes()
        section = measure(Bench(bundle, scratch, arguments.provider, sizes, echo.address))
        facts = machine(scratch) | {"h2load": h2load.version()} | clock.facts(quick=arguments.quick)
    command = shlex.join(["python", "-m", "tools.bench.cluster", *(sys.argv[1:] if argv is None else argv)])
    write_report(arguments.out, "A store on servers", f"Written by `{command}`.", facts, [section])
    show(arguments.out, facts, [section], as_json=arguments.json)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where a target is missed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
