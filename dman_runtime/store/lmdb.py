"""Durable user state: the only module that imports lmdb.

One LMDB environment (engine 0.9) holds four databases; numbers are little-endian unless said otherwise:

| database | key | value |
|---|---|---|
| meta | `info`; `item_ids` | JSON; zlib of a JSON list |
| state | user id, UTF-8 | u64 version, u64 event count, the *tail*, then the record, which this module never reads |
| history | user id, `\\0`, chunk number as u32 big-endian | 64 events of (u32 item index, i64 timestamp) |
| seen | user id, UTF-8 | byte 0 and the sorted u32 item indices, or byte 1 and a bitmap of all items: the shorter |

The tail holds the events that do not fill a chunk yet, so an update touches one B-tree, and two more when a chunk is
full. `seen` covers the chunks. A durable commit costs a sync of every page it touches: each B-tree more made it a
seventh slower.

The version of a user is the number of the transaction that wrote it. None is given twice, so a user who is deleted and
comes back does not reuse one. Any number of threads and processes may read and write; each process opens the store
once, and after any fork. POSIX only.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import lmdb
import numpy as np
from lmdb.verify import VerifyError, verify
from numpy.typing import NDArray

from dman_runtime.errors import StoreError, StoreFullError, StoreMismatchError, StoreUnavailableError

FORMAT_VERSION = 2
DEFAULT_MAP_SIZE = 64 << 30  # bytes of address space; the disk holds only what is used
MAX_USER_ID_BYTES = 400  # an LMDB key holds 511, and a history key is 5 longer than the user id
CHUNK_EVENTS = 64
_MAX_READERS = 2048  # concurrent read transactions of all processes
# Commits leave a sixteenth of the map free, within these bytes: copy-on-write makes even a deletion need pages.
_MIN_RESERVE, _MAX_RESERVE = 256 << 10, 16 << 20
_SCAN_USERS = 1000  # user ids per read transaction of `user_ids`
_EVENT = np.dtype([("item", "<u4"), ("timestamp", "<i8")])
_HEADER, _CHUNK = struct.Struct("<QQ"), struct.Struct(">BI")
_MAGIC, _DATA_FORMAT = struct.pack("=I", 0xBEEFC0DE), struct.pack("=I", 1)  # how LMDB 0.9 marks its file
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SORTED, _BITMAP = 0, 1  # first byte of a value of `seen`
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CORRUPTED = "is corrupted ({}); restore a backup, or pass another --state"
_MISSING = "does not exist; check --state, or create it by serving a bundle"
_FOREIGN = "is an LMDB database of another program; pass another --state"
_UNAVAILABLE = {
    lmdb.ReadersFullError: "has no free reader slot; use fewer processes and threads",
    lmdb.MapResizedError: "was grown by another process; restart every process with the same --map-size-mib",
    lmdb.MemoryError: "does not fit into this process's address space; lower --map-size-mib or raise `ulimit -v`",
    **dict.fromkeys((lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, VerifyError), _CORRUPTED),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredUser:
    """One user as last committed; `event_count` is the length of the history."""

    version: int
    event_count: int
    record: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """What `StateStore.commit` stores for one user: the new record and the new events, oldest first.

    `items` (N,) are item indices below the store's item count, `timestamps` (N,) fit i64; N may be 0.
    `expected_version` is the version the record was computed from; 0 means that the user must not exist yet.
    """

    user_id: str
    expected_version: int
    record: bytes
    items: NDArray[Any]
    timestamps: NDArray[Any]


@dataclass(frozen=True)
class StoreStats:
    """`bytes_used` counts live pages, `file_bytes` the file, which keeps freed pages for reuse."""

    users: int
    bytes_used: int
    file_bytes: int
    map_size: int


@dataclass(frozen=True)
class StoreInfo:
    """What a store says of itself without its bundle."""

    bundle_id: str
    format_version: int
    users: int


class _Databases(NamedTuple):
    meta: lmdb._Database
    state: lmdb._Database
    seen: lmdb._Database
    history: lmdb._Database


def user_key(user_id: str) -> bytes:
    """UTF-8 of a user id. ValueError unless it is 1 to 400 bytes without control characters."""
    key = user_id.encode()  # UnicodeEncodeError is a ValueError
    if not 0 < len(key) <= MAX_USER_ID_BYTES or _CONTROL_CHARACTER.search(user_id):
        raise ValueError(
            f"a user id is 1 to {MAX_USER_ID_BYTES} bytes of UTF-8, no control characters: {user_id!r:.80}"
        )
    return key


def read_store_info(path: str | os.PathLike[str]) -> StoreInfo:
    """What the store at `path` is, without its bundle; works while a server uses it, and writes nothing."""
    with StateStore.open(path, readonly=True) as store:
        return StoreInfo(store.bundle_id, FORMAT_VERSION, store.stats().users)


class StateStore:
    """The state, the history and the seen items of every user. Make one with `StateStore.open`.

    Safe to call from many threads; close it after the last call has returned. Every method raises a StoreError
    where the store cannot serve, and ValueError for a user id that `user_key` rejects.
    """

    def __init__(self, env: lmdb.Environment, path: Path, *, readonly: bool) -> None:
        self.path, self.readonly = path, readonly
        self.bundle_id, self.item_count = "", 0  # read from the store, like the databases, by open
        self._env: lmdb.Environment | None = env
        self._dbs: _Databases
        self._pid = os.getpid()
        self._map_size, self._page_size = env.info()["map_size"], env.stat()["psize"]
        self._item_ids: tuple[str, ...] | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        bundle_id: str | None = None,
        item_ids: Sequence[str] | None = None,
        map_size: int = DEFAULT_MAP_SIZE,
        readonly: bool = False,
    ) -> Self:
        """Open the store in the directory `path`, and create it where there is none (not if `readonly`).

        `item_ids` are the external ids by item index. A store opens for its own bundle only; without `bundle_id` it
        opens for whichever it was written for. `map_size` in bytes bounds the file, unless the file is larger already;
        use the same in every process. Raises StoreMismatchError, StoreFullError or StoreUnavailableError.
        """
        path = Path(path)
        with _store_errors(path, map_size):
            _check_files(path, must_exist=readonly or bundle_id is None or item_ids is None)
            if not readonly:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (path / "lock.mdb").exists() and _disk_is_full(path):  # or LMDB dies of SIGBUS creating it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # A reader takes the map size from the file. Access is random, hence no readahead.
            env = lmdb.open(
                str(path), lib_version=0, map_size=0 if readonly else map_size, max_dbs=4, max_readers=_MAX_READERS,
                readonly=readonly, create=False, mode=0o700, readahead=False,
                sync=True, metasync=True, writemap=False, map_async=False,
            )  # fmt: skip
            try:
                store = cls(env, path, readonly=readonly)
                store._open_databases(env, bundle_id, item_ids)
                with env.begin() as txn:
                    store._check_bundle(txn, bundle_id, item_ids)
                if not readonly and (stale := env.reader_check()):
                    logger.info("freed %d reader slots of dead processes in %s", stale, path)
            except BaseException:
                env.close()
                raise
        return store

    def _open_databases(self, env: lmdb.Environment, bundle_id: str | None, item_ids: Sequence[str] | None) -> None:
        """Open the databases, and create them where there are none; other processes wait meanwhile."""
        with env.begin(write=not self.readonly) as txn:
            _check_length(env, self.path)
            new = not txn.stat()["entries"]
            if new and (self.readonly or bundle_id is None or item_ids is None):
                raise StoreUnavailableError(f"the state store {self.path} {_MISSING}")
            names = (name.encode() for name in _Databases._fields)
            try:  # a handle opened in a reader's transaction would end with it
                self._dbs = _Databases(
                    *(env.open_db(name, txn=None if self.readonly else txn, create=new) for name in names)
                )
            except (lmdb.NotFoundError, lmdb.IncompatibleError) as error:
                raise StoreMismatchError(f"{self.path} {_FOREIGN}") from error
            if new:
                _create(txn, self._dbs.meta, self.path, str(bundle_id), list(item_ids or ()))

    def _check_bundle(self, txn: lmdb.Transaction, bundle_id: str | None, item_ids: Sequence[str] | None) -> None:
        info = json.loads(bytes(txn.get(b"info", b"{}", db=self._dbs.meta)))
        if info.get("format_version") != FORMAT_VERSION:
            found = f"format version {info.get('format_version')}, not {FORMAT_VERSION}"
            raise StoreMismatchError(f"the state store {self.path} has {found}; use the release that wrote it")
        self.bundle_id, self.item_count = info["bundle_id"], info["item_count"]
        items = self.item_count if item_ids is None else len(item_ids)
        if bundle_id not in (None, self.bundle_id) or items != self.item_count:
            raise StoreMismatchError(
                f"the state store {self.path} was written for bundle {self.bundle_id} ({self.item_count} items), "
                f"not {bundle_id} ({items}); serve that bundle, or `dman-runtime import` into a new --state directory"
            )

    def get(self, user_id: str) -> StoredUser | None:
        """The user as last committed, or None for an unknown one."""
        return self.get_many([user_id])[0]

    def get_many(self, user_ids: Sequence[str]) -> list[StoredUser | None]:
        """`get` for each user, all from one snapshot."""
        keys = [user_key(user_id) for user_id in user_ids]
        with self._read() as txn:
            found = [self._stored(txn, key) for key in keys]
        return [stored[0] if stored else None for stored in found]

    def get_with_seen(
        self, user_id: str, *, record_bytes: int | None = None
    ) -> tuple[StoredUser, NDArray[np.uint32]] | None:
        """The user and the item indices of the whole history, in one snapshot; None if unknown.

        They are in no order, and those of the last events may come twice. With `record_bytes`, the record is only its
        first that many bytes.
        """
        key = user_key(user_id)
        with self._read() as txn:
            stored = self._stored(txn, key, record_bytes)
            if stored is None:
                return None
            user, tail = stored
            recent = np.frombuffer(tail, _EVENT)["item"]
            if user.event_count < CHUNK_EVENTS:
                return user, recent
            return user, np.concatenate([self._seen(txn, key), recent])

    def history(self, user_id: str, *, limit: int | None = None) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Item indices (N,) and timestamps (N,) of the last `limit` events, oldest first; all events where None.

        Reads only the chunks that hold them. Empty for an unknown user.
        """
        if limit is not None and limit < 0:
            raise ValueError(f"limit must be 0 or more, not {limit}")
        key = user_key(user_id)
        with self._read() as txn:
            stored = self._stored(txn, key, record_bytes=0)
            count, tail = (stored[0].event_count, stored[1]) if stored else (0, b"")
            start = 0 if limit is None else max(0, count - limit)
            chunks = range(start // CHUNK_EVENTS, count // CHUNK_EVENTS)
            events = np.frombuffer(b"".join([*(self._chunk(txn, key, chunk) for chunk in chunks), tail]), _EVENT)
        events = events[len(events) - (count - start) :]
        return events["item"].astype(np.uint32), events["timestamp"].astype(np.int64)

    def commit(self, writes: Sequence[Write]) -> bool:
        """Store all writes in one transaction and return True once it is on disk.

        False: some user's stored version is not its `expected_version`; then nothing is stored, and the caller reads
        again. Raises ValueError for bad items or timestamps or a user named twice, StoreFullError where the map or the
        disk is full; then nothing is stored either.
        """
        prepared = [(user_key(write.user_id), write, self._events(write)) for write in writes]
        if len({key for key, _, _ in prepared}) != len(prepared):
            raise ValueError("a user appears twice in one commit; merge the writes of one user")
        with self._write() as txn:
            before = [self._stored(txn, key, record_bytes=0) for key, _, _ in prepared]
            if any((old[0].version if old else 0) != w.expected_version for old, w in zip(before, writes, strict=True)):
                return False
            size = 0
            for (key, write, events), old in zip(prepared, before, strict=True):
                count, tail = (old[0].event_count, old[1]) if old else (0, b"")
                size += self._put(txn, key, write.record, count=count, tail=tail, events=events)
            # The next transaction cannot use the pages that this one replaces: leave as much again.
            reserve = min(max(self._map_size // 16, _MIN_RESERVE), _MAX_RESERVE) + size
            # No more pages than the file has can be live, which is cheaper to ask than how many are.
            if self._file_bytes() + reserve > self._map_size - reserve and (
                self._live_bytes(txn) > self._map_size - reserve
            ):
                raise lmdb.MapFullError("the reserve for deletions is reached")
        return True

    def delete(self, user_id: str) -> int | None:
        """Remove a user; return the number of events removed once that is on disk, or None for an unknown user.

        Later commits reuse the freed pages; until then the bytes remain in the file.
        """
        key = user_key(user_id)
        with self._write() as txn:
            stored = self._stored(txn, key, record_bytes=0)
            if stored is None:
                return None
            count = stored[0].event_count
            txn.delete(key, db=self._dbs.state)
            txn.delete(key, db=self._dbs.seen)
            for chunk in range(count // CHUNK_EVENTS):
                txn.delete(key + _CHUNK.pack(0, chunk), db=self._dbs.history)
        return count

    def stats(self) -> StoreStats:
        """Users and sizes, from one snapshot."""
        with self._read() as txn:
            users, used = txn.stat(self._dbs.state)["entries"], self._live_bytes(txn)
            return StoreStats(users, used, (self.path / "data.mdb").stat().st_size, self._map_size)

    def user_ids(self) -> Iterator[str]:
        """All user ids, in the order of their UTF-8. Holds no snapshot while it is suspended."""
        start = b"\0"
        while True:
            with self._read() as txn, txn.cursor(db=self._dbs.state) as cursor:
                found = cursor.iternext(values=False) if cursor.set_range(start) else iter(())
                keys = [bytes(key) for key in islice(found, _SCAN_USERS)]
            yield from (key.decode() for key in keys)
            if len(keys) < _SCAN_USERS:
                return
            start = keys[-1] + b"\0"

    @property
    def item_ids(self) -> tuple[str, ...]:
        """The external item ids by item index, as given when the store was created."""
        if self._item_ids is None:
            with self._read() as txn:
                self._item_ids = tuple(json.loads(zlib.decompress(txn.get(b"item_ids", b"", db=self._dbs.meta))))
        return self._item_ids

    def flush(self) -> None:
        """Sync the file. Commits are on disk when they return, so nothing depends on this."""
        env = self._environment()
        if not self.readonly:
            with _store_errors(self.path, self._map_size):
                env.sync(True)

    def close(self) -> None:
        """Release the files; a second call does nothing, nor does one in a forked child."""
        env, self._env = self._env, None
        if env is not None and self._pid == os.getpid():
            env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _environment(self) -> lmdb.Environment:
        if self._pid != os.getpid():
            raise StoreError(f"the state store {self.path} was opened before a fork; open it in each process")
        if self._env is None:
            raise StoreError(f"the state store {self.path} is closed; open it again")
        return self._env

    def _read(self) -> _Snapshot:
        return _Snapshot(self._environment(), self.path, self._map_size)

    @contextmanager
    def _write(self) -> Iterator[lmdb.Transaction]:
        """The one write transaction of all processes: on disk when the block ends, undone when it raises."""
        if self.readonly:
            raise StoreError(f"the state store {self.path} was opened read-only; open it for writing")
        with _store_errors(self.path, self._map_size), self._environment().begin(write=True) as txn:
            yield txn

    def _stored(
        self, txn: lmdb.Transaction, key: bytes, record_bytes: int | None = None
    ) -> tuple[StoredUser, bytes] | None:
        """The user, with the first `record_bytes` of the record or all of it, and the tail; None for an unknown one."""
        value = txn.get(key, db=self._dbs.state)
        if value is None:
            return None
        if len(value) < _HEADER.size:
            raise lmdb.CorruptedError("a state is too short")
        version, count = _HEADER.unpack_from(value)
        begin = _HEADER.size + count % CHUNK_EVENTS * _EVENT.itemsize
        if len(value) < begin:
            raise lmdb.CorruptedError("a state is too short")
        end = None if record_bytes is None else begin + record_bytes
        return StoredUser(version, count, bytes(value[begin:end])), bytes(value[_HEADER.size : begin])

    def _chunk(self, txn: lmdb.Transaction, key: bytes, chunk: int) -> bytes | memoryview:
        value = txn.get(key + _CHUNK.pack(0, chunk), b"", db=self._dbs.history)
        if len(value) != CHUNK_EVENTS * _EVENT.itemsize:
            raise lmdb.CorruptedError("a history does not have the length its state says")
        return value

    def _seen_payload(self, value: bytes | memoryview) -> NDArray[Any]:
        """View of the sorted indices, or of the bytes of the bitmap, in a value of `seen`."""
        if len(value) % 4 == 1 and value[0] == _SORTED:
            return np.frombuffer(value, "<u4", offset=1)
        if len(value) == 1 - (-self.item_count // 8) and value[0] == _BITMAP:
            return np.frombuffer(value, np.uint8, offset=1)
        raise lmdb.CorruptedError("a list of seen items is unreadable")

    def _seen(self, txn: lmdb.Transaction, key: bytes) -> NDArray[np.uint32]:
        value = txn.get(key, b"", db=self._dbs.seen)
        seen = self._seen_payload(value)
        if value[0] == _BITMAP:
            seen = np.flatnonzero(np.unpackbits(seen, count=self.item_count, bitorder="little"))
        return seen.astype(np.uint32)

    def _events(self, write: Write) -> NDArray[np.void]:
        """The new events as the history stores them; ValueError where it cannot."""
        items, timestamps = np.asarray(write.items), np.asarray(write.timestamps)
        if items.ndim != 1 or items.shape != timestamps.shape:
            raise ValueError(f"items {items.shape} and timestamps {timestamps.shape} must be two lists of one length")
        events = np.empty(len(items), _EVENT)
        if len(items):
            if items.dtype.kind not in "iu" or not np.can_cast(timestamps.dtype, np.int64):
                raise ValueError(f"items ({items.dtype}) must be integers and timestamps ({timestamps.dtype}) fit i64")
            if items.min() < 0 or items.max() >= self.item_count:
                raise ValueError(f"item indices must be 0 to {self.item_count - 1}, not {items.min()} to {items.max()}")
            events["item"], events["timestamp"] = items, timestamps
        return events

    def _put(
        self, txn: lmdb.Transaction, key: bytes, record: bytes, *, count: int, tail: bytes, events: NDArray[np.void]
    ) -> int:
        """Put one user's record and new events behind `count` old ones, the last in `tail`; return the bytes put."""
        tail, step = tail + events.tobytes(), CHUNK_EVENTS * _EVENT.itemsize
        full = len(tail) // step * step  # bytes that fill chunks
        for start in range(0, full, step):
            chunk = _CHUNK.pack(0, count // CHUNK_EVENTS + start // step)
            txn.put(key + chunk, tail[start : start + step], db=self._dbs.history)
        put = full + (self._add_seen(txn, key, np.frombuffer(tail[:full], _EVENT)["item"]) if full else 0)
        value = b"".join((_HEADER.pack(txn.id(), count + len(events)), tail[full:], record))
        txn.put(key, value, db=self._dbs.state)
        return put + len(value)

    def _add_seen(self, txn: lmdb.Transaction, key: bytes, items: NDArray[np.uint32]) -> int:
        """Add to the seen items and return the bytes put. A bitmap is updated in place and stays one."""
        before = bytes(txn.get(key, b"\0", db=self._dbs.seen))
        bitmap = np.zeros(-(-self.item_count // 8), np.uint8)
        if before[0] == _BITMAP:
            bitmap[:] = self._seen_payload(before)
        else:
            items = np.union1d(self._seen_payload(before), items)
        after = b"\0" + items.astype("<u4").tobytes()
        if before[0] == _BITMAP or len(after) > 1 + len(bitmap):
            np.bitwise_or.at(bitmap, items >> 3, (1 << (items & 7)).astype(np.uint8))
            after = b"\1" + bitmap.tobytes()
        if after == before:
            return 0
        txn.put(key, after, db=self._dbs.seen)
        return len(after)

    def _file_bytes(self) -> int:
        """Bytes of the pages ever used, as of the last commit."""
        return (self._environment().info()["last_pgno"] + 1) * self._page_size

    def _live_bytes(self, txn: lmdb.Transaction) -> int:
        stats = [txn.stat(), *(txn.stat(db) for db in self._dbs)]
        return self._page_size * sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)


class _Snapshot:
    """One read transaction. What it returns are views into the file: copy what leaves the block.

    A class, as every recommendation passes here and contextlib's generators cost more than the read itself.
    """

    __slots__ = ("_env", "_map_size", "_path", "_txn")

    def __init__(self, env: lmdb.Environment, path: Path, map_size: int) -> None:
        self._env, self._path, self._map_size = env, path, map_size

    def __enter__(self) -> lmdb.Transaction:
        try:
            self._txn = self._env.begin(buffers=True)
        except lmdb.Error as error:
            self._fail(error)
        return self._txn

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._txn.abort()
        if isinstance(error, lmdb.Error):
            self._fail(error)

    def _fail(self, error: lmdb.Error) -> NoReturn:
        with _store_errors(self._path, self._map_size):
            raise error
        raise AssertionError  # _store_errors raises another error


def _create(txn: lmdb.Transaction, meta: lmdb._Database, path: Path, bundle_id: str, item_ids: list[str]) -> None:
    info = {"format_version": FORMAT_VERSION, "bundle_id": bundle_id, "item_count": len(item_ids)}
    txn.put(b"info", json.dumps(info).encode(), db=meta)
    txn.put(b"item_ids", zlib.compress(json.dumps(item_ids).encode()), db=meta)
    for directory in (path, path.resolve().parent):  # LMDB syncs the file; its name is ours to sync
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    logger.info("created the state store %s for bundle %s with %d items", path, bundle_id, len(item_ids))


def _check_files(path: Path, *, must_exist: bool) -> None:
    """Refuse what is no store, before LMDB puts a lock file beside it."""
    data = path / "data.mdb"
    if path.exists() and not path.is_dir():
        raise StoreUnavailableError(f"{path} is a file, not the directory of a state store; pass another --state")
    if not data.exists() or not data.stat().st_size:
        if must_exist:
            raise StoreUnavailableError(f"the state store {path} {_MISSING}")
        return
    with data.open("rb") as file:
        head = file.read(64)
    magic = head.find(_MAGIC)
    if magic < 0:
        raise lmdb.InvalidError("data.mdb is not an LMDB file")
    if head[magic + 4 : magic + 8] != _DATA_FORMAT:
        raise StoreUnavailableError(f"{data} is not in the format of LMDB 0.9; convert it with mdb_dump and mdb_load")


def _check_length(env: lmdb.Environment, path: Path) -> None:
    """Refuse a truncated file: a read behind its end would kill the process by SIGBUS.

    LMDB may leave out unused pages at the end, so a short file is looked at in full: slow, and rare.
    """
    size = (path / "data.mdb").stat().st_size
    if size < (env.info()["last_pgno"] + 1) * env.stat()["psize"] and (problems := verify(str(path))):  # type: ignore[no-untyped-call]
        raise lmdb.CorruptedError(f"data.mdb is truncated: {problems[0]}")


@contextmanager
def _store_errors(path: Path, map_size: int) -> Iterator[None]:
    """Turns what LMDB and the system raise into StoreErrors."""
    try:
        yield
    except (lmdb.Error, VerifyError, OSError) as error:
        code = getattr(error, "errno", getattr(error, "code", 0)) or 0
        reason = os.strerror(code) if code > 0 else str(error)
        if isinstance(error, lmdb.MapFullError):
            full = f"is full (map size {map_size >> 20} MiB); restart with a larger --map-size-mib"
            raise StoreFullError(f"the state store {path} {full}") from error
        if code in _FULL or (code == errno.EIO and _disk_is_full(path)):
            full = f"has no disk space left ({reason}); free some or raise the limit, then retry"
            raise StoreFullError(f"the state store {path} {full}") from error
        if "already open" in reason:
            raise StoreUnavailableError(f"the state store {path} is already open in this process; share it") from error
        what = _UNAVAILABLE.get(type(error), "is unavailable ({}); check the path, its permissions and the disk")
        raise StoreUnavailableError(f"the state store {path} {what.format(reason)}") from error


def _disk_is_full(path: Path) -> bool:
    """LMDB reports a short write as an I/O error: see whether the file can grow."""
    data, probe = path / "data.mdb", bytes(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            return os.pwrite(file.fileno(), probe, data.stat().st_size if data.exists() else 0) < len(probe)
    except OSError as error:
        return error.errno in _FULL
