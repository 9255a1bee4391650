"""Scripts in other processes, for tests of stores that several processes share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from contract.stores import Harness

ROOT = Path(__file__).resolve().parents[2]
_HEADER = """
import json, os, sys
from pathlib import Path
import numpy as np
from contract import stores
from dman_runtime.errors import StoreError, StoreFullError
from dman_runtime.store.base import Write
from dman_runtime.store.lmdb import LmdbStore
"""
_OPENED = """
harness = getattr(stores, sys.argv[1])(Path(sys.argv[2]))
arguments = sys.argv[3:]
"""
Process = subprocess.Popen[str]


def start(script: str, *arguments: object) -> Process:
    """Runs a script that has the names of `_HEADER`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", _HEADER + dedent(script), *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def start_with(harness: Harness, directory: Path, script: str, *arguments: object) -> Process:
    """Runs a script that also has a `harness` of the same store, and its `arguments`."""
    return start(_OPENED + dedent(script), type(harness).__name__, directory, *arguments)


def release(processes: list[Process], word: str = "ready") -> None:
    """Lets scripts that print `word` and then read a line go on, all at once."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == f"{word}\n"
    for process in processes:
        say(process, "")


def say(process: Process, line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def finish(process: Process) -> str:
    """All that a script printed. It must end without an error."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out
