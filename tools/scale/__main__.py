"""Simulates a store that is divided among primaries, and writes reports/scale.md.

    python -m tools.scale

How many primaries so many users need, what Zipf users do to the busiest one, and what a death costs. `shards` has the
model, docs/scale.md the arithmetic around it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dman_runtime.errors import UsageError
from dman_runtime.options import Parser, run_command
from tools.bench.report import Claim, Section, show, write_report
from tools.scale.measured import measured
from tools.scale.plan import ROOT, SIZES, Assumed, Plan
from tools.scale.shards import (
    Costs,
    Death,
    Load,
    Outcome,
    busiest_share,
    primaries_needed,
    simulate,
    years_between_losses,
)

METHOD = (
    "Written by `python -m tools.scale`: a simulation, not a measurement. What a command costs a primary was measured "
    "([experiments](../docs/experiments.md), 2026-11-28, 03:22: one replica, `WAIT`, one connection), and the rates "
    "are those of [scale](../docs/scale.md). Each primary serves one command at a time; calls arrive at random; the "
    "r-th busiest user calls r^-exponent times as often as the busiest. Latencies are those at the store, without the "
    "network and without what the server computes. The same seed gives the same page."
)
CALLS = 300_000  # that a run has at least
EXPONENTS = (0.0, 0.6, 0.8, 1.0, 1.1)
LATENCY_HEADS = ("recommend p50 / p99 / p99.9 ms", "update p50 / p99 / p99.9 ms")
DIES, WATCHED = 3.0, 40.0  # seconds: when a primary dies, and for how long it is looked at
YEARS = 1e6  # beyond, other things happen


@dataclass(frozen=True)
class Settings:
    """What the sections share."""

    load: Load
    costs: Costs
    death: Death
    p99: float  # seconds
    busiest: float
    seconds: float  # at least
    seed: int
    deaths: float  # of a machine, a year
    hours: float  # until a new copy is there

    def long_enough(self, load: Load) -> float:
        return max(self.seconds, CALLS / load.calls)


def latencies(outcome: Outcome) -> list[str]:
    found = [outcome.percentiles(of, 0.5, 0.99, 0.999) for of in (~outcome.is_update, outcome.is_update)]
    return [" / ".join(f"{1e3 * value:.2f}" for value in of_kind) for of_kind in found]


def _years(years: float) -> str:
    if years > YEARS:
        return "more than a million"
    return f"{years:,.0f}" if years >= 100 else f"{years:.2g}"


def needed(s: Settings, load: Load) -> tuple[int, Outcome]:
    """Raises UsageError where no number of primaries is enough."""
    try:
        return primaries_needed(load, s.costs, p99=s.p99, busiest=s.busiest, seconds=s.long_enough(load), seed=s.seed)
    except ValueError as error:
        raise UsageError(f"{load}: {error}", "allow a longer p99, a busier primary or a smaller exponent") from error


def takes(s: Settings) -> Section:
    """Primaries for each size of the plan."""
    m, rows = measured(ROOT), []
    claims = []
    for users in SIZES:
        load = replace(s.load, users=users, calls=Plan(users, m, Assumed()).calls)
        number, outcome = needed(s, load)
        years = [years_between_losses(max(3, number), replicas, deaths=s.deaths, hours=s.hours) for replicas in (1, 2)]
        busy = f"{outcome.busy.mean():.2f}, {outcome.busy.max():.2f}"
        rows.append([f"{users:,}", f"{load.calls:,.0f}", f"{number:,}", busy, *latencies(outcome), *map(_years, years)])
        claims.append(Claim(f"primaries for {users:,} users, {load.calls:,.0f} calls/s", f"{number:,}"))
    heads = (
        "users",
        "calls/s",
        "primaries",
        "busy: mean, busiest",
        *LATENCY_HEADS,
        "years to a loss, 1 replica",
        "2 replicas",
    )
    method = (
        f"The fewest primaries with p99 of at most {1e3 * s.p99:g} ms and none busy for more than {s.busiest:g} of the "
        f"time, Zipf's exponent {s.load.exponent:g}. A cluster has at least three. A primary is one thread: several "
        "fit on a machine. They must also hold the data: [scale](../docs/scale.md). "
        "Years to a loss: until a primary and all its replicas are dead at once, if "
        f"machines die {s.deaths:g} times a year each on its own, and a new copy is there after {s.hours:g} h."
    )  # fmt: skip
    return Section("What so many users take", method, claims, heads, rows)


def by_primaries(s: Settings, number: int) -> Section:
    """The same load on fewer and more."""
    rows = []
    for primaries in sorted({max(1, round(number * factor)) for factor in (0.7, 0.85, 1, 1.5, 2, 3)}):
        outcome = simulate(s.load, s.costs, primaries=primaries, seconds=s.long_enough(s.load), seed=s.seed)
        rows.append([f"{primaries:,}", f"{outcome.busy.mean():.2f}", f"{outcome.busy.max():.2f}", *latencies(outcome)])
    load = f"{s.load.calls:,.0f} calls/s of {s.load.users:,} users"
    method = f"{load}. Busy above 1: the queue of that primary grows for ever."
    return Section("Primaries", method, [], ("primaries", "busy, mean", "busiest", *LATENCY_HEADS), rows)


def by_exponent(s: Settings, number: int) -> Section:
    """The same load by users who are more and more unlike."""
    rows = []
    for exponent in EXPONENTS:
        load = replace(s.load, exponent=exponent)
        outcome = simulate(load, s.costs, primaries=number, seconds=s.long_enough(load), seed=s.seed)
        share = f"{100 * busiest_share(load.users, exponent):.2g} %"
        ratio = f"{outcome.busy.max() / outcome.busy.mean():.2f}"
        rows.append([f"{exponent:g}", share, f"{outcome.busy.max():.2f}", ratio, *latencies(outcome)])
    method = (
        f"The same on {number} primaries. Exponent 0: all users alike. In MovieLens-1M the busiest of 6,040 users has "
        "2,314 of 1,000,209 events, which is less than with .5. From 1 on, one user is a large part of what a primary "
        "can do, and more primaries do not help: such a user is a robot, to be stopped before it reaches the store."
    )
    heads = ("exponent", "calls of the busiest user", "busiest primary", "by the mean", *LATENCY_HEADS)
    return Section("Users who are unlike", method, [], heads, rows)


def deaths(s: Settings, number: int) -> Section:
    """The busiest primary dies."""
    rows, claims = [], []
    d = s.death
    cases = [(1.8, d.slower, number), (d.failover, d.slower, number), (15.0, d.slower, number)]
    cases += [(d.failover, slower, primaries) for primaries in (number, 2 * number) for slower in (1.5, 2.0)]
    run = partial(simulate, s.load, s.costs, seconds=DIES + WATCHED, seed=s.seed)
    quiet = {primaries: run(primaries=primaries) for primaries in (number, 2 * number)}
    for failover, slower, primaries in cases:
        before, outcome = quiet[primaries], run(primaries=primaries, death=replace(d, failover=failover, slower=slower))
        noticed = outcome.latency > before.latency + 1e-3
        failed = outcome.latency > d.patience
        normal = float(outcome.arrival[noticed].max(initial=DIES)) - DIES
        lost = f"{failed.sum() / s.load.calls:.2f}"
        rows.append(
            [f"{primaries}", f"{before.busy.max():.2f}", f"{failover:g}", f"{slower:g}", f"{failed.sum():,}", lost,
             f"{(noticed & ~failed).sum():,}", f"{normal:.1f}" if normal < WATCHED - 1 else f"more than {WATCHED:g}"]
        )  # fmt: skip
        if (failover, slower, primaries) == cases[1]:
            text = f"{lost} s of all calls, of {100 / number:.0f} % of the users"
            claims.append(Claim(f"calls that fail when the busiest of {number} primaries dies", text))
    heads = (
        "primaries",
        "busiest",
        "failover s",
        "slower",
        "failed calls",
        "s of all calls",
        "1 ms late or more",
        "s until none is",
    )
    method = (
        "The busiest primary dies; its replica serves after the failover, at first so many times slower, for "
        f"{d.cold:g} s (caches). A caller gives up after {d.patience:g} s; a call that takes longer has failed. Calls "
        "of other primaries notice nothing. Failovers of 1.8 and 7.6 s were measured, with node timeouts of 1 and 5 s; "
        "15 s is the default timeout of the servers. How much slower a successor is was not measured: one that keeps "
        "all in memory is not, one on disk may be. Where `busiest` times `slower` is above 1, the queue grows until "
        "the caches are warm: so a store on disk needs more primaries than its load asks for."
    )  # fmt: skip
    return Section("A primary that dies", method, claims, heads, rows)


def replicas(s: Settings, number: int) -> Section:
    rows = []
    for hours in (0.25, 1.0, 4.0, 24.0):
        years = [years_between_losses(number, of, deaths=s.deaths, hours=hours) for of in (0, 1, 2)]
        rows.append([f"{hours:g}", *map(_years, years)])
    method = (
        f"{number} primaries on machines that die {s.deaths:g} times a year, each on its own. One replica is enough "
        "where a new copy is made at once; two allow for the night, and for a machine that is taken away on purpose "
        "while another dies. Replicas on the same host, rack or release do not count."
    )
    return Section(
        "How many replicas", method, [], ("hours to a new copy", "years to a loss, none", "one", "two"), rows
    )


def _parser() -> Parser:
    load, costs, death = Load(0, 10**8), Costs(), Death(at=DIES)
    p = Parser(prog="python -m tools.scale", description="Simulate a store that is divided among primaries.")
    p.add_argument("--users", type=int, default=load.users, help="of the sections after the first")
    p.add_argument("--calls", type=float, default=0.0, help="of them in a second; 0: as docs/scale.md has it")
    p.add_argument("--updates", type=float, default=load.updates, help="share of the calls that are updates")
    p.add_argument("--exponent", type=float, default=load.exponent, help="of Zipf's law; 0: all users alike")
    p.add_argument("--recommend-us", type=float, default=1e6 * costs.recommend, help="microseconds of a primary")
    p.add_argument("--read-us", type=float, default=1e6 * costs.read, help="the same, to read for an update")
    p.add_argument("--commit-us", type=float, default=1e6 * costs.commit, help="the same, to write an update")
    p.add_argument("--encode-ms", type=float, default=1e3 * costs.encode, help="between the two")
    p.add_argument("--spread", type=float, default=costs.spread, help="standard deviation of costs by their mean")
    p.add_argument("--failover", type=float, default=death.failover, help="seconds until a replica serves")
    p.add_argument("--slower", type=float, default=death.slower, help="what it takes longer at first")
    p.add_argument("--cold", type=float, default=death.cold, help="for so many seconds")
    p.add_argument("--patience", type=float, default=death.patience, help="seconds after which a caller gives up")
    p.add_argument("--p99-ms", type=float, default=2.0, help="at most, at the store")
    p.add_argument("--busiest", type=float, default=Assumed().busy, help="share of the time that a primary may be busy")
    p.add_argument("--seconds", type=float, default=2.0, help="that each run simulates, at least")
    p.add_argument("--deaths", type=float, default=4.0, help="of a machine in a year")
    p.add_argument("--hours", type=float, default=1.0, help="until a new copy of a primary is there")
    p.add_argument("--seed", type=int, default=0, help="of the random numbers")
    p.add_argument("--out", type=Path, default=Path("reports/scale.md"), help="Markdown file to write")
    p.add_argument("--json", action="store_true", help="print the claims as JSON on the last line")
    return p


POSITIVE = ("users", "recommend_us", "read_us", "commit_us", "p99_ms", "busiest", "seconds", "deaths", "hours")


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    for name in POSITIVE:
        if not 0 < getattr(arguments, name) < np.inf:
            raise UsageError(f"{name} is {getattr(arguments, name)}", "give a number above 0", parameter=name)
    calls = arguments.calls or Plan(arguments.users, measured(ROOT), Assumed()).calls
    micro = {name: getattr(arguments, f"{name}_us") * 1e-6 for name in ("recommend", "read", "commit")}
    death = {name: getattr(arguments, name) for name in ("failover", "slower", "cold", "patience")}
    s = Settings(
        Load(calls, arguments.users, arguments.updates, arguments.exponent),
        Costs(**micro, encode=arguments.encode_ms / 1e3, spread=arguments.spread),
        Death(at=DIES, **death),
        p99=arguments.p99_ms / 1e3, busiest=arguments.busiest, seconds=arguments.seconds, seed=arguments.seed,
        deaths=arguments.deaths, hours=arguments.hours,
    )  # fmt: skip
    number, _ = needed(s, s.load)
    sections = [takes(s), by_primaries(s, number), by_exponent(s, number), deaths(s, number), replicas(s, number)]
    facts = {
        "command": "`" + " ".join(["python -m tools.scale", *(sys.argv[1:] if argv is None else argv)]) + "`",
        "a primary, for a recommendation; the read of an update; its commit": " / ".join(
            f"{1e6 * one:.0f}" for one in (s.costs.recommend, s.costs.read, s.costs.commit)
        )
        + f" us, spread {s.costs.spread:g}",
        "updates": f"{100 * s.load.updates:g} % of the calls, {1e3 * s.costs.encode:g} ms between read and commit",
        "seed": str(s.seed),
    }
    write_report(arguments.out, "A divided store, simulated", METHOD, facts, sections)
    show(arguments.out, facts, sections, as_json=arguments.json)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
