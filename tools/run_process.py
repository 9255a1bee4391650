"""The process of one run of a plan: started or continued, asked to stop, its output in a log beside its directory.

The process inherits a lock on its log. So a run is known to be busy as long as the process lives, even if the command
that started it was killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from dman_runtime.errors import UsageError
from tools.run_plan import PlannedRun

RUN_FILES = {  # what `dman_train.run` writes
    "config.json", "vocabulary.json", "metrics.jsonl", "metrics.json", "ranks.npz", "best.pt", "checkpoint.pt",
    "curves.png", "tensorboard",
}  # fmt: skip


def log_file(path: Path) -> Path:
    """The log of the run in this directory. It lies beside the directory, which must be empty at the start."""
    return path.with_name(f"{path.name}.log")


def claim(path: Path) -> IO[bytes] | None:
    """The locked log of the run in this directory; None if another process trains it. Raises UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = log_file(path).open("ab")
    except OSError as error:
        raise UsageError(
            f"{path.parent} cannot be written ({error.strerror})", "choose another directory", parameter="runs"
        ) from None
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    return log


def other_files(path: Path) -> list[str]:
    """The names in a directory that are not of a run; its own name if it is no directory."""
    if not path.is_dir():
        return [path.name] if path.exists() else []
    of_a_run = RUN_FILES | {f".{name}.tmp" for name in RUN_FILES}
    return sorted(file.name for file in path.iterdir() if file.name not in of_a_run)


def remove_run(path: Path) -> None:
    """Removes a run directory, if there is one. Raises UsageError, also if other files are in it."""
    if others := other_files(path):
        raise UsageError(f"{path} stays, as it holds {others[0]}, which is not of a run", "move that file away")
    try:
        if path.exists():
            shutil.rmtree(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be removed ({error.strerror})", "remove it yourself") from None


class RunProcess:
    """A training that runs."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self.name, self.stopped = name, False
        self._process, self._log = process, log

    @classmethod
    def start(cls, planned: PlannedRun, path: Path, log: IO[bytes], *, device: str, resume: bool) -> RunProcess:
        """`log`: from `claim`; the process keeps its lock. Raises UsageError if files of others are in the way."""
        if not resume:
            remove_run(path)  # it was killed before its first checkpoint
        command = [sys.executable, "-m", planned.module, *planned.arguments, "--run", str(path), "--threads", "1"]
        command += ["--resume"] if resume else []
        command += [] if device == "auto" else ["--device", device]
        # In a session of its own: Ctrl-C must reach the command only, which asks each process once.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        return cls(planned.name, process, log)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks it to write a checkpoint and to end."""
        self.stopped = True
        self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Gives the lock back."""
        self._log.close()
