"""How long a history may become, and how large a catalogue, before a server gets slower."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
FIRST_INDEXED = 100_000
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


class Catalogue(NamedTuple):
    """How many items, and whether they are searched through an index."""

    items: int
    indexed: bool

    def __str__(self) -> str:
        return f"{self.items:,} items, {'index' if self.indexed else 'exact'}"


@dataclass
class Measured:
    """What was measured of a catalogue."""

    blocks: Mapping[str, Sequence[Block]]
    worker: Worker
    recall: float | None  # of its index, at 100


def catalogue_size(bench: Bench) -> Section:
    """recommend by one client and by several, and what a further worker takes, by the items of the catalogue."""
    from dman_train.config import ModelConfig
    from dman_train.stored_config import from_dict
    from tools.bench.catalogues import Catalogues  # torch is imported where it is needed only

    bundles = Catalogues(from_dict(ModelConfig, bench.bundle.manifest.model, where="the bundle"))
    found, left_out = dict[Catalogue, Measured](), list[str]()
    for catalogue in _catalogues(bench.sizes.catalogues):
        if (needed := catalogue.items * BYTES_AN_ITEM) > psutil.virtual_memory().available:
            left_out.append(f"{catalogue} is left out: it would take {needed / 1e9:.0f} GB of memory here.")
            continue
        print(f"    {catalogue} ...", flush=True)
        path = bench.scratch / f"bundle-{catalogue.items}-{catalogue.indexed}"
        recall = bundles.make(path, catalogue.items, indexed=catalogue.indexed)
        if catalogue.indexed and recall is None:
            left_out.append(f"{catalogue} is left out: FAISS is missing, or no index was good enough.")
        else:
            found[catalogue] = _measure(bench, path, catalogue, recall)
        shutil.rmtree(path)
    return Section(
        "Catalogue size",
        "Bundles of untrained models with the sizes of the one above, whose items are random vectors in clusters. They "
        "cost as much as trained ones; how many lists an index must read depends on the vectors. One worker; "
        f"{USERS} users with about {bench.sizes.events} events. {' '.join(left_out)}".strip(),
        [*_claims(found), *(claim for one, of in found.items() for claim in of.worker.claims(one.items, str(one)))],
        ("catalogue", "call", *HEADS),
        [
            [str(one), name.partition(",")[0], str(_clients(name)), *cells(of, measured.blocks[_echo_of(name)])]
            for one, measured in found.items()
            for name, of in measured.blocks.items()
        ],
        {
            str(one): {"worker": of.worker.as_json(), "recall": of.recall, **block_data(of.blocks)}
            for one, of in found.items()
        },
        panels=_panels(found),
    )


def _catalogues(sizes: Sequence[int]) -> list[Catalogue]:
    """Exact search as far as anybody would use it, and an index from where it may be quicker."""
    exact = [Catalogue(items, False) for items in sizes if items <= MILLION]
    return sorted([*exact, *(Catalogue(items, True) for items in sizes if items >= FIRST_INDEXED)])


def _measure(bench: Bench, path: Path, catalogue: Catalogue, recall: float | None) -> Measured:
    sizes, state = bench.sizes, path.with_name(f"{path.name}-state")
    chooser = random.Random(catalogue.items)
    histories = {
        f"user-{number}": [str(chooser.randrange(catalogue.items)) for _ in range(sizes.events + number % 20)]
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
        blocks = clean(h2load.in_turns(loads, rounds=sizes.block_rounds, seconds=sizes.block_seconds))
        check(server, reads)
    worker = further_worker(bench, path, state, reads, repeats=sizes.start_repeats_of_catalogues)
    return Measured(blocks, worker, recall)


def _clients(name: str) -> int:
    return int(name.rpartition(" ")[2])


def _echo_of(name: str) -> str:
    return f"echo, {_clients(name)}"


def _claims(found: Mapping[Catalogue, Measured]) -> Iterator[Claim]:
    for one, measured in found.items():
        blocks, recall = measured.blocks, "" if measured.recall is None else f", recall@100 {measured.recall:.4f}"
        more = rate_ratios(blocks[f"recommend, {CLIENTS}"], blocks["recommend, 1"])
        title = f"recommend in {one}, calls/s of {CLIENTS} clients by those of one"
        limited = one == Catalogue(LARGE, False)
        target = (f">= {MIN_SPEED_UP:g}", more.median >= MIN_SPEED_UP) if limited else ()
        yield Claim(title, f"{more} times", *target)
        above = _above(blocks["recommend, 1"], blocks["echo, 1"])
        title, limited = f"recommend in {one}, 1 client, p50 above the echo's", one == Catalogue(MILLION, True)
        target = (f"<= {MAX_MORE:g} ms", above.median <= MAX_MORE) if limited else ()
        yield Claim(title, f"{above} ms{recall}", *target)


def _above(blocks: Sequence[Block], echo: Sequence[Block]) -> Spread:
    return Spread(tuple(one.p50 - other.p50 for one, other in zip(blocks, echo, strict=True)))


def _panels(found: Mapping[Catalogue, Measured]) -> Panels:
    def line(call: str, *, indexed: bool, rate: bool = False) -> dict[int, float]:
        chosen = {one.items: of.blocks[call] for one, of in found.items() if one.indexed == indexed}
        return {items: (rates(of) if rate else p50s(of)).median for items, of in chosen.items()}

    kinds = {"exact": False, "index": True}
    return {
        "1 client, p50 ms by items": {
            "echo": line("echo, 1", indexed=False),
            **{f"recommend, {kind}": line("recommend, 1", indexed=indexed) for kind, indexed in kinds.items()},
        },
        "recommend, calls/s by items": {
            f"{kind}, {clients} client{'s' * (clients > 1)}": line(f"recommend, {clients}", indexed=indexed, rate=True)
            for kind, indexed in kinds.items()
            for clients in (1, CLIENTS)
        },
    }
