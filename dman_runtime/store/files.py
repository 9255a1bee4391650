"""The files of a store: who else uses them, whether they are whole, and whether they are still the same ones.

Every process that has a store open holds a lock on `data.mdb`: an exclusive one while it opens it, then a shared one.
So creations follow each other, and who opens a store knows whether anybody else uses it. This lock has nothing to do
with `lock.mdb`, by which LMDB keeps the writers apart: with another `lock.mdb` than the others, a process would write
into their pages.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import lmdb
from lmdb.verify import verify

from dman_runtime.errors import StoreGoneError, StoreUnavailableError

_MAGIC, _DATA_FORMAT = struct.pack("=I", 0xBEEFC0DE), struct.pack("=I", 1)  # how LMDB 0.9 marks its file
# How LMDB describes its file at the start of its first two pages, which it writes in turns: magic, format, map size,
# page size, last page, transaction.
_META, _TRANSACTION = struct.Struct("=16xII8xQI92xQQ"), struct.Struct("=Q")
_GROWTH = 64 << 20  # bytes that a file may grow by until a reader maps it again
_FILLED = 0.8  # of the map that a file may fill when a writer opens it
_BUSY, _GONE = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}, {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_CHECKED_BYTES = 64 << 20  # of larger files the structure is not checked when they are opened
_PATIENCE, _PAUSE, _TRIES = 60.0, 0.02, 5  # seconds for another process to open the store; between tries; for lock.mdb


class StoreFiles:
    """The claimed files of a store. Make one with `StoreFiles.claim`."""

    def __init__(self, path: Path, descriptor: int, *, alone: bool) -> None:
        self.alone = alone  # nobody else has the store open, or can open it before `share`
        self._path, self._descriptor = path, descriptor
        self._data, self._lock = str(path / "data.mdb"), str(path / "lock.mdb")
        self._identity: dict[str, tuple[int, int]] = {}  # by path: device and inode
        self._size = 0
        self._problem = ""

    @classmethod
    def claim(cls, path: Path, *, readonly: bool) -> StoreFiles:
        """Locks `data.mdb`, and creates it empty where there is none (not if `readonly`).

        Raises OSError, and StoreUnavailableError where others use the store with a `lock.mdb` that was removed.
        """
        flags = os.O_RDONLY if readonly else os.O_RDWR | os.O_CREAT
        while True:
            descriptor = os.open(path / "data.mdb", flags | os.O_CLOEXEC, 0o600)
            try:
                files = cls(path, descriptor, alone=_lock(path, descriptor))
                if not files._was_replaced():
                    return files
            except BaseException:
                os.close(descriptor)
                raise
            files.close()  # a compaction has put another file there while this process waited for the lock

    def _was_replaced(self) -> bool:
        own = os.fstat(self._descriptor)
        with suppress(OSError):  # `watch` says what is wrong with a file that has gone
            found = Path(self._data).stat()
            return (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino)
        return False

    def check_whole(self) -> None:
        """lmdb.Error for what LMDB should not be let near, StoreUnavailableError for another format of LMDB.

        The structure is checked where nobody can change it meanwhile, and where that is quick.
        """
        data = self._path / "data.mdb"
        with data.open("rb") as file:
            head = file.read(64)
        if not head:
            return
        magic = head.find(_MAGIC)
        if magic < 0:
            raise lmdb.InvalidError("data.mdb is not an LMDB file")
        if head[magic + 4 : magic + 8] != _DATA_FORMAT:
            raise StoreUnavailableError(
                f"{data} is not in the format of LMDB 0.9", "convert it with mdb_dump and mdb_load"
            )
        if self.alone and data.stat().st_size <= _CHECKED_BYTES and (problems := verify(str(self._path))):  # type: ignore[no-untyped-call]
            raise lmdb.CorruptedError(f"data.mdb: {problems[0]}")

    def map_size(self, asked: int) -> int:
        """Bytes that a writer maps: `asked`, or more where the file fills most of that.

        It is made larger by who has the store alone. Others take what that one has: with less, they could not read what
        it adds.
        """
        size = (self._path / "data.mdb").stat().st_size
        if size <= _FILLED * asked:
            return asked
        if not self.alone:
            return max(asked, stored_map_size(self._path))
        larger = asked
        while size > _FILLED * larger:
            larger *= 2
        return larger

    def watch(self, *, share: bool = True) -> None:
        """Remembers which files these are. From now on `check` compares, and others may open the store, if `share`."""
        own, lock = os.fstat(self._descriptor), Path(self._lock).stat()
        self._identity = {self._data: (own.st_dev, own.st_ino), self._lock: (lock.st_dev, lock.st_ino)}
        self.check()
        if self.alone and share:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            self.alone = False

    def check(self) -> None:
        """StoreGoneError once the paths have led to other files, or `data.mdb` has become shorter; also ever after."""
        self._compare(self._lock)
        self.check_data()

    def check_data(self) -> None:
        """The part of `check` that every write does before it is acknowledged.

        `lock.mdb` can wait for the next `check`: while this process has the file open, no other opens it without.
        """
        known = self._size  # before the file is looked at: another thread may see it grow
        size = self._compare(self._data)
        if size < known:
            self._fail("was cut short")
        self._size = size

    def check_known(self) -> None:
        """StoreGoneError if a check has failed before."""
        if self._problem:
            self._fail(self._problem)

    def _compare(self, name: str) -> int:
        """The size of a file that must still be the same."""
        self.check_known()
        try:
            found = os.stat(name)  # noqa: PTH116 - Path.stat takes twice as long, and every commit passes here
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self._fail("was removed")
        if (found.st_dev, found.st_ino) != self._identity[name]:
            self._fail("was replaced")
        return found.st_size

    def _fail(self, problem: str) -> NoReturn:
        self._problem = problem  # for good: what others write meanwhile is not ours
        raise StoreGoneError(
            f"the state store {self._path} {problem} while it was open",
            "mount its volume or restore it, then restart every process",
        )

    def close(self, *, leaves_lock: bool = True) -> None:
        """A second call does nothing. `leaves_lock`: `lock.mdb` stays, also if nobody else uses the store."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                if not leaves_lock and _locked(descriptor, fcntl.LOCK_EX):
                    Path(self._lock).unlink(missing_ok=True)
            os.close(descriptor)


def map_size_to_read(path: Path) -> int:
    """Bytes of address space that a reader needs, and some more: a server may be adding to the file."""
    return (path / "data.mdb").stat().st_size + _GROWTH


def stored_map_size(path: Path) -> int:
    """The map size in bytes that the last writer had: what the file may grow to, or has grown to already."""
    with (path / "data.mdb").open("rb") as file:
        newest = max(_read_metas(file.fileno()), key=lambda meta: meta.transaction)
    return newest.map_size


class _Meta(NamedTuple):
    magic: int
    format: int
    map_size: int
    page_size: int
    last_page: int
    transaction: int


def _read_metas(descriptor: int) -> list[_Meta]:
    """Of the first page and of the second one."""
    first = _Meta(*_META.unpack(os.pread(descriptor, _META.size, 0)))
    return [first, _Meta(*_META.unpack(os.pread(descriptor, _META.size, first.page_size)))]


def continue_versions(path: Path, *, after: int) -> None:
    """Lets the transactions of a copy, which nobody has open, have numbers above `after`; on disk on return.

    LMDB counts anew in a copy, and the versions of users are numbers of transactions.
    """
    with (path / "data.mdb").open("r+b") as file:
        metas = _read_metas(file.fileno())
        counts = [meta.transaction for meta in metas]
        newest = counts.index(max(counts))
        number = max(after, *counts) + 1
        number += (number + newest) % 2  # an even one stands in the first page, an odd one in the second
        end = newest * metas[0].page_size + _META.size
        os.pwrite(file.fileno(), _TRANSACTION.pack(number), end - _TRANSACTION.size)
        os.fsync(file.fileno())


def has_data(path: Path) -> bool:
    """Whether there is a store, or was one: `data.mdb` is empty where a creation was interrupted."""
    data = path / "data.mdb"
    return data.exists() and data.stat().st_size > 0


def check_directory(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StoreUnavailableError(
            f"{path} is a file, not the directory of a state store", "use another path", parameter="state"
        )


def _lock(path: Path, descriptor: int) -> bool:
    """Takes the exclusive lock if nobody has the file open, else a shared one. Returns whether it is exclusive."""
    lock, end, tries = path / "lock.mdb", time.monotonic() + _PATIENCE, 0
    try:
        while time.monotonic() < end:
            if _locked(descriptor, fcntl.LOCK_EX):
                return True
            if _locked(descriptor, fcntl.LOCK_SH):
                if lock.exists():
                    return False
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                tries += 1  # the process that opened it may just have died
                if tries == _TRIES:
                    raise StoreUnavailableError(
                        f"{lock} was removed while other processes use the state store",
                        "stop them all, then start again",
                    )
            time.sleep(_PAUSE)
    except OSError:
        return False  # a file system without such locks: nothing is known of others
    raise StoreUnavailableError(
        f"another process has kept the state store {path} to itself for {_PATIENCE:.0f} s",
        "wait until its compaction is over, or see what it does",
    )


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _BUSY:
            raise
        return False
    return True


def sync(path: Path) -> None:
    """Brings the content of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(path: Path) -> None:
    """LMDB syncs the file; its name is ours to sync."""
    for directory in (path, path.resolve().parent):
        sync(directory)


def check_length(env: lmdb.Environment, path: Path) -> None:
    """Refuse a truncated file: a read behind its end would kill the process by SIGBUS.

    LMDB may leave out unused pages at the end, so a short file is looked at in full: slow, and rare.
    """
    size = (path / "data.mdb").stat().st_size
    if size < (env.info()["last_pgno"] + 1) * env.stat()["psize"] and (problems := verify(str(path))):  # type: ignore[no-untyped-call]
        raise lmdb.CorruptedError(f"data.mdb is truncated: {problems[0]}")
