"""The floor of every round trip: the fastest empty echo that this gRPC can serve, for each number of clients."""

from __future__ import annotations

from tools.bench import h2load
from tools.bench.blocks import Block, p50s, rates
from tools.bench.report import Section, block_data
from tools.bench.servers import Running
from tools.bench.setting import Bench

PROCESSES = 8  # of h2load at most, for requests that may share a user


class Floor:
    """What was measured of all kinds of echo."""

    def __init__(self, bench: Bench) -> None:
        sizes = bench.sizes
        self._echoes = bench.echoes
        self.blocks = {
            clients: h2load.in_turns(
                [h2load.echo_load(server, clients, PROCESSES, kind) for kind, server in bench.echoes.items()],
                rounds=sizes.floor_rounds,
                seconds=sizes.block_seconds,
            )
            for clients in sizes.clients
        }

    def best(self, clients: int) -> tuple[str, Running]:
        """The kind that answered most calls a second for the nearest number of clients that was measured."""
        blocks = self.blocks[min(self.blocks, key=lambda measured: abs(measured - clients))]
        kind = max(blocks, key=lambda one: rates(blocks[one]).median)
        return kind, self._echoes[kind]


def floor_section(bench: Bench) -> Section:
    """All kinds of empty echo against each other."""
    floor = bench.floor
    rows = []
    for clients, blocks in floor.blocks.items():
        best = floor.best(clients)[0]
        rows += [[str(clients), f"**{kind}**" if kind == best else kind, *_numbers(of)] for kind, of in blocks.items()]
    return Section(
        "The floor: an empty gRPC echo",
        "A method that takes bytes and returns them, by every kind of gRPC server in Python: thread pools, asyncio, "
        "and asyncio on uvloop, which is what the product is built on. Everything below is compared with the one in "
        "bold, the fastest for that number of clients, measured again beside it.",
        [],
        ("clients", "echo", "calls/s", "of the rounds", "p50 ms"),
        rows,
        {str(clients): block_data(blocks) for clients, blocks in floor.blocks.items()},
        panels={
            "empty echo, calls/s by clients": {
                kind: {clients: rates(blocks[kind]).median for clients, blocks in floor.blocks.items()}
                for kind in bench.echoes
            }
        },
    )


def _numbers(blocks: list[Block]) -> list[str]:
    rate, p50 = rates(blocks), p50s(blocks)
    return [f"{rate.median:,.0f}", f"{min(rate.values):,.0f} to {max(rate.values):,.0f}", f"{p50.median:.3f}"]
