"""Trains what a plan lists, and keeps a record of each run.

    python -m tools.runs tools/plans/paper.toml --list            # the state of each run
    python -m tools.runs tools/plans/paper.toml --jobs 2          # train what is missing, in the order of the plan
    python -m tools.runs tools/plans/paper.toml --minutes 30 --only 'taobao-*'

A run is done if the records have one of its name, with the settings that the plan gives today and the same data. The
command can be stopped at any time (Ctrl-C, SIGTERM, --minutes): runs write checkpoints, and the next call continues
them. Several calls may work on one plan at the same time. A call does not wait for the runs of another one, and names
them at its end. `tools.run_plan` describes the file.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal

from dman_runtime.errors import DmanError, UsageError
from dman_runtime.jobs.spreading import cores
from dman_runtime.options import Parser, run_command
from dman_train.run import open_run
from dman_train.signals import stop_requests
from tools.record_file import RECORDS, Record, add, read_records
from tools.records import record_of, summary
from tools.run_plan import PlannedRun, read_plan
from tools.run_process import RunProcess, claim, log_file, remove_run
from tools.run_progress import Progress, is_leftover, progress_of

POLL_SECONDS = 0.2


class Worker:
    """Trains the missing runs of a plan, some at a time."""

    def __init__(self, plan: Sequence[PlannedRun], *, directory: Path, records: Path, device: str, keep: bool) -> None:
        """`keep`: whether the directory of a run stays when its record is written."""
        self.plan, self.directory, self.records = list(plan), directory, records
        self.device, self.keep = device, keep
        self.running: list[RunProcess] = []
        self.failed: list[str] = []
        self.left_to_others: list[str] = []  # runs that another call trains

    def work(self, jobs: int, seconds: float) -> Literal["complete", "time", "signal"]:
        """Trains until nothing is left to train here, the time is over, or a signal arrives. Says which it was."""
        end, waiting = time.monotonic() + seconds, list(self.plan)
        with stop_requests() as stop_requested:
            try:
                while waiting or self.running:
                    if stop_requested():
                        return "signal"
                    if time.monotonic() >= end:
                        return "time"
                    while waiting and len(self.running) < jobs and not stop_requested():
                        self._start(waiting.pop(0))
                    self._reap()
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop()
        return "complete"

    def _start(self, planned: PlannedRun) -> None:
        """Starts or continues a run, unless it is done or another call trains it."""
        path = self.directory / planned.name
        try:
            done = self._progress(planned).kind == "done"
            if done and (self.keep or not path.exists()):
                return
            log = claim(path)
            if log is None:
                if not done:
                    self.left_to_others.append(planned.name)
                    say(planned.name, "another call trains it")
                return
            try:
                self._train_or_record(planned, path, log)
            except DmanError:
                log.close()
                raise
        except DmanError as error:
            self._fail(planned.name, str(error))

    def _train_or_record(self, planned: PlannedRun, path: Path, log: IO[bytes]) -> None:
        """Does what a claimed run needs next. Raises UsageError, RunError, InputError."""
        progress = self._progress(planned)  # another call may have finished it just now
        if progress.kind == "blocked":
            raise UsageError(progress.text, progress.remedy, parameter="runs")
        if progress.kind in ("missing", "under way"):
            resume = progress.kind == "under way"
            self.running.append(RunProcess.start(planned, path, log, device=self.device, resume=resume))
            say(planned.name, f"continued after {progress.text}" if resume else "started")
            return
        if progress.kind == "trained":
            self._record(planned.name)
        elif not self.keep and is_leftover(planned, path):
            remove_run(path)
        log.close()

    def _progress(self, planned: PlannedRun) -> Progress:
        return progress_of(planned, by_name(self.records), self.directory)

    def _reap(self) -> None:
        for process in [process for process in self.running if process.poll() is not None]:
            self.running.remove(process)
            try:
                self._finish(process)
            except DmanError as error:
                self._fail(process.name, str(error))
            finally:
                process.close()  # not before: another call must not begin the run while its directory goes

    def _finish(self, process: RunProcess) -> None:
        """What follows the end of a process. Raises RunError, UsageError."""
        name, code = process.name, process.poll()
        if code == 0:
            self._record(name)
        elif process.stopped:
            say(name, "stopped")
        else:
            log = log_file(self.directory / name)
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            self._fail(name, f"exit status {code}: {lines[-1].strip()} ({log} has the rest)")

    def _record(self, name: str) -> None:
        """Raises RunError, UsageError."""
        run = open_run(self.directory / name)
        record = record_of(run, name)
        add(self.records, record)
        say(name, summary(record).partition(": ")[2])
        if not self.keep:
            remove_run(run.path)

    def _fail(self, name: str, reason: str) -> None:
        self.failed.append(name)
        say(name, f"failed: {reason}")

    def _stop(self) -> None:
        """Asks all processes to stop, which write checkpoints, and waits for them."""
        for process in self.running:
            process.stop()
        while self.running:
            self._reap()
            time.sleep(POLL_SECONDS)


def by_name(records: Path) -> dict[str, Record]:
    """The records of a file by name."""
    found = records.stat() if records.exists() else None
    return _by_name(records, found and (found.st_mtime_ns, found.st_ino))


@lru_cache(maxsize=1)
def _by_name(records: Path, _version: object) -> dict[str, Record]:
    return {record.name: record for record in read_records(records)}


def say(name: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name}: {text}", flush=True)


def show(plan: Sequence[PlannedRun], records: Path, directory: Path) -> None:
    """One line for each run, and the number of each kind."""
    found, counts = by_name(records), Counter[str]()
    width = max(len(planned.name) for planned in plan)
    for planned in plan:
        try:
            progress = progress_of(planned, found, directory)
            kind, text = str(progress.kind), str(progress)
        except DmanError as error:
            kind, text = "unreadable", f"unreadable: {error}"
        counts[kind] += 1
        print(f"{planned.name:{width}}  {text}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))


def chosen(plan: Sequence[PlannedRun], patterns: Sequence[str] | None) -> list[PlannedRun]:
    """The runs whose names match one of the patterns; all without patterns. Raises UsageError."""
    if not patterns:
        return list(plan)
    found = [planned for planned in plan if any(fnmatchcase(planned.name, pattern) for pattern in patterns)]
    if not found:
        raise UsageError(f"no run of the plan is called {' or '.join(patterns)}", "list the runs", parameter="only")
    return found


def parser() -> Parser:
    p = Parser(prog="python -m tools.runs", description="Train what a plan lists, and keep a record of each run.")
    p.add_argument("plan", type=Path, metavar="PLAN", help="the plan, a TOML file")
    p.add_argument("--list", "--dry-run", action="store_true", help="print the state of each run, and train nothing")
    p.add_argument("--only", action="append", metavar="PATTERN", help="only runs whose name matches, as file names do")
    p.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time, one thread each; 0: one per core")
    p.add_argument("--minutes", type=float, default=None, metavar="M", help="stop after this time")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    p.add_argument("--runs", type=Path, default=Path("runs/plan"), help="where run directories and their logs go")
    p.add_argument("--keep-runs", action="store_true", help="keep the directories of runs whose records are written")
    p.flag("--records", type=Path, default=RECORDS, help="the file of all records")
    return p


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.jobs < 0:
        raise UsageError(f"jobs is {arguments.jobs}", "give 1 or more, or 0 for one per core", parameter="jobs")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UsageError(f"minutes is {arguments.minutes:g}", "give a number above 0", parameter="minutes")
    plan = chosen(read_plan(arguments.plan), arguments.only)
    if arguments.list:
        show(plan, arguments.records, arguments.runs)
        return 0
    worker = Worker(
        plan, directory=arguments.runs, records=arguments.records, device=arguments.device, keep=arguments.keep_runs
    )
    seconds = float("inf") if arguments.minutes is None else 60 * arguments.minutes
    ended = worker.work(arguments.jobs or cores(), seconds)
    if ended != "complete":
        print("stopped; the same command continues")
    if worker.left_to_others:
        print(f"{len(worker.left_to_others)} left to another call: {', '.join(worker.left_to_others)}")
    if worker.failed:
        print(f"{len(worker.failed)} failed: {', '.join(worker.failed)}")
        return 1
    return 130 if ended == "signal" else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a run failed, 130 after a signal."""
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
