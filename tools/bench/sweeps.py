"""How long a history may become, and how large a catalogue, before a server gets slower."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tools.bench import h2load
from tools.bench.blocks import Block, Spread, clean, p50s, rate_ratios, rates, ratios
from tools.bench.closed import HEADS, cells
from tools.bench.floor import PROCESSES
from tools.bench.h2load import Group, Load
from tools.bench.messages import check, recommend_calls, update_calls
from tools.bench.report import Claim, Panels, Section, block_data
from tools.bench.servers import connect, counting_server
from tools.bench.setting import CLIENTS, SINCE, Bench
from tools.bench.workers import Worker, further_worker
from tools.loadgen import add_events

MAX_LONG_BY_SHORT = 1.05  # p50 after the longest history by that after the shortest
LARGE, MIN_SPEED_UP = 200_000, 3.0  # calls/s of eight clients by those of one, in a catalogue of so many items
MILLION, MAX_MORE = 1_000_000, 3.0  # ms above the echo in a catalogue of a million
BYTES_AN_ITEM = 3000  # of memory that a bundle of the default width takes while it is made
USERS = 64


def history_length(bench: Bench) -> Section:
    """recommend and update by the length of the history, in the same server."""
    sizes = bench.sizes
    with bench.server("history") as server:
        users = {f"{events} events": events for events in sizes.histories}
        with connect(server.address) as channel:
            for user, events in users.items():
                add_events(channel, {user: bench.history(user, events)}, since=SINCE)
        reads, updates = recommend_calls(list(users)), update_calls(bench, list(users))
        check(server, [*reads, *updates])
        loads = [h2load.echo_load(bench.floor.best(1)[1], 1, 1)]
        for user, read, update in zip(users, reads, updates, strict=True):
            loads.append(Load(server, {f"recommend, {user}": Group([read], 1)}))
            loads.append(Load(server, {f"update, {user}": Group([update], 1)}))
        blocks = h2load.in_turns(loads, rounds=2 * sizes.block_rounds, seconds=sizes.block_seconds / 2)
        check(server, [*reads, *updates])
    short, long = (f"{events} events" for events in (min(sizes.histories), max(sizes.histories)))
    return Section(
        "History length",
        "One client asks for, or updates, one user of each length, in turns, items of all from a random half of the "
        "catalogue. A model that sees times finds the answer kept, until the user is updated.",
        [
            Claim(
                f"{call} after {max(sizes.histories):,} by after {min(sizes.histories):,} events, p50",
                f"{found} times ({p50s(blocks[f'{call}, {long}']).median:.3f} ms)",
                f"<= {MAX_LONG_BY_SHORT}",
                found.median <= MAX_LONG_BY_SHORT,
            )
            for call in ("recommend", "update")
            for found in [ratios(blocks[f"{call}, {long}"], blocks[f"{call}, {short}"])]
        ],
        ("call", *HEADS),
        [[name, "1", *cells(of, blocks["echo"])] for name, of in blocks.items()],
        block_data(blocks),
        panels={
            "p50 ms by events in the history": {
                call: {events: p50s(blocks[f"{call}, {user}"]).median for user, events in users.items()}
                for call in ("recommend", "update")
            }
        },
    )


# -- catalogues ------------------------------------------------------------------------------------------------------


def catalogue_size(bench: Bench) -> Section:
    """recommend by one client and by several, and what a further worker takes, by the items of the catalogue."""
    from dman_train.config import ModelConfig
    from dman_train.stored_config import from_dict
    from tools.bench.catalogues import Catalogues  # torch is imported where it is needed only

    bundles = Catalogues(from_dict(ModelConfig, bench.bundle.manifest.model, where="the bundle"))
    found, workers, left_out = dict[int, dict[str, list[Block]]](), dict[int, Worker](), list[str]()
    for items in bench.sizes.catalogues:
        if (needed := items * BYTES_AN_ITEM) > psutil.virtual_memory().available:
            left_out.append(f"{items:,} items are left out: they would take {needed / 1e9:.0f} GB of memory here.")
            continue
        print(f"    {items:,} items ...", flush=True)
        path = bench.scratch / f"bundle-{items}"
        bundles.make(path, items)
        found[items], workers[items] = _measure(bench, path, items)
        clean(found[items])
        shutil.rmtree(path)
    rows = [
        [f"{items:,}", name.partition(",")[0], str(_clients(name)), *cells(of, blocks[f"echo, {_clients(name)}"])]
        for items, blocks in found.items()
        for name, of in blocks.items()
    ]
    return Section(
        "Catalogue size",
        "Bundles of untrained models with the sizes of the one above, whose items are random vectors: they cost as "
        "much as trained ones, except where an index finds trained vectors more easily. One worker; "
        f"{USERS} users with about {bench.sizes.events} events. {' '.join(left_out)}".strip(),
        [*_claims(found), *_worker_claims(workers)],
        ("items", "call", *HEADS),
        rows,
        {str(items): block_data(blocks) for items, blocks in found.items()}
        | {"workers": {str(items): worker.as_json() for items, worker in workers.items()}},
        panels=_panels(found),
    )


def _measure(bench: Bench, path: Path, items: int) -> tuple[dict[str, list[Block]], Worker]:
    sizes, state = bench.sizes, bench.scratch / f"state-{items}"
    chooser = random.Random(items)
    histories = {
        f"user-{number}": [str(chooser.randrange(items)) for _ in range(sizes.events + number % 20)]
        for number in range(USERS)
    }
    with counting_server(path, state, "--provider", bench.provider) as server:
        with connect(server.address) as channel:
            add_events(channel, histories, since=SINCE)
        reads = recommend_calls(list(histories)[:PROCESSES])
        check(server, reads)
        loads = []
        for clients in (1, CLIENTS):
            loads.append(h2load.echo_load(bench.floor.best(clients)[1], clients, PROCESSES, f"echo, {clients}"))
            loads.append(Load(server, {f"recommend, {clients}": Group(reads, clients)}))
        blocks = h2load.in_turns(loads, rounds=sizes.block_rounds, seconds=sizes.block_seconds)
        check(server, reads)
    return blocks, further_worker(bench, path, state, reads, repeats=sizes.start_repeats_of_catalogues)


def _clients(name: str) -> int:
    return int(name.rpartition(" ")[2])


def _claims(found: Mapping[int, Mapping[str, Sequence[Block]]]) -> Iterator[Claim]:
    for items, blocks in found.items():
        more = rate_ratios(blocks[f"recommend, {CLIENTS}"], blocks["recommend, 1"])
        title = f"recommend in {items:,} items, calls/s of {CLIENTS} clients by those of one"
        limit = items == LARGE
        yield Claim(title, f"{more} times", *((f">= {MIN_SPEED_UP:g}", more.median >= MIN_SPEED_UP) if limit else ()))
        above = _above(blocks["recommend, 1"], blocks["echo, 1"])
        title, limit = f"recommend in {items:,} items, 1 client, p50 above the echo's", items == MILLION
        yield Claim(title, f"{above} ms", *((f"<= {MAX_MORE:g} ms", above.median <= MAX_MORE) if limit else ()))


def _above(blocks: Sequence[Block], echo: Sequence[Block]) -> Spread:
    return Spread(tuple(one.p50 - other.p50 for one, other in zip(blocks, echo, strict=True)))


def _worker_claims(workers: Mapping[int, Worker]) -> Iterator[Claim]:
    for items, worker in workers.items():
        yield from worker.claims(items)


def _panels(found: Mapping[int, Mapping[str, Sequence[Block]]]) -> Panels:
    calls = ("recommend", "echo")
    return {
        "1 client, p50 ms by items": {
            call: {items: p50s(blocks[f"{call}, 1"]).median for items, blocks in found.items()} for call in calls
        },
        "recommend, calls/s by items": {
            f"{clients} client{'s' * (clients > 1)}": {
                items: rates(blocks[f"recommend, {clients}"]).median for items, blocks in found.items()
            }
            for clients in (1, CLIENTS)
        },
    }
