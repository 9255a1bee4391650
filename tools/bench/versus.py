"""Compares this checkout with another one, for example with the commit before a change, and writes a report.

    python -m tools.bench.versus --other ../base --bundle bundle

Ratios are this checkout by the other one. A missed target is a line in the report, not a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import open_bundle
from dman_runtime.options import Parser, run_command
from dman_runtime.requests import MAX_EVENTS
from tools.bench.checkouts import Checkout
from tools.bench.comparison import OTHER, THIS, Comparison, calls, imports, what_ifs
from tools.bench.report import HOW_TO_READ, Section, machine, show, sizes_of, write_report
from tools.bench.servers import ROOT
from tools.bench.setting import QUICK, Bench, Clock, Sizes, bench_parser, end_with, scratch_directory
from tools.bench.stored import stored_sizes
from tools.bench.whatif import Effort

MEASUREMENTS: tuple[Callable[[Comparison], list[Section]], ...] = (calls, imports, what_ifs, stored_sizes)
IMPORT_USERS, QUICK_IMPORT_USERS = 6000, 1000  # the import must take longer than the start of the command


def _parser() -> Parser:
    p = bench_parser("tools.bench.versus", "Compare this checkout with another one.", Path("reports/versus.md"))
    p.add_argument("--other", type=Path, required=True, help="directory of the other checkout; both serve the bundle")
    p.add_argument("--what-if-events", type=int, default=MAX_EVENTS, help="events in one what-if")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    if not 1 <= arguments.what_if_events <= MAX_EVENTS:
        raise UsageError(
            f"{arguments.what_if_events} events in a what-if", f"choose 1 to {MAX_EVENTS}", parameter="what_if_events"
        )
    checkouts = {OTHER: Checkout.at(arguments.other), THIS: Checkout.at(ROOT)}
    bundle, sizes = open_bundle(arguments.bundle.resolve()), QUICK if arguments.quick else Sizes()
    effort = replace(Effort.of(sizes), events=arguments.what_if_events)
    clock, sections = Clock(), list[Section]()
    with scratch_directory(arguments.scratch) as scratch:
        bench = Bench(bundle, scratch, arguments.provider, sizes, echo="")
        comparison = Comparison(bench, checkouts, effort, QUICK_IMPORT_USERS if arguments.quick else IMPORT_USERS)
        facts = {f"{side} checkout": checkout.commit() for side, checkout in checkouts.items()}
        facts |= machine(bench.scratch) | sizes_of(bundle) | {"provider": arguments.provider}
        for measure in MEASUREMENTS:
            print(f"{(measure.__doc__ or '').splitlines()[0]} ...", flush=True)
            sections += measure(comparison)
    facts |= clock.facts(quick=arguments.quick)
    _write(arguments.out, facts, sections)
    show(arguments.out, facts, sections, as_json=arguments.json)
    return 0


def _write(path: Path, facts: dict[str, str], sections: Sequence[Section]) -> None:
    """The report names no directory: those of this machine tell a reader nothing."""
    method = (
        f"Written by `python -m tools.bench.versus --other CHECKOUT --bundle BUNDLE`. {HOW_TO_READ} Both checkouts "
        "serve the same bundle, each with its own state directory. Ratios are this checkout by the other one."
    )
    write_report(path, "This checkout by another one", method, facts, sections)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where a target is missed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
