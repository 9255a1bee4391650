"""Load on several servers at several numbers of clients, in turns, and the throughput of each at equal p99."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.blocks import Block, Spread
from tools.bench.h2load import Request
from tools.bench.peers import h2load
from tools.bench.peers.running import Server

BOUNDS = (5.0, 10.0, 20.0, 50.0)  # milliseconds of p99


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    clients: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
    rounds: int = 3
    seconds: float = 1.0  # of each block


QUICK = Effort(clients=(1, 4), rounds=1, seconds=0.4)


@dataclass(frozen=True)
class Step:
    """One block of a server at some number of clients."""

    block: Block
    cpu_milliseconds: float  # of all processes of the server, per call


@dataclass
class Climb:
    """All blocks of a server, by the number of clients."""

    server: Server
    steps: dict[int, list[Step]] = field(default_factory=dict)

    def per_second(self, clients: int) -> float:
        return statistics.median(step.block.per_second for step in self.steps[clients])

    def p50(self, clients: int) -> float:
        return statistics.median(step.block.p50 for step in self.steps[clients])

    def p99(self, clients: int) -> float:
        return statistics.median(step.block.p99 for step in self.steps[clients])

    def cpu_milliseconds(self, clients: int) -> float:
        return statistics.median(step.cpu_milliseconds for step in self.steps[clients])

    def failed(self, clients: int) -> int:
        """Calls in all rounds."""
        return sum(step.block.errors.total() for step in self.steps[clients])

    def within(self, bound: float) -> int | None:
        """The number of clients with the highest throughput whose p99 is within the bound, without failed calls."""
        kept = [clients for clients in self.steps if not self.failed(clients) and self.p99(clients) <= bound]
        return max(kept, key=self.per_second, default=None)


def climb(
    servers: Sequence[Server],
    requests: Callable[[Server, int], Sequence[Request]],
    reply_bytes: Mapping[str, int],
    effort: Effort,
    scratch: Path,
) -> list[Climb]:
    """All servers at all numbers of clients, in turns; only the one that is measured runs.

    `requests`: those of so many clients. `reply_bytes`: of a right reply, by server. Raises UsageError where a client
    gets no answer at all.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    climbs = [Climb(server) for server in servers]
    for turn in range(effort.rounds):
        first = turn % len(climbs)
        for one in climbs[first:] + climbs[:first]:
            server = one.server
            server.thaw()
            for clients in effort.clients:
                step = _step(server, requests(server, clients), reply_bytes[server.name], effort, scratch)
                one.steps.setdefault(clients, []).append(step)
            server.freeze()
    return climbs


def _step(server: Server, requests: Sequence[Request], reply_bytes: int, effort: Effort, scratch: Path) -> Step:
    used = server.cpu_seconds()
    load = h2load.block(
        server.address,
        requests,
        http1=server.wire.http1,
        seconds=effort.seconds,
        reply_bytes=reply_bytes,
        scratch=scratch,
    )
    return Step(load.block, 1e3 * (server.cpu_seconds() - used) / load.calls)


def ratio_within(ours: Sequence[Climb], others: Sequence[Climb], bound: float) -> tuple[Climb, Climb, Spread] | None:
    """Our best server and the best other one within a bound, and the ratios of their throughputs, round by round.

    None where no server of one side keeps the bound.
    """
    best = [_best_within(side, bound) for side in (ours, others)]
    if best[0] is None or best[1] is None:
        return None
    (mine, my_clients), (other, other_clients) = best[0], best[1]
    pairs = zip(mine.steps[my_clients], other.steps[other_clients], strict=True)
    return mine, other, Spread(tuple(a.block.per_second / b.block.per_second for a, b in pairs))


def _best_within(climbs: Sequence[Climb], bound: float) -> tuple[Climb, int] | None:
    kept = [(one, clients) for one in climbs if (clients := one.within(bound)) is not None]
    return max(kept, key=lambda found: found[0].per_second(found[1]), default=None)
