"""How the contract suites handle each store: the only place here that knows what is behind the interface.

A new implementation joins every suite with one class more in `HARNESSES`.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NoReturn, Protocol
from unittest.mock import patch

import lmdb
from lmdb.verify import verify

from dman_runtime.store import checks
from dman_runtime.store.base import StateStore
from dman_runtime.store.lmdb import LmdbStore
from dman_runtime.store.memory import MemoryStore
from dman_runtime.store.place import ServerAddress, parse_place
from dman_runtime.store.redis import RedisStore
from dman_runtime.store.redis_servers import Command
from tools.faults.redis_servers import Cluster, RedisServer

_MEMORY_DISK = Path("/dev/shm")  # syncing costs nothing there


class Crash(BaseException):
    """The process ends here. No `except Exception` stops it."""


class Harness(Protocol):
    """One store for tests. Suites call the methods below `open` for durable stores only."""

    durable: ClassVar[bool]  # what was written outlives the process
    together: ClassVar[bool]  # as in `StateStore.commits_together`; a snapshot is of one moment too
    clock: Callable[[], float]  # of the stores that are opened from now on

    def __init__(self, directory: Path) -> None:
        """Nothing is opened yet. The same directory means the same store, in every process."""

    def open(self) -> StateStore:
        """Opens the store and creates it where there is none. Not while this process has it open."""
        ...

    def at_step(self, step: int, action: Callable[[], object]) -> AbstractContextManager[None]:
        """In this block, calls `action` before step number `step` of the writes, counted from 0.

        Steps are what a process can die between: each change, the commit, and the return to the caller.
        """
        ...

    def crash(self) -> NoReturn:
        """An action for `at_step`: keeps what a process that died now would leave, and raises Crash."""
        ...

    def recover(self, store: StateStore) -> StateStore:
        """Gives up the crashed store, and opens what the crash left."""
        ...

    def problems(self) -> list[str]:
        """What is wrong with the stored data, for a store that is not open; empty if nothing is."""
        ...


class MemoryHarness:
    durable, together = False, True

    def __init__(self, directory: Path) -> None:
        self.clock: Callable[[], float] = time.time

    def open(self) -> MemoryStore:
        return MemoryStore(clock=self.clock)

    def problems(self) -> list[str]:
        return []


class _Steps:
    """Calls an action before one of the steps that a store says it takes."""

    def __init__(self) -> None:
        self._action: Callable[[], object] | None = None
        self._steps_left = 0

    @contextmanager
    def at_step(self, step: int, action: Callable[[], object]) -> Iterator[None]:
        self._steps_left, self._action = step, action
        try:
            yield
        finally:
            self._action = None

    def step(self) -> None:
        self._steps_left -= 1
        if self._action is not None and self._steps_left < 0:
            action, self._action = self._action, None
            action()


class LmdbHarness(_Steps):
    durable, together = True, True

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.path = directory / "state"
        self.clock: Callable[[], float] = time.time

    def open(self) -> LmdbStore:
        opening = lmdb.open
        with patch.object(lmdb, "open", lambda *args, **options: _Environment(opening(*args, **options), self.step)):
            return LmdbStore.open(self.path, clock=self.clock)

    def crash(self) -> NoReturn:
        image = self.path.with_name(self.path.name + "+")
        image.mkdir()
        shutil.copy(self.path / "data.mdb", image)  # before LMDB can clean up; nobody else holds the lock file
        raise Crash

    def recover(self, store: StateStore) -> LmdbStore:
        store.close()
        shutil.rmtree(self.path)
        self.path.with_name(self.path.name + "+").rename(self.path)
        return self.open()

    def problems(self) -> list[str]:
        return list(verify(str(self.path)))


class _Environment:
    """An lmdb.Environment whose write transactions call `step` before each of their steps."""

    def __init__(self, env: lmdb.Environment, step: Callable[[], None]) -> None:
        self._env, self._step = env, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def begin(self, *args: Any, write: bool = False, **options: Any) -> Any:
        txn = self._env.begin(*args, write=write, **options)
        return _Stepwise(txn, self._step) if write else txn

    def open_db(self, *args: Any, txn: Any = None, **options: Any) -> Any:
        return self._env.open_db(*args, txn=txn.target if isinstance(txn, _Stepwise) else txn, **options)


class _Stepwise:
    """A write transaction, or a cursor of one."""

    def __init__(self, target: Any, step: Callable[[], None]) -> None:
        self.target, self._step = target, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def put(self, *args: Any, **options: Any) -> Any:
        self._step()
        return self.target.put(*args, **options)

    def delete(self, *args: Any, **options: Any) -> Any:
        self._step()
        return self.target.delete(*args, **options)

    def cursor(self, **options: Any) -> _Stepwise:
        return _Stepwise(self.target.cursor(**options), self._step)

    def __enter__(self) -> _Stepwise:
        self.target.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        committing = isinstance(self.target, lmdb.Transaction) and kind is None
        if committing:
            try:
                self._step()
            except BaseException:
                self.target.abort()
                raise
        self.target.__exit__(kind, error, traceback)
        if committing:
            self._step()


class RedisHarness(_Steps):
    """On one server for all tests of a process and of those it starts; each store has a namespace of its own."""

    durable, together = True, False
    variable: ClassVar[str] = "DMAN_TEST_REDIS"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        digest = hashlib.blake2b(str(directory.resolve()).encode(), digest_size=12).hexdigest()
        self.place = parse_place(f"redis://{self.address()}/{digest}")
        self.clock: Callable[[], float] = time.time

    @classmethod
    def address(cls) -> str:
        if cls.variable not in os.environ:
            os.environ[cls.variable] = cls.start(Path(_RUNNING.enter_context(fresh_directory())))
        return os.environ[cls.variable]

    @staticmethod
    def start(directory: Path) -> str:
        return _RUNNING.enter_context(RedisServer(directory)).address

    def open(self) -> RedisStore:
        assert isinstance(self.place, ServerAddress)
        store = RedisStore.open(self.place, clock=self.clock)
        for name in ("write", "write_each"):
            setattr(store._servers, name, functools.partial(self._stepwise, getattr(store._servers, name)))
        return store

    def _stepwise(self, writing: Callable[[Sequence[Command]], list[Any]], commands: Sequence[Command]) -> list[Any]:
        if self._action is None:
            return writing(commands)
        answers = []
        for command in commands:
            self.step()
            answers += writing([command])
        self.step()
        return answers

    def crash(self) -> NoReturn:
        raise Crash

    def recover(self, store: StateStore) -> RedisStore:
        store.close()
        return self.open()

    def problems(self) -> list[str]:
        return []


class ClusterHarness(RedisHarness):
    """On three primaries."""

    variable = "DMAN_TEST_REDIS_CLUSTER"

    @staticmethod
    def start(directory: Path) -> str:
        return _RUNNING.enter_context(Cluster(directory)).address


_RUNNING = ExitStack()  # servers that tests have started
atexit.register(_RUNNING.close)
HARNESSES: dict[str, type[Harness]] = {
    "lmdb": LmdbHarness,
    "memory": MemoryHarness,
    "redis": RedisHarness,
    "cluster": ClusterHarness,
}
DURABLE = [name for name, harness in HARNESSES.items() if harness.durable]


@contextmanager
def request_id_limit(limit: int) -> Iterator[None]:
    """In this block, all stores take so many request ids of a user in 6 hours."""
    with (
        patch.object(checks, "MAX_IDS", limit),
    ):
        yield


@contextmanager
def fresh_directory() -> Iterator[Path]:
    """A directory that is removed at the end, in memory where the system has such a place."""
    memory_disk = _MEMORY_DISK if os.access(_MEMORY_DISK, os.W_OK) else None
    with TemporaryDirectory(dir=memory_disk, prefix="dman-test-") as name:
        yield Path(name)
