"""How fast a rebuild is, beside an import of the same histories, and what it takes."""

from __future__ import annotations

import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dman_runtime.jobs.generations import GenerationInfo, list_generations
from dman_runtime.store.lmdb import LmdbStore
from tools.bench.blocks import Spread
from tools.bench.lifecycle import Setting, run
from tools.bench.report import Claim, Section

MIN_SPEED = 0.7  # of rebuild, by import


@dataclass(frozen=True)
class Ran:
    """A command that ran: seconds, and CPU seconds, of all of it; and its result."""

    seconds: float
    cpu_seconds: float
    result: dict[str, Any]


def _timed(command: str, *options: str | Path) -> Ran:
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(command, *options, "--provider", "cpu")
    seconds, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Ran(seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, result)


def speed(setting: Setting, base: Path) -> Section:
    """`rebuild` of a store, which comes to be at `base`, by `import` of the same log into a fresh one."""
    old, new = setting.pair.old.bundle, setting.pair.new.bundle
    run("import", "--bundle", old.path, "--state", base, "--input", setting.log, "--provider", "cpu")
    pairs = list[tuple[Ran, Ran]]()
    for number in range(setting.effort.speed_repeats):
        fresh, copy = setting.scratch / f"imported-{number}", setting.scratch / f"rebuilt-{number}"
        imported = _timed("import", "--bundle", new.path, "--state", fresh, "--input", setting.log, "--processes", "1")
        shutil.copytree(base, copy)
        pairs.append((imported, _timed("rebuild", "--bundle", new.path, "--state", copy, "--max-share", "1")))
        shutil.rmtree(fresh)
        before, after, made = _bytes(base), _bytes(copy), _generation(copy, new.bundle_id)
        shutil.rmtree(copy)
    events = pairs[0][1].result["events"]
    share = Spread(tuple(one.seconds / other.seconds for one, other in pairs))
    cpu_share = Spread(tuple(one.cpu_seconds / other.cpu_seconds for one, other in pairs))
    return Section(
        "Speed",
        f"The whole commands, one after the other, without a server: `import` of the log into a fresh store under the "
        f"new bundle, by one process, and `rebuild --max-share 1` of a store that was imported under the old one. Both "
        f"encode {events:,} events. Speed of rebuild by that of import: {share}; by CPU seconds: {cpu_share}. The "
        f"store had {before / 1e6:.1f} MB before the rebuild, and {after / 1e6:.1f} MB after it.",
        [
            Claim(
                "speed of rebuild by that of import",
                f"{share.median:.2f}x ({events / pairs[0][1].seconds:,.0f} events/s)",
                f">= {MIN_SPEED}x",
                share.median >= MIN_SPEED,
            ),
            Claim("records of a bundle", f"{made.bytes / 1e6:.1f} MB of {made.records:,} users"),
        ],
        ("repeat", "import s", "CPU s", "events/s", "rebuild s", "CPU s", "events/s", "rebuild by import"),
        [
            [
                str(number + 1),
                *(text for ran in pair for text in _speed_cells(ran, events)),
                f"{pair[0].seconds / pair[1].seconds:.2f}",
            ]
            for number, pair in enumerate(pairs)
        ],
        {
            "share": share.values,
            "cpu_share": cpu_share.values,
            "record_bytes": made.bytes,
        },
    )


def _speed_cells(ran: Ran, events: int) -> list[str]:
    return [f"{ran.seconds:.1f}", f"{ran.cpu_seconds:.1f}", f"{events / ran.seconds:,.0f}"]


def _bytes(state: Path) -> int:
    with LmdbStore.open(state, readonly=True) as store:
        return store.stats().bytes_used


def _generation(state: Path, bundle_id: str) -> GenerationInfo:
    with LmdbStore.open(state, readonly=True) as store:
        (found,) = [one for one in list_generations(store).generations if one.bundle_id == bundle_id]
    return found
