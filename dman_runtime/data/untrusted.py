"""Files that anybody may have written: opened once, read once up to a limit, and parsed as data only."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dman_runtime.errors import InputError

MAX_DEPTH = 32  # of lists and objects in a JSON file; what writes our files stays below ten
CACHE_LINE = 64  # bytes; matrix products are up to a quarter slower on rows that begin within one
# Non-blocking, because opening a named pipe waits for its writer; it changes nothing for regular files.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class FileIdentity(NamedTuple):
    """What tells a file from another one under its name, and from itself after a change."""

    device: int
    inode: int
    size: int  # bytes
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def system_reason(error: OSError) -> str:
    """The system's words for it, without any path."""
    return os.strerror(error.errno) if error.errno else "unknown error"


def open_regular(file: str | Path, *, directory: int | None = None) -> BinaryIO:
    """A regular file, open for reading. It never waits: not for the writer of a pipe, nor for a device.

    `directory` is the descriptor of the directory that `file` is in. Raises OSError, and ValueError for what is no
    regular file.
    """
    descriptor = os.open(file, _FLAGS, dir_fd=directory)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise ValueError("not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def opened_file(file: Path, *, limit: int, directory: int | None = None) -> Iterator[tuple[BinaryIO, FileIdentity]]:
    """A regular file, open for reading. Symbolic links are followed: data stores use them.

    Args:
        limit: Largest size in bytes.
        directory: Descriptor of the directory that the file is in, whatever has its name now.

    Raises:
        FileNotFoundError
        InputError: it is no regular file, is larger, or cannot be read. Its text names the file.
    """
    try:
        with _opened(file, directory) as stream:
            identity = FileIdentity.of(os.fstat(stream.fileno()))
            if identity.size > limit:
                raise InputError(f"{file} has {identity.size} bytes, more than {limit}")
            yield stream, identity
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read: {system_reason(error)}") from None
    except MemoryError:
        raise InputError(f"{file} cannot be read: not enough memory") from None


def _opened(file: Path, directory: int | None) -> BinaryIO:
    try:
        return open_regular(file if directory is None else file.name, directory=directory)
    except ValueError as error:
        raise InputError(f"{file} cannot be read: it is {error}") from None


def read_file(file: Path, *, limit: int) -> bytes:
    """The content of a file. Argument and errors as for `opened_file`."""
    with opened_file(file, limit=limit) as (stream, identity):
        return read_stream(file, stream, identity.size)


def read_stream(file: Path, stream: BinaryIO, size: int) -> bytes:
    """`size` bytes of an opened file. Raises InputError if it has become shorter."""
    content = stream.read(size)
    if len(content) != size:
        raise InputError(f"{file} was cut while it was read")
    return content


def read_aligned(file: Path, stream: BinaryIO, size: int) -> memoryview:
    """As `read_stream`, into private memory that begins at a cache line. Read-only, and never held twice."""
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    content = memory[start : start + size]
    if stream.readinto(content.data) != size:  # type: ignore[attr-defined]
        raise InputError(f"{file} was cut while it was read")
    content.flags.writeable = False
    return content.data


def read_mapped(file: Path, stream: BinaryIO, size: int) -> memoryview:
    """As `read_stream`, mapped: processes share the memory. The file must not change as long as the result is used.

    What is overwritten is read, and a process that reads what was cut off ends with SIGBUS.
    """
    try:
        return memoryview(mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ))
    except (OSError, ValueError):
        raise InputError(f"{file} cannot be mapped into memory") from None


def sha256_of(content: bytes | memoryview) -> str:
    """64 hex digits."""
    return hashlib.sha256(content).hexdigest()


# -- JSON ------------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
_PLAIN = json.JSONDecoder()


def parse_json(content: bytes) -> Any:
    """A JSON value in UTF-8, as the standard has it: no NaN, no name twice, no number that is out of range.

    Raises ValueError, whose text is one line, also for text that is nested deeper than MAX_DEPTH.
    """
    value = _decoded(content, _STRICT)
    _check_json(value)
    return value


def parse_json_line(content: bytes) -> Any:
    """A JSON value as Python reads it, of which the last of equal names counts: for many values, checked one by one.

    Raises ValueError, whose text is one line.
    """
    return _decoded(content, _PLAIN)


def _decoded(content: bytes, decoder: json.JSONDecoder) -> Any:
    try:
        return decoder.decode(content.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from None
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None


def _check_json(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str):
                if not is_text(one):
                    raise ValueError("a text is not valid Unicode")
            elif isinstance(one, float) and not math.isfinite(one):
                raise ValueError("a number is out of range")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        level = inner


def is_text(value: object) -> bool:
    """Whether it is a string that can be written: JSON can name half of a character pair."""
    if not isinstance(value, str):
        return False
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def is_whole_number(value: object, low: int, high: int) -> bool:
    """Whether it is an int (not a bool) from `low` to `high`."""
    return type(value) is int and low <= value <= high


def shown(value: object) -> str:
    """A value from a file for a message: one short line, whatever it is."""
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    text = str(value) if not isinstance(value, str) else value[:60]
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) < 60 else f"{text[:57]}..."
