"""Commands of `dman-runtime` in processes of their own, and a loop of those that change the bundle of a server."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tools.faults.background import Background
from tools.faults.bundles import read_manifest
from tools.faults.servers import ROOT, python_environment

JOB_SECONDS = 300.0


def start_job(command: str, *options: str | Path) -> subprocess.Popen[str]:
    """Starts `dman-runtime COMMAND` of this checkout."""
    return subprocess.Popen(
        [sys.executable, "-m", "dman_runtime", command, *map(str, options)],
        cwd=ROOT,
        env=python_environment(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_rebuild(bundle: Path, state: Path, *, share: float) -> subprocess.Popen[str]:
    options = ("--provider", "cpu", "--max-share", f"{share:g}")
    return start_job("rebuild", "--bundle", bundle, "--state", state, *options)


def run_job(command: str, *options: str | Path) -> tuple[int, str]:
    """The exit status of a command, and what it printed last."""
    return finished(start_job(command, *options))


def finished(job: subprocess.Popen[str], *, seconds: float = JOB_SECONDS) -> tuple[int, str]:
    """Waits for a job: its exit status, and what it printed last."""
    try:
        output, errors = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        output, errors = job.communicate()
        errors += f"\nit took more than {seconds:g} s"
    return job.returncode, ((errors if job.returncode else output).strip().splitlines() or ["no message"])[-1]


def kill_when_encoded(job: subprocess.Popen[str], share: float) -> bool:
    """Kills a rebuild once its log says that this share of its events is encoded, and stored; with 0, after its first
    commit. Returns whether it came to that.

    Nobody looks into the store for that, which would take the time of its servers.
    """
    assert job.stderr is not None
    running = False
    for line in job.stderr:
        found = re.search(r"(\d+) of (\d+) events are encoded", line)
        if found and int(found[1]) >= share * int(found[2]):
            running = job.poll() is None
            break
    job.kill()
    job.communicate()
    return running


class RollOvers(Background):
    """Changes the bundle of a store's servers and back until the block ends.

    In turns: the new bundle's records are made from nothing, it is activated, the old one's are brought up to date, and
    it is activated again. Some rebuilds are killed on the way and started again. `done` counts what succeeded, `killed`
    the killed rebuilds; `failures` has the commands that failed.
    """

    SHARE = 0.2  # of a core, for a rebuild: it shall last

    def __init__(self, state: Path, old: Path, new: Path) -> None:
        super().__init__()
        self._state, self._old, self._new = state, old, new
        self.done, self.killed, self.failures = Counter[str](), 0, list[str]()

    def rounds(self) -> int:
        """How often both bundles were rebuilt and activated."""
        return min(self.done[f"{command} {which}"] for command in ("rebuild", "activate") for which in ("new", "old"))

    def run(self) -> None:
        chooser = random.Random(0)
        for which, bundle in itertools.cycle({"new": self._new, "old": self._old}.items()):
            if which == "new":
                self._do("drop", which, read_manifest(bundle)["bundle_id"], "--state", self._state)
            while not self.over.is_set() and chooser.random() < 0.5:
                self._kill_a_rebuild(bundle, chooser)
            for command, *options in (["rebuild", "--max-share", f"{self.SHARE:g}"], ["activate"]):
                self._do(command, which, "--bundle", bundle, "--state", self._state, "--provider", "cpu", *options)
            if self.over.is_set():
                return

    def _kill_a_rebuild(self, bundle: Path, chooser: random.Random) -> None:
        job = start_rebuild(bundle, self._state, share=self.SHARE)
        self.over.wait(chooser.uniform(1, 4))
        self.killed += job.poll() is None
        job.kill()
        job.communicate()

    def _do(self, command: str, which: str, *options: str | Path) -> None:
        if self.over.is_set():
            return
        status, line = run_job(command, *options)
        if not status:
            self.done[f"{command} {which}"] += 1
        elif command != "drop" or self.done["rebuild new"]:  # at first there is nothing to drop
            self.failures.append(f"{command} {which}: {line}")
