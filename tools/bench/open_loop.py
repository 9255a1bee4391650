"""Open loops: calls at a rate of their own, up to three times what the server sustains."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import psutil

from dman_runtime.errors import UsageError
from tools.bench.arrivals import (
    CONNECTIONS,
    DEADLINE_EXCEEDED,
    OK,
    RESOURCE_EXHAUSTED,
    Arrivals,
    Client,
    Outcome,
    arrivals_client,
)
from tools.bench.blocks import Spread
from tools.bench.h2load import ECHO, Call
from tools.bench.messages import check, recommend_calls, update_calls
from tools.bench.report import Claim, Panels, Section
from tools.bench.servers import Running
from tools.bench.setting import Bench

UPDATES = 0.2  # share of the calls
CALLS = 1000  # different ones, over and over
SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2)  # of what the server sustains
DEADLINE, PATIENCE = 1.0, 30.0  # seconds: of a call, and where none is to be given up
OVERLOAD, MIN_GOODPUT, MAX_GROWTH, BACK_SECONDS = 3.0, 0.9, 1.05, 2.0
QUIET = 0.1  # share of the sustainable rate, before and after an overload
NORMAL = 2.0  # times the p99 before
WINDOW = 0.5  # seconds
SLICE_SECONDS = 5.0  # of an overload, for a row of the table
CLIENT = """\
A process of its own sends {updates:.0%} updates of one event, with request ids, and recommendations (k=10), of \
{users} users at random, over {connections} connections, at a fixed rate. A call's time counts from when it was due. \
The client gives it up after {deadline:g} s, as gRPC's do. The sustained rate is what {connections} clients of the \
same process get who wait for each answer: the median of {rounds} runs, {sustained:,.0f} calls/s."""


def mix(bench: Bench, users: Sequence[str]) -> list[Call]:
    """Calls in a random order."""
    chooser = random.Random(0)
    updates = round(UPDATES * CALLS)
    chosen = chooser.choices(users, k=CALLS)
    calls = [*update_calls(bench, chosen[:updates]), *recommend_calls(chosen[updates:])]
    chooser.shuffle(calls)
    return calls


def sustained(client: Client, server: Running, calls: Sequence[Call], bench: Bench) -> Spread:
    """Calls a second that a closed loop gets. Raises UsageError where one fails."""
    found = []
    for _ in range(bench.sizes.rate_rounds):
        one = client.run(Arrivals(server.address, calls, bench.sizes.rate_seconds, None, deadline=PATIENCE))
        if not one.good.all():
            raise UsageError(f"calls failed while measuring: {statuses(one)}")
        found.append(len(one.due) / one.seconds)
    return Spread(tuple(found))


def statuses(one: Outcome) -> dict[int, int]:
    """Calls by gRPC status."""
    return dict(zip(*(found.tolist() for found in np.unique(one.status, return_counts=True)), strict=True))


def percentile(milliseconds: np.ndarray, percent: float) -> float:
    return float(np.percentile(milliseconds, percent)) if len(milliseconds) else float("nan")


# -- latency by rate -------------------------------------------------------------------------------------------------


def latency_by_rate(bench: Bench) -> Section:
    """Latency from when a call was due, by the rate at which calls arrive, beside the echo at the same rate."""
    sizes, found = bench.sizes, dict[tuple[float, str], list[Outcome]]()
    echo = bench.echo_for(CONNECTIONS)
    with bench.server("open") as server, arrivals_client() as client:
        users = bench.ordinary_users(server.address)
        calls = mix(bench, users)
        check(server, calls[:50])
        peak = sustained(client, server, calls, bench)
        for _ in range(sizes.rate_rounds):
            for share in SHARES:
                rate = share * peak.median
                for name, address, sent in (("server", server.address, calls), ("echo", echo, [ECHO])):
                    arrivals = Arrivals(address, sent, sizes.rate_seconds, rate, deadline=DEADLINE)
                    found.setdefault((share, name), []).append(client.run(arrivals))
    rows, panels = [], Panels({"p99 ms by calls/s": {"server": {}, "echo": {}}})
    for (share, name), outcomes in found.items():
        rate, p99 = share * peak.median, _median([percentile(one.milliseconds[one.good], 99) for one in outcomes])
        p50 = _median([percentile(one.milliseconds[one.good], 50) for one in outcomes])
        panels["p99 ms by calls/s"][name][round(rate)] = p99
        lost = sum(int((~one.good).sum()) for one in outcomes)
        cpu = _median([one.cpu_seconds / one.seconds for one in outcomes])
        late = _median([one.late_ms for one in outcomes])
        numbers = (f"{rate:,.0f}", str(sum(len(one.due) for one in outcomes)), str(lost), f"{p50:.3f}", f"{p99:.3f}")
        rows.append([f"{share:.0%}", name, *numbers, f"{late:.3f}", f"{cpu:.2f}"])
    return Section(
        "Open loop",
        f"One worker. {_client_text(bench, peak)} The last columns are about the client itself: how late it was in "
        "sending what was due (p99; where the server is behind, HTTP/2's limit of streams is a part of that), and how "
        "much of a core it took.",
        [
            Claim(
                "mix, p99 from when a call was due, at 80 % of the sustained rate, by the echo's at that rate",
                f"{_ratio(found[0.8, 'server'], found[0.8, 'echo'])} times",
            )
        ],
        (
            "of the sustained rate",
            "who",
            "calls/s",
            "calls",
            "failed",
            "p50 ms",
            "p99 ms",
            "client late ms",
            "its cores",
        ),
        rows,
        {f"{share:g} {name}": [statuses(one) for one in outcomes] for (share, name), outcomes in found.items()},
        panels=panels,
    )


def _client_text(bench: Bench, peak: Spread) -> str:
    return CLIENT.format(
        updates=UPDATES,
        users=bench.sizes.users,
        connections=CONNECTIONS,
        deadline=DEADLINE,
        rounds=len(peak.values),
        sustained=peak.median,
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _ratio(outcomes: Sequence[Outcome], echoes: Sequence[Outcome]) -> Spread:
    p99 = [[percentile(one.milliseconds[one.good], 99) for one in ones] for ones in (outcomes, echoes)]
    return Spread(tuple(one / other for one, other in zip(*p99, strict=True)))


# -- overload --------------------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """A part of an overload."""

    began: float
    good: int
    refused: int
    expired: int
    other: int
    p50: float
    p99: float
    megabytes: float  # RSS of the server, at the end


@dataclass
class Watched:
    """RSS of a server over time: (time.time(), bytes)."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    def at(self, moment: float) -> int:
        return min(self.samples, key=lambda sample: abs(sample[0] - moment))[1]


@contextmanager
def watched_memory(server: Running) -> Iterator[Watched]:
    found, over, process = Watched(), threading.Event(), psutil.Process(server.pid)

    def watch() -> None:
        while not over.wait(0.25):
            found.samples.append((time.time(), process.memory_info().rss))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def overload(bench: Bench) -> Section:
    """Three times the sustained rate: what is answered in time, memory, and how soon all is normal again."""
    sizes = bench.sizes
    with bench.server("overload") as server, arrivals_client() as client:
        users = bench.ordinary_users(server.address)
        calls = mix(bench, users)
        check(server, calls[:50])
        peak = sustained(client, server, calls, bench)

        def at(share: float, seconds: float) -> Outcome:
            return client.run(Arrivals(server.address, calls, seconds, share * peak.median, deadline=DEADLINE))

        with watched_memory(server) as memory:
            at(OVERLOAD, min(5.0, sizes.overload_seconds))  # buffers that a first overload needs
            time.sleep(min(5.0, sizes.overload_seconds))
            before = at(QUIET, 10 * WINDOW)
            hard = at(OVERLOAD, sizes.overload_seconds)
            after = at(QUIET, max(10 * WINDOW, 2 * BACK_SECONDS))
            check(server, calls[:50])
    slices = list(_slices(hard, memory, sizes.overload_seconds))
    goodput = float(hard.good.sum()) / sizes.overload_seconds
    p99 = percentile(hard.milliseconds[hard.accepted], 99)
    limit = NORMAL * percentile(before.milliseconds[before.good], 99)
    normal, growth = _normal_again(after, limit), _growth(slices)
    return Section(
        "Overload",
        f"{_client_text(bench, peak)} Then {OVERLOAD:g} times that rate for {sizes.overload_seconds:g} s, after a "
        f"first overload of some seconds and a pause; before it and at once after it, {QUIET:.0%} of that rate. A call "
        f"is good if it was answered with OK within {DEADLINE:g} s from when it was due. Accepted is what was sent and "
        "not refused, answered in time or not. All is normal again when in every following half of a second no call "
        f"fails and p99 is at most {NORMAL:g} times that before ({limit / NORMAL:.2f} ms). The client kept "
        f"{hard.cpu_seconds / hard.seconds:.2f} of the cores busy, which it shares with the server.",
        [
            Claim(
                f"goodput at {OVERLOAD:g} times the sustained rate, by that rate",
                f"{goodput / peak.median:.2f} ({goodput:,.0f} by {peak.median:,.0f} calls/s)",
                f">= {MIN_GOODPUT}",
                goodput >= MIN_GOODPUT * peak.median,
            ),
            Claim(
                "p99 of what is accepted then",
                f"{p99:.0f} ms",
                f"< {1000 * DEADLINE:.0f} ms",
                bool(p99 < 1000 * DEADLINE),
            ),
            Claim(
                "resident memory at the end of the overload by that after its first seconds",
                f"{growth:.3f} times",
                f"<= {MAX_GROWTH}",
                growth <= MAX_GROWTH,
            ),
            Claim(
                "normal again after the overload",
                f"{normal:g} s" if np.isfinite(normal) else "not seen",
                f"<= {BACK_SECONDS:g} s",
                bool(normal <= BACK_SECONDS),
            ),
        ],
        ("s", "good/s", "refused/s", "given up/s", "other/s", "p50 ms", "p99 ms", "RSS MB"),
        [_row(one) for one in slices],
        {"slices": [one._asdict() for one in slices], "statuses": statuses(hard)},
    )


def _slices(found: Outcome, memory: Watched, seconds: float) -> Iterator[Slice]:
    begin = 0.0
    while begin < seconds:
        end = min(begin + SLICE_SECONDS, seconds)
        inside = (found.due >= begin) & (found.due < end)
        status, times = found.status[inside], found.milliseconds[inside & found.good]
        good, refused = int((status == OK).sum()), int((status == RESOURCE_EXHAUSTED).sum())
        expired = int((status == DEADLINE_EXCEEDED).sum())
        yield Slice(
            begin,
            round(good / (end - begin)),
            round(refused / (end - begin)),
            round(expired / (end - begin)),
            round((len(status) - good - refused - expired) / (end - begin)),
            percentile(times, 50),
            percentile(times, 99),
            memory.at(found.began + end) / 1e6,
        )
        begin = end


def _growth(slices: Sequence[Slice]) -> float:
    return slices[-1].megabytes / slices[0].megabytes


def _normal_again(after: Outcome, limit: float) -> float:
    """Seconds until the first window from which on all are normal; infinite where the last one is not."""
    windows = np.arange(0.0, float(after.due.max()), WINDOW)
    bad = [
        begin + WINDOW
        for begin in windows
        for inside in [(after.due >= begin) & (after.due < begin + WINDOW)]
        if not after.good[inside].all() or percentile(after.milliseconds[inside], 99) > limit
    ]
    last = max(bad, default=0.0)
    return last if last < windows[-1] else float("inf")


def _row(one: Slice) -> list[str]:
    numbers = [f"{value:,}" for value in (one.good, one.refused, one.expired, one.other)]
    return [f"{one.began:g}", *numbers, f"{one.p50:.1f}", f"{one.p99:.1f}", f"{one.megabytes:.0f}"]
