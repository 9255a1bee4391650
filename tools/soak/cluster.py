"""Exactly once over a cluster: two servers on one store of the Redis protocol, whose primaries die, as they do."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

from dman_runtime.store.place import Durability
from tools.bench.report import Claim, Section
from tools.faults.background import Background
from tools.faults.honest import stored_events
from tools.faults.redis_servers import Cluster
from tools.faults.servers import FaultServer
from tools.soak.callers import ready
from tools.soak.exactly_once import CLIENTS, START_SECONDS, USERS, Writer, wrong_histories
from tools.soak.setting import Soak

PRIMARIES = 3


class PrimaryKills(Background):
    """Kills a primary, waits until a replica serves in its place, and starts it again, until there were enough."""

    def __init__(self, cluster: Cluster, kills: int) -> None:
        super().__init__()
        self._cluster, self._left, self.done = cluster, kills, 0
        self.seconds: list[float] = []  # until a replica served

    def run(self) -> None:
        chooser = random.Random(1)
        while self._left and not self.over.wait(chooser.uniform(1.0, 3.0)):
            began, node = time.monotonic(), chooser.choice(self._cluster.primaries())
            node.kill()
            while len(self._cluster.primaries()) < PRIMARIES and not self.over.wait(0.05):
                pass
            self.seconds.append(time.monotonic() - began)
            self._cluster.wait_until_whole()
            node.start()
            self._cluster.wait_until_whole()  # it has the data by now, and can take over again
            self._left, self.done = self._left - 1, self.done + 1


def lost_events(address: str, writers: Sequence[Writer]) -> int:
    """Events that were acknowledged and are not stored."""
    wanted = {(user, at) for writer in writers for user, times in writer.acknowledged.items() for at in times}
    stored = {(user, at) for user in {user for user, _ in wanted} for _, at in stored_events(address, user)}
    return len(wanted - stored)


def over_a_cluster(soak: Soak, durability: Durability) -> Section:
    """Acknowledged updates while primaries and servers are killed."""
    writers = [Writer(number, soak.items()) for number in range(CLIENTS)]
    scratch = soak.scratch / f"cluster-{durability}"
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(scratch / "nodes", primaries=PRIMARIES, replicas=1))
        servers = [
            stack.enter_context(
                FaultServer(
                    soak.bundle,
                    f"redis://{cluster.address}/soak",
                    f"--durability {durability}",
                    log=scratch / f"server-{number}.log",
                )
            )
            for number in range(2)
        ]
        kills = stack.enter_context(PrimaryKills(cluster, soak.effort.primary_kills))
        over = threading.Event()
        threads = [
            threading.Thread(target=writer.run, args=(servers[writer.number % 2].address, over), daemon=True)
            for writer in writers
        ]
        for thread in threads:
            thread.start()
        server_kills = _kill_in_turn(servers, soak.effort.server_kills)
        deadline = time.monotonic() + 10 * START_SECONDS
        while not _enough(writers, kills, soak) and time.monotonic() < deadline:
            time.sleep(0.1)
        over.set()
        for thread in threads:
            thread.join(20 * START_SECONDS)
        for server in servers:
            if not ready(server.address, seconds=START_SECONDS):
                writers[0].failures.append("a server did not come back")
        wrong, lost = wrong_histories(servers[0].address, writers), lost_events(servers[1].address, writers)
    return _section(soak, durability, writers, kills, server_kills, wrong, lost)


def _kill_in_turn(servers: Sequence[FaultServer], kills: int) -> int:
    chooser = random.Random(0)
    for number in range(kills):
        time.sleep(chooser.uniform(0.5, 2.0))
        server = servers[number % len(servers)]
        server.kill()
        server.start()
    return kills


def _enough(writers: Sequence[Writer], kills: PrimaryKills, soak: Soak) -> bool:
    updates = sum(writer.updates for writer in writers)
    gave_up = all(writer.failures for writer in writers)
    return gave_up or (updates >= soak.effort.updates and kills.done >= soak.effort.primary_kills)


def _section(
    soak: Soak,
    durability: Durability,
    writers: Sequence[Writer],
    kills: PrimaryKills,
    server_kills: int,
    wrong: Sequence[str],
    lost: int,
) -> Section:
    updates, repeats = (sum(getattr(writer, name) for writer in writers) for name in ("updates", "repeats"))
    failures = [failure for writer in writers for failure in writer.failures]
    slowest = max(kills.seconds, default=float("nan"))
    effort, bounded = soak.effort, durability != "local"
    right = not wrong if bounded else None
    return Section(
        f"Exactly once over a cluster, durability {durability}",
        f"{len(writers)} clients wrote {updates} updates for {USERS} shared users ({repeats} had been applied when "
        f"they were sent again), half of them to each of two servers over a cluster of {PRIMARIES} primaries with a "
        f"replica each. A primary got a SIGKILL {kills.done} times, and was started again once its replica served "
        f"({slowest:.1f} s at most); a server got one {server_kills} times. Each update was repeated with its id until "
        "it was acknowledged. Then each history was read and compared with what was acknowledged."
        + ("" if bounded else " A primary acknowledges alone here, so what its replica had not got yet is lost."),
        [
            Claim.at_least("acknowledged updates", updates, effort.updates),
            Claim.at_least("SIGKILLs of primaries", kills.done, effort.primary_kills),
            Claim.at_least("SIGKILLs of servers", server_kills, effort.server_kills),
            Claim("clients that gave up", "; ".join(failures) or "none", "none", not failures),
            Claim("acknowledged events that are lost", str(lost), "none", not lost if bounded else None),
            Claim("users with an event lost, doubled or out of order", str(len(wrong)), "none", right),
        ],
        ("users that are wrong",) if wrong else (),
        [[text] for text in wrong[:20]],
    )
