"""What two checkouts are compared in: round trips, imports, updates during what-ifs, and stored bytes.

Both serve the same bundle at the same time, each with its own state directories, and take turns.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from dman_runtime.errors import UsageError
from dman_runtime.store.marker import marker_path
from tools.bench import whatif
from tools.bench.batch import write_log
from tools.bench.blocks import Operation, Plan, Spread, clean, p50s, ratios, run_in_processes
from tools.bench.checkouts import Checkout, stored_bytes
from tools.bench.report import BLOCK_HEADS, Claim, Section, block_data, block_rows
from tools.bench.servers import connect
from tools.bench.setting import Bench, K, Sizes
from tools.loadgen import recommend_operation, update_operation

OTHER, THIS = "other", "this"
MAX_P50_RATIO, MIN_IMPORT_RATIO = 1.05, 0.95
MIN_IMPORT_SECONDS = 0.01  # a log that is too short to measure must give no negative speed


@dataclass(frozen=True)
class Comparison:
    """What every measurement of a run shares."""

    bench: Bench
    checkouts: Mapping[str, Checkout]  # the other one first
    effort: whatif.Effort
    import_users: int

    @contextmanager
    def servers(self, name: str) -> Iterator[dict[str, str]]:
        """A fresh server of each checkout: their addresses."""
        with ExitStack() as stack:
            yield {
                side: stack.enter_context(
                    checkout.server(self.bench.bundle.path, self._state(name, side), provider=self.bench.provider)
                ).address
                for side, checkout in self.checkouts.items()
            }

    def stored(self, name: str) -> dict[str, dict[str, tuple[int, int]]]:
        """What the stores of servers of that name hold, now that these have stopped: see `stored_bytes`."""
        return {side: stored_bytes(self._state(name, side)) for side in self.checkouts}

    def import_seconds(self, side: str, log: Path, events: int) -> float:
        state = self._state("import", side)
        taken, result = self.checkouts[side].import_log(
            log, self.bench.bundle.path, state, provider=self.bench.provider
        )
        shutil.rmtree(state)
        marker_path(state).unlink(missing_ok=True)
        if result["events"] != events:
            raise UsageError(f"the {side} checkout imported {result['events']} of {events} events")
        return taken

    def _state(self, name: str, side: str) -> Path:
        return self.bench.scratch / f"{name}-{side}"


# -- recommend and update --------------------------------------------------------------------------------------------


def calls(comparison: Comparison) -> list[Section]:
    """Round trips of recommend and durable single-event updates, one client."""
    bench, made = comparison.bench, []
    with comparison.servers("calls") as addresses:
        for address in addresses.values():
            users = bench.ordinary_users(address)  # the same on both

        def recommend(channel: grpc.Channel, chooser: random.Random) -> Operation:
            return recommend_operation(channel, lambda: chooser.choice(users), k=K)

        def update(channel: grpc.Channel, chooser: random.Random) -> Operation:
            return update_operation(channel, lambda: chooser.choice(users), lambda: chooser.choice(bench.items))

        for title, operation in {"Recommend": recommend, "Durable update": update}.items():
            made.append(_compare_calls(bench.sizes, addresses, title, operation))
    return made


def _compare_calls(
    sizes: Sizes,
    addresses: Mapping[str, str],
    title: str,
    operation: Callable[[grpc.Channel, random.Random], Operation],
) -> Section:
    def opened(stack: ExitStack, number: int, names: Sequence[str]) -> list[Operation]:
        """Both checkouts get the same requests in the same order."""
        return [
            replace(operation(stack.enter_context(connect(addresses[name])), random.Random(number)), name=name)
            for name in names
        ]

    plan = Plan(dict.fromkeys(addresses, sizes.rounds * sizes.calls), concurrency=1, rounds=sizes.rounds)
    blocks = clean(run_in_processes(plan, opened))
    ratio, p50 = ratios(blocks[THIS], blocks[OTHER]), {side: p50s(blocks[side]).median for side in blocks}
    return Section(
        title,
        f"One worker of each checkout, {sizes.users} users with about {sizes.events} events, one client. The two "
        f"checkouts take turns in blocks of {sizes.calls} calls.",
        [
            Claim(
                f"{title.lower()} p50",
                f"{_ratio(ratio)}, {p50[THIS]:.3f} ms by {p50[OTHER]:.3f} ms",
                f"<= {MAX_P50_RATIO}x",
                ratio.median <= MAX_P50_RATIO,
            )
        ],
        BLOCK_HEADS,
        block_rows(blocks),
        {"ratio": ratio.values, "operations": block_data(blocks)},
    )


# -- import ----------------------------------------------------------------------------------------------------------


def imports(comparison: Comparison) -> list[Section]:
    """Speed of the import command, less the time that it takes to start."""
    bench, rounds = comparison.bench, comparison.bench.sizes.import_repeats
    logs = {name: _log(bench, name, users=users) for name, users in (("tiny", 1), ("whole", comparison.import_users))}
    taken: dict[tuple[str, str], list[float]] = {(name, side): [] for name in logs for side in comparison.checkouts}
    for turn in range(rounds):
        for name, (log, events) in logs.items():
            for side in list(comparison.checkouts)[:: 1 if turn % 2 == 0 else -1]:
                taken[name, side].append(comparison.import_seconds(side, log, events))
    start = {side: Spread(tuple(taken["tiny", side])) for side in comparison.checkouts}
    events = logs["whole"][1]
    speed = {
        side: Spread(
            tuple(events / max(whole - start[side].median, MIN_IMPORT_SECONDS) for whole in taken["whole", side])
        )
        for side in comparison.checkouts
    }
    ratio = Spread(tuple(a / b for a, b in zip(speed[THIS].values, speed[OTHER].values, strict=True)))
    section = Section(
        "Import",
        f"`dman-runtime import` of {events} events of {comparison.import_users} users into a fresh state directory, "
        f"{rounds} times each, in turns. The whole command is timed. The median time of the same command with a log "
        f"of {logs['tiny'][1]} events is its start; it is subtracted.",
        [
            Claim(
                "import events/s",
                f"{_ratio(ratio)}, {speed[THIS].median:.0f} by {speed[OTHER].median:.0f}",
                f">= {MIN_IMPORT_RATIO}x",
                ratio.median >= MIN_IMPORT_RATIO,
            )
        ],
        ("checkout", "whole command s", "start s", "events/s"),
        [[side, str(Spread(tuple(taken["whole", side]))), str(start[side]), _whole(speed[side])] for side in start],
        {"events": events, "seconds": {f"{name}, {side}": seconds for (name, side), seconds in taken.items()}},
    )
    return [section]


def _log(bench: Bench, name: str, *, users: int) -> tuple[Path, int]:
    path = bench.scratch / f"{name}.parquet"
    return path, write_log(replace(bench, sizes=replace(bench.sizes, import_users=users)), path)


# -- updates during what-ifs -----------------------------------------------------------------------------------------


def what_ifs(comparison: Comparison) -> list[Section]:
    """Updates of other users while long what-ifs run."""
    effort = comparison.effort
    with comparison.servers("what-ifs") as addresses:
        found = whatif.measure(comparison.bench, addresses, effort)
    claims = []
    for side, one in found.items():
        for claim in whatif.claims(one, effort):
            named = replace(claim, claim=f"{claim.claim}, {side} checkout")
            claims.append(named if side == THIS else replace(named, target="none", met=None))
    texts = [f"{side.capitalize()} checkout: {whatif.what_if_text(one)}" for side, one in found.items()]
    section = Section(
        "Updates during what-ifs",
        " ".join([whatif.method(effort), "The two checkouts take turns.", *texts]),
        claims,
        ("checkout", *whatif.HEADS),
        [[side, *row] for side, one in found.items() for row in whatif.rows(one)],
        {side: whatif.data(one) for side, one in found.items()},
    )
    return [section]


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x ({min(ratio.values):.2f} to {max(ratio.values):.2f})"


def _whole(spread: Spread) -> str:
    return f"{spread.median:.0f} ({min(spread.values):.0f} to {max(spread.values):.0f})"
