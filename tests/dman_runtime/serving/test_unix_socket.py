"""The Unix socket of the admin service: for one user only, and never taken from a server that lives."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dman_runtime.errors import UsageError
from dman_runtime.serving.unix_socket import UnixSocket, check_socket

Bind = Callable[[str], int]


@pytest.fixture
def bind() -> Iterator[Bind]:
    """Listens at addresses until the end of the test."""
    opened: list[socket.socket] = []

    def listen(address: str) -> int:
        opened.append(socket.socket(socket.AF_UNIX))
        opened[-1].bind(address.removeprefix("unix:"))
        opened[-1].listen()
        return 1

    yield listen
    for one in opened:
        one.close()


def test_socket_is_for_its_user_only_and_nothing_else_is_left(tmp_path: Path, bind: Bind) -> None:
    path = tmp_path / "admin.sock"

    def watched(address: str) -> int:
        made = Path(address.removeprefix("unix:"))
        assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700  # before the socket has its own mode
        return bind(address)

    ours = UnixSocket(path, watched)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(tmp_path.iterdir()) == [path]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    ours.remove()
    assert list(tmp_path.iterdir()) == []
    ours.remove()


def test_socket_of_a_dead_server_is_replaced(tmp_path: Path, bind: Bind) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    UnixSocket(path, bind)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_socket_of_another_server_is_neither_taken_nor_removed(tmp_path: Path, bind: Bind) -> None:
    path = tmp_path / "admin.sock"
    ours = UnixSocket(path, bind)
    with pytest.raises(UsageError, match=r"another server listens there; choose another path") as caught:
        UnixSocket(path, bind)
    assert caught.value.parameter == "admin_socket"
    path.unlink()
    UnixSocket(path, bind)
    ours.remove()
    assert path.is_socket()


def test_file_and_missing_directory_and_long_path_are_refused(tmp_path: Path, bind: Bind) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="there is a file"):
        check_socket(tmp_path / "file")
    with pytest.raises(UsageError, match="No such file or directory"):
        UnixSocket(tmp_path / "missing" / "admin.sock", bind)
    with pytest.raises(UsageError, match="the path is too long"):
        check_socket(tmp_path / ("x" * 100))
    assert (tmp_path / "file").read_text() == "precious"


def test_failure_of_the_server_to_bind_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(address: str) -> int:
        raise RuntimeError("gRPC")

    with pytest.raises(UsageError, match="no socket can be made there"):
        UnixSocket(tmp_path / "admin.sock", fail)
    assert list(tmp_path.iterdir()) == []
