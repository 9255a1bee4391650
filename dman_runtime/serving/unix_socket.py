"""A Unix socket to listen on. Loads no gRPC."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dman_runtime.errors import UsageError

MAX_SOCKET_PATH = 107  # bytes that the kernel takes


class UnixSocket:
    """A Unix socket that only this user and root may use, from its first moment on."""

    def __init__(self, path: Path, bind: Callable[[str], int]) -> None:
        """`bind` listens at an address. Raises UsageError."""
        check_socket(path)
        try:
            directory = Path(tempfile.mkdtemp(prefix=".", dir=path.parent))  # nobody else may look into it
        except OSError as error:
            raise _no_socket(path, error.strerror or str(error)) from None
        try:
            bind(f"unix:{directory / 's'}")
            (directory / "s").chmod(0o600)
            self._inode = (directory / "s").stat().st_ino
            (directory / "s").rename(path)
        except (OSError, RuntimeError) as error:
            raise _no_socket(path, getattr(error, "strerror", None) or "no socket can be made there") from None
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self._path = path

    def remove(self) -> None:
        """Unless another server has put its own there."""
        with suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()


def check_socket(path: Path) -> None:
    """Raises UsageError where a server cannot have its socket. What a dead server left there is no hindrance."""
    if len(os.fsencode(path.absolute())) + 12 > MAX_SOCKET_PATH:  # it is made in a directory beside it
        raise _no_socket(path, "the path is too long")
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise _no_socket(path, "there is a file")
    except FileNotFoundError:
        return
    except OSError as error:
        raise _no_socket(path, error.strerror or str(error)) from None
    with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError, FileNotFoundError):
        probe.settimeout(1.0)
        with suppress(TimeoutError, PermissionError):
            probe.connect(str(path))
        raise _no_socket(path, "another server listens there")


def _no_socket(path: Path, reason: str) -> UsageError:
    return UsageError(f"cannot listen on {path}: {reason}", "choose another path", parameter="admin_socket")
