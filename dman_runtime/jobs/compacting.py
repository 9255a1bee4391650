"""Writes a state store anew, so that no byte of deleted users is left, and takes it into use in one step.

No process may have the store open meanwhile: servers hold item numbers and versions, and a file that is open.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dman_runtime.errors import UsageError
from dman_runtime.jobs.backup import DATA, checked_copy, copying, counted, partial_directories
from dman_runtime.presence import present
from dman_runtime.store.files import sync
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.lmdb_compact import rewrite
from dman_runtime.store.lmdb_errors import store_errors


@dataclass(frozen=True)
class Compacted:
    """`counts` says what was read back, by kind."""

    bytes_before: int
    bytes: int
    freed_items: int  # whose ids are gone, as no history has them
    seconds: float  # in which no process could open the store
    counts: Mapping[str, int]

    def summary(self) -> str:
        """For people."""
        return (
            f"{self.bytes / 1e6:,.1f} MB instead of {self.bytes_before / 1e6:,.1f} MB in {self.seconds:.1f} s; "
            f"items that no history has: {self.freed_items} removed; read back: {counted(self.counts)}"
        )


def compact(state: Path, *, map_size: int) -> Compacted:
    """Rewrites the store, reads the copy back, and puts it in the place of the old one, which is gone afterwards.

    A process that dies on the way leaves the old store or the new one, and maybe a directory that the next compaction
    removes. Raises UsageError where servers use the store, StoreError; StoreDamagedError where it is not sound. Nothing
    is changed then.
    """
    if servers := present(state):
        pids = ", ".join(str(one.pid) for one in servers)
        raise UsageError(f"the server processes {pids} use the state store {state}", "stop them, and compact it again")
    began = time.monotonic()
    with LmdbStore.open(state, map_size=map_size, must_exist=True, alone=True) as store:
        with store_errors(state, 0, readonly=True):
            for leftover in partial_directories(state):
                shutil.rmtree(leftover)
        before = (state / DATA).stat().st_size
        with copying(state) as partial:
            freed = rewrite(store, partial)
            copied = checked_copy(partial, state, "the store, or its disk, is damaged: run verify on it")
            _replace(state, partial)
    return Compacted(before, copied.bytes, freed, time.monotonic() - began, copied.counts)


def _replace(state: Path, partial: Path) -> None:
    """Puts the new file in the place of the old one. There is one at any moment.

    The lock file is that of the old one. Without it, the next process makes another, as nobody has the store open.
    """
    (state / "lock.mdb").unlink(missing_ok=True)
    sync(state)
    (partial / DATA).replace(state / DATA)
    sync(state)
