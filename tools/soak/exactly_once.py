"""Exactly once: clients on shared users, lost replies, killed processes; then every event is counted."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import numpy as np
import psutil

from sdk import CallError, Client
from tools.bench.report import Claim, Section
from tools.faults.honest import stored_events
from tools.faults.proxy import LossyProxy, share_of
from tools.faults.servers import FaultServer
from tools.soak.callers import ready
from tools.soak.setting import Soak

CLIENTS, USERS, LOST_SHARE = 8, 200, 0.05
PAUSE_SECONDS = 0.05  # between the updates of one client, so that they last as long as the kills
START_SECONDS = 60.0
TOLERANCE = 1e-3  # of scores, relative to the largest; states are float32
CLIENT_TIMES = 10_000_000  # the times of client n begin at n times this


@dataclass
class Writer:
    """A client that numbers its events by their times, and repeats each update until it is acknowledged."""

    number: int
    items: list[str]
    acknowledged: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # times by user
    updates: int = 0
    repeats: int = 0  # updates that had been applied when they were acknowledged
    failures: list[str] = field(default_factory=list)

    def run(self, address: str, over: threading.Event) -> None:
        chooser = random.Random(self.number)
        next_time = self.number * CLIENT_TIMES
        try:
            with Client(address, timeout=5, retries=3) as client:
                while not over.is_set():
                    user, size = f"shared {chooser.randrange(USERS)}", chooser.randint(1, 2)
                    times = list(range(next_time, next_time + size))
                    self._send(client, user, times)
                    self.acknowledged[user] += times
                    self.updates += 1
                    next_time += size
                    time.sleep(PAUSE_SECONDS)
        except Exception as error:
            self.failures.append(repr(error))

    def item_of(self, event_time: int) -> str:
        return self.items[event_time * 7 % len(self.items)]

    def _send(self, client: Client, user: str, times: list[int]) -> None:
        deadline = time.monotonic() + 10 * START_SECONDS
        while True:
            try:
                result = client.update(
                    user,
                    [self.item_of(one) for one in times],
                    timestamps=times,
                    request_id=f"{self.number} {times[0]}",
                )
            except CallError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                self.repeats += result.duplicate
                return


def kill_often(server: FaultServer, kills: int, chooser: random.Random) -> int:
    """SIGKILLs: two of three to a worker, one to the supervisor, which is then started again. Returns how many."""
    done = 0
    while done < kills:
        time.sleep(chooser.uniform(0.2, 1.5))
        if done % 3 == 2:
            server.kill()
            server.start()
            done += 1
        else:
            with suppress(psutil.Error, IndexError):
                chooser.choice(server.workers()).kill()
                done += 1
    return done


def wrong_histories(address: str, writers: list[Writer]) -> list[str]:
    """Users whose stored events are not what was acknowledged: each once, each client's in its order."""
    wrong = []
    for user in sorted({user for writer in writers for user in writer.acknowledged}):
        stored = stored_events(address, user)
        for writer in writers:
            own = [(item, at) for item, at in stored if at // CLIENT_TIMES == writer.number]
            if own != [(writer.item_of(at), at) for at in writer.acknowledged.get(user, [])]:
                wrong.append(f"{user}, client {writer.number}")
        if len(stored) != sum(len(writer.acknowledged.get(user, [])) for writer in writers):
            wrong.append(f"{user}: {len(stored)} events")
    return wrong


def state_errors(address: str, clean: str, users: list[str]) -> list[float]:
    """For each user the largest difference of scores to a server that gets the same history in one update."""
    errors = []
    with Client(address, timeout=60) as served, Client(clean, timeout=60) as replayed:
        for user in users:
            events = stored_events(address, user)
            replayed.update(user, [item for item, _ in events], timestamps=[at for _, at in events])
            found, expected = (
                {item.item_id: item.score for item in client.recommend(user, k=1000, include_seen=True)}
                for client in (served, replayed)
            )
            if found.keys() != expected.keys():
                errors.append(float("inf"))
                continue
            scores = np.array([[found[item], expected[item]] for item in expected])
            errors.append(float(np.abs(scores[:, 0] - scores[:, 1]).max() / np.abs(scores).max()))
    return errors


def exactly_once(soak: Soak) -> Section:
    """Acknowledged updates under lost replies and kills, against a clean replay."""
    bundle, items = soak.exact_bundle(), soak.items()
    writers = [Writer(number, items) for number in range(CLIENTS)]
    with soak.server("exactly-once", "--workers 2", bundle=bundle) as server:
        kills, lost = _write_under_fire(soak, server, writers)
        if not ready(server.address, seconds=START_SECONDS):
            writers[0].failures.append("the server did not come back")
        wrong = wrong_histories(server.address, writers)
        users = sorted({user for writer in writers for user in writer.acknowledged})
        with soak.server("clean-replay", bundle=bundle) as clean:
            errors = state_errors(server.address, clean.address, users)
    return _section(soak, writers, kills=kills, lost=lost, wrong=wrong, errors=errors)


def _write_under_fire(soak: Soak, server: FaultServer, writers: list[Writer]) -> tuple[int, int]:
    """Until both numbers are reached. Returns how many kills there were, and how many replies were lost."""
    over = threading.Event()
    with ExitStack() as stack:
        proxy = stack.enter_context(LossyProxy(server.address, share_of(LOST_SHARE, seed=0)))
        threads = [threading.Thread(target=writer.run, args=(proxy.address, over), daemon=True) for writer in writers]
        for thread in threads:
            thread.start()
        kills = kill_often(server, soak.effort.kills, random.Random(0))
        while sum(writer.updates for writer in writers) < soak.effort.updates:
            if not any(thread.is_alive() for thread in threads):
                break
            time.sleep(0.1)
        over.set()
        for thread in threads:
            thread.join(20 * START_SECONDS)
        return kills, proxy.lost


def _section(
    soak: Soak, writers: list[Writer], *, kills: int, lost: int, wrong: list[str], errors: list[float]
) -> Section:
    updates = sum(writer.updates for writer in writers)
    events = sum(len(times) for writer in writers for times in writer.acknowledged.values())
    repeats = sum(writer.repeats for writer in writers)
    failures = [failure for writer in writers for failure in writer.failures]
    worst, effort = max(errors, default=float("nan")), soak.effort
    return Section(
        "Exactly once",
        f"{CLIENTS} clients wrote {updates} updates ({events} events) for {USERS} shared users through a proxy that "
        f"lost {lost} replies, while two workers and their supervisor got {kills} SIGKILLs. Each update was repeated "
        f"with its id until it was acknowledged; {repeats} had been applied before. Then each history was read and "
        "compared with what was acknowledged. The scores of its items were compared with those of a server that got "
        "the history in one update.",
        [
            Claim("acknowledged updates", str(updates), f">= {effort.updates}", updates >= effort.updates),
            Claim("SIGKILLs", str(kills), f">= {effort.kills}", kills >= effort.kills),
            Claim("clients that gave up", "; ".join(failures) or "none", "none", not failures),
            Claim("users with an event lost, doubled or out of order", str(len(wrong)), "none", not wrong),
            Claim(
                "worst difference from a clean replay", f"{worst:.1e}", f"<= {TOLERANCE:g}", bool(worst <= TOLERANCE)
            ),
        ],
        ("users that are wrong",) if wrong else (),
        [[text] for text in wrong[:20]],
    )
