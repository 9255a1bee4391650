"""Measures what serving a bundle costs and writes a report: `make bench`.

    python -m tools.bench --bundle bundle --out reports/serving.md

Starts real servers on free loopback ports with temporary state directories, and stops them. A missed target is a line
in the report, not a failure.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import open_bundle
from dman_runtime.model.encoder import Encoder
from dman_runtime.options import Parser, print_json, run_command
from tools.bench.batch import cuda, import_speed
from tools.bench.memory import resident_memory
from tools.bench.report import Section, claims_table, machine, sizes_of, write_report
from tools.bench.servers import echo_server
from tools.bench.serving import history_length, round_trips
from tools.bench.setting import QUICK, Bench, Sizes
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
BUSY_LOAD = 0.5  # processes, on average of a minute, before the run


def _parser() -> Parser:
    p = Parser(prog="python -m tools.bench", description="Measure what serving a bundle costs; write a report.")
    p.flag("--bundle", type=Path, default=Path("bundle"), help="bundle directory")
    p.add_argument("--out", type=Path, default=Path("reports/serving.md"), help="the report")
    p.add_argument("--quick", action="store_true", help="few and short: does everything work? Not for quoting")
    p.add_argument("--provider", choices=["auto", "cuda", "cpu"], default="auto", help="where servers run the graphs")
    p.add_argument(
        "--scratch", type=Path, default=Path(), help="where temporary state goes; updates are as durable as its disk"
    )
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    bundle = open_bundle(arguments.bundle.resolve())
    began, load_before = time.monotonic(), os.getloadavg()[0]
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".bench-", dir=arguments.scratch)
    except OSError as error:
        raise UsageError(f"cannot write to {arguments.scratch}: {error.strerror}; choose another --scratch") from None
    sections = []
    with scratch as directory, echo_server() as echo:
        sizes = QUICK if arguments.quick else Sizes()
        bench = Bench(bundle, Path(directory).resolve(), arguments.provider, sizes, echo.address)
        facts = machine(bench.scratch) | sizes_of(bundle)
        facts["provider"] = Encoder(bundle.path, provider=arguments.provider).provider
        for measure in SECTIONS:
            print(f"{(measure.__doc__ or '').splitlines()[0]} ...", flush=True)
            sections.append(measure(bench))
    quiet = "" if load_before < BUSY_LOAD else "; the machine was busy: do not quote"
    facts["load average, before and after"] = f"{load_before:.2f}, {os.getloadavg()[0]:.2f}{quiet}"
    facts["duration"] = f"{time.monotonic() - began:.0f} s{' (--quick: too short to quote)' * arguments.quick}"
    command = shlex.join(["python", "-m", "tools.bench.__main__", *(sys.argv[1:] if argv is None else argv)])
    write_report(arguments.out, facts, command, sections)
    claims = [claim for section in sections for claim in section.claims]
    print(claims_table(claims))
    print(f"wrote {arguments.out}")
    if arguments.json:
        found = {section.title: section.data for section in sections}
        print_json({"facts": facts, "claims": [asdict(claim) for claim in claims], "sections": found})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where a target is missed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and scratch files go with it
    sys.exit(main())
