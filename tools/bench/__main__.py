"""Measures what serving a bundle costs and writes a report with pictures: `make bench`.

    python -m tools.bench --bundle bundle --out reports/performance.md [--only closed overload]

Starts real servers on free loopback ports with temporary state directories, and stops them. A missed target is a line
in the report, not a failure.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from dman_runtime.model.bundle import open_bundle
from dman_runtime.model.encoder import Encoder
from dman_runtime.options import Parser, run_command
from tools.bench import h2load
from tools.bench.batch import cuda, import_speed
from tools.bench.breakdown import breakdown
from tools.bench.closed import answer_sizes, closed_loops, reads_to_updates
from tools.bench.floor import floor_section
from tools.bench.open_loop import latency_by_rate, overload
from tools.bench.report import HOW_TO_READ, Section, machine, show, sizes_of, write_report
from tools.bench.servers import ECHO_KINDS, OWN_KIND, Running, echo_server
from tools.bench.setting import QUICK, Bench, Clock, Sizes, bench_parser, end_with, scratch_directory
from tools.bench.sweeps import catalogue_size, history_length
from tools.bench.updates import durable_updates
from tools.bench.whatif import updates_during_what_ifs
from tools.bench.workers import workers


class Part(NamedTuple):
    """A part of the report."""

    measure: Callable[[Bench], Section]
    by_h2load: bool = False
    by_floor: bool = False  # compared with the fastest echo


PARTS: Mapping[str, Part] = {
    "floor": Part(floor_section, by_h2load=True, by_floor=True),
    "closed": Part(closed_loops, by_h2load=True, by_floor=True),
    "mix": Part(reads_to_updates, by_h2load=True, by_floor=True),
    "k": Part(answer_sizes, by_h2load=True, by_floor=True),
    "open": Part(latency_by_rate, by_floor=True),
    "overload": Part(overload),
    "updates": Part(durable_updates, by_floor=True),
    "breakdown": Part(breakdown),
    "history": Part(history_length, by_h2load=True, by_floor=True),
    "catalogue": Part(catalogue_size, by_h2load=True, by_floor=True),
    "workers": Part(workers),
    "what-ifs": Part(updates_during_what_ifs),
    "import": Part(import_speed),
    "cuda": Part(cuda),
}


def _parser() -> Parser:
    description = "Measure what serving a bundle costs; write a report."
    p = bench_parser("tools.bench", description, Path("reports/performance.md"))
    p.add_argument("--only", nargs="+", choices=list(PARTS), default=None, help="parts of the report; default: all")
    return p


@contextmanager
def _echoes(parts: Sequence[str]) -> Iterator[dict[str, Running]]:
    """All kinds, where something is compared with the fastest of them; else the one of the product's kind."""
    kinds = ECHO_KINDS if h2load.is_here() and any(PARTS[name].by_floor for name in parts) else (OWN_KIND,)
    with ExitStack() as stack:
        yield {kind: stack.enter_context(echo_server(kind)) for kind in kinds}


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    parts = [name for name in PARTS if name in (arguments.only or PARTS)]
    bundle, clock, sections = open_bundle(arguments.bundle.resolve()), Clock(), []
    if not h2load.is_here():
        print(f"{h2load.HOW_TO_GET_IT}. What it measures is left out.", flush=True)
    with scratch_directory(arguments.scratch) as scratch, _echoes(parts) as echoes:
        sizes = QUICK if arguments.quick else Sizes()
        bench = Bench(bundle, scratch, arguments.provider, sizes, echoes[OWN_KIND].address, echoes)
        facts = machine(bench.scratch) | sizes_of(bundle)
        facts["provider"] = Encoder.of(bundle, provider=arguments.provider).provider
        facts["client in C"] = h2load.version()
        for name in parts:
            sections.append(_measured(name, PARTS[name], bench))
    facts |= clock.facts(quick=arguments.quick)
    command = shlex.join(["python", "-m", "tools.bench", *(sys.argv[1:] if argv is None else argv)])
    write_report(arguments.out, "What serving costs", f"Written by `{command}`. {HOW_TO_READ}", facts, sections)
    show(arguments.out, facts, sections, as_json=arguments.json)
    return 0


def _measured(name: str, part: Part, bench: Bench) -> Section:
    summary = (part.measure.__doc__ or "").splitlines()[0]
    if part.by_h2load and not h2load.is_here():
        return Section(name.capitalize(), f"{summary} Not measured: {h2load.HOW_TO_GET_IT}.", [])
    print(f"{name}: {summary} ...", flush=True)
    return part.measure(bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where a target is missed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
