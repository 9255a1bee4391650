"""The rows of the table of faults, in rotation: attacks while honest callers work, and the tests of `tests/faults`."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Self
from xml.etree import ElementTree

import psutil

from protos.dman.v1 import dman_pb2 as pb
from tools.bench.report import Claim, Section
from tools.faults import http2
from tools.faults.attacks import (
    Attack,
    Caller,
    Calls,
    KilledReader,
    OpenRequests,
    SlowReaders,
    StoppedWorker,
    WriteLock,
    abandoned_batches,
    busy_user,
    large_messages,
    large_reply_request,
    malformed_messages,
    update,
    what_ifs,
)
from tools.faults.background import Background
from tools.faults.servers import ROOT, FaultServer, python_environment
from tools.soak.callers import HonestCallers
from tools.soak.numbers import HEADS, RowResult, by_phase
from tools.soak.setting import Soak

MANY = 1_000_000  # calls: the end of the block ends an attack
TEST_SECONDS = 900


class Together:
    """Several attacks at once. The last one that began ends first."""

    def __init__(self, *attacks: Attack) -> None:
        self._attacks, self._stack = attacks, ExitStack()

    def __enter__(self) -> Self:
        for attack in self._attacks:
            self._stack.enter_context(attack)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def did(self) -> str:
        return " and ".join(attack.did() for attack in self._attacks)


class KilledWorkers(Background):
    """Kills one worker after the other, with a pause between."""

    def __init__(self, server: FaultServer, *, pause: float = 3.0) -> None:
        super().__init__()
        self._server, self._pause, self._killed = server, pause, 0

    def did(self) -> str:
        return f"{self._killed} workers killed"

    def run(self) -> None:
        chooser = random.Random(0)
        while not self.over.is_set():
            with suppress(psutil.Error, IndexError):
                chooser.choice(self._server.workers()).kill()
                self._killed += 1
            self.over.wait(self._pause)


def blocked_updates(server: FaultServer) -> Attack:
    waiting = Calls(
        server.address,
        lambda caller, number: caller.stub.Update(update(f"blocked {number}", ["1"]), timeout=30),
        what="updates waiting",
        threads=40,
    )
    return Together(waiting, WriteLock(server.data_file(), seconds=600))


def conflicting_batches(server: FaultServer, items: Sequence[str]) -> Attack:
    """Large batches with a user whom somebody else updates all the time, perhaps through another worker."""
    updates = [update(f"batch {n}", [items[(n + i) % len(items)] for i in range(100)]) for n in range(100)]
    batch = pb.BatchUpdateRequest(updates=[*updates, update("busy", items[:5])])

    def send(caller: Caller, _: int) -> None:
        caller.stub.BatchUpdate(batch, timeout=60)

    batches = Calls(server.address, send, what="batches of 101 users", threads=2)
    return Together(batches, *(busy_user(server.address, "busy", items) for _ in range(2)))


def repeatedly_abandoned_batches(server: FaultServer, items: Sequence[str]) -> Calls:
    attack = abandoned_batches(server.address, items)
    attack.most = MANY
    return attack


@dataclass(frozen=True)
class Row:
    row: str
    attack: str
    start: Callable[[FaultServer, Sequence[str]], Attack]
    bounded: bool = False  # the p99 of others must stay below a multiple of its quiet value
    workers: int = 1
    updates: bool = True  # honest callers send updates, too


ROWS = (
    Row("1", "requests without a body", lambda server, _: OpenRequests(server.address), bounded=True),
    Row("1", "open reflections", lambda s, _: OpenRequests(s.address, path=http2.REFLECTION), bounded=True),
    Row("1", "blocked commits", lambda server, _: blocked_updates(server), bounded=True, updates=False),
    Row("3", "large what-ifs", lambda s, items: what_ifs(s.address, items, calls=MANY, seconds=10), bounded=True),
    Row("4", "abandoned batches", repeatedly_abandoned_batches, bounded=True),
    Row("5", "conflicting batches", conflicting_batches, bounded=True, workers=2),
    Row("6", "killed workers", lambda server, _: KilledWorkers(server), bounded=True, workers=2),
    Row("6", "a hung worker", lambda s, _: StoppedWorker(s.workers()[0].pid), bounded=True, workers=2),
    Row("8", "a killed reader", lambda server, _: KilledReader(server.data_file())),
    Row("9", "malformed messages", lambda server, _: malformed_messages(server.address, calls=MANY)),
    Row("10", "messages of 15 MiB", lambda server, _: large_messages(server.address, calls=8)),
    Row("10", "slow readers", lambda server, _: SlowReaders(server.address, large_reply_request(server.address))),
)


def one_turn(soak: Soak, row: Row, result: RowResult, turn: int) -> None:
    """Quiet, attack, and what comes after, on a fresh server."""
    effort, items = soak.effort, soak.items()
    state = f"{row.row}-{row.attack.replace(' ', '-')}-{turn}"
    with soak.server(state, f"--workers {row.workers}") as server:
        callers = HonestCallers(server.address, items, updates=row.updates)
        with callers:
            time.sleep(1)  # what is new is slow
            times = [time.monotonic()]
            time.sleep(effort.quiet_seconds)
            before = server.resident_bytes()
            times.append(time.monotonic())
            with row.start(server, items) as attack:
                time.sleep(effort.attack_seconds)
                times.append(time.monotonic())
            times.append(time.monotonic())
            time.sleep(effort.after_seconds)
            times.append(time.monotonic())
            memory = (before, server.resident_bytes())
        quiet, began, ended, gone, over = times
        phases = {"quiet": (quiet, began), "during": (began, ended), "after": (gone, over)}
        result.add(by_phase(callers.samples, phases), memory, server.log_bytes(), attack.did())


def run_tests(soak: Soak, results: dict[str, Counter[str]], turn: int) -> None:
    """The tests of all rows, in a process of their own; what became of each is counted in `results`."""
    report = soak.scratch / f"tests-{turn}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/faults", f"--junitxml={report}"]
    with (soak.scratch / f"tests-{turn}.log").open("wb") as log:
        environment = python_environment(ROOT)
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False, timeout=TEST_SECONDS)
    for case in ElementTree.parse(report).iter("testcase"):
        found = [case.find(kind) for kind in ("failure", "error")]
        name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name')}"
        reasons = [str(one.get("message")).splitlines()[0] for one in found if one is not None]
        failed = bool(reasons)
        if failed:
            print(f"{name} failed: {reasons[0]}", flush=True)
        results.setdefault(name, Counter())["failed" if failed else "passed"] += 1


def rotation(soak: Soak) -> list[Section]:
    """All rows, again and again until the minutes are over; each at least once."""
    results = [RowResult(row.row, row.attack, row.bounded) for row in ROWS]
    tests: dict[str, Counter[str]] = {}
    deadline, turn = time.monotonic() + 60 * soak.effort.minutes, 0
    while turn == 0 or time.monotonic() < deadline:
        for row, result in zip(ROWS, results, strict=True):
            if turn == 0 or time.monotonic() < deadline:
                print(f"turn {turn + 1}: row {row.row}, {row.attack} ...", flush=True)
                one_turn(soak, row, result, turn)
        print(f"turn {turn + 1}: the tests of all rows ...", flush=True)
        run_tests(soak, tests, turn)
        turn += 1
    return [_attacks_section(results, turn), _tests_section(tests)]


def _attacks_section(results: Sequence[RowResult], turns: int) -> Section:
    return Section(
        "Attacks while honest callers work",
        f"{turns} turns. Each turn starts a server, lets four honest callers recommend, update and check health one "
        "call after the other, attacks the server, and watches it afterwards. The callers use the SDK with five "
        "retries, in a process of their own. Times are of calls that succeeded. Rows 5 and 6 have two workers, the "
        "others one.",
        [claim for result in results for claim in result.claims()],
        HEADS,
        [line for result in results for line in result.rows()],
    )


def _tests_section(tests: dict[str, Counter[str]]) -> Section:
    failed = sum(counts["failed"] for counts in tests.values())
    ran = sum(counts.total() for counts in tests.values())
    return Section(
        "The rows as tests",
        "`tests/faults`, run once a turn.",
        [Claim("tests of tests/faults that failed", f"{failed} of {ran}", "none", bool(ran) and not failed)],
        ("test", "passed", "failed"),
        [[name, str(counts["passed"]), str(counts["failed"])] for name, counts in sorted(tests.items())],
    )
