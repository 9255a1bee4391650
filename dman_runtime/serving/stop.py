"""Being asked to stop."""

from __future__ import annotations

import select
import signal
import socket
from contextlib import suppress
from typing import Self


class StopRequest:
    """Asked for by SIGTERM, SIGINT or `set`. Use as a context manager, in the main thread.

    A threading.Event misses a signal that arrives just as the main thread begins to wait: handlers run after the wait.
    The wakeup descriptor gets its byte at once, in whichever thread and state Python is.
    """

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        """Signals that come later find a process that is ending anyway, and no descriptor to write to."""
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()

    def set(self) -> None:
        with suppress(OSError):  # stopped already
            self._writer.send(b"\0")

    def wait(self, timeout: float | None = None) -> bool:
        """Whether stopping was asked for, after at most `timeout` seconds. Nothing is read, so it stays so."""
        return bool(select.select([self._reader], [], [], timeout)[0])
