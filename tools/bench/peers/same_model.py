"""The same model in our server and in those of peers: throughput at equal p99, of recommendations and of updates."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dman_runtime.errors import UsageError
from tools.bench.h2load import Request
from tools.bench.peers.catalogue import PEERS, Peer
from tools.bench.peers.environments import UnavailableError
from tools.bench.peers.hosted import Settings
from tools.bench.peers.ladder import BOUNDS, Climb, Effort, climb, ratio_within
from tools.bench.peers.running import Server, free_port, our_server, peer_server
from tools.bench.peers.wire import Ranked
from tools.bench.report import Claim, Section, table
from tools.bench.servers import connect
from tools.bench.setting import Bench, K
from tools.loadgen import add_events

WORKERS = (1, 2)
MIN_RATIO = 1.5  # ours by the best peer
PROBED = "user-probed"  # by whom starts are waited for
TOLERANCE = 1e-3  # of scores, relative to the largest one
RECOMMEND, UPDATE = "recommend", "update"
HEADS = ("server", "clients", "calls/s", "failed", "p50 ms", "p99 ms", "CPU ms a call")
AT_EQUAL_P99 = (
    "Each client sends its next request when the last one is answered. At equal p99: of the numbers of clients with "
    "which a server keeps the bound (its p99, median of the rounds) and fails no call, the one with its highest "
    "throughput. The ratio is ours by the best peer, round by round. CPU time is that of all processes of a server."
)


@dataclass(frozen=True)
class Unavailable:
    """A peer that was not measured."""

    title: str
    reason: str


@dataclass
class Compared:
    """The servers of a run."""

    servers: list[Server]
    unavailable: list[Unavailable]
    settings: dict[str, str]  # by name of a peer: for the report


def start(stack: ExitStack, bench: Bench, cache: Path, peers: Sequence[Peer] = PEERS) -> Compared:
    """Starts all servers with the same users, and checks that all give the same recommendations.

    Raises UsageError where a server recommends something else than ours.
    """
    histories = _histories(bench)
    path = bench.scratch / "histories.json"
    path.write_text(json.dumps(histories), encoding="utf-8")
    compared = Compared([], [], {})
    for workers in WORKERS:
        server = stack.enter_context(our_server(bench.bundle.path, bench.scratch / f"ours-{workers}", workers))
        with connect(server.address) as channel:
            add_events(channel, histories)
        compared.servers.append(server)
    for peer in peers:
        print(f"{peer.title} ...", flush=True)
        try:
            command = peer.command(cache)
            for workers in WORKERS:
                settings = Settings(
                    str(bench.bundle.path),
                    str(path),
                    str(bench.scratch / f"{peer.name}-{workers}"),
                    free_port(),
                    workers,
                )
                server = stack.enter_context(
                    peer_server(peer.title, command, peer.wire, settings, bench.scratch, (PROBED, bench.items[0]))
                )
                server.freeze()
                compared.servers.append(server)
            compared.settings[peer.title] = peer.facts()
        except UnavailableError as error:
            compared.unavailable.append(Unavailable(peer.title, str(error)))
    _check_same(compared.servers, bench.sizes.users)
    return compared


def _user(number: int) -> str:
    return f"user-{number}"


def _histories(bench: Bench) -> dict[str, list[str]]:
    """About `events` of each user, all fills of the last segment alike."""
    segment, sizes = bench.bundle.manifest.state.segment_length, bench.sizes
    lengths = {_user(i): sizes.events + i % segment for i in range(sizes.users)} | {PROBED: sizes.events}
    return {user: bench.history(user, events) for user, events in lengths.items()}


def _check_same(servers: Sequence[Server], users: int) -> None:
    for number in range(min(users, 8)):
        expected: Ranked | None = None
        for server in servers:
            server.thaw()
            wire = server.wire
            found = wire.ranked(wire.send(server.address, wire.recommend(_user(number), K)))
            server.freeze()
            expected = expected or found
            if not same(found, expected):
                raise UsageError(f"{server.name} recommends {found} where {servers[0].name} has {expected}")


def same(found: Ranked, expected: Ranked) -> bool:
    """Whether two rankings are the same, but for the last digits of scores and the order of equal ones."""
    limit = TOLERANCE * max(map(abs, expected.scores), default=0.0)
    if len(found.scores) != len(expected.scores) or np.abs(np.subtract(found.scores, expected.scores)).max() > limit:
        return False
    places = {item_id: place for place, item_id in enumerate(expected.item_ids)}
    last = expected.scores[-1] + limit  # what another item could be as good as
    return all(
        abs(score - expected.scores[places[item_id]]) <= limit if item_id in places else score <= last
        for item_id, score in zip(found.item_ids, found.scores, strict=True)
    )


# -- the measurements ------------------------------------------------------------------------------------------------


def recommendations(bench: Bench, compared: Compared, effort: Effort) -> tuple[Section, list[Climb]]:
    """Recommendations: our server reads the state from its store, peers have it in memory."""

    def requests(server: Server, clients: int) -> list[Request]:
        return [server.wire.recommend(_user(number), K) for number in range(clients)]

    climbs = _measure(compared.servers, requests, effort, bench.scratch / "recommend")
    method = (
        f"One user per client, of {bench.sizes.users} with about {bench.sizes.events} events, k={K}; each gets the "
        "items and scores. Peers have the states in memory, ours reads its store. Two workers of a peer are two "
        "processes with a copy of the states each (two instances in one process in PyTriton)."
    )
    return _section("Recommendations", RECOMMEND, method, climbs, compared), climbs


def updates(bench: Bench, compared: Compared, effort: Effort) -> tuple[Section, list[Climb]]:
    """Durable updates by one event; peers keep states in one process."""
    items = random.Random(0).choices(bench.items, k=max(effort.clients))

    def requests(server: Server, clients: int) -> list[Request]:
        return [server.wire.update(_user(number), items[number]) for number in range(clients)]

    servers = [server for server in compared.servers if server.ours or server.name.endswith("1 worker")]
    climbs = _measure(servers, requests, effort, bench.scratch / "update")
    method = (
        "One event of one user per client. A peer encodes a batch in one run of the graph, and commits the records of "
        "its users to LMDB before it answers; ours also keeps histories, seen items and versions. Peers run one "
        "process with the model, as two would each have states of their own."
    )
    return _section("Updates", UPDATE, method, climbs, compared), climbs


def _measure(
    servers: Sequence[Server], requests: Callable[[Server, int], Sequence[Request]], effort: Effort, scratch: Path
) -> list[Climb]:
    reply_bytes = {}
    for server in servers:
        server.thaw()
        reply_bytes[server.name] = len(server.wire.send(server.address, requests(server, 1)[0]))
        server.freeze()
    return climb(servers, requests, reply_bytes, effort, scratch)


def _section(title: str, call: str, method: str, climbs: Sequence[Climb], compared: Compared) -> Section:
    ours = [one for one in climbs if one.server.ours]
    others = [one for one in climbs if not one.server.ours]
    claims = [claim for bound in BOUNDS if (claim := _claim(call, ours, others, bound))]
    claims += [Claim(f"{call} in {one.title}", f"not measured: {one.reason}") for one in compared.unavailable]
    rows = [
        [
            one.server.name,
            str(clients),
            f"{one.per_second(clients):.0f}",
            str(one.failed(clients)),
            *_times(one, clients),
        ]
        for one in climbs
        for clients in one.steps
    ]
    return Section(title, f"{method} {AT_EQUAL_P99}\n\n{_bounds_table(climbs)}", claims, HEADS, rows, _data(climbs))


def _times(one: Climb, clients: int) -> list[str]:
    return [f"{value:.2f}" for value in (one.p50(clients), one.p99(clients), one.cpu_milliseconds(clients))]


def _claim(call: str, ours: Sequence[Climb], others: Sequence[Climb], bound: float) -> Claim | None:
    found = ratio_within(ours, others, bound)
    if found is None:
        return None
    mine, other, ratio = found
    spread = f"{ratio.median:.2f}x ({min(ratio.values):.2f} to {max(ratio.values):.2f})"
    return Claim(
        f"{call}/s at p99 <= {bound:g} ms, ours by the best peer",
        f"{spread}, {mine.server.name} by {other.server.name}",
        f">= {MIN_RATIO}x",
        bool(ratio.median >= MIN_RATIO),
    )


def _bounds_table(climbs: Sequence[Climb]) -> str:
    rows = []
    for one in climbs:
        best = [one.within(bound) for bound in BOUNDS]
        rows.append([one.server.name, *("-" if b is None else f"{one.per_second(b):.0f} ({b})" for b in best)])
    heads = ["calls/s (clients) at a p99 of at most", *(f"{bound:g} ms" for bound in BOUNDS)]
    return table(heads, rows)


def _data(climbs: Sequence[Climb]) -> dict[str, Any]:
    return {
        one.server.name: {
            str(clients): {
                "per_second": [step.block.per_second for step in steps],
                "p50": [step.block.p50 for step in steps],
                "p99": [step.block.p99 for step in steps],
                "failed": [step.block.errors.total() for step in steps],
                "cpu_ms": [step.cpu_milliseconds for step in steps],
            }
            for clients, steps in one.steps.items()
        }
        for one in climbs
    }
