"""What is wrong with a worker: looked for every second, told by health checks, status calls and metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dman_runtime.errors import DmanError, StoreDamagedError, StoreFullError, StoreGoneError, StoreUnavailableError
from dman_runtime.metrics import NO_METRICS, Metrics
from dman_runtime.problems import Problems

BLOCKED_SECONDS = 5.0  # a turn that takes longer waits for the disk, or for another process
FULL_SECONDS = 30.0  # a store that was full is called full for so long
ROOM_SECONDS = 5.0  # or for so long, once a commit succeeds: some fit for a while where others do not
HANGING_SECONDS = 5.0  # a look at the disk that takes longer
MAINTAIN_SECONDS = 1.0  # the store is maintained between turns, and beside shorter ones
MIN_FREE_BYTES = 64 << 20
FILLING, NEARLY_FULL = 0.8, 0.95  # of the map in use


class Monitor:
    """Looks at what can go wrong under a running worker."""

    def __init__(
        self,
        problems: Problems,
        *,
        state: Path | None,
        check_store: Callable[[], None],
        maintain_store: Callable[[], int],
        store_sizes: Callable[[], tuple[int, int, int]],
        bundle_changed: Callable[[], str],
        reload_tokens: Callable[[], DmanError | None],
        busy_since: Sequence[Callable[[], float | None]],
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """`state` is the directory of the store; None for one on servers. The callables: `check_store` raises
        StoreError; `store_sizes` gives the bytes in use, those of the file, and those of the map; `busy_since` say
        since when (time.monotonic()) a batcher's turn has run.
        """
        self._problems, self._state = problems, state
        self._check_store, self._maintain_store = check_store, maintain_store
        self._store_sizes = store_sizes
        self._bundle_changed, self._reload_tokens, self._busy_since = bundle_changed, reload_tokens, busy_since
        self._metrics = metrics
        self._full_at = -FULL_SECONDS
        self._has_room = False  # a commit has succeeded since
        self._look_began: float | None = None

    def saw(self, error: Exception) -> None:
        """A call failed with this error."""
        if isinstance(error, StoreFullError):
            self._full_at, self._has_room = time.monotonic(), False
            self._problems.set("disk_full", str(error))
        elif isinstance(error, StoreGoneError):
            self._problems.set("store_gone", str(error), blocking=True)
        elif isinstance(error, StoreDamagedError):
            self._problems.set("store_damaged", str(error))
        elif isinstance(error, StoreUnavailableError) and self._state is None:
            self._problems.set("store_unreachable", str(error), blocking=True)

    def committed(self) -> None:
        """A commit succeeded: the store has room."""
        self._has_room = True

    def look_at_clock(self) -> None:
        """Whether turns take too long, or `look` itself: without the disk, which may hang."""
        now, began = time.monotonic(), self._look_began
        detail = "commits wait for the disk or for another process that writes; look at the disk and at other programs"
        self._problems.set("commits_blocked", detail if self._blocked_seconds(now) > BLOCKED_SECONDS else "")
        hangs = began is not None and now - began > HANGING_SECONDS
        self._problems.set("disk_hangs", "files cannot be looked at; look at the disks and mounts" if hangs else "")

    def _blocked_seconds(self, now: float) -> float:
        return max((now - since for get in self._busy_since if (since := get()) is not None), default=0.0)

    def look(self) -> None:
        """Everything on the disk once; may take as long as the disk does."""
        self._look_began = time.monotonic()
        try:
            self._look_at_files(self._look_began)
        except DmanError as error:
            self.saw(error)
        finally:
            self._look_began = None
        self._metrics.problems([problem.name for problem in self._problems.now()])
        if self._blocked_seconds(time.monotonic()) < MAINTAIN_SECONDS:  # else it would wait as well
            try:
                self._metrics.stale_readers(self._maintain_store())
            except DmanError as error:
                self.saw(error)

    def _look_at_files(self, now: float) -> None:
        changed = self._bundle_changed()
        remedy = (
            "answers still come from what was read; restart the server to serve what is there, or put the files back"
        )
        self._problems.set("bundle_changed", f"in the bundle, {changed}; {remedy}" if changed else "")
        tokens = self._reload_tokens()
        self._problems.set("tokens_unusable", str(tokens) if tokens else "")
        self._check_store()
        self._problems.set("store_unreachable", "")
        used, file, size = self._store_sizes()
        self._metrics.store(used, file, size)
        self._look_at_map(used, size)
        self._look_at_disk(now)

    def _look_at_map(self, used: int, size: int) -> None:
        if not size:  # it has no bound
            return
        where, more = ("its map", "restart all that use it, which makes it larger")
        if self._state is None:
            where, more = ("the memory of its servers", "let them use more, add some")
        detail = (
            f"the state store uses {used / size:.0%} of {where} of {size >> 20} MiB; {more}, or delete users or states"
        )
        nearly = used >= NEARLY_FULL * size
        self._problems.set("store_nearly_full", detail if nearly else "")
        self._problems.set("store_filling", detail if used >= FILLING * size and not nearly else "")

    def _look_at_disk(self, now: float) -> None:
        if self._state is None or now - self._full_at < (ROOM_SECONDS if self._has_room else FULL_SECONDS):
            return
        try:
            disk = os.statvfs(self._state)
        except OSError:  # `check_store` tells whether that is a problem
            return
        free = disk.f_bavail * disk.f_frsize
        detail = f"the disk of the state store has {free >> 20} MiB left; free some, or move the store"
        self._problems.set("disk_full", detail if free < MIN_FREE_BYTES else "")
