"""An LMDB environment that is opened with care, and whose every failure is a StoreError.

py-lmdb 3 bundles LMDB 0.9, which is what this asks for. Each process opens an environment once, after any fork. POSIX
only.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn, Self

import lmdb
from lmdb.verify import VerifyError, verify

from dman_runtime.errors import StoreError, StoreFullError, StoreMismatchError, StoreUnavailableError
from dman_runtime.store.history import DamagedError

_MAX_READERS = 2048  # concurrent read transactions of all processes
# Commits leave a sixteenth of the map free, within these bytes: copy-on-write makes even a deletion need pages.
_MIN_RESERVE, _MAX_RESERVE = 256 << 10, 16 << 20
_MAGIC, _DATA_FORMAT = struct.pack("=I", 0xBEEFC0DE), struct.pack("=I", 1)  # how LMDB 0.9 marks its file
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CORRUPTED = ("is corrupted ({})", "restore a backup, or use another directory", "state")
_FOREIGN = ("is an LMDB database of another program", "use another directory")
_UNAVAILABLE: Mapping[type[Exception], tuple[str, str, str]] = {
    lmdb.ReadersFullError: ("has no free reader slot", "use fewer processes and threads", ""),
    lmdb.MapResizedError: (
        "was grown by another process",
        "restart every process with the same map size",
        "map_size_mib",
    ),
    lmdb.MemoryError: (
        "does not fit into this process's address space",
        "lower the map size or raise `ulimit -v`",
        "map_size_mib",
    ),
    **dict.fromkeys(
        (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, VerifyError, DamagedError), _CORRUPTED
    ),
}
_OTHER = ("is unavailable ({})", "check the path, its permissions and the disk", "state")

logger = logging.getLogger(__name__)


class Environment:
    """The databases of one directory. Make one with `Environment.open`."""

    def __init__(self, env: lmdb.Environment, path: Path, *, readonly: bool) -> None:
        self.path, self.readonly = path, readonly
        self.databases: dict[str, lmdb._Database] = {}
        self._env: lmdb.Environment | None = env
        self._pid = os.getpid()
        self.map_size, self._page_size = env.info()["map_size"], env.stat()["psize"]

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        names: Sequence[str],
        create: Callable[[lmdb.Transaction, Mapping[str, lmdb._Database]], None],
        check: Callable[[lmdb.Transaction, lmdb._Database], None],
        map_size: int,
        readonly: bool,
    ) -> Self:
        """Opens the databases `names` in the directory `path`, and creates them where there are none.

        `create` fills new databases in the transaction that makes them. `check` looks at the first database of existing
        ones before the others are opened. `map_size` in bytes bounds the file, unless the file is larger already; use
        the same in every process. Raises StoreError; a readonly environment must exist.
        """
        with store_errors(path, map_size):
            _check_files(path, must_exist=readonly)
            if not readonly:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (path / "lock.mdb").exists() and _disk_is_full(path):  # or LMDB dies of SIGBUS creating it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # A reader takes the map size from the file. Access is random, hence no readahead.
            env = lmdb.open(
                str(path), lib_version=0, map_size=0 if readonly else map_size, max_dbs=len(names),
                max_readers=_MAX_READERS, readonly=readonly, create=False, mode=0o700, readahead=False,
                sync=True, metasync=True, writemap=False, map_async=False,
            )  # fmt: skip
            try:
                opened = cls(env, path, readonly=readonly)
                opened._open_databases(env, names, create, check)
                if not readonly and (stale := env.reader_check()):
                    logger.info("freed %d reader slots of dead processes in %s", stale, path)
            except BaseException:
                env.close()
                raise
        return opened

    def _open_databases(
        self,
        env: lmdb.Environment,
        names: Sequence[str],
        create: Callable[[lmdb.Transaction, Mapping[str, lmdb._Database]], None],
        check: Callable[[lmdb.Transaction, lmdb._Database], None],
    ) -> None:
        """Other processes that open the environment wait meanwhile, so that only one creates the databases."""
        with env.begin(write=not self.readonly) as txn:
            _check_length(env, self.path)
            new = not txn.stat()["entries"]
            if new and self.readonly:
                raise missing(self.path)
            for name in names:
                # A handle that is opened in a reader's transaction would end with it.
                own = None if self.readonly else txn
                try:
                    self.databases[name] = env.open_db(name.encode(), txn=own, create=new)
                except (lmdb.NotFoundError, lmdb.IncompatibleError) as error:
                    cause, remedy = _FOREIGN
                    raise StoreMismatchError(f"{self.path} {cause}", remedy, parameter="state") from error
                if not new and name == names[0]:
                    # A reader knows the handles that were opened before it began.
                    with nullcontext(txn) if own else env.begin() as checking:
                        check(checking, self.databases[name])
            if new:
                create(txn, self.databases)
                _sync_names(self.path)
                logger.info("created the state store %s", self.path)

    def read(self) -> ReadTransaction:
        """A read transaction as a context manager."""
        return ReadTransaction(self)

    def begin_reading(self) -> lmdb.Transaction:
        return self._environment().begin(buffers=True)

    @contextmanager
    def write(self) -> Iterator[lmdb.Transaction]:
        """The one write transaction of all processes: on disk when the block ends, undone when it raises."""
        if self.readonly:
            raise StoreError(f"the state store {self.path} was opened read-only", "open it for writing")
        with store_errors(self.path, self.map_size), self._environment().begin(write=True) as txn:
            yield txn

    def keep_reserve(self, txn: lmdb.Transaction, new_bytes: int) -> None:
        """MapFullError where a transaction that put `new_bytes` leaves too little for deletions."""
        # The next transaction cannot use the pages that this one replaces: leave as much again.
        reserve = min(max(self.map_size // 16, _MIN_RESERVE), _MAX_RESERVE) + new_bytes
        # No more pages than the file has can be live, which is cheaper to ask than how many are.
        if self._file_bytes() + reserve > self.map_size - reserve and self.live_bytes(txn) > self.map_size - reserve:
            raise lmdb.MapFullError("the reserve for deletions is reached")

    def _file_bytes(self) -> int:
        """Bytes of the pages ever used, as of the last commit."""
        return (self._environment().info()["last_pgno"] + 1) * self._page_size

    def live_bytes(self, txn: lmdb.Transaction) -> int:
        stats = [txn.stat(), *(txn.stat(db) for db in self.databases.values())]
        return self._page_size * sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)

    def file_bytes_on_disk(self) -> int:
        return (self.path / "data.mdb").stat().st_size

    def flush(self) -> None:
        env = self._environment()
        if not self.readonly:
            with store_errors(self.path, self.map_size):
                env.sync(True)

    def close(self) -> None:
        """A second call does nothing, nor does one in a forked child."""
        env, self._env = self._env, None
        if env is not None and self._pid == os.getpid():
            env.close()

    def _environment(self) -> lmdb.Environment:
        if self._pid != os.getpid():
            raise StoreError(f"the state store {self.path} was opened before a fork", "open it in each process")
        if self._env is None:
            raise StoreError(f"the state store {self.path} is closed", "open it again")
        return self._env


class ReadTransaction:
    """One moment of the store. What is read are views into the file: copy what leaves the block.

    A class, as every recommendation passes here and contextlib's generators cost more than the read itself.
    """

    __slots__ = ("_env", "txn")

    def __init__(self, env: Environment) -> None:
        self._env = env

    def __enter__(self) -> Self:
        try:
            self.txn = self._env.begin_reading()
        except lmdb.Error as error:
            self._fail(error)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.txn.abort()
        if isinstance(error, (lmdb.Error, DamagedError)):
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        with store_errors(self._env.path, self._env.map_size):
            raise error
        raise AssertionError  # store_errors raises another error


def missing(path: Path) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"the state store {path} does not exist", "check the path, or create it by serving a bundle", parameter="state"
    )


def _sync_names(path: Path) -> None:
    """LMDB syncs the file; its name is ours to sync."""
    for directory in (path, path.resolve().parent):
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _check_files(path: Path, *, must_exist: bool) -> None:
    """Refuse what is no store, before LMDB puts a lock file beside it."""
    data = path / "data.mdb"
    if path.exists() and not path.is_dir():
        raise StoreUnavailableError(
            f"{path} is a file, not the directory of a state store", "use another path", parameter="state"
        )
    if not data.exists() or not data.stat().st_size:
        if must_exist:
            raise missing(path)
        return
    with data.open("rb") as file:
        head = file.read(64)
    magic = head.find(_MAGIC)
    if magic < 0:
        raise lmdb.InvalidError("data.mdb is not an LMDB file")
    if head[magic + 4 : magic + 8] != _DATA_FORMAT:
        raise StoreUnavailableError(f"{data} is not in the format of LMDB 0.9", "convert it with mdb_dump and mdb_load")


def _check_length(env: lmdb.Environment, path: Path) -> None:
    """Refuse a truncated file: a read behind its end would kill the process by SIGBUS.

    LMDB may leave out unused pages at the end, so a short file is looked at in full: slow, and rare.
    """
    size = (path / "data.mdb").stat().st_size
    if size < (env.info()["last_pgno"] + 1) * env.stat()["psize"] and (problems := verify(str(path))):  # type: ignore[no-untyped-call]
        raise lmdb.CorruptedError(f"data.mdb is truncated: {problems[0]}")


@contextmanager
def store_errors(path: Path, map_size: int) -> Iterator[None]:
    """Turns what LMDB, the codec and the system raise into StoreErrors."""
    try:
        yield
    except (lmdb.Error, VerifyError, DamagedError, OSError) as error:
        code = getattr(error, "errno", getattr(error, "code", 0)) or 0
        reason = os.strerror(code) if code > 0 else str(error)
        store = f"the state store {path}"
        if isinstance(error, lmdb.MapFullError):
            raise StoreFullError(
                f"{store} is full (map size {map_size >> 20} MiB)",
                "restart with a larger map size",
                parameter="map_size_mib",
            ) from error
        if code in _FULL or (code == errno.EIO and _disk_is_full(path)):
            remedy = "free some or raise the limit, then retry"
            raise StoreFullError(f"{store} has no disk space left ({reason})", remedy) from error
        if "already open" in reason:
            raise StoreUnavailableError(f"{store} is already open in this process", "share it") from error
        cause, remedy, parameter = _UNAVAILABLE.get(type(error), _OTHER)
        raise StoreUnavailableError(f"{store} {cause.format(reason)}", remedy, parameter=parameter) from error


def _disk_is_full(path: Path) -> bool:
    """LMDB reports a short write as an I/O error: see whether the file can grow."""
    data, probe = path / "data.mdb", bytes(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            return os.pwrite(file.fileno(), probe, data.stat().st_size if data.exists() else 0) < len(probe)
    except OSError as error:
        return error.errno in _FULL
