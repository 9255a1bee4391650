"""An LMDB environment that is opened with care, and whose every failure is a StoreError.

py-lmdb 3 bundles LMDB 0.9, which is what this asks for. Each process opens an environment once, after any fork. POSIX
only.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn, Self

import lmdb

from dman_runtime.errors import StoreError, StoreMismatchError, StoreUnavailableError
from dman_runtime.store.files import (
    StoreFiles,
    check_directory,
    check_length,
    continue_versions,
    has_data,
    map_size_to_read,
    stored_map_size,
    sync_names,
)
from dman_runtime.store.history import DamagedError
from dman_runtime.store.lmdb_errors import disk_is_full, store_errors
from dman_runtime.store.lmdb_layout import (
    FORMAT_VERSION,
    LATER_NAMES,
    NAMES,
    OLD_FORMAT,
    hash_key_of,
    read_info,
    write_info,
)
from dman_runtime.store.marker import absent, check_id, read_marker, write_marker

_MAX_READERS = 2048  # concurrent read transactions of all processes
# Commits leave a sixteenth of the map free, within these bytes: copy-on-write makes even a deletion need pages.
_MIN_RESERVE, _MAX_RESERVE = 256 << 10, 16 << 20
_FOREIGN = ("is an LMDB database of another program", "use another directory")

logger = logging.getLogger(__name__)


class Environment:
    """The databases of one directory. Make one with `Environment.open`."""

    def __init__(self, env: lmdb.Environment, path: Path, files: StoreFiles, *, readonly: bool) -> None:
        self.path, self.readonly = path, readonly
        self.databases: dict[str, lmdb._Database] = {}
        self.legacy = False  # values of format 3 may be there
        self.store_id = ""
        self.hash_key = ""  # as in `Databases`
        self._env: lmdb.Environment | None = env
        self._files, self._pid = files, os.getpid()
        self._made_lock = False  # only to read, so it is removed again
        self._page_size = env.stat()["psize"]
        # A reader maps less than the file may grow to.
        self.map_size = stored_map_size(path) if readonly else env.info()["map_size"]

    @classmethod
    def open(cls, path: Path, *, map_size: int, readonly: bool, must_exist: bool, alone: bool = False) -> Self:
        """Opens the store in the directory `path`; `LmdbStore.open` says what the options mean. Raises StoreError."""
        with store_errors(path, map_size, readonly=readonly):
            check_directory(path)
            expected = read_marker(path)  # before the files: another process may be creating both
            refusal = absent(path, expected=expected, readonly=readonly, must_exist=must_exist)
            if refusal and not has_data(path):
                raise refusal
            if not readonly:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            files = StoreFiles.claim(path, readonly=readonly)
            try:
                if alone and not files.alone:
                    raise StoreUnavailableError(
                        f"other processes have the state store {path} open", "stop them, then try again"
                    )
                files.check_whole()
                asked, map_size = map_size, map_size if readonly else files.map_size(map_size)
                makes_lock = readonly and not (path / "lock.mdb").exists()
                opened = cls(_open(path, map_size, readonly=readonly), path, files, readonly=readonly)
                opened._made_lock = makes_lock
                try:
                    opened._open_databases(expected, refusal, grown=map_size > asked and files.alone)
                    files.watch(share=not alone)
                    opened.free_stale_readers()
                except BaseException:
                    opened.close()
                    raise
            except BaseException:
                files.close()
                raise
        if expected is None and not readonly:
            write_marker(path, opened.store_id)
        return opened

    def _open_databases(self, expected: str | None, refusal: StoreError | None, *, grown: bool) -> None:
        """Opens the databases, and creates or upgrades them if need be.

        Other processes that open the environment wait meanwhile, so that only one creates the databases.
        """
        env = self._environment()
        with env.begin(write=not self.readonly) as txn:
            check_length(env, self.path)
            new = not txn.stat()["entries"]
            if new and refusal:
                raise refusal
            meta = self._open_database("meta", txn, create=new)
            if new:
                write_info(txn, meta)
            # A reader knows the handles that were opened before it began.
            with env.begin() if self.readonly else nullcontext(txn) as reading:
                info = read_info(reading, meta)
            upgrading = self._needs_upgrade(info)
            check_id(self.path, expected=None if new else expected, found=info.get("store_id", ""))
            if upgrading:
                write_info(txn, meta, upgraded_from=OLD_FORMAT)
                info = read_info(txn, meta)
            if grown:  # for others to see
                txn.put(b"info", bytes(txn.get(b"info", b"", db=meta)), db=meta)
            for name in NAMES[1:]:
                if name not in LATER_NAMES:
                    self._open_database(name, txn, create=new or (upgrading and name == "requests"))
                elif not self.readonly:
                    self._open_database(name, txn, create=True)
                else:
                    with suppress(lmdb.NotFoundError):
                        self.databases[name] = env.open_db(name.encode(), create=False)
        if new:
            sync_names(self.path)
            logger.info("created the state store %s", self.path)
        if grown:
            logger.info("the state store %s now has a map of %d MiB", self.path, self.map_size >> 20)
        if upgrading:
            logger.info("upgraded the state store %s from format %d to %d", self.path, OLD_FORMAT, FORMAT_VERSION)
        self.legacy = "upgraded_from" in info
        self.store_id = str(info["store_id"])
        self.hash_key = hash_key_of(info)

    def _open_database(self, name: str, txn: lmdb.Transaction, *, create: bool) -> lmdb._Database:
        # A handle that is opened in a reader's transaction would end with it.
        own = None if self.readonly else txn
        try:
            self.databases[name] = self._environment().open_db(name.encode(), txn=own, create=create)
        except (lmdb.NotFoundError, lmdb.IncompatibleError) as error:
            cause, remedy = _FOREIGN
            raise StoreMismatchError(f"{self.path} {cause}", remedy, parameter="state") from error
        return self.databases[name]

    def _needs_upgrade(self, info: dict[str, Any]) -> bool:
        """Whether the store has the old format. StoreMismatchError where it cannot be used."""
        found = info.get("format_version", "unknown")
        if found == OLD_FORMAT and not self.readonly:
            return True
        if found != FORMAT_VERSION:
            remedy = "import the log again into another directory"
            if found == OLD_FORMAT:
                remedy = "open it once for writing, which upgrades it, for example by serving it"
            raise StoreMismatchError(
                f"the state store {self.path} has format {found}, this release reads {FORMAT_VERSION}",
                remedy,
                parameter="state",
            )
        return False

    def read(self) -> ReadTransaction:
        """A read transaction as a context manager."""
        return ReadTransaction(self)

    def begin_reading(self) -> lmdb.Transaction:
        env = self._env
        if env is None or self._pid != os.getpid():  # `_environment` without the call: every recommendation passes here
            env = self._environment()
        try:
            return env.begin(buffers=True)
        except lmdb.MapResizedError:
            if not self.readonly:
                raise
            return self._begin_in_larger_map(env)

    def _begin_in_larger_map(self, env: lmdb.Environment) -> lmdb.Transaction:
        """Maps what other processes have added to the file, where nothing in this process reads the present map."""
        own = str(os.getpid())
        readers = [line.split() for line in env.readers().splitlines()]
        if any(columns[0] == own and columns[-1] != "-" for columns in readers):
            raise lmdb.MapResizedError("the map cannot be replaced while it is read")
        env.set_mapsize(map_size_to_read(self.path))
        return env.begin(buffers=True)

    def write(self) -> WriteTransaction:
        """The one write transaction of all processes, as a context manager."""
        if self.readonly:
            raise StoreError(f"the state store {self.path} was opened read-only", "open it for writing")
        return WriteTransaction(self)

    def begin_writing(self) -> lmdb.Transaction:
        self._files.check_known()
        return self._environment().begin(write=True, buffers=True)

    def check_written(self) -> None:
        """Keeps what went nowhere from being acknowledged."""
        self._files.check_data()

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

    def copy_to(self, directory: Path) -> None:
        """Raises StoreError, which names the directory."""
        with store_errors(directory, 0, readonly=True):
            self._environment().copy(str(directory), compact=True)
            self.continue_versions(directory)

    def continue_versions(self, copy: Path) -> None:
        """Lets a copy, which nobody has open, give no version that was given here before it was made."""
        continue_versions(copy, after=self._environment().info()["last_txnid"])

    def check(self) -> None:
        """StoreGoneError if the files are no longer the ones that were opened."""
        with self._errors():
            self._files.check()

    def free_stale_readers(self) -> int:
        """Frees the reader slots of dead processes, whose snapshots keep pages from being reused; returns how many."""
        with self._errors():
            stale = self._environment().reader_check()
        if stale:
            logger.info("freed %d reader slots of dead processes in %s", stale, self.path)
        return stale

    def _errors(self) -> AbstractContextManager[None]:
        return store_errors(self.path, self.map_size, readonly=self.readonly)

    def fail(self, error: Exception) -> NoReturn:
        """Raises the StoreError that says what went wrong."""
        with self._errors():
            raise error
        raise AssertionError  # store_errors raises another error

    def flush(self) -> None:
        env = self._environment()
        if not self.readonly:
            with self._errors():
                env.sync(True)

    def close(self) -> None:
        """A second call does nothing, nor does one in a forked child."""
        env, self._env = self._env, None
        if env is not None and self._pid == os.getpid():
            env.close()
            self._files.close(leaves_lock=not self._made_lock)

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
            self._env.fail(error)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.txn.abort()
        if isinstance(error, (lmdb.Error, DamagedError)):
            self._env.fail(error)


class WriteTransaction:
    """On disk when the block ends, undone when it raises. What it reads are views that the next change makes invalid.

    StoreGoneError if the files are no longer the ones that were opened.
    """

    __slots__ = ("_env", "_txn")

    def __init__(self, env: Environment) -> None:
        self._env = env

    def __enter__(self) -> lmdb.Transaction:
        try:
            self._txn = self._env.begin_writing()
            return self._txn.__enter__()
        except (lmdb.Error, OSError) as error:
            self._env.fail(error)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            self._txn.__exit__(kind, error, traceback)
            if error is None:
                self._env.check_written()
        except (lmdb.Error, OSError) as failed:
            self._env.fail(failed)
        if isinstance(error, (lmdb.Error, OSError, DamagedError)):
            self._env.fail(error)


def _open(path: Path, map_size: int, *, readonly: bool) -> lmdb.Environment:
    if not (path / "lock.mdb").exists() and disk_is_full(path):  # or LMDB dies of SIGBUS creating it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if readonly:  # address space may be short, and the file has what there is to read
        map_size = map_size_to_read(path)
    # Access is random, hence no readahead.
    return lmdb.open(
        str(path), lib_version=0, map_size=map_size, max_dbs=len(NAMES),
        max_readers=_MAX_READERS, readonly=readonly, create=False, mode=0o700, readahead=False,
        sync=True, metasync=True, writemap=False, map_async=False,
    )  # fmt: skip
