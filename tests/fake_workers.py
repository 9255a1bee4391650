"""Worker functions for tests of the supervisor: real processes, without a model. They import little, to start fast.

`config.bundle` is a file with the bundle id. `config.state` is a directory of orders: what is in the file named after a
slot is what the worker in it does, next time it looks.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

from dman_runtime.errors import UsageError
from dman_runtime.problems import ClusterStatus
from dman_runtime.serving.cluster import WorkerPipe
from dman_runtime.serving.config import ServeConfig


def order(config: ServeConfig, slot: int) -> str:
    try:
        return (config.state / str(slot)).read_text()
    except FileNotFoundError:
        return "serve"


def give(config: ServeConfig, slot: int, text: str) -> None:
    path = config.state / f"{slot}.new"
    path.write_text(text)
    path.replace(config.state / str(slot))


def note(config: ServeConfig, name: str, text: str) -> None:
    with (config.state / name).open("a") as file:
        file.write(text + "\n")


def notes(config: ServeConfig, name: str) -> list[str]:
    path: Path = config.state / name
    return path.read_text().splitlines() if path.exists() else []


def obedient(config: ServeConfig, pipe: WorkerPipe) -> int:
    """Serves, that is beats, and notes each beat and each status that it is told, until its order is another one."""
    slot = pipe.assignment.slot
    note(config, f"starts-{slot}", f"{os.getpid()} {time.monotonic()}")
    _before_ready(order(config, slot))
    bundle_id = config.bundle.read_text()
    if order(config, slot) == "impostor":
        bundle_id = "two"
    else:
        pipe.assignment.check_bundle(config.bundle, bundle_id)
    pipe.ready(bundle_id, "fake", bundle_id)
    while True:
        what = order(config, slot)
        if what == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if what != "silent":
            pipe.beat({"order": what})
            note(config, f"beats-{slot}", str(time.monotonic()))
        try:
            status = pipe.receive()
        except EOFError:
            return 0
        if isinstance(status, ClusterStatus):
            note(config, f"told-{slot}", repr(status))
        time.sleep(0.02)


def _before_ready(what: str) -> None:
    if what == "never ready":
        time.sleep(600)
    if what == "refuse":
        raise UsageError("the fake has no wish to start", "ask it kindly", parameter="state")
    if what == "raise":
        raise ValueError("two\nlines")
    if what == "log":
        logging.getLogger("fake").warning("a line", extra={"event": "faked"})
    if what == "exit":
        os._exit(3)
    if what.isdigit():
        os.kill(os.getpid(), int(what))


def stubborn(config: ServeConfig, pipe: WorkerPipe) -> int:
    """Does not stop when asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return obedient(config, pipe)
