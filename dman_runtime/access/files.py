"""Small files that people edit while the server runs: tokens, certificates, keys. Read with care, again on change."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from dman_runtime.data.untrusted import open_regular

MAX_FILE_BYTES = 1 << 20
_SETTLED_NS = 2_000_000_000  # a younger file may change again and keep its time: clocks of file systems are coarse

Signature = tuple[object, ...]


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of at most 1 MiB. Never waits for a pipe or a device.

    Raises OSError or ValueError; both say in a few words what is wrong, without the path.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except IsADirectoryError:
        raise ValueError("not a regular file") from None
    if len(content) > MAX_FILE_BYTES:
        raise ValueError("larger than 1 MiB")
    return content


def reason(error: OSError | ValueError) -> str:
    """What `read_file` found, in a few words."""
    return (error.strerror or type(error).__name__).lower() if isinstance(error, OSError) else str(error)


def signature(paths: Iterable[Path]) -> Signature:
    """Differs from an earlier one if a file was changed, replaced or removed. Costs one `stat` per file.

    A file that changed within the last two seconds has a new signature at each call.
    """
    return tuple(_one(path) for path in paths)


def _one(path: Path) -> object:
    try:
        found = path.stat()
    except OSError as error:
        return error.errno
    identity = (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev)
    now = time.time_ns()
    return identity if now - found.st_ctime_ns > _SETTLED_NS else (*identity, now)
