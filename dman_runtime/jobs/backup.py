"""Copies a state store while servers go on, checks the copy by reading it, and puts one back.

A copy gets its name only once it is complete, sound and on the disk. Nothing that is there is overwritten.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dman_runtime.errors import StoreDamagedError, UsageError
from dman_runtime.jobs.verifying import format_report, verify_store
from dman_runtime.store.files import sync
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_errors import store_errors

DATA = "data.mdb"


@dataclass(frozen=True)
class Copied:
    """`counts` says what was read back, by kind."""

    path: str
    bytes: int
    counts: Mapping[str, int]

    def summary(self) -> str:
        """For people."""
        return f"{self.path} ({self.bytes / 1e6:,.1f} MB); read back: {counted(self.counts)}"


def counted(counts: Mapping[str, int]) -> str:
    """For people: how many there are of each kind."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def backup(state: Path, output: Path) -> Copied:
    """Copies the store of one moment, without the space that nothing uses. Servers may use it meanwhile.

    What they write during the copy needs new space, as the moment is kept until it is over. Raises UsageError where
    `output` exists, StoreError; StoreDamagedError where the copy is not sound.
    """
    if output.exists():
        raise UsageError(f"{output} exists", "name a new directory for each backup", parameter="output")
    with LmdbStore.open(state, readonly=True) as store, copying(output) as partial:
        store.copy_to(partial)
        return checked_copy(
            partial, output, "the store, or the disk of the backup, is damaged: run verify on the store"
        )


def restore(source: Path, state: Path) -> Copied:
    """Puts a checked copy of a backup where a store belongs; no process may have opened one there.

    Raises UsageError where there is a store, StoreError; StoreDamagedError where the backup is not sound.
    """
    if (state / DATA).exists() or (state.exists() and any(state.iterdir())):
        raise UsageError(f"{state} is not empty", "stop what uses it, and move it away first", parameter="state")
    report = verify_store(source)
    if not report.sound:
        raise StoreDamagedError(f"the backup {format_report(report)}", "restore another one", parameter="backup")
    with copying(state) as partial:
        shutil.copyfile(source / DATA, partial / DATA)
        copied = checked_copy(partial, state, "the disk is damaged: the backup itself was sound")
        if state.exists():  # an empty mount point, which cannot be replaced
            (partial / DATA).rename(state / DATA)
            sync(state)
        return copied


def partial_directories(path: Path) -> list[Path]:
    """What `copying` has left in an existing directory where it was killed."""
    return sorted(path.glob(".*.partial"))


@contextmanager
def copying(path: Path) -> Iterator[Path]:
    """A directory beside `path`, or in it if it exists, which is gone afterwards unless it was renamed."""
    partial = (path if path.exists() else path.parent) / f".{path.name}.{uuid.uuid4().hex}.partial"
    with store_errors(path, 0, readonly=True):
        partial.mkdir(mode=0o700, parents=True)
        try:
            yield partial
            if not path.exists():
                partial.rename(path)
                sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def checked_copy(partial: Path, path: Path, remedy: str) -> Copied:
    """Syncs a copy and reads everything in it."""
    (partial / DATA).chmod(0o600)
    sync(partial / DATA)
    report = verify_store(partial)
    sync(partial)
    if not report.sound:
        raise StoreDamagedError(f"the copy of the store is not sound: {format_report(report)}", remedy)
    return Copied(str(path), (partial / DATA).stat().st_size, report.counts)
