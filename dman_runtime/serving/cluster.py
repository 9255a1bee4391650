"""What a supervisor and its workers tell each other, through a pipe that never makes either of them wait."""

from __future__ import annotations

import select
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from dman_runtime.errors import DmanError, replaced_bundle
from dman_runtime.problems import ClusterStatus

MESSAGE_BYTES = 8192  # at most: the kernel takes so much in one piece, and has room for it if it has any
ERROR_CHARACTERS = 800  # of cause and of remedy; so they fit, whatever the characters


@dataclass(frozen=True)
class Assignment:
    """What a supervisor asks of a worker."""

    slot: int  # from 0 on
    bundle_id: str | None = None  # what the others serve; None: whatever is there
    metrics: Path | None = None  # directory for the metrics of all

    def check_bundle(self, path: Path, found: str) -> None:
        """Raises BundleError where the bundle at `path` is not the one that the others serve."""
        if self.bundle_id is not None and found != self.bundle_id:
            raise replaced_bundle(path, found=found, served=self.bundle_id)


@dataclass(frozen=True)
class Ready:
    bundle_id: str  # it was started with
    provider: str
    serves: str  # id of the bundle that answers


@dataclass(frozen=True)
class Beat:
    status: dict[str, Any]


class WorkerPipe:
    """A worker's end of the pipe. No method waits, so the event loop may call them. Use it from one thread.

    Attributes:
        assignment: What the supervisor asks for.
    """

    def __init__(self, connection: Connection, assignment: Assignment) -> None:
        self.assignment = assignment
        self._connection = connection

    def ready(self, bundle_id: str, provider: str, serves: str) -> None:
        """The worker serves from now on, and beats about once a second."""
        offer(self._connection, Ready(bundle_id, provider, serves))

    def beat(self, status: dict[str, Any]) -> None:
        """The worker is alive. `status` is small; the supervisor logs the last one of a worker that hangs.

        Left out where the pipe is full.
        """
        offer(self._connection, Beat(status))

    def failed(self, error: DmanError) -> None:
        """The worker ends because of this."""
        cause, remedy = error.cause[:ERROR_CHARACTERS], error.remedy[:ERROR_CHARACTERS]
        offer(self._connection, type(error)(cause, remedy, parameter=error.parameter))

    def receive(self) -> ClusterStatus | None:
        """The newest status that has come since the last call. Raises EOFError when the supervisor is gone: stop."""
        messages, ended = drain(self._connection)
        if ended and not messages:
            raise EOFError
        return messages[-1] if messages else None

    def fileno(self) -> int:
        """Readable when `receive` has something."""
        return self._connection.fileno()


def offer(connection: Connection, message: object) -> bool:
    """Sends a message if that takes no waiting. Returns whether it was sent; never raises OSError.

    A pipe that is ready for writing takes a short message whole, so nobody finds half of one.
    """
    data = ForkingPickler.dumps(message)
    if len(data) > MESSAGE_BYTES:
        return False
    try:
        poll = select.poll()  # select.select knows only the first 1,024 descriptors
        poll.register(connection.fileno(), select.POLLOUT)
        if not any(event & select.POLLOUT for _, event in poll.poll(0)):
            return False
        connection.send_bytes(data)
    except OSError:  # the other end is gone
        return False
    return True


def drain(connection: Connection) -> tuple[list[Any], bool]:
    """All messages that have come, oldest first, and whether the other end is gone."""
    messages = []
    try:
        while connection.poll():
            messages.append(connection.recv())
    except Exception:  # it ended, or within a message, or wrote what is none
        return messages, True
    return messages, False
