"""Runs a command of `dman-runtime` for as long as somebody waits for it: what the admin service of a server starts.

    python -m dman_runtime.attended

Its standard input has one line, a JSON object: `arguments` of the command, `json_log` and `verbose` for its log. When
the input ends, so does the command: whoever started it has gone, or wants no more of it. So no argument is in the list
of processes, and no job outlives its server. Its standard output is one JSON object a line:

    {"progress": [done, total]}     of what the job counts, about twice a second
    {"output": "..."}               the next piece of what the command prints
    {"failure": {"status", "cause", "remedy"}}
    {"status": 0}                   exit status, the last line of a command that did not fail
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from typing import Any, BinaryIO

from dman_runtime import cli
from dman_runtime.errors import DmanError
from dman_runtime.options import configure_logging

PROGRESS_SECONDS = 0.5
PIECE_CHARACTERS = 64 << 10
END_SECONDS = 5.0  # that a command gets to clean up
_INTERRUPTED = 130


class Frames(io.TextIOBase):
    """What the command prints, and the progress of its job, as lines for whoever waits."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._told = file, -PROGRESS_SECONDS

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for first in range(0, len(text), PIECE_CHARACTERS):
            self.say(output=text[first : first + PIECE_CHARACTERS])
        return len(text)

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self.say(progress=[done, total])

    def say(self, **frame: Any) -> None:
        self._file.write(json.dumps(frame).encode() + b"\n")
        self._file.flush()


def _end_with_input(over: threading.Event) -> None:
    """Interrupts the command when the input ends; later ends it, if it does not end itself."""
    while os.read(0, 1024):
        pass
    if over.is_set():
        return
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(END_SECONDS)
    os._exit(_INTERRUPTED)


def main() -> int:
    order, over = json.loads(sys.stdin.buffer.readline()), threading.Event()
    threading.Thread(target=_end_with_input, args=(over,), daemon=True).start()
    configure_logging(verbose=order["verbose"], json=order["json_log"])
    with os.fdopen(os.dup(1), "wb") as file:
        os.dup2(2, 1)  # what libraries print is no frame
        cli.give_way(order["arguments"])
        try:
            return _run(order["arguments"], Frames(file))
        finally:
            over.set()  # before the output ends, which tells whoever waits to end the input


def _run(argv: list[str], frames: Frames) -> int:
    try:
        with redirect_stdout(frames):
            arguments = cli.parser().parse_args(argv)
            arguments.progress = frames.progress
            status = cli.COMMANDS[arguments.command](arguments)
        frames.say(status=status)
        return status
    except DmanError as error:
        with suppress(BrokenPipeError):
            frames.say(failure={"status": error.status, "cause": error.cause, "remedy": error.remedy})
        return 2
    except (BrokenPipeError, KeyboardInterrupt):
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
