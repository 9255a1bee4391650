"""Measures other systems beside ours, on the same machine and in the same run, and writes a report.

    python -m tools.bench.peers --bundle bundle --out reports/peers.md

The peers are installed on demand into environments of their own. One that cannot be is a line in the report that says
why; a missed target is one, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dman_runtime.model.bundle import open_bundle
from dman_runtime.options import Parser, run_command
from tools.bench.peers import h2load, ladder, reencoding, same_model
from tools.bench.peers import search as searched
from tools.bench.peers.catalogue import PEERS
from tools.bench.peers.environments import DEFAULT_CACHE
from tools.bench.report import HOW_TO_READ, Section, machine, show, sizes_of, write_report
from tools.bench.setting import QUICK, Bench, Clock, Sizes, end_with, measuring_parser, scratch_directory


def _parser() -> Parser:
    p = measuring_parser("tools.bench.peers", "Measure other systems beside ours.", Path("reports/peers.md"))
    p.flag("--bundle", type=Path, default=Path("bundle"), help="bundle directory")
    p.add_argument(
        "--environments", type=Path, default=DEFAULT_CACHE, metavar="DIR", help="where the peers are installed"
    )
    p.add_argument(
        "--peers",
        nargs="*",
        choices=[peer.name for peer in PEERS],
        metavar="NAME",
        help="which servers to compare with; all without it",
    )
    p.add_argument("--data", type=Path, default=None, help="log whose users search; without it random histories do")
    p.add_argument("--search-items", type=int, nargs="+", metavar="N", help="sizes of catalogues to search")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    client = h2load.version()
    bundle, clock = open_bundle(arguments.bundle.resolve()), Clock()
    with scratch_directory(arguments.scratch) as scratch:
        bench = Bench(bundle, scratch, "cpu", QUICK if arguments.quick else Sizes(), echo="")
        facts = machine(bench.scratch) | sizes_of(bundle) | {"client": client}
        sections, settings = _sections(bench, arguments)
    facts |= settings | clock.facts(quick=arguments.quick)
    write_report(
        arguments.out, "Beside other systems", f"Written by `{_command(arguments)}`. {HOW_TO_READ}", facts, sections
    )
    show(arguments.out, facts, sections, as_json=arguments.json)
    return 0


def _sections(bench: Bench, arguments: argparse.Namespace) -> tuple[list[Section], dict[str, str]]:
    """All measurements, and how each peer was set."""
    quick = arguments.quick
    effort = ladder.QUICK if quick else ladder.Effort()
    chosen = [peer for peer in PEERS if arguments.peers is None or peer.name in arguments.peers]
    with ExitStack() as stack:
        compared = same_model.start(stack, bench, arguments.environments, chosen)
        print("recommendations ...", flush=True)
        first, recommended = same_model.recommendations(bench, compared, effort)
        print("updates ...", flush=True)
        second, updated = same_model.updates(bench, compared, effort)
    print("encoding histories again ...", flush=True)
    third = reencoding.reencoding(bench, reencoding.QUICK if quick else reencoding.Effort(), (recommended, updated))
    print("search ...", flush=True)
    searches = searched.QUICK if quick else searched.Effort()
    if arguments.search_items:
        searches = replace(searches, items=tuple(arguments.search_items))
    fourth = searched.search(bench, searches, arguments.environments, arguments.data)
    return [first, second, third, fourth], compared.settings


def _command(arguments: argparse.Namespace) -> str:
    """What to run for the same report. It names no directory: those of this machine tell a reader nothing."""
    words = ["python -m tools.bench.peers --bundle BUNDLE"]
    words += ["--quick"] * arguments.quick
    words += ["--data FILE"] if arguments.data else []
    words += [" ".join(["--peers", *arguments.peers])] if arguments.peers is not None else []
    words += [f"--search-items {' '.join(map(str, arguments.search_items))}"] if arguments.search_items else []
    return " ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where a target is missed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
