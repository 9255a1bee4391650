"""What filters and rules of diversity cost: requests with and without them take turns on one server.

    python -m tools.bench.filters

The model has the default sizes and untrained weights, which cost as much as trained ones.
"""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from dman_runtime.data.interactions import ItemInfo
from dman_runtime.errors import UsageError
from dman_runtime.options import Parser, run_command
from dman_train.config import ModelConfig
from dman_train.export import export_bundle
from dman_train.model import DMAN
from dman_train.vocabulary import Vocabulary
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.blocks import Block, Operation, Plan, clean, interleave, ratios
from tools.bench.report import BLOCK_HEADS, Claim, Section, block_data, block_rows, machine, show, write_report
from tools.bench.servers import connect, dman_server
from tools.bench.setting import QUICK, Clock, K, Sizes, end_with, measuring_parser, scratch_directory
from tools.loadgen import CALL_SECONDS, add_events

PLAIN, FEW = "no filter", "a filter that keeps 1 %"
MOST = 1.2  # p50 with the filter by p50 without
CATALOGUES = (3416, 100_000)  # items: as many as MovieLens-1M has, and the most that the event loop searches itself
GROUPS = 100  # values of the attribute: each is that of 1 % of the items
METHOD = """\
{items:,} items, {users} users with {events} events, k={k}. A block is {calls} calls of one kind by one client; blocks \
of all kinds take turns. Users are chosen at random. The server knows what each filter leaves: it was asked before."""


def kinds() -> dict[str, dict[str, Any]]:
    """What each kind of request has beside its user."""
    group: Any = {"in": pb.Filter.In(field="group", values=["7"])}  # a keyword of Python
    group = pb.Filter(**group)
    tenth = pb.Filter(range=pb.Filter.Range(field="group", max=9))
    half = pb.Filter(range=pb.Filter.Range(field="group", max=49))
    nested = pb.Filter(any=pb.Filter.Parts(filters=[group, pb.Filter(all=pb.Filter.Parts(filters=[tenth, half]))]))
    return {
        PLAIN: {},
        FEW: {"filter": group},
        "a filter that keeps half": {"filter": half},
        "a filter of five parts that keeps a tenth": {"filter": nested},
        "one of each group": {"diversity": [pb.Diversity(field="group", at_most=1)]},
    }


def measure(scratch: Path, sizes: Sizes, items: int) -> Section:
    """Requests of all kinds on one server."""
    bundle = export(scratch / f"bundle-{items}", items)
    state = scratch / f"state-{items}"
    with dman_server(bundle, state, "--provider", "cpu") as server, connect(server.address) as channel:
        operations = _operations(channel, sizes, items)
        plan = Plan({one.name: sizes.rounds * sizes.calls for one in operations}, concurrency=1, rounds=sizes.rounds)
        blocks = clean(interleave(plan.schedule(), [operations], seconds=3600))
    return Section(
        f"{items:,} items",
        METHOD.format(items=items, users=sizes.users, events=sizes.events, calls=sizes.calls, k=K),
        list(_claims(blocks, items)),
        BLOCK_HEADS,
        block_rows(blocks),
        block_data(blocks),
    )


def export(path: Path, items: int) -> Path:
    """A bundle of an untrained model, each of whose items has one of `GROUPS` values of an attribute."""
    torch.manual_seed(0)
    model = DMAN(replace(ModelConfig(), time="none", returns="off"), items)
    ids = [str(i) for i in range(items)]
    infos = {item_id: ItemInfo(f"Item {item_id}", {"group": str(int(item_id) % GROUPS)}) for item_id in ids}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter, about its future
        export_bundle(model, Vocabulary(ids, True, np.ones(items, np.int64), infos), path)
    return path


def _operations(channel: grpc.Channel, sizes: Sizes, items: int) -> list[Operation]:
    stub, chooser = RecommenderStub(channel), random.Random(0)
    users = [f"user-{number}" for number in range(sizes.users)]
    add_events(channel, {user: [str(chooser.randrange(items)) for _ in range(sizes.events)] for user in users})

    def send(request: pb.RecommendRequest) -> pb.RecommendReply:
        return stub.Recommend(request, timeout=CALL_SECONDS)

    def asking(options: Mapping[str, Any]) -> Callable[[], pb.RecommendRequest]:
        return lambda: pb.RecommendRequest(user_id=chooser.choice(users), k=K, **options)

    def accepting(name: str) -> Callable[[Any, Any], bool]:
        kept = {str(item) for item in range(7, items, GROUPS)} if name == FEW else None
        return lambda _, reply: (
            reply.source == pb.SOURCE_PERSONALIZED
            and len(reply.items) == K
            and (kept is None or all(item.item_id in kept for item in reply.items))
        )

    return [Operation(name, asking(options), send, accepting(name)) for name, options in kinds().items()]


def _claims(blocks: Mapping[str, Sequence[Block]], items: int) -> Iterator[Claim]:
    for name, of_name in blocks.items():
        if name != PLAIN:
            found = ratios(of_name, blocks[PLAIN])
            title = f"p50 with {name}, by that without, {items:,} items"
            if name == FEW:
                yield Claim(title, f"{found} times", f"<= {MOST}", found.median <= MOST)
            else:
                yield Claim(title, f"{found} times")


def _parser() -> Parser:
    p = measuring_parser("tools.bench.filters", "Measure what filters cost.", Path("reports/filters.md"))
    p.add_argument(
        "--num-items", type=int, nargs="+", default=list(CATALOGUES), metavar="N", help="sizes of catalogues"
    )
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments, clock, sections = _parser().parse_args(argv), Clock(), []
    if min(arguments.num_items) < K * GROUPS * 2:  # a filter must leave enough for users who have seen some
        raise UsageError(f"num-items is {min(arguments.num_items)}", f"give {K * GROUPS * 2} or more")
    with scratch_directory(arguments.scratch) as scratch:
        for items in arguments.num_items:
            print(f"{items:,} items ...", flush=True)
            sections.append(measure(scratch, QUICK if arguments.quick else Sizes(), items))
        facts = machine(scratch) | clock.facts(quick=arguments.quick)
    write_report(arguments.out, "What filters cost", "Written by `python -m tools.bench.filters`.", facts, sections)
    show(arguments.out, facts, sections, as_json=arguments.json)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where the target is missed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
