"""Measures what serving a bundle costs and writes a report: `make bench`.

    python -m tools.bench --bundle bundle --out reports/serving.md

Starts real servers on free loopback ports with temporary state directories, and stops them. A missed target is a line
in the report, not a failure.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dman_runtime.model.bundle import open_bundle
from dman_runtime.model.encoder import Encoder
from dman_runtime.options import Parser, run_command
from tools.bench.batch import cuda, import_speed
from tools.bench.memory import resident_memory
from tools.bench.report import HOW_TO_READ, Section, machine, show, sizes_of, write_report
from tools.bench.servers import echo_server
from tools.bench.serving import history_length, round_trips
from tools.bench.setting import QUICK, Bench, Clock, Sizes, bench_parser, end_with, scratch_directory
from tools.bench.updates import durable_updates
from tools.bench.whatif import updates_during_what_ifs

SECTIONS: tuple[Callable[[Bench], Section], ...] = (
    round_trips,
    history_length,
    durable_updates,
    updates_during_what_ifs,
    import_speed,
    resident_memory,
    cuda,
)


def _parser() -> Parser:
    description = "Measure what serving a bundle costs; write a report."
    return bench_parser("tools.bench", description, Path("reports/serving.md"))


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    bundle, clock, sections = open_bundle(arguments.bundle.resolve()), Clock(), []
    with scratch_directory(arguments.scratch) as scratch, echo_server() as echo:
        sizes = QUICK if arguments.quick else Sizes()
        bench = Bench(bundle, scratch, arguments.provider, sizes, echo.address)
        facts = machine(bench.scratch) | sizes_of(bundle)
        facts["provider"] = Encoder.of(bundle, provider=arguments.provider).provider
        for measure in SECTIONS:
            print(f"{(measure.__doc__ or '').splitlines()[0]} ...", flush=True)
            sections.append(measure(bench))
    facts |= clock.facts(quick=arguments.quick)
    command = shlex.join(["python", "-m", "tools.bench", *(sys.argv[1:] if argv is None else argv)])
    write_report(arguments.out, "What serving costs", f"Written by `{command}`. {HOW_TO_READ}", facts, sections)
    show(arguments.out, facts, sections, as_json=arguments.json)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where a target is missed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
