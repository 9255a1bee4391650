"""A server to attack: a real `dman-runtime serve` of some checkout, started here and stopped by its process id."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Self

import psutil

from dman_runtime.errors import UsageError
from tools.faults.background import Background

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, STOP_SECONDS = 120.0, 30.0


def importable(root: Path) -> dict[str, str]:
    """The environment of a process that imports from the checkout `root` first, then from where this one does."""
    given = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{given}" if given else str(root)}


def python_environment(root: Path) -> dict[str, str]:
    """The checkout `root` is importable, and small matrices do not pay for threads."""
    return importable(root) | {"OMP_NUM_THREADS": "1"}


@lru_cache
def known_options(root: Path) -> frozenset[str]:
    """The options of `dman-runtime serve` in a checkout."""
    command = [sys.executable, "-m", "dman_runtime", "serve", "--help"]
    shown = subprocess.check_output(command, cwd=root, env=python_environment(root), text=True, timeout=60)
    return frozenset(re.findall(r"--[a-z-]+", shown))


class FaultServer:
    """A server that can be stopped, killed and started again on the same port and state. Use as a context manager.

    `state` is a directory, or the address of servers, and then `log` says where its messages go. `options` are pairs or
    single flags, each as one string, such as "--workers 2". An option in `if_known` is left out where the checkout has
    none of that name.
    """

    def __init__(
        self,
        bundle: Path,
        state: Path | str,
        *options: str,
        log: Path | None = None,
        root: Path = ROOT,
        if_known: tuple[str, ...] = (),
        open_files: int | None = None,
    ) -> None:
        known = known_options(root) if if_known else frozenset()
        self._options = [*options, *(option for option in if_known if option.split()[0] in known)]
        self.bundle, self.root = bundle.resolve(), root
        self._state, self._log = state if isinstance(state, str) else state.resolve(), log
        self._open_files = open_files
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers():
            with suppress(psutil.Error):
                worker.resume()  # one that was stopped by SIGSTOP would not end
        self.stop()

    @property
    def state(self) -> Path:
        """The directory of its state, if that is in one."""
        return Path(self._state)

    @property
    def log(self) -> Path:
        """What it says on stderr, over all its starts."""
        return self._log or self.state.with_name(f"{self.state.name}.server.log")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def command(self) -> list[str]:
        arguments = ["--bundle", str(self.bundle), "--state", str(self._state), "--port", str(self.port)]
        words = [word for option in self._options for word in shlex.split(option)]
        command = [sys.executable, "-m", "dman_runtime", "serve", "--provider", "cpu", *arguments, *words]
        if self._open_files is None:
            return command
        return ["sh", "-c", f'ulimit -n {self._open_files} && exec "$@"', "sh", *command]

    def start(self) -> None:
        """Starts it, on the port of the last start. Raises UsageError with its last line when it does not serve."""
        with self.log.open("ab") as errors:
            self._process = subprocess.Popen(
                self.command(),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=self.root,
                env=python_environment(self.root),
            )
        assert self._process.stdout is not None
        hanging = threading.Timer(START_SECONDS, self._process.kill)
        hanging.start()
        line = self._process.stdout.readline().strip()
        hanging.cancel()
        if " on " not in line:
            self._process.kill()
            self._end()
            raise UsageError(f"the server did not start: {(self.log_lines() or ['no message'])[-1]}")
        self.port = int(line.split(" on ")[1].split(" ")[0].rpartition(":")[2])

    def stop(self) -> int | None:
        """SIGTERM, and waits. Returns the exit status; None where it was not running."""
        return self._stopped_by(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, to the process that was started; workers of a supervisor then end by themselves."""
        workers = self.workers()
        self._stopped_by(signal.SIGKILL)
        psutil.wait_procs(workers, timeout=STOP_SECONDS)

    @property
    def supervised(self) -> bool:
        """Whether its workers are processes of their own, which are started again."""
        return any(option.startswith("--workers ") and option != "--workers 1" for option in self._options)

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def workers(self) -> list[psutil.Process]:
        """The processes that serve: the workers of a supervisor, or the process itself."""
        if not self.running():
            return []
        try:
            process = psutil.Process(self.pid)
            spawned = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
        except psutil.Error:  # one has just ended
            return []
        return spawned or [process]

    def resident_bytes(self) -> int:
        """Of the largest worker."""
        sizes = []
        for worker in self.workers():
            with suppress(psutil.Error):
                sizes.append(int(worker.memory_info().rss))
        return max(sizes, default=0)

    def log_bytes(self) -> int:
        return self.log.stat().st_size

    def log_lines(self) -> list[str]:
        return self.log.read_text(errors="replace").strip().splitlines()

    def data_file(self) -> Path:
        """The one file with the data of the state store."""
        (found,) = self.state.rglob("data.mdb")
        return found

    def _stopped_by(self, number: signal.Signals) -> int | None:
        if self._process is None:
            return None
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._end()

    def _end(self) -> int | None:
        assert self._process is not None and self._process.stdout is not None
        status = self._process.wait(STOP_SECONDS)
        self._process.stdout.close()
        self._process = None
        return status


class PeakMemory(Background):
    """The largest resident memory of a worker while a block runs, in bytes, looked at every few milliseconds."""

    def __init__(self, server: FaultServer, *, seconds: float = 0.02) -> None:
        super().__init__()
        self._server, self._seconds = server, seconds
        self.before = self.peak = 0

    def __enter__(self) -> Self:
        self.before = self.peak = self._server.resident_bytes()
        return super().__enter__()

    @property
    def growth(self) -> int:
        return self.peak - self.before

    def run(self) -> None:
        while not self.over.wait(self._seconds):
            self.peak = max(self.peak, self._server.resident_bytes())


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def wait_until(true: Callable[[], bool], *, seconds: float, pause: float = 0.1) -> bool:
    """Whether `true` becomes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(pause)
    return found
