"""What it costs to see times and returns: a real server for each kind of model, side by side.

    python -m tools.bench.signals

The models have the default sizes and untrained weights, which cost as much as trained ones.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import torch

from dman_runtime.model.bundle import open_bundle
from dman_runtime.model.record import max_record_bytes
from dman_runtime.options import Parser, require_positive, run_command
from dman_train.config import ModelConfig
from dman_train.export import export_bundle
from dman_train.model import DMAN
from dman_train.searching import Indexed
from dman_train.vocabulary import Vocabulary
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.blocks import Block, Operation, Plan, clean, interleave, ratios
from tools.bench.report import BLOCK_HEADS, Claim, Section, block_data, block_rows, machine, show, write_report
from tools.bench.servers import connect, dman_server
from tools.bench.setting import QUICK, Clock, K, Sizes, end_with, measuring_parser, scratch_directory
from tools.loadgen import CALL_SECONDS, recommend_operation

WITHOUT = "neither"
MODELS = {
    WITHOUT: replace(ModelConfig(), time="none", returns="off"),
    "times": replace(ModelConfig(), time="request", returns="off"),
    "times and returns": replace(ModelConfig(), time="request", returns="on"),
}
ITEMS = 3416  # as many as MovieLens-1M has
BEGIN, DAY = 1_600_000_000, 86_400
MOST = {"recommend": 1.25, "first recommend": 1.25, "update": 1.3}  # by the same of a model that sees neither
MAX_STATE = 24_000  # bytes
METHOD = """\
Each server has {users} users with about {events} events. A block is {calls} calls of one kind to one server by one \
client; blocks of all kinds and servers take turns. "recommend": users at random of those who have been asked about \
and do not act meanwhile, so that a server has kept their answers. "first recommend": the first one for a user after \
an update of theirs, which is not timed."""


def measure(scratch: Path, sizes: Sizes, items: int) -> Section:
    """All servers at once."""
    with ExitStack() as stack:
        operations, records = list[Operation](), dict[str, int]()
        for name, config in MODELS.items():
            bundle = export(config, scratch / f"bundle-{len(records)}", items)
            records[name] = max_record_bytes(open_bundle(bundle).manifest.state)
            server = stack.enter_context(dman_server(bundle, scratch / f"state-{len(records)}", "--provider", "cpu"))
            operations += _operations(name, stack.enter_context(connect(server.address)), sizes, items)
        plan = Plan({one.name: sizes.rounds * sizes.calls for one in operations}, concurrency=1, rounds=sizes.rounds)
        blocks = clean(interleave(plan.schedule(), [operations], seconds=3600))
    return Section(
        "Servers",
        METHOD.format(users=sizes.users, events=sizes.events, calls=sizes.calls),
        [*_claims(blocks), *_record_claims(records)],
        BLOCK_HEADS,
        block_rows(blocks),
        block_data(blocks),
    )


def export(config: ModelConfig, path: Path, items: int) -> Path:
    """A bundle of an untrained model."""
    torch.manual_seed(0)
    export_untrained(DMAN(config, items), path)
    return path


def export_untrained(model: DMAN, path: Path, indexed: Indexed | None = None) -> None:
    """Its items are called by their numbers."""
    items = model.vocabulary
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter, about its future
        vocabulary = Vocabulary([str(i) for i in range(items)], True, np.ones(items, np.int64), {})
        export_bundle(model, vocabulary, path, indexed=indexed)


def _operations(model: str, channel: grpc.Channel, sizes: Sizes, items: int) -> list[Operation]:
    stub, users = RecommenderStub(channel), [f"user-{number}" for number in range(sizes.users)]
    idle, active = users[::2], users[1::2]
    chooser, clock = random.Random(0), itertools.count(BEGIN + sizes.events * DAY, 60)
    for user in users:
        events = [
            pb.Event(item_id=str(chooser.randrange(items)), timestamp=BEGIN + place * DAY + chooser.randrange(DAY))
            for place in range(sizes.events + chooser.randrange(20))
        ]
        stub.Update(pb.UpdateRequest(user_id=user, events=events), timeout=CALL_SECONDS)

    def event() -> pb.UpdateRequest:
        happened = pb.Event(item_id=str(chooser.randrange(items)), timestamp=next(clock))
        return pb.UpdateRequest(user_id=chooser.choice(active), events=[happened])

    def update(sent: pb.UpdateRequest) -> pb.UpdateReply:
        return stub.Update(sent, timeout=CALL_SECONDS)

    def updated_user() -> str:
        sent = event()
        update(sent)
        return sent.user_id

    again = recommend_operation(channel, lambda: chooser.choice(idle), k=K)
    first = recommend_operation(channel, updated_user, k=K)
    for user in idle:
        again.send(pb.RecommendRequest(user_id=user, k=K))
    return [
        replace(again, name=f"recommend, {model}"),
        replace(first, name=f"first recommend, {model}"),
        Operation(f"update, {model}", event, update, lambda _, reply: reply.applied == 1),
    ]


def _claims(blocks: Mapping[str, Sequence[Block]]) -> Iterator[Claim]:
    for kind, most in MOST.items():
        for model in MODELS:
            if model != WITHOUT:
                found = ratios(blocks[f"{kind}, {model}"], blocks[f"{kind}, {WITHOUT}"])
                title = f"p50 of {kind} with {model}, by that with neither"
                yield Claim(title, f"{found} times", f"<= {most}", found.median <= most)


def _record_claims(records: dict[str, int]) -> Iterator[Claim]:
    for model, size in records.items():
        yield Claim(f"largest state with {model}", f"{size:,} bytes", f"<= {MAX_STATE:,}", size <= MAX_STATE)


def _parser() -> Parser:
    p = measuring_parser("tools.bench.signals", "Measure what times and returns cost.", Path("reports/signals.md"))
    p.add_argument("--num-items", type=int, default=ITEMS, metavar="N", help="items in the catalogue")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments, clock = _parser().parse_args(argv), Clock()
    require_positive(arguments, "num_items")
    with scratch_directory(arguments.scratch) as scratch:
        section = measure(scratch, QUICK if arguments.quick else Sizes(), arguments.num_items)
        facts = machine(scratch) | {"items": f"{arguments.num_items:,}"} | clock.facts(quick=arguments.quick)
    write_report(
        arguments.out, "What times and returns cost", "Written by `python -m tools.bench.signals`.", facts, [section]
    )
    show(arguments.out, facts, [section], as_json=arguments.json)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where a target is missed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
