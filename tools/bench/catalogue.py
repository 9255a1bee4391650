"""Training with a large catalogue: how fast, and how much memory each command of a run takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dman_runtime.data.interactions import Interactions
from dman_runtime.errors import UsageError
from dman_train.run import open_run
from dman_train.synthetic import write_log
from tools.bench.report import Claim, Section
from tools.bench.servers import ROOT

EVENTS_PER_ITEM, EVENTS_PER_USER = 2, 250
POPULARITY = 0.8  # exponent of Zipf's law, by which half of the events are drawn
MIN_SPEED, MAX_MEMORY = 5000, 6 << 30  # events/s, bytes
HEADS = ("command", "seconds", "peak memory, MB", "what it left, MB")


@dataclass(frozen=True)
class Ran:
    """A command that ended well."""

    name: str
    seconds: float
    peak: int  # bytes resident, at most
    left: int  # bytes of files

    def row(self) -> list[str]:
        return [f"`{self.name}`", f"{self.seconds:.0f}", f"{self.peak / 1e6:,.0f}", f"{self.left / 1e6:,.0f}"]


def catalogue_log(items: int, *, seed: int = 0) -> Interactions:
    """A log in which every one of so many items occurs: once, and as often again by Zipf's law. For speed only."""
    rng, events = np.random.default_rng(seed), items * EVENTS_PER_ITEM
    shares = np.cumsum(np.arange(1, items + 1, dtype=np.float64) ** -POPULARITY)
    drawn = np.searchsorted(shares, rng.random(events - items) * shares[-1])
    ranked = rng.permutation(np.concatenate([np.arange(items), drawn]).astype(np.int32))
    users = max(1, events // EVENTS_PER_USER)
    offsets = np.concatenate([[0], np.sort(rng.integers(0, events, users - 1)), [events]]).astype(np.int64)
    return Interactions(
        user_ids=[f"u{user}" for user in range(users)],
        item_ids=[str(item + 1) for item in range(items)],
        offsets=offsets,
        items=rng.permutation(items).astype(np.int32)[ranked],
        timestamps=1_600_000_000 + np.cumsum(rng.integers(1, 60, events)),
        integer_user_ids=False,
        integer_item_ids=True,
    ).filtered(min_user_events=1, min_item_events=1)


def large_catalogue(items: int, scratch: Path) -> Section:
    """Trains one epoch on a generated log, exports and evaluates: each a command, in a process of its own."""
    log, run, bundle = scratch / "log.parquet", scratch / "run", scratch / "bundle"
    write_log(catalogue_log(items), log)
    unfiltered = ("--min-user-events", "1", "--min-item-events", "1")
    train = ("--epochs", "1", "--evaluation-users", "1000", *unfiltered)
    ran = [
        _run("dman_train.train", "--data", log, "--run", run, *train, leaves=run),
        _run("dman_train.export", "--run", run, "--out", bundle, leaves=bundle),
        *(_run("dman_train.evaluate", *of, "--split", "valid") for of in (("--run", run), ("--bundle", bundle))),
    ]
    speed, peak = open_run(run).epochs()[0]["events_per_second"], max(one.peak for one in ran)
    users = open_run(run).config["dataset"]["users"]
    return Section(
        f"{items:,} items",
        f"A generated log of {items * EVENTS_PER_ITEM:,} events of {users:,} users. The default preset, one epoch, on "
        f"all {len(os.sched_getaffinity(0))} cores. Memory is that of the whole process, with reading the log. "
        "Training ranks 1,000 users after the epoch and all of them twice at its end.",
        [
            Claim(f"events/s in training, {items:,} items", f"{speed:,.0f}", f">= {MIN_SPEED:,}", speed >= MIN_SPEED),
            Claim(
                f"peak memory of any command, {items:,} items",
                f"{peak / 2**30:.2f} GiB",
                f"<= {MAX_MEMORY >> 30} GiB",
                peak <= MAX_MEMORY,
            ),
        ],
        HEADS,
        [one.row() for one in ran],
        {"events_per_second": speed, "commands": [vars(one) for one in ran]},
    )


def _run(module: str, *options: str | Path, leaves: Path | None = None) -> Ran:
    """Runs `python -m module` and measures its process. Raises UsageError if it fails."""
    command, began = [sys.executable, "-m", module, *map(str, options)], time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            last = (said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise UsageError(f"{module} failed: {last:.300}", "run it alone and see", parameter="catalogue")
    files = [] if leaves is None else [file.stat().st_size for file in leaves.rglob("*") if file.is_file()]
    return Ran(f"{module} {options[0]}", time.monotonic() - began, usage.ru_maxrss * 1024, sum(files))
