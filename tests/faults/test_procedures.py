"""Rebuild, activation, backup and compaction when the disk is full, when they are killed or stopped, with flipped bits,
and with a clock that jumps: the documented error, the service up, nothing acknowledged lost.
"""

from __future__ import annotations

import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT

from dman_runtime.jobs.generations import list_generations
from dman_runtime.jobs.verifying import verify_store
from dman_runtime.model.generation import Generation
from dman_runtime.store.lmdb import LmdbStore
from sdk import Client
from tools.faults.servers import FaultServer, python_environment, wait_until

from .conftest import Start
from .test_rollover import Callers

pytestmark = pytest.mark.slow

PROCEDURES = ("rebuild", "activate", "backup", "compact")
USERS, EVENTS = 150, 35
DAY = 86_400
SMALL_FILE = 8192  # bytes: what a process on a full disk can still write into a file

# Runs `dman-runtime`, which says "here" and waits a little before it calls the function that the first argument names.
PAUSING = """
import importlib, sys, time
module, _, name = sys.argv.pop(1).rpartition(".")
place = importlib.import_module(module)
original = getattr(place, name)
def pausing(*arguments, **options):
    print("here", flush=True)
    time.sleep(1)
    return original(*arguments, **options)
setattr(place, name, pausing)
from dman_runtime.cli import main
sys.exit(main())
"""
MIDDLE = {  # of each procedure
    "rebuild": "dman_runtime.jobs.rebuilding._commit",
    "activate": "dman_runtime.jobs.activating._wait_until_loaded",
    "backup": "dman_runtime.jobs.backup.verify_store",
    "compact": "dman_runtime.jobs.compacting._replace",
}
# Runs `dman-runtime` with stores whose clock is so many seconds ahead as the file says that the first argument names.
# (gRPC compares deadlines with the clock, but has its own way to it.)
SHIFTED = """
import pathlib, sys, time
from dman_runtime.store.lmdb import LmdbStore
shift, opened = pathlib.Path(sys.argv.pop(1)), LmdbStore.open
def clock(): return time.time() + float(shift.read_text())
LmdbStore.open = lambda *arguments, **options: opened(*arguments, clock=clock, **options)
from dman_runtime.cli import main
sys.exit(main())
"""


class Service:
    """A server with histories, another bundle for it, and callers who must notice nothing."""

    def __init__(self, server: FaultServer, old: Generation, new: Path, folder: Path) -> None:
        self.server, self.new, self.backups = server, new, folder
        self._old, self._items = old.bundle_id, {old.bundle_id: range(1, 61)}
        self._sent = {f"user {number}": EVENTS for number in range(USERS)}
        self._backups = 0
        choices = np.random.default_rng(0)
        with Client(server.address, timeout=30) as client:
            self._items[Generation.open(new, provider="cpu").bundle_id] = range(21, 81)
            client.update_many({user: choices.integers(21, 61, EVENTS).tolist() for user in self._sent})

    @contextmanager
    def going_on(self) -> Iterator[Callers]:
        """Callers while the block runs."""
        with Callers(self.server.address, self._items, threads=2) as callers:
            yield callers
        assert callers.failures == []
        for user, count in callers.sent.items():
            self._sent[user] = self._sent.get(user, 0) + count

    @contextmanager
    def around(self, procedure: str) -> Iterator[Callers | None]:
        """What the procedure runs in: beside a server with callers, or for a compaction, without one."""
        if procedure != "compact":
            with self.going_on() as callers:
                yield callers
        else:
            self.server.stop()
            yield None
            self.server.start()

    def check(self) -> None:
        """The service is up, and the store is sound and has every acknowledged event once."""
        with self.going_on() as callers:
            assert callers.answered()
        assert verify_store(self.server.state).problems == ()
        with LmdbStore.open(self.server.state, readonly=True) as store:
            assert {user: len(store.history(user)[0]) for user in store.scan()} == self._sent

    def arguments(self, procedure: str, bundle: Path | None = None) -> list[str]:
        """The command; each backup goes to another place."""
        self._backups += procedure == "backup"
        of_bundle = ["--bundle", str(bundle or self.new), "--provider", "cpu"]
        options = {
            "rebuild": [*of_bundle, "--max-share", "1"],
            "activate": of_bundle,
            "backup": ["--output", str(self.backup)],
            "compact": [],
        }
        return [procedure, "--state", str(self.server.state), *options[procedure]]

    @property
    def backup(self) -> Path:
        """Of the last command."""
        return self.backups / f"backup {self._backups}"

    def check_done(self, procedure: str) -> None:
        """What a procedure that has succeeded leaves."""
        with LmdbStore.open(self.server.state, readonly=True) as store:
            old, new = list_generations(store).generations[:2] if procedure == "rebuild" else (None, None)
            active = store.rollout().active
        if new is not None and old is not None:
            assert new.records >= USERS
        if procedure == "activate":
            assert active != self._old and active in self._items
        if procedure == "backup":
            assert verify_store(self.backup).sound
        assert not list(self.server.state.glob(".*.partial"))


def begin(
    arguments: Sequence[str], *, program: Sequence[str] = ("-m", "dman_runtime"), room: int | None = None
) -> subprocess.Popen[str]:
    """Starts a command; with `room`, no file that it writes can have more bytes."""
    job = subprocess.Popen(
        [sys.executable, *program, *arguments], cwd=ROOT, env=python_environment(ROOT), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if room is not None:  # it is still starting
        resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    return job


def end(job: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status, and what was printed last."""
    output, errors = job.communicate(timeout=120)
    assert "Traceback" not in errors
    return job.returncode, (errors or output).strip().splitlines()[-1] if job.returncode else output


def begin_in_the_middle(arguments: Sequence[str], place: str | None = None) -> subprocess.Popen[str]:
    """Starts a command, and returns when it is about to call the function at a place in the middle of its work."""
    job = begin(arguments, program=("-c", PAUSING, place or MIDDLE[arguments[0]]))
    assert job.stdout is not None and job.stdout.readline() == "here\n", job.communicate()[1]
    return job


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_bits_of_a_user(data: Path) -> None:
    """In the head of a user, wherever the file has it."""
    content, key = bytearray(data.read_bytes()), b"user 7\0\0\0\0\0"
    places = [place.end() for place in re.finditer(re.escape(key), bytes(content))]
    assert places
    for place in places:
        content[place + 9] ^= 1
    data.write_bytes(content)


@pytest.fixture
def service(start: Start, exact_bundle: Path, exact: Generation, renamed_bundle: Path, tmp_path: Path) -> Service:
    return Service(start(bundle=exact_bundle), exact, renamed_bundle, tmp_path)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_full_disk(service: Service, procedure: str) -> None:
    with service.around(procedure):
        status, error = end(begin(service.arguments(procedure), room=SMALL_FILE))
    assert (status, "has no disk space left" in error) == (2, True), error
    service.check()
    with service.around(procedure):
        assert end(begin(service.arguments(procedure)))[0] == 0
    service.check_done(procedure)
    service.check()


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_killed(service: Service, procedure: str) -> None:
    with service.around(procedure):
        job = begin_in_the_middle(service.arguments(procedure))
        job.kill()
        job.communicate(timeout=30)
    service.check()
    with service.around(procedure):
        assert end(begin(service.arguments(procedure)))[0] == 0
    service.check_done(procedure)
    service.check()


@pytest.mark.parametrize("procedure", [one for one in PROCEDURES if one != "compact"])
def test_stopped_for_a_while(service: Service, procedure: str) -> None:
    with service.going_on() as callers:
        job = begin_in_the_middle(service.arguments(procedure))
        job.send_signal(signal.SIGSTOP)
        before = callers.sent.total()
        assert wait_until(lambda: callers.sent.total() > before + 5, seconds=30)  # updates go on
        job.send_signal(signal.SIGCONT)
        assert end(job)[0] == 0
    service.check_done(procedure)
    service.check()


def test_server_that_starts_while_a_compaction_is_stopped_waits_for_it(service: Service) -> None:
    service.server.stop()
    job = begin_in_the_middle(service.arguments("compact"))
    job.send_signal(signal.SIGSTOP)
    starting = threading.Thread(target=service.server.start)
    starting.start()
    starting.join(timeout=8)
    assert starting.is_alive()
    job.send_signal(signal.SIGCONT)
    assert end(job)[0] == 0
    starting.join(timeout=60)
    service.check_done("compact")
    service.check()


def test_server_that_is_stopped_keeps_a_bundle_from_being_activated(
    start: Start, exact_bundle: Path, exact: Generation, renamed_bundle: Path, tmp_path: Path
) -> None:
    server = start("--workers 2", bundle=exact_bundle)
    service = Service(server, exact, renamed_bundle, tmp_path)
    place = "dman_runtime.jobs.activating._prepared"  # then, the server is asked to load it
    job = begin_in_the_middle([*service.arguments("activate"), "--wait", "2"], place)
    stopped = server.workers()[0]
    stopped.suspend()
    status, error = end(job)
    with suppress(psutil.Error):  # it may have been replaced: it gave no sign of life
        stopped.resume()
    assert (status, "have not loaded bundle" in error and "nothing was changed" in error) == (2, True), error
    with Client(server.address, timeout=30) as client:
        assert client.recommend("user 1").bundle_id == exact.bundle_id
        assert wait_until(lambda: client.status().workers_ready == 2, seconds=60)
    assert end(begin(service.arguments("activate")))[0] == 0
    service.check_done("activate")
    service.check()


# -- flipped bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("procedure", ["rebuild", "activate"])
def test_flipped_bits_in_a_bundle(service: Service, procedure: str, tmp_path: Path) -> None:
    for file in ("segment_encoder.onnx", "item_embeddings.npy", "items.jsonl"):
        bad = Path(shutil.copytree(service.new, tmp_path / file / "bundle"))
        flip_bit(bad / file)
        with service.around(procedure):
            status, error = end(begin(service.arguments(procedure, bad)))
        assert (status, "does not match its checksum" in error) == (2, True), error
    with LmdbStore.open(service.server.state, readonly=True) as store:
        assert len(store.generations()) == 1 and not store.rollout().active
    service.check()


def test_flipped_bits_in_a_backup(service: Service, tmp_path: Path) -> None:
    with service.around("backup"):
        assert end(begin(service.arguments("backup")))[0] == 0
    flip_bits_of_a_user(service.backup / "data.mdb")
    status, report = end(begin(["verify", "--state", str(service.backup)]))
    assert status == 1, report
    status, error = end(begin(["restore", "--backup", str(service.backup), "--state", str(tmp_path / "restored")]))
    assert (status, "damaged" in error or "corrupted" in error) == (2, True), error
    assert not (tmp_path / "restored").exists()
    service.check()


def test_flipped_bits_in_a_store_that_is_compacted(service: Service) -> None:
    data = service.server.state / "data.mdb"
    with service.around("compact"):
        whole = data.read_bytes()
        flip_bits_of_a_user(data)
        damaged = data.read_bytes()
        status, error = end(begin(service.arguments("compact")))
        assert (status, "damaged" in error or "corrupted" in error) == (2, True), error
        assert data.read_bytes() == damaged and not list(service.server.state.glob(".*.partial"))
        data.write_bytes(whole)
    service.check()


# -- the clock ---------------------------------------------------------------------------------------------------------


class ShiftedServer(FaultServer):
    """Its clock is so many seconds ahead as a file says."""

    shift: Path

    def command(self) -> list[str]:
        command = super().command()
        at = command.index("-m")
        return [*command[:at], "-c", SHIFTED, str(self.shift), *command[at + 2 :]]


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_clock_that_jumps_by_a_day(
    procedure: str, exact_bundle: Path, exact: Generation, renamed_bundle: Path, tmp_path: Path
) -> None:
    """Forward in the middle of everything, and then back by two days."""
    server = ShiftedServer(exact_bundle, tmp_path / "state")
    server.shift = tmp_path / "shift"
    server.shift.write_text("0")
    with server:
        service = Service(server, exact, renamed_bundle, tmp_path)
        with Client(server.address, timeout=30) as client:
            assert client.update("anna", [21], request_id="first").applied == 1
        service._sent["anna"] = 1
        for jump in (DAY, -DAY):
            with service.around(procedure):
                _set(server.shift, jump)
                time.sleep(0.2)  # for the callers
                assert end(begin(service.arguments(procedure), program=("-c", SHIFTED, str(server.shift))))[0] == 0
            with Client(server.address, timeout=30) as client:
                assert client.update("anna", [21], request_id="first").duplicate
            service.check_done(procedure)
            service.check()


def _set(shift: Path, seconds: int) -> None:
    """At once, as others read it."""
    new: Callable[[str], Path] = shift.with_suffix
    new(".new").write_text(str(seconds))
    new(".new").replace(shift)
