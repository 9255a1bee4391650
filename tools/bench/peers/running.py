"""Servers with the same model: ours and the peers', started here and stopped by their process group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tools.bench.peers.environments import UnavailableError
from tools.bench.peers.hosted import SETTINGS, Settings
from tools.bench.peers.wire import DmanWire, Wire, WrongReplyError
from tools.bench.servers import ROOT, dman_server

START_SECONDS, STOP_SECONDS = 120.0, 15.0
QUIET = {  # one thread for each matrix product: what runs in parallel are processes
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Server:
    """A server that answers."""

    name: str  # with the number of its workers
    wire: Wire
    address: str
    pid: int
    ours: bool = False
    _frozen: list[int] = field(default_factory=list)

    def processes(self) -> list[psutil.Process]:
        """It and all that it started."""
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.pid)
            return [first, *first.children(recursive=True)]
        return []

    def cpu_seconds(self) -> float:
        """That all its processes have used."""
        used = 0.0
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def freeze(self) -> None:
        """Stops a peer for a time, as some poll for requests. Ours waits, and its supervisor would miss workers."""
        if not self.ours:
            self._frozen = [process.pid for process in self.processes()]
            _signal(self._frozen, signal.SIGSTOP)

    def thaw(self) -> None:
        _signal(self._frozen, signal.SIGCONT)
        self._frozen = []


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def our_server(bundle: Path, state: Path, workers: int) -> Iterator[Server]:
    """`dman-runtime serve`."""
    with dman_server(bundle, state, "--provider", "cpu", "--workers", str(workers)) as running:
        yield Server(_named("dman-runtime", workers), DmanWire(), running.address, running.pid, ours=True)


@contextmanager
def peer_server(
    name: str, command: Sequence[str], wire: Wire, settings: Settings, scratch: Path, probe: tuple[str, str]
) -> Iterator[Server]:
    """The model in a peer's framework, once it has taken the `probe`, a user and an item. Raises UnavailableError."""
    named = _named(name, settings.workers)
    files = scratch / named.replace(" ", "-").replace(",", "")
    Path(settings.store).mkdir(parents=True, exist_ok=True)
    settings.write(files.with_suffix(".json"))
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | QUIET | {SETTINGS: str(files.with_suffix(".json")), "PYTHONPATH": python_path}
    with files.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=scratch,
            env=environment,
            start_new_session=True,
        )
    server = Server(named, wire, f"127.0.0.1:{settings.port}", process.pid)
    try:
        _wait_for(process, server, probe, files.with_suffix(".log"))
        yield server
    finally:
        server.thaw()
        _stop(process)


def _named(name: str, workers: int) -> str:
    return f"{name}, {workers} worker{'s' * (workers > 1)}"


def _wait_for(process: subprocess.Popen[bytes], server: Server, probe: tuple[str, str], log: Path) -> None:
    user_id, item_id = probe
    deadline, problem, wire = time.monotonic() + START_SECONDS, "it does not answer", server.wire
    while time.monotonic() < deadline:
        if process.poll() is not None:
            problem = f"it ended with status {process.returncode}"
            break
        try:
            wire.ranked(wire.send(server.address, wire.recommend(user_id, 1)))
            wire.event_count(wire.send(server.address, wire.update(user_id, item_id)))
            return
        except (OSError, WrongReplyError, ValueError, KeyError) as error:
            problem = str(error)
        time.sleep(0.2)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise UnavailableError(f"{problem}; its last line: {(lines or ['none'])[-1].strip()[:300]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the whole group to end, and ends what does not."""
    group = [one for one in psutil.process_iter() if _group_of(one.pid) == process.pid]
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        _, group = psutil.wait_procs(group, timeout=STOP_SECONDS)
        if not group and process.poll() is not None:
            return


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def free_port() -> int:
    """A free port of the loopback interface, the one after it free as well."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port
