"""What LMDB, the codecs and the system raise, as StoreErrors."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lmdb
from lmdb.verify import VerifyError

from dman_runtime.errors import StoreDamagedError, StoreFullError, StoreUnavailableError
from dman_runtime.store.history import DamagedError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CORRUPTED = ("is corrupted ({})", "restore a backup; `dman-runtime verify` lists what is damaged", "state")
_DAMAGED = (  # what LMDB says of pages that are not what it wrote; the last two come from a tree that has no end
    DamagedError, VerifyError, lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError,
    lmdb.CursorFullError, lmdb.BadTxnError,
)  # fmt: skip
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
    **dict.fromkeys(_DAMAGED, _CORRUPTED),
}
_TO_READERS: Mapping[type[Exception], tuple[str, str, str]] = {  # they take as much of the map as the file has
    **_UNAVAILABLE,
    lmdb.MapResizedError: ("was grown by another process while it was read", "try again", ""),
    lmdb.MemoryError: ("does not fit into this process's address space", "raise `ulimit -v`", ""),
}
_OTHER = ("is unavailable ({})", "check the path, its permissions and the disk", "state")


@contextmanager
def store_errors(path: Path, map_size: int, *, readonly: bool) -> Iterator[None]:
    """Turns what LMDB, the codec and the system raise into StoreErrors. `map_size` is that of a writer."""
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
        if code in _FULL or (code == errno.EIO and disk_is_full(path)):
            remedy = "free some or raise the limit, then retry"
            raise StoreFullError(f"{store} has no disk space left ({reason})", remedy) from error
        if "already open" in reason:
            raise StoreUnavailableError(f"{store} is already open in this process", "share it") from error
        cause, remedy, parameter = (_TO_READERS if readonly else _UNAVAILABLE).get(type(error), _OTHER)
        kind = StoreDamagedError if isinstance(error, _DAMAGED) else StoreUnavailableError
        raise kind(f"{store} {cause.format(reason)}", remedy, parameter=parameter) from error


def disk_is_full(path: Path) -> bool:
    """LMDB reports a short write as an I/O error: see whether the file can grow."""
    data, probe = path / "data.mdb", bytes(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            return os.pwrite(file.fileno(), probe, data.stat().st_size if data.exists() else 0) < len(probe)
    except OSError as error:
        return error.errno in _FULL
