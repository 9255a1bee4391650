"""Measures the reading of logs beside the bare scan of pyarrow, and beside another checkout; writes a report.

    python -m tools.bench.reading [--other ../base] [--rows 10000000] [--large-rows 100000000]

Every measurement is a process of its own, so that its peak memory is that of one reading. Rounds go in turns. The log:
integer users and items, seconds, in order of time, as CSV and as Parquet.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dman_runtime.options import Parser, require_positive, run_command
from tools.bench.checkouts import Checkout
from tools.bench.report import Claim, Section, machine, show, write_report
from tools.bench.servers import ROOT
from tools.bench.setting import Clock, scratch_directory
from tools.faults.servers import importable

KINDS = ("csv", "parquet")
ROWS_PER_USER, ITEMS, START, CHUNK = 100, 50_000, 1_500_000_000, 5_000_000
PART_ROWS = 5_000_000  # as the commands read
LARGE_MIB = 2048
_MEASURED = """
import json, resource, sys, time
import pyarrow, pyarrow.compute, pyarrow.csv, pyarrow.parquet
path = sys.argv[1]
{setup}
began = time.perf_counter()
rows = {work}
seconds = time.perf_counter() - began
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rows]))
"""
_SCAN_CSV = """
types = dict.fromkeys(("user_id", "item_id", "timestamp"), pyarrow.string())
def scan():
    options = pyarrow.csv.ConvertOptions(column_types=types)
    with pyarrow.csv.open_csv(path, convert_options=options) as reader:
        return sum(map(len, reader))
"""
_SCAN_PARQUET = """
def scan():
    with pyarrow.parquet.ParquetFile(path) as file:
        return sum(map(len, file.iter_batches()))
"""
_READ = "from dman_runtime.data.logs import read_interactions"
_PARTS = """
from dman_runtime.data.logs import open_log
def read():
    with open_log(path, max_rows=int(sys.argv[2])) as log:
        return sum(map(len, log.parts()))
"""
CODE = {
    "scan csv": _MEASURED.format(setup=_SCAN_CSV, work="scan()"),
    "scan parquet": _MEASURED.format(setup=_SCAN_PARQUET, work="scan()"),
    "read": _MEASURED.format(setup=_READ, work="len(read_interactions(path))"),
    "parts": _MEASURED.format(setup=_PARTS, work="read()"),
}


def _parser() -> Parser:
    p = Parser(prog="python -m tools.bench.reading", description="Measure the reading of logs.")
    p.add_argument("--other", type=Path, default=None, help="directory of another checkout, to read the same logs")
    p.add_argument("--rows", type=int, default=10_000_000, help="rows of the log")
    p.add_argument("--large-rows", type=int, default=0, help="rows of a log that is read in parts once; 0: none")
    p.add_argument("--rounds", type=int, default=5, help="rounds")
    p.add_argument("--out", type=Path, default=Path("reports/reading.md"), help="the report")
    p.add_argument("--scratch", type=Path, default=Path(), help="where the logs go")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def write_log(path: Path, rows: int) -> None:
    """A log of these rows, the same for the same number; the name says the format."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    rng = np.random.default_rng(0)
    users, weights = max(1, rows // ROWS_PER_USER), 1 / np.arange(1, ITEMS + 1)
    edges = np.cumsum(weights) / weights.sum()
    schema = pa.schema([(name, pa.int64()) for name in ("user_id", "item_id", "timestamp")])
    with csv.CSVWriter(path, schema) if path.suffix == ".csv" else parquet.ParquetWriter(path, schema) as writer:
        for begin in range(0, rows, CHUNK):
            count = min(CHUNK, rows - begin)
            items = np.searchsorted(edges, rng.random(count)).clip(max=ITEMS - 1) + 1
            times = START + (np.arange(begin, begin + count) * (10**8 / rows)).astype(np.int64)
            columns = [rng.integers(1, users + 1, count), items, times]
            writer.write_table(pa.table([pa.array(column, pa.int64()) for column in columns], schema=schema))


def measured(checkout: Path, what: str, path: Path, *arguments: object) -> tuple[float, float, int]:
    """Seconds, peak memory in MiB, and rows of one reading in a process of its own."""
    environment = importable(checkout)
    command = [sys.executable, "-c", CODE[what], str(path), *map(str, arguments)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    seconds, mib, rows = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), float(mib), int(rows)


def _compare(kind: str, path: Path, other: Path | None, rounds: int) -> Section:
    """Bare scan, this reader and the other one, in turns."""
    jobs = {"pyarrow's scan": (ROOT, f"scan {kind}"), "this reader": (ROOT, "read")}
    if other is not None:
        jobs["the other checkout"] = (other, "read")
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, (checkout, what) in jobs.items():
            found[name].append(measured(checkout, what, path))
    seconds = {name: [one[0] for one in results] for name, results in found.items()}
    ratios = [scan / read for scan, read in zip(seconds["pyarrow's scan"], seconds["this reader"], strict=True)]
    share = statistics.median(ratios)
    claims = [
        Claim(f"speed of reading and grouping by that of the scan, {kind}", _spread(ratios), ">= .5", share >= 0.5)
    ]
    if other is not None:
        pairs = zip(seconds["the other checkout"], seconds["this reader"], strict=True)
        faster = [before / now for before, now in pairs]
        claims.append(
            Claim(
                f"speed by that of the other checkout, {kind}", _spread(faster), ">= 1", statistics.median(faster) >= 1
            )
        )
    rows = [
        [
            name,
            f"{min(seconds[name]):.2f}",
            f"{statistics.median(seconds[name]):.2f}",
            f"{max(one[1] for one in results):.0f}",
        ]
        for name, results in found.items()
    ]
    size = f"{found['this reader'][0][2]:,} events, {path.stat().st_size / 1e6:.0f} MB"
    method = f"{size}. Scan: all three columns, CSV as text."
    data: dict[str, Any] = {
        "seconds": seconds,
        "mib": {name: [one[1] for one in results] for name, results in found.items()},
    }
    return Section(kind, method, claims, ("", "seconds, best", "seconds, median", "peak MiB"), rows, data)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _large(path: Path) -> Section:
    seconds, mib, rows = measured(ROOT, "parts", path, PART_ROWS)
    claim = Claim(
        f"peak memory of reading {rows:,} rows in parts", f"{mib:.0f} MiB", f"<= {LARGE_MIB} MiB", mib <= LARGE_MIB
    )
    method = f"CSV of {path.stat().st_size / 1e9:.1f} GB, read once in parts of {PART_ROWS:,} rows: {seconds:.0f} s."
    return Section("larger than memory", method, [claim], data={"seconds": seconds, "mib": mib})


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    require_positive(arguments, "rows", "rounds")
    other = Checkout.at(arguments.other) if arguments.other else None
    clock, sections = Clock(), list[Section]()
    with scratch_directory(arguments.scratch) as scratch:
        facts = {"this checkout": Checkout.at(ROOT).commit()}
        facts |= {"the other checkout": other.commit()} if other else {}
        facts |= machine(scratch)
        for kind in KINDS:
            path = scratch / f"log.{kind}"
            write_log(path, arguments.rows)
            sections.append(_compare(kind, path, other.root if other else None, arguments.rounds))
            path.unlink()
        if arguments.large_rows:
            path = scratch / "large.csv"
            write_log(path, arguments.large_rows)
            sections.append(_large(path))
    facts |= clock.facts(quick=False)
    method = (
        "Written by `python -m tools.bench.reading`. Each reading is a process of its own; rounds go in turns, and a "
        "ratio is the median of those of single rounds."
    )
    write_report(arguments.out, "Reading logs", method, facts, sections)
    show(arguments.out, facts, sections, as_json=arguments.json)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
