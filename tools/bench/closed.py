"""Closed loops of a client in C: how many calls a second a server answers for 1 to 256 clients, and how fast."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from tools.bench import h2load
from tools.bench.blocks import Block, Spread, p50s, rate_ratios, rates, ratios, summary
from tools.bench.floor import PROCESSES
from tools.bench.h2load import Group, Load
from tools.bench.messages import check, recommend_calls, update_calls
from tools.bench.report import Claim, Panels, Section, block_data
from tools.bench.servers import Running
from tools.bench.setting import MANY_CLIENTS, Bench, K

MIN_RECOMMEND, MIN_UPDATE, MAX_ALONE = 0.55, 0.35, 1.35  # by the echo
WRITERS = 64  # processes that update, each for another user: updates of one user wait for each other
WRITERS_ECHO = "echo, as many processes"
MIX = 4  # one client in so many updates
HEADS = ("clients", "calls", "calls/s", "by echo", "p50 ms", "p99 ms", "p50 by echo")
Found = Mapping[str, Sequence[Block]]
METHOD = """\
h2load sends, and sends again when it is answered. A process of it sends one request again and again, so \
recommendations come from up to {readers} processes for as many users, and updates from up to {writers}: those of one \
user would wait for each other. The echo beside each has as many processes and clients. Users have about {events} \
events with times; nobody acts between two recommendations of a user here, so a model that sees times finds its answer \
kept, which it does not always in the mixes, where one client in {mix} updates. An update is one event, stored \
durably before it is answered; it has no request id, as h2load repeats it. All processes share {cores} cores. Real \
calls before and after were answered in full, and the servers' own counts say OK for every call of h2load. k={k}."""


def closed_loops(bench: Bench) -> Section:
    """recommend, update and a mix, one worker and two, by numbers of clients."""
    sizes = bench.sizes
    with bench.server("closed-1") as one, bench.server("closed-2", "--workers", "2") as two:
        servers = {"1 worker": one, "2 workers": two}
        for server in servers.values():
            users = bench.ordinary_users(server.address)
        reads, updates = recommend_calls(users[:PROCESSES]), update_calls(bench, users[-WRITERS:])
        for server in servers.values():
            check(server, [*reads, *updates])
        found = {
            clients: h2load.in_turns(
                _loads(bench, servers, reads, updates, clients), rounds=sizes.block_rounds, seconds=sizes.block_seconds
            )
            for clients in sizes.clients
        }
        for server in servers.values():
            check(server, [*reads, *updates])
    return Section(
        "Closed loops",
        method(bench),
        _claims(bench, found),
        ("call", *HEADS),
        [row for clients, blocks in found.items() for row in _rows(clients, blocks)],
        {str(clients): block_data(blocks) for clients, blocks in found.items()},
        panels=_panels(found),
    )


def method(bench: Bench) -> str:
    return METHOD.format(
        readers=PROCESSES, writers=WRITERS, mix=MIX, events=bench.sizes.events, cores=len(os.sched_getaffinity(0)), k=K
    )


def _loads(
    bench: Bench,
    servers: Mapping[str, Running],
    reads: Sequence[h2load.Call],
    updates: Sequence[h2load.Call],
    clients: int,
) -> list[Load]:
    echo = bench.floor.best(clients)[1]
    loads = [h2load.echo_load(echo, clients, PROCESSES, "echo")]
    if clients > PROCESSES:
        loads.append(h2load.echo_load(echo, clients, WRITERS, WRITERS_ECHO))
    for name, server in servers.items():
        loads.append(Load(server, {f"recommend, {name}": Group(reads, clients)}))
        loads.append(Load(server, {f"update, {name}": Group(updates, clients)}))
        if writers := clients // MIX:
            mix = {
                f"recommend of the mix, {name}": Group(reads, clients - writers),
                f"update of the mix, {name}": Group(updates, writers),
            }
            loads.append(Load(server, mix))
    return loads


def echo_of(name: str, blocks: Found) -> Sequence[Block]:
    """The echo that was sent by as many processes."""
    return blocks.get(WRITERS_ECHO if name.startswith("update,") else "", blocks["echo"])


def _rows(clients: int, blocks: Found) -> list[list[str]]:
    return [[name, str(clients), *cells(of, echo_of(name, blocks))] for name, of in blocks.items()]


def cells(blocks: Sequence[Block], echo: Sequence[Block]) -> list[str]:
    """Calls, their rate, that by the echo's, p50, p99, and p50 by the echo's."""
    one = summary("", blocks)
    return [
        str(one.count),
        f"{rates(blocks).median:,.0f}",
        str(rate_ratios(blocks, echo)),
        f"{p50s(blocks).median:.3f}",
        f"{one.p99:.3f}",
        str(ratios(blocks, echo)),
    ]


def _claims(bench: Bench, found: Mapping[int, Found]) -> list[Claim]:
    many = min(found, key=lambda clients: abs(clients - MANY_CLIENTS))
    few = min(found)
    alone, busy = found[few], found[many]
    share = rate_ratios(busy["recommend, 1 worker"], busy["echo"])
    latency = ratios(alone["recommend, 1 worker"], alone["echo"])
    updates = rate_ratios(busy["update, 1 worker"], echo_of("update, 1 worker", busy))
    return [
        Claim(
            f"recommend, one worker, {many} clients, calls/s by the best echo's",
            f"{_by(share, busy['recommend, 1 worker'])} ({bench.floor.best(many)[0]})",
            f">= {MIN_RECOMMEND}",
            share.median >= MIN_RECOMMEND,
        ),
        Claim(
            f"recommend, {few} client, p50 by the best echo's",
            f"{latency} times ({p50s(alone['recommend, 1 worker']).median:.3f} ms)",
            f"<= {MAX_ALONE}",
            latency.median <= MAX_ALONE,
        ),
        Claim(
            f"durable update, one worker, {many} clients, calls/s by the best echo's",
            _by(updates, busy["update, 1 worker"]),
            f">= {MIN_UPDATE}",
            updates.median >= MIN_UPDATE,
        ),
        *(
            Claim(
                f"{call}, two workers, {many} clients, calls/s by the best echo's",
                _by(rate_ratios(busy[name], echo_of(name, busy)), busy[name]),
            )
            for call in ("recommend", "update")
            for name in [f"{call}, 2 workers"]
        ),
    ]


def _by(share: Spread, blocks: Sequence[Block]) -> str:
    return f"{share} ({rates(blocks).median:,.0f}/s)"


def _panels(found: Mapping[int, Found]) -> Panels:
    names = {name: None for blocks in found.values() for name in blocks if "mix" not in name and name != WRITERS_ECHO}

    def line(name: str, of: str) -> dict[int, float]:
        measured = {clients: blocks[name] for clients, blocks in found.items() if name in blocks}
        return {clients: (rates(one) if of == "rate" else p50s(one)).median for clients, one in measured.items()}

    return {
        "calls/s by clients": {name: line(name, "rate") for name in names},
        "p50 ms by clients": {name: line(name, "p50") for name in names},
    }


# -- k, and reads to updates -----------------------------------------------------------------------------------------


def answer_sizes(bench: Bench) -> Section:
    """recommend by the number of items that are asked for."""
    sizes = bench.sizes
    few, many = min(sizes.clients), min(sizes.clients, key=lambda clients: abs(clients - MANY_CLIENTS))
    rows, data, panels = list[list[str]](), {}, Panels()
    with bench.server("k") as server:
        users = bench.ordinary_users(server.address)[:PROCESSES]
        by_k = {k: recommend_calls(users, k) for k in sizes.ks if k <= len(bench.bundle.items.item_ids) // 2}
        check(server, [call for calls in by_k.values() for call in calls])
        for clients in (few, many):
            loads = [h2load.echo_load(bench.floor.best(clients)[1], clients, PROCESSES)]
            loads += [Load(server, {f"k={k}": Group(calls, clients)}) for k, calls in by_k.items()]
            blocks = h2load.in_turns(loads, rounds=sizes.block_rounds, seconds=sizes.block_seconds)
            rows += [[name, str(clients), *cells(of, blocks["echo"])] for name, of in blocks.items()]
            data[str(clients)] = block_data(blocks)
            line = {k: rates(blocks[f"k={k}"]).median for k in by_k}
            panels.setdefault("recommend, calls/s by k", {})[f"{clients} clients"] = line
        check(server, [call for calls in by_k.values() for call in calls])
    return Section(
        "Items asked for",
        "The same closed loops, one worker, by k. A reply has the id, score and title of each item.",
        [],
        ("call", *HEADS),
        rows,
        data,
        panels=panels,
    )


def reads_to_updates(bench: Bench) -> Section:
    """Recommendations and updates of the same users, by how many of the clients update."""
    sizes = bench.sizes
    many = min(sizes.clients, key=lambda clients: abs(clients - MANY_CLIENTS))
    with bench.server("mix") as server:
        users = bench.ordinary_users(server.address)[: max(many, PROCESSES)]
        reads, updates = recommend_calls(users), update_calls(bench, users)
        check(server, [*reads, *updates])
        loads = [h2load.echo_load(bench.floor.best(many)[1], many, many)]
        for writers in sizes.update_clients:
            groups = {}
            if writers < many:
                groups[f"recommend beside {writers} that update"] = Group(reads, many - writers)
            if writers:
                groups[f"update by {writers}"] = Group(updates, writers)
            loads.append(Load(server, groups))
        blocks = h2load.in_turns(loads, rounds=sizes.block_rounds, seconds=sizes.block_seconds)
        check(server, [*reads, *updates])
    counts = {name: group.clients for load in loads for name, group in load.groups.items()}
    return Section(
        "Reads to updates",
        f"One worker and {many} clients, each a process with a user of its own; some update, the others ask for "
        "recommendations of the same users and others. So some recommendations are the first ones after an update, "
        "which no answer is kept for.",
        [],
        ("call", *HEADS),
        [[name, str(counts[name]), *cells(of, blocks["echo"])] for name, of in blocks.items()],
        block_data(blocks),
    )
