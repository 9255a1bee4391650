"""Trains what a plan lists, and keeps a record of each run.

    python -m tools.runs tools/plans/paper.toml --list            # the state of each run
    python -m tools.runs tools/plans/paper.toml --jobs 2          # train what is missing, in the order of the plan
    python -m tools.runs tools/plans/paper.toml --minutes 30 --only 'taobao-*'

A run is done if the records have one of its name, with the settings that the plan gives today and the same data. The
command can be stopped at any time (Ctrl-C, SIGTERM, --minutes): runs write checkpoints, and the next call continues
them. Several calls may work on one plan at the same time. `tools.run_plan` describes the file.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any, Literal

from dman_runtime.errors import DmanError, UsageError
from dman_runtime.options import Parser, run_command
from dman_train.config import BaselineConfig, ConfigError, DataConfig, ModelConfig, TrainConfig, from_dict, to_dict
from dman_train.data import load
from dman_train.run import Run, open_run
from dman_train.signals import stop_requests
from dman_train.trainer import SELECTION_METRIC
from tools.record_file import RECORDS, Record, add, read_records
from tools.records import record_of, summary
from tools.report_rows import decisive
from tools.run_plan import PlannedRun, read_plan
from tools.run_process import RunProcess, claim, log_file

POLL_SECONDS = 0.2
LOG_LINES = 10  # of a run that failed
Kind = Literal["done", "trained", "under way", "missing", "blocked"]


@dataclass(frozen=True)
class State:
    """How far a run of the plan is."""

    kind: Kind  # trained: only the record is missing; blocked: another run has its directory
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


@cache
def fingerprint(log: Path, config: DataConfig) -> str:
    """The fingerprint of a log as this config reads it. Raises InputError."""
    return load(log, config).fingerprint()


def state_of(planned: PlannedRun, records: dict[str, Record], directory: Path) -> State:
    """Raises InputError if the log cannot be read; RunError for a damaged run directory."""
    record, earlier = records.get(planned.name), ""
    if record is not None:
        if difference := _difference(planned, record.content):
            earlier = f"the record of that name has {difference}"
        else:
            return State("done", summary(record).partition(", ")[2])
    path = directory / planned.name
    if not (path / "config.json").exists():
        return State("missing", earlier)
    run = open_run(path)
    if difference := _difference(planned, run.config):
        return State("blocked", f"{path} is a run with {difference}; remove it or use another directory")
    if run.metrics is not None:
        return State("trained", earlier)
    if not (path / "checkpoint.pt").exists():
        return State("missing", earlier)
    return State("under way", _progress(run))


def _difference(planned: PlannedRun, found: dict[str, Any]) -> str:
    """What a record or a run has other than the plan: "" for nothing, else words for a message.

    Options that do not decide its result may differ. Those that it is too old to have count as their defaults.
    """
    model, train, data = planned.configs()
    kind = BaselineConfig if "system" in found["model"] else ModelConfig
    try:
        stored = (from_dict(kind, found["model"], where="model"), from_dict(TrainConfig, found["train"], where="train"))
    except ConfigError:
        return "settings of another version"
    if _deciding(*stored) != _deciding(model, train):
        return "other settings"
    if found["dataset"]["fingerprint"] != fingerprint(planned.log, data):
        return "other data"
    return ""


def _deciding(model: ModelConfig | BaselineConfig, train: TrainConfig) -> dict[str, Any]:
    return decisive({"model": to_dict(model), "train": to_dict(train)}) | {"seed": train.seed}


def _progress(run: Run) -> str:
    epochs, total = run.epochs(), run.train_config().epochs
    if not epochs:
        return f"0 of {total} epochs"
    best = max(epoch.get(f"valid/{SELECTION_METRIC}", 0.0) for epoch in epochs)
    return f"{len(epochs)} of {total} epochs, best validation NDCG@10 {best:.4f}"


class Worker:
    """Trains the missing runs of a plan, some at a time."""

    def __init__(self, plan: Sequence[PlannedRun], *, directory: Path, records: Path, device: str, keep: bool) -> None:
        """`keep`: whether the directory of a run stays when its record is written."""
        self.plan, self.directory, self.records = list(plan), directory, records
        self.device, self.keep = device, keep
        self.running: list[RunProcess] = []
        self.failed: list[str] = []

    def work(self, jobs: int, seconds: float) -> Literal["complete", "time", "signal"]:
        """Trains until all is done, the time is over, or a signal arrives. Says which it was."""
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
            if self._state(planned).kind == "done":
                return
            log = claim(path)
            if log is None:
                say(planned.name, "another call trains it")
                return
            try:
                self._claimed(planned, path, log)
            except DmanError:
                log.close()
                raise
        except DmanError as error:
            self._fail(planned.name, str(error))

    def _claimed(self, planned: PlannedRun, path: Path, log: IO[bytes]) -> None:
        """Raises UsageError, RunError, InputError."""
        state = self._state(planned)  # another call may have finished it just now
        if state.kind == "blocked":
            raise UsageError(state.text)
        if state.kind in ("missing", "under way"):
            resume = state.kind == "under way"
            self.running.append(RunProcess.start(planned, path, log, device=self.device, resume=resume))
            say(planned.name, f"continued after {state.text}" if resume else "started")
            return
        if state.kind == "trained":
            self._record(planned.name)
        log.close()

    def _state(self, planned: PlannedRun) -> State:
        return state_of(planned, by_name(self.records), self.directory)

    def _reap(self) -> None:
        for process in [process for process in self.running if process.poll() is not None]:
            self.running.remove(process)
            name, code = process.name, process.poll()
            process.close()
            if code == 0:
                try:
                    self._record(name)
                except DmanError as error:
                    self._fail(name, str(error))
            elif process.stopped:
                say(name, "stopped")
            else:
                last = log_file(self.directory / name).read_text(errors="replace").splitlines()[-LOG_LINES:]
                self._fail(name, "\n    ".join([f"exit status {code}; the end of its log:", *last]))

    def _record(self, name: str) -> None:
        """Raises RunError, UsageError."""
        run = open_run(self.directory / name)
        record = record_of(run, name)
        add(self.records, record)
        if not self.keep:
            shutil.rmtree(run.path)
        say(name, summary(record).partition(": ")[2])

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
            state = state_of(planned, found, directory)
            kind, text = str(state.kind), str(state)
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


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parser() -> Parser:
    p = Parser(prog="python -m tools.runs", description="Train what a plan lists, and keep a record of each run.")
    p.add_argument("plan", type=Path, metavar="PLAN", help="the plan, a TOML file")
    p.add_argument("--list", "--dry-run", action="store_true", help="print the state of each run, and train nothing")
    p.add_argument("--only", action="append", metavar="PATTERN", help="only runs whose name matches, as file names do")
    p.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time, one thread each; 0: one per core")
    p.add_argument("--minutes", type=float, default=None, metavar="M", help="stop after this time")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    p.add_argument("--runs", type=Path, default=Path("runs/plan"), help="where run directories and their logs go")
    p.add_argument("--keep-runs", action="store_true", help="keep the directory of a run when its record is written")
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
    ended = worker.work(arguments.jobs or _cores(), seconds)
    if ended != "complete":
        print("stopped; the same command continues")
    if worker.failed:
        print(f"{len(worker.failed)} failed: {', '.join(worker.failed)}")
        return 1
    return 130 if ended == "signal" else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a run failed, 130 after a signal."""
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
