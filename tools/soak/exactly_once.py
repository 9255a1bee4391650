"""Exactly once: clients on shared users, lost replies, killed processes; then every event is counted."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import psutil

from sdk import CallError, Client
from tools.bench.report import Claim, Section
from tools.faults.honest import stored_events
from tools.faults.proxy import LossyProxy, share_of
from tools.faults.servers import FaultServer
from tools.soak.callers import ready
from tools.soak.setting import Effort, Soak

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


def kill_often(server: FaultServer, kills: int, chooser: random.Random, enough: Callable[[], bool]) -> int:
    """SIGKILLs: two of three to a worker, one to the supervisor, which is then started again, as is a server without
    one. There are at least so many, and more until it is `enough`. Returns how many."""
    done = 0
    while done < kills or not enough():
        time.sleep(chooser.uniform(0.2, 1.5))
        workers = [worker for worker in server.workers() if worker.pid != server.pid]
        if done % 3 == 2 or not server.supervised:
            server.kill()
            server.start()
            done += 1
        elif workers:
            with suppress(psutil.Error):
                chooser.choice(workers).kill()
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
        fire = write_under_fire(server, writers, soak.effort)
        wrong = wrong_histories(server.address, writers)
        users = sorted({user for writer in writers for user in writer.acknowledged})
        with soak.server("clean-replay", bundle=bundle) as clean:
            errors = state_errors(server.address, clean.address, users)
    worst = max(errors, default=float("nan"))
    return Section(
        "Exactly once",
        f"{what_was_written(writers, fire)} while two workers and their supervisor got {fire.kills} SIGKILLs. Each "
        "update was repeated with its id until it was acknowledged. Then each history was read and compared with what "
        "was acknowledged. The scores of its items were compared with those of a server that got the history in one "
        "update.",
        [
            *claims_of_writers(writers, fire, soak.effort, wrong),
            Claim(
                "worst difference from a clean replay", f"{worst:.1e}", f"<= {TOLERANCE:g}", bool(worst <= TOLERANCE)
            ),
        ],
        ("users that are wrong",) if wrong else (),
        [[text] for text in wrong[:20]],
    )


class Fire(NamedTuple):
    """What the writers had to bear."""

    kills: int
    lost: int  # replies


def write_under_fire(
    server: FaultServer, writers: list[Writer], effort: Effort, enough: Callable[[], bool] = lambda: True
) -> Fire:
    """Lets all write until there were so many kills and acknowledged updates, and it is `enough`. Then the server is up
    again."""
    over = threading.Event()
    with ExitStack() as stack:
        proxy = stack.enter_context(LossyProxy(server.address, share_of(LOST_SHARE, seed=0)))
        threads = [threading.Thread(target=writer.run, args=(proxy.address, over), daemon=True) for writer in writers]
        for thread in threads:
            thread.start()
        kills = kill_often(server, effort.kills, random.Random(0), enough)
        while sum(writer.updates for writer in writers) < effort.updates:
            if not any(thread.is_alive() for thread in threads):
                break
            time.sleep(0.1)
        over.set()
        for thread in threads:
            thread.join(20 * START_SECONDS)
        lost = proxy.lost
    if not ready(server.address, seconds=START_SECONDS):
        writers[0].failures.append("the server did not come back")
    return Fire(kills, lost)


def what_was_written(writers: Sequence[Writer], fire: Fire) -> str:
    """The beginning of a sentence."""
    updates, repeats = (sum(getattr(writer, name) for writer in writers) for name in ("updates", "repeats"))
    events = sum(len(times) for writer in writers for times in writer.acknowledged.values())
    return (
        f"{len(writers)} clients wrote {updates} updates ({events} events; {repeats} of the updates had been applied "
        f"when they were sent again) for {USERS} shared users through a proxy that lost {fire.lost} replies,"
    )


def claims_of_writers(writers: Sequence[Writer], fire: Fire, effort: Effort, wrong: Sequence[str]) -> list[Claim]:
    """`wrong`: as `wrong_histories` has them."""
    updates = sum(writer.updates for writer in writers)
    failures = [failure for writer in writers for failure in writer.failures]
    return [
        Claim.at_least("acknowledged updates", updates, effort.updates),
        Claim.at_least("SIGKILLs", fire.kills, effort.kills),
        Claim("clients that gave up", "; ".join(failures) or "none", "none", not failures),
        Claim("users with an event lost, doubled or out of order", str(len(wrong)), "none", not wrong),
    ]
