"""What one more worker takes: memory that no other process shares, and time until it serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tools.bench import h2load
from tools.bench.blocks import Spread
from tools.bench.h2load import Call, Group, Load
from tools.bench.messages import check, recommend_calls, update_calls
from tools.bench.report import Claim, Section
from tools.bench.servers import counting_server, dman_server
from tools.bench.setting import CLIENTS, Bench

MAX_PRIVATE = 80e6  # bytes
MAX_START, MAX_START_OF_MANY, MANY_ITEMS = 1.0, 5.0, 1_000_000  # seconds; with so many items


@dataclass(frozen=True)
class Worker:
    """Of a server with two workers that have served; bytes and seconds."""

    private: int  # USS of the larger worker
    proportional: int  # PSS of both and of the supervisor, above that of a server with one
    resident: int  # RSS of the larger worker
    supervisor: int  # USS
    starts: tuple[float, ...]  # from the start of a process to its first line, on a store that knows the items

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def claims(self, items: int, catalogue: str) -> list[Claim]:
        start, limit = Spread(self.starts), MAX_START_OF_MANY if items >= MANY_ITEMS else MAX_START
        more = f"; a server of two has {self.proportional / 1e6:.0f} MB more than of one"
        return [
            Claim(
                f"private memory of a worker, {catalogue}",
                f"{self.private / 1e6:.0f} MB (USS; RSS {self.resident / 1e6:.0f} MB{more})",
                f"<= {MAX_PRIVATE / 1e6:.0f} MB",
                self.private <= MAX_PRIVATE,
            ),
            Claim(
                f"from the start of a worker until it is ready, {catalogue}",
                f"{start} s",
                f"<= {limit:g} s",
                start.median <= limit,
            ),
        ]


def further_worker(bench: Bench, bundle: Path, state: Path, calls: Sequence[Call], *, repeats: int) -> Worker:
    """Measures servers of a bundle, some starts of one, on a state directory that was served before."""
    starts, provider = [], ("--provider", bench.provider)
    for _ in range(repeats):
        began = time.perf_counter()
        with dman_server(bundle, state, *provider):
            starts.append(time.perf_counter() - began)
    alone = _after_serving(bench, bundle, state, calls, 1)
    memory = _after_serving(bench, bundle, state, calls, 2)
    workers = [one for one in memory if one is not memory[0]]  # the first is the supervisor
    return Worker(
        max(one.uss for one in workers),
        sum(one.pss for one in memory) - sum(one.pss for one in alone),
        max(one.rss for one in workers),
        memory[0].uss,
        tuple(starts),
    )


def _after_serving(bench: Bench, bundle: Path, state: Path, calls: Sequence[Call], workers: int) -> list[Any]:
    """Memory of a server's processes after some thousand calls; of several workers, the supervisor's first."""
    options = ["--provider", bench.provider, "--workers", str(workers)]
    with counting_server(bundle, state, *options) as server:
        check(server, calls)
        for call in {call.path for call in calls}:
            group = Group([one for one in calls if one.path == call], CLIENTS)
            if h2load.is_here():
                h2load.send(Load(server, {call: group}), seconds=2 * bench.sizes.block_seconds)
        process = psutil.Process(server.pid)
        return [one.memory_full_info() for one in (process, *process.children(recursive=True))]


def workers(bench: Bench) -> Section:
    """Private memory of a worker, and the time until it is ready."""
    with bench.server("workers") as server:
        users = bench.ordinary_users(server.address)
    calls = [*recommend_calls(users[:CLIENTS]), *update_calls(bench, users[:CLIENTS])]
    repeats, items = bench.sizes.start_repeats, bench.bundle.manifest.vocabulary
    worker = further_worker(bench, bench.bundle.path, bench.scratch / "workers", calls, repeats=repeats)
    return Section(
        "A further worker",
        f"A server with two workers, after some seconds of recommendations and updates by {CLIENTS} clients. USS is "
        "what a worker has to itself; RSS counts the pages of the state store as well, which workers share and the "
        "system can take back. A start is timed from the start of a process to its first line, on a store that knows "
        "the items of the bundle already, as it does for every worker but the first one of all.",
        worker.claims(items, f"{items:,} items"),
        data=worker.as_json(),
    )
