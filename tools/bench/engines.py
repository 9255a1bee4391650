"""Measures score, import and rebuild by one process, by two, and by Ray, and writes a report.

    python -m tools.bench.engines --data ../shared/data/ml-1m/interactions.parquet [--bundle bundle]

Whole commands take turns, start of the processes included. Then each is run once more, and one of its processes is
killed on the way. All of them must leave the same file, and the same store.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import open_bundle
from dman_runtime.options import Parser, require_positive, run_command
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.marker import marker_path
from tools.bench.batch import write_log
from tools.bench.blocks import Spread
from tools.bench.report import Claim, Section, machine, show, sizes_of, write_report
from tools.bench.setting import QUICK, Bench, Clock, Sizes, bench_parser, end_with, scratch_directory

JOBS = ("score", "import", "rebuild")
WAYS: Mapping[str, tuple[str, ...]] = {
    "1 process": ("--processes", "1"),
    "2 processes": ("--processes", "2"),
    "Ray": ("--engine", "ray"),
}
ONE, TWO = "1 process", "2 processes"
MIN_GAIN = 1.7  # of two processes over one, for score
MADE = Sizes(import_users=4000, import_events=165)  # a log like MovieLens-1M, where none is given
COMMAND_SECONDS = 1800.0
POLL_SECONDS = 0.2
HEADS = ("job", "way", "seconds", "by 1 process", "MB of the command", "MB of a process that encodes", "same")


@dataclass
class Run:
    """One command."""

    seconds: float
    result: str  # a hash of what it left
    main_bytes: int = 0  # the most memory of the command's own process
    other_bytes: int = 0  # the most of one that works for it
    to_be_killed: bool = False  # one of these, on the way
    killed: bool = False  # whether one was


@dataclass(frozen=True)
class Setting:
    """What all commands share."""

    bundle: Path
    bundle_id: str
    log: Path
    scratch: Path
    provider: str = "cpu"
    environment: Mapping[str, str] = field(
        default_factory=lambda: {name: value for name, value in os.environ.items() if not name.startswith("DMAN_")}
    )

    @property
    def state(self) -> Path:
        return self.scratch / "state"

    @property
    def scores(self) -> Path:
        return self.scratch / "scores.parquet"

    def command(self, job: str, way: str) -> list[str]:
        options = ["--bundle", str(self.bundle), "--provider", self.provider, *WAYS[way]]
        if job == "score":
            options += ["--input", str(self.log), "--output", str(self.scores), "--k", "100"]
        else:
            options += ["--state", str(self.state)]
            options += ["--input", str(self.log)] if job == "import" else ["--max-share", "1"]
        return [sys.executable, "-m", "dman_runtime", job, *options]

    def run(self, job: str, way: str, *, kill_after: float = float("inf")) -> Run:
        """Runs a command as `job` needs it; kills a process that works for it after so many seconds.

        Raises UsageError for a command that fails.
        """
        if job == "import":
            self.remove_state()
        elif job == "rebuild":
            with LmdbStore.open(self.state) as store:
                store.drop_records(store.generations()[self.bundle_id])
        run = self._run(self.command(job, way), kill_after)
        run.result = hashlib.sha256(self.scores.read_bytes()).hexdigest() if job == "score" else store_hash(self.state)
        return run

    def _run(self, command: Sequence[str], kill_after: float) -> Run:
        run, output, began = (
            Run(0.0, "", to_be_killed=kill_after < COMMAND_SECONDS),
            self.scratch / "output.txt",
            time.perf_counter(),
        )
        with (
            output.open("wb") as file,
            subprocess.Popen(command, env=dict(self.environment), stdout=file, stderr=file) as process,
        ):
            while process.poll() is None and (now := time.perf_counter() - began) < COMMAND_SECONDS:
                others = list(at_work(process.pid))
                with suppress(psutil.Error):
                    run.main_bytes = max(run.main_bytes, psutil.Process(process.pid).memory_info().rss)
                for other in others:
                    with suppress(psutil.Error):
                        run.other_bytes = max(run.other_bytes, other.memory_info().rss)
                if now > kill_after and others and not run.killed:
                    others[0].kill()
                    run.killed = True
                time.sleep(POLL_SECONDS)
            run.seconds = time.perf_counter() - began
            if process.poll() != 0:
                process.kill()
                raise UsageError(f"{shlex.join(command[1:])} failed: {output.read_text()[-300:]}")
        return run

    def remove_state(self) -> None:
        shutil.rmtree(self.state, ignore_errors=True)
        marker_path(self.state).unlink(missing_ok=True)


def at_work(pid: int) -> Iterator[psutil.Process]:
    """The processes that work on users for a command."""
    with suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.name().startswith("ray::_do") or "--multiprocessing-fork" in process.cmdline():
                    yield process


def store_hash(state: Path) -> str:
    """Of all items, histories and records."""
    content = hashlib.sha256()
    with LmdbStore.open(state, readonly=True) as store:
        content.update("\n".join(store.item_ids(range(store.stats().items))).encode())
        for user_id in store.scan():
            items, times = store.history(user_id)
            content.update(user_id.encode() + items.tobytes() + times.tobytes())
            for number in store.generations().values():
                (stored,) = store.get_many([user_id], number)
                content.update((stored and stored.record) or b"-")
    return content.hexdigest()


def measure(
    setting: Setting, ways: Sequence[str], jobs: Sequence[str], *, rounds: int
) -> dict[tuple[str, str], list[Run]]:
    """All runs by job and way: the timed ones, whose order turns, and at last the one with a kill."""
    found: dict[tuple[str, str], list[Run]] = {(job, way): [] for job in jobs for way in ways}
    for number in range(rounds):
        for way in [*ways[number % len(ways) :], *ways[: number % len(ways)]]:
            for job in jobs:
                if job == "rebuild" and not setting.state.exists():
                    setting.run("import", TWO)
                found[job, way].append(run := setting.run(job, way))
                print(f"{job} by {way}: {run.seconds:.1f} s", flush=True)
    for (job, way), runs in found.items():
        if way != ONE:
            half = statistics.median(run.seconds for run in runs) / 2
            runs.append(setting.run(job, way, kill_after=half))
            print(f"{job} by {way}, a process killed after {half:.1f} s: {runs[-1].seconds:.1f} s", flush=True)
    return found


def report(found: Mapping[tuple[str, str], Sequence[Run]]) -> Section:
    """Claims about speed and equality, and a row for each job and way."""
    claims, rows, data = [], [], {}
    for job in dict.fromkeys(job for job, _ in found):
        results = {run.result for (of_job, _), runs in found.items() if of_job == job for run in runs}
        ways = [way for of_job, way in found if of_job == job]
        missed = [way for way in ways if way != ONE and not found[job, way][-1].killed]
        claims.append(
            Claim(
                f"{job}: what all runs left, a process killed on the way or not",
                "the same to the bit" if len(results) == 1 else f"{len(results)} different results",
                "the same",
                len(results) == 1 and not missed,
            )
        )
        first = next(iter(found[job, ways[0]])).result
        for way in ways:
            timed = [run for run in found[job, way] if not run.to_be_killed]
            seconds = Spread(tuple(run.seconds for run in timed))
            rows.append(
                [job, way, str(seconds), "", *(f"{value / 1e6:.0f}" if value else "-" for value in memory(timed))]
            )
            rows[-1].append("yes" if all(run.result == first for run in found[job, way]) else "NO")
            data[f"{job}, {way}"] = {"seconds": list(seconds.values), "killed": found[job, way][-1].killed}
            if way != ONE and (job, ONE) in found:
                pairs = zip(found[job, ONE], timed, strict=True)
                gain = Spread(tuple(one.seconds / other.seconds for one, other in pairs))
                rows[-1][3] = f"{gain} times as fast"
                target = MIN_GAIN if (job, way) == ("score", TWO) else None
                claims.append(
                    Claim(
                        f"{job} by {way} against {ONE}",
                        f"{gain.median:.2f} times as fast",
                        f">= {target}" if target else "none",
                        gain.median >= target if target else None,
                    )
                )
        killed = [f"{way}: {found[job, way][-1].seconds:.1f} s" for way in ways if way != ONE and way not in missed]
        rows.append([job, "one killed on the way", "; ".join(killed), "", "", "", ""])
    return Section(
        "Engines",
        "Whole commands in turns, the start of processes included: score writes 100 items a user, import fills an "
        "empty store, rebuild makes all records of one with `--max-share 1`. Memory: resident, shared pages too.",
        claims,
        HEADS,
        rows,
        data,
    )


def memory(runs: Sequence[Run]) -> tuple[int, int]:
    return max(run.main_bytes for run in runs), max(run.other_bytes for run in runs)


def _parser() -> Parser:
    description = "Measure score, import and rebuild by one process, two, and Ray; write a report."
    p = bench_parser("tools.bench.engines", description, Path("reports/engines.md"))
    p.add_argument("--data", type=Path, default=None, help="interaction log; without one, a log is made")
    p.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="what is measured")
    p.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="how it is done")
    p.add_argument("--rounds", type=int, default=2, metavar="N", help="turns of each")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    require_positive(arguments, "rounds")
    bundle, clock = open_bundle(arguments.bundle.resolve()), Clock()
    provider = "cpu" if arguments.provider == "auto" else arguments.provider
    with scratch_directory(arguments.scratch) as scratch:
        log = arguments.data and arguments.data.resolve()
        if log is None:
            sizes = QUICK if arguments.quick else MADE
            write_log(Bench(bundle, scratch, provider, sizes, ""), log := scratch / "log.parquet")
        setting = Setting(bundle.path, bundle.bundle_id, log, scratch, provider)
        ways, jobs = (
            [name for name in names if name in given]
            for names, given in ((WAYS, arguments.ways), (JOBS, arguments.jobs))
        )
        section = report(measure(setting, ways, jobs, rounds=arguments.rounds))
        facts = machine(scratch) | sizes_of(bundle) | {"log": log.name} | clock.facts(quick=arguments.quick)
    command = shlex.join(["python", "-m", "tools.bench.engines", *(sys.argv[1:] if argv is None else argv)])
    write_report(arguments.out, "What several processes gain", f"Written by `{command}`.", facts, [section])
    show(arguments.out, facts, [section], as_json=arguments.json)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 even where a target is missed, 2 for what cannot be done."""
    return run_command(_main, argv)


if __name__ == "__main__":
    end_with(main)
