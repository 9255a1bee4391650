"""A command of `dman-runtime` as a process of its own, which ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from dman_runtime.errors import JobError

END_SECONDS = 6.0  # a little more than the process gives itself


class Job:
    """One run of `dman_runtime.attended`. Belongs to one event loop."""

    def __init__(self, arguments: Sequence[str], *, threads: Executor, json_log: bool = False) -> None:
        """Starts the command. `threads` wait for the process. Raises JobError.

        With subprocess and not with the event loop: that would fork a process whose threads are in gRPC.
        """
        self._threads = threads
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DMAN_")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the same code as here, wherever that is
        order = {
            "arguments": list(arguments),
            "json_log": json_log,
            "verbose": logging.getLogger().isEnabledFor(logging.DEBUG),
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dman_runtime.attended"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:  # no process or descriptor is left
            raise JobError(f"no process can be started: {error.strerror}", "try again later") from None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone already, and the frames say so
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def frames(self) -> AsyncIterator[dict[str, Any]]:
        """What the process says, until it ends."""
        assert self._process.stdout is not None
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(self._threads, self._process.stdout.readline):
            with suppress(ValueError):  # it was killed in the middle of a line
                yield json.loads(line)

    async def end(self) -> str:
        """Ends the process if it still runs, and returns how it ended, in words. Goes on if it is cancelled itself."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        await asyncio.get_running_loop().run_in_executor(self._threads, self._end)
        return self._ended()

    def _end(self) -> None:
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ended(self) -> str:
        status = self._process.wait()
        if status >= 0:
            return f"exit status {status}"
        names = {number.value: number.name for number in signal.Signals}
        return f"killed by {names.get(-status, f'signal {-status}')}"
