"""Another checkout of the project as something to measure: its server, its import command, what its store holds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from dman_runtime.errors import UsageError
from tools.bench.servers import Running, dman_server
from tools.faults.servers import importable

IMPORT_SECONDS = 600  # an import that takes longer is stopped
WHERE = "import dman_runtime; print(dman_runtime.__file__)"


@dataclass(frozen=True)
class Checkout:
    """A directory with the project's code. Its commands run in it, on this interpreter."""

    root: Path

    @staticmethod
    def at(path: Path) -> Checkout:
        """Raises UsageError unless `path` has its own `dman_runtime`, and Python takes that one."""
        root = path.resolve()
        expected = root / "dman_runtime" / "__init__.py"
        if not expected.is_file():
            raise UsageError(
                f"{path} is no checkout of this project", "give a directory with dman_runtime", parameter="other"
            )
        found = _python(root, ["-c", WHERE], seconds=60).strip()
        if Path(found).resolve() != expected:
            raise UsageError(f"Python takes dman_runtime from {found}, not from {root}")
        return Checkout(root)

    @contextmanager
    def server(self, bundle: Path, state: Path, *, provider: str) -> Iterator[Running]:
        with dman_server(bundle, state, "--provider", provider, checkout=self.root) as running:
            yield running

    def import_log(self, log: Path, bundle: Path, state: Path, *, provider: str) -> tuple[float, dict[str, Any]]:
        """Seconds of the whole import command, and its result. Raises UsageError when it fails."""
        command = ["-m", "dman_runtime", "import", "--input", str(log), "--bundle", str(bundle), "--state", str(state)]
        began = time.perf_counter()
        printed = _python(self.root, [*command, "--provider", provider, "--json"], seconds=IMPORT_SECONDS)
        return time.perf_counter() - began, json.loads(printed.splitlines()[-1])

    def commit(self) -> str:
        """Short hash and subject of the commit, and whether files differ from it."""
        head = _git(self.root, "log", "-1", "--format=%h %s")
        changed = _git(self.root, "status", "--porcelain", "--untracked-files=no")
        return f"{head or 'not a git repository'}{', with changes that are not committed' if changed else ''}"


def stored_bytes(state: Path) -> dict[str, tuple[int, int]]:
    """For each database of the stores under a state directory: its number of values, and the bytes of all of them.

    No process may use the store. Raises UsageError when there is none.
    """
    found = {}
    for file in sorted(state.rglob("data.mdb")):
        with lmdb.open(str(file.parent), lib_version=0, readonly=True, lock=False, max_dbs=64) as env:
            with env.begin() as txn, txn.cursor() as cursor:
                names = [bytes(key) for key in cursor.iternext(keys=True, values=False)]
            for name in names:
                database = env.open_db(name, create=False)
                with env.begin(db=database) as txn, txn.cursor() as cursor:
                    sizes = [len(value) for value in cursor.iternext(keys=False, values=True)]
                found[name.decode()] = (len(sizes), sum(sizes))
    if not found:
        raise UsageError(f"no LMDB database under {state}")
    return found


def _python(root: Path, arguments: list[str], *, seconds: float) -> str:
    """What a Python command prints. Raises UsageError, with the command's last line, when it fails."""
    environment = importable(root) | {"DMAN_PROCESSES": "1"}  # as versions without that option have
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"a command of {root} ran longer than {seconds:g} s: {' '.join(arguments)}") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UsageError(f"a command of {root} failed: {reason[0]}")
    return done.stdout


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
