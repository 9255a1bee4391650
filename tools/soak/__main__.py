"""Repeats all attacks for a while, counts what honest callers see, and writes a report: `make soak`.

    python -m tools.soak                  everything
    python -m tools.soak exactly-once     one part; so do rows, roll-overs, cluster, ingestion, malformed, memory and
                                          overhead

The exit status is 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dman_runtime.errors import UsageError
from dman_runtime.options import Parser, run_command
from tools.bench.checkouts import Checkout
from tools.bench.report import Section, machine, show, write_report
from tools.bench.setting import Clock, end_with, scratch_directory
from tools.faults.bundles import read_manifest
from tools.faults.servers import ROOT
from tools.soak.cluster import over_a_cluster
from tools.soak.exactly_once import exactly_once
from tools.soak.ingestion import ingestion
from tools.soak.limits import malformed, memory
from tools.soak.overhead import overhead
from tools.soak.rollover import while_bundles_change
from tools.soak.rows import rotation
from tools.soak.setting import QUICK, Effort, Soak, demo_bundle

PARTS: dict[str, Callable[[Soak], list[Section]]] = {
    "rows": rotation,
    "exactly-once": lambda soak: [exactly_once(soak)],
    "roll-overs": lambda soak: [while_bundles_change(soak, workers) for workers in (1, 2)],
    "cluster": lambda soak: [over_a_cluster(soak, "replica"), over_a_cluster(soak, "local")],
    "ingestion": lambda soak: [ingestion(soak)],
    "malformed": lambda soak: [malformed(soak)],
    "memory": lambda soak: [memory(soak)],
    "overhead": lambda soak: [overhead(soak)],
}


def _parser() -> Parser:
    p = Parser(prog="python -m tools.soak", description="Attack servers on this machine; write a report.")
    p.add_argument("part", nargs="?", choices=["all", *PARTS], default="all", help="what to run")
    p.add_argument("--minutes", type=float, default=None, help="how long the attacks rotate (default: 30)")
    p.add_argument("--bundle", type=Path, default=None, help="bundle to serve; without it one is trained on made data")
    p.add_argument("--out", type=Path, default=Path("reports/faults.md"), help="the report")
    p.add_argument("--quick", action="store_true", help="few and short: does everything work? Not for quoting")
    p.add_argument("--scratch", type=Path, default=Path(), help="where temporary state goes")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    effort: Effort = QUICK if arguments.quick else Effort()
    if arguments.minutes is not None:
        if not 0 < arguments.minutes <= 24 * 60:
            raise UsageError(f"minutes is {arguments.minutes}", "choose more than 0, at most 1440", parameter="minutes")
        effort = replace(effort, minutes=arguments.minutes)
    clock = Clock()
    with scratch_directory(arguments.scratch) as scratch:
        bundle = arguments.bundle.resolve() if arguments.bundle else demo_bundle(scratch)
        soak = Soak(bundle, scratch, effort)
        manifest = read_manifest(bundle)
        facts = {"commit": Checkout.at(ROOT).commit(), **machine(scratch)}
        facts["bundle"] = f"`{manifest['bundle_id']}`, {manifest['vocabulary']} items"
        sections: list[Section] = []
        for name in PARTS if arguments.part == "all" else [arguments.part]:
            print(f"{name} ...", flush=True)
            sections += PARTS[name](soak)
    facts |= clock.facts(quick=arguments.quick)
    _write(arguments.out, facts, _command(arguments), sections)
    show(arguments.out, facts, sections, as_json=arguments.json)
    return 1 if broken(sections) else 0


def _command(arguments: argparse.Namespace) -> str:
    """What to run for the same report. It names no directory: those of this machine tell a reader nothing."""
    words = ["python -m tools.soak", arguments.part]
    words += ["--quick"] * arguments.quick
    words += [f"--minutes {arguments.minutes:g}"] if arguments.minutes is not None else []
    words += ["--bundle BUNDLE"] if arguments.bundle else []
    return " ".join(words)


def broken(sections: Sequence[Section]) -> list[str]:
    """The claims whose bound was not kept."""
    return [claim.claim for section in sections for claim in section.claims if claim.met is False]


def _write(path: Path, facts: dict[str, str], command: str, sections: Sequence[Section]) -> None:
    count = len(broken(sections))
    verdict = "Every bound was kept." if not count else f"{count} bounds were broken."
    method = f"Written by `{command}`. {verdict}"
    write_report(path, "Faults, attacks and what others see of them", method, facts, sections)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a bound is broken, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
