"""Memory and logs at the limits: a million malformed messages, and the worst load that is allowed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from protos.dman.v1 import dman_pb2 as pb
from tools.bench.report import Claim, Section
from tools.faults import bundles
from tools.faults.attacks import Calls, SlowReaders, large_messages, large_reply_request, malformed_messages
from tools.faults.honest import failures, health, recommend
from tools.faults.servers import PeakMemory
from tools.soak.setting import Soak

MAX_GROWTH, MAX_LOG_BYTES = 0.05, 1 << 20
MAX_RESIDENT = 600e6  # bytes
WARM_UP_SHARE = 0.05
LARGE_REPLY_ITEMS = 1000  # so many items make a reply of 13 MiB possible


def malformed(soak: Soak) -> Section:
    """Malformed messages: memory, log, and what callers get."""
    rows = []
    with soak.server("malformed") as server:
        warm = _send_malformed(server.address, max(1000, round(WARM_UP_SHARE * soak.effort.malformed)))
        statuses, before, log = warm.statuses, server.resident_bytes(), server.log_bytes()
        sizes = [before]
        for part in range(1, 11):
            statuses += _send_malformed(server.address, soak.effort.malformed // 10).statuses
            sizes.append(server.resident_bytes())
            rows.append([str(part * soak.effort.malformed // 10), f"{sizes[-1] / 1e6:.1f}"])
        logged, broken = server.log_bytes() - log, failures(server.address, recommend, health, rounds=3)
    growth = max(sizes) / before - 1
    others = {name: count for name, count in statuses.items() if name != "INVALID_ARGUMENT"}
    return Section(
        "Malformed messages",
        f"{soak.effort.malformed} messages whose bytes do not parse, by eight callers, after a warm-up.",
        [
            Claim("largest growth of resident memory", f"{growth:.1%}", f"<= {MAX_GROWTH:.0%}", growth <= MAX_GROWTH),
            Claim("bytes of log", str(logged), f"< {MAX_LOG_BYTES}", logged < MAX_LOG_BYTES),
            Claim("answers other than INVALID_ARGUMENT", str(others or "none"), "none", not others),
            Claim("calls that failed afterwards", "; ".join(broken) or "none", "none", not broken),
        ],
        ("messages", "resident MB"),
        [["after the warm-up", f"{before / 1e6:.1f}"], *rows],
    )


def _send_malformed(address: str, calls: int) -> Calls:
    with malformed_messages(address, calls=calls) as attack:
        while not attack.finished():
            time.sleep(0.1)
    return attack


def legal_batches(address: str, *, calls: int = 8, size: int = 15 << 20) -> Calls:
    """Batches of so many bytes that keep every limit: 1,000 updates, the longest item ids."""
    events = [pb.Event(item_id=f"{n:04}".ljust(400, "x"), timestamp=n) for n in range(size // 1000 // 410)]
    updates = [pb.UpdateRequest(user_id=f"large {n}", events=events) for n in range(1000)]
    message = pb.BatchUpdateRequest(updates=updates)
    return Calls(
        address,
        lambda caller, _: caller.stub.BatchUpdate(message, timeout=60),
        what=f"batches of {message.ByteSize() >> 20} MiB at once",
        threads=calls,
        most=calls,
    )


def memory(soak: Soak) -> Section:
    """The worst legal load: large messages, and large replies that nobody reads, at once."""
    bundle = _bundle_with_items(soak, LARGE_REPLY_ITEMS)
    rows, peaks, broken = [], [], []
    for name, messages in (("3,000,000 events in an update", large_messages), ("1,000 updates", legal_batches)):
        with soak.server(f"memory-{messages.__name__}", bundle=bundle) as server:
            request = large_reply_request(server.address)
            slow_readers = SlowReaders(server.address, request, readers=soak.effort.slow_readers)
            with PeakMemory(server) as peak, slow_readers as readers:
                with messages(server.address) as attack:
                    attack.wait()
                time.sleep(soak.effort.after_seconds)
                broken += failures(server.address, health, rounds=3)
            broken += failures(server.address, recommend, health, rounds=3, seconds=10)
            peaks.append(peak.peak)
            answers = ", ".join(f"{count} {status}" for status, count in sorted(attack.statuses.items()))
            sizes = [f"{value / 1e6:.0f}" for value in (peak.before, peak.peak, server.resident_bytes())]
            rows.append([f"{attack.did()}: {name}", readers.did(), answers, *sizes])
    worst = max(peaks)
    return Section(
        "Memory under the worst load",
        "Eight messages of 15 MiB at once, and callers who ask for 13 MiB each and read nothing. One worker.",
        [
            Claim("peak of resident memory", f"{worst / 1e6:.0f} MB", "<= 600 MB", worst <= MAX_RESIDENT),
            Claim("calls of others that failed", "; ".join(broken) or "none", "none", not broken),
        ],
        ("messages", "replies", "answers to the messages", "MB before", "MB at the peak", "MB afterwards"),
        rows,
    )


def _bundle_with_items(soak: Soak, items: int) -> Path:
    path = soak.scratch / "large-bundle"
    shutil.copytree(soak.bundle, path)
    if bundles.read_manifest(path)["vocabulary"] < items:
        bundles.enlarge(path, items)
    return path
