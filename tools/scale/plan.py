"""Does the arithmetic of docs/scale.md, and writes its tables into the page, between their marks.

    python -m tools.scale.plan

Numbers that were measured are read from the pages that have them (`measured`), all others are in `Assumed`. A test
writes the page again and compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from math import ceil
from pathlib import Path

from dman_runtime.errors import UsageError
from dman_runtime.options import Parser, run_command
from tools.bench.report import table
from tools.scale.measured import MEASURED, PRIMARIES, measured

ROOT = Path(__file__).resolve().parents[2]
SIZES = tuple(PRIMARIES)
GIGA, DAY, HOUR = 1e9, 86_400, 3600
COMMAND_EVENTS = 150  # of a user, where the part of the command was measured
WRITER, CORES = "LMDB: one writer, one user a commit", "cores of the servers"
DISK = "LMDB or Kvrocks: the disk, in a roll-over, one copy"
COMMAND = "the command of a rebuild in a night, whoever encodes"
EMBEDDED = (WRITER, CORES, DISK)  # what one machine with the embedded store must stay below
WIDTH, FLOAT_BYTES, TABLES = 128, 4, 4  # of an item: weights, two moments of Adam, the moving average


def _assumed(value: float, meaning: str, unit: str = "", scale: float = 1) -> float:
    """A field of `Assumed`: its value, and how the page says it."""
    return field(default=value, metadata={"meaning": meaning, "unit": unit, "scale": scale})


@dataclass(frozen=True)
class Assumed:
    """What was not measured. Change it, and write the page again."""

    events: float = _assumed(1000, "events of a user, on average: about a year of them")
    events_a_day: float = _assumed(3, "events of a user in a day")
    recommends: float = _assumed(4, "recommendations for each event, as in the mix that was measured")
    peak: float = _assumed(3, "busiest hour by the mean")
    copies: float = _assumed(3, "copies of what is stored, the primary's included; the embedded store has one")
    recommend_bytes: float = _assumed(
        5000,
        "of the store for a recommendation: head with the latest events, first 4 kB of the record, seen items",
        "B",
    )
    busy: float = _assumed(0.6, "share of the time that a core or a wire may be busy in the busiest hour")
    full: float = _assumed(0.75, "share of a memory or a disk that may be full")
    cores: float = _assumed(16, "cores of a machine")
    memory: float = _assumed(128 * GIGA, "its memory", "GB", GIGA)
    disk: float = _assumed(4000 * GIGA, "its disk", "GB", GIGA)
    network: float = _assumed(1.25 * GIGA, "its network, 10 Gbit/s", "GB/s", GIGA)
    night: float = _assumed(8, "time to encode all histories under another model", "hours")


@dataclass(frozen=True)
class Plan:
    """So many users, by what was measured `m` and what is assumed `a`. Rates are of the busiest hour."""

    users: float
    m: dict[str, float]
    a: Assumed

    @property
    def updates(self) -> float:
        return self.users * self.a.events_a_day * self.a.peak / DAY

    @property
    def calls(self) -> float:
        return self.updates * (1 + self.a.recommends)

    @property
    def cores(self) -> float:
        return self.calls / self.m["calls"] / self.a.busy

    @property
    def servers(self) -> int:
        """Machines for the servers."""
        return ceil(self.cores / self.a.cores)

    @property
    def events(self) -> float:
        return self.users * self.a.events

    @property
    def stored(self) -> float:
        """Bytes of one copy, with the records of one model."""
        return self.users * self.m["record_on_disk"] + self.events * self.m["event_on_disk"]

    @property
    def rolling(self) -> float:
        """Bytes of one copy while there are records of two models."""
        return self.stored + self.users * self.m["record_on_disk"]

    @property
    def network(self) -> float:
        """Bytes a second that the store sends and receives, its replicas included."""
        update = self.m["record"] * (1 + self.a.copies)
        return self.updates * (self.a.recommends * self.a.recommend_bytes + update)

    @property
    def primary_seconds(self) -> float:
        """Of primaries, each second."""
        microseconds = self.a.recommends * self.m["redis_recommend"] + self.m["redis_update"]
        return self.updates * microseconds / 1e6

    @property
    def rebuild_hours(self) -> float:
        """Of one core."""
        return self.events / self.m["rebuild"] / HOUR

    @property
    def command_hours(self) -> float:
        """Of the one command that reads and commits all users, whoever encodes them: it takes so long for a user, and
        hardly longer for one with more events."""
        return self.users * self.m["command"] * COMMAND_EVENTS / self.m["rebuild"] / HOUR

    @property
    def rolling_hours(self) -> float:
        """On the machines of the servers, one command."""
        return max(self.command_hours, self.rebuild_hours / (self.servers * self._cores_at_work))

    @property
    def night_machines(self) -> float:
        return self.rebuild_hours / self._cores_at_work / self.a.night

    @property
    def _cores_at_work(self) -> float:
        """What the cores of a machine do together, in cores that work alone."""
        return self.a.cores * self.m["cores"] / 2

    @property
    def valkey_machines(self) -> float:
        memory = self.rolling * self.m["redis_memory"] * self.a.copies / (self.a.memory * self.a.full)
        return max(self.a.copies, memory, self._by_network)

    @property
    def kvrocks_machines(self) -> float:
        disk = self.rolling * self.a.copies / (self.a.disk * self.a.full)
        return max(self.a.copies, disk, self._by_network)

    @property
    def _by_network(self) -> float:
        return self.network / (self.a.network * self.a.busy)


def limits(m: dict[str, float], a: Assumed) -> list[tuple[str, str, float]]:
    """Each limit of one machine, how it is computed, and the users at which it is reached; the lowest first."""
    one = Plan(1, m, a)
    memory, disk = a.memory * a.full, a.disk * a.full
    found = [
        ("memory of a Valkey server, one copy", "memory x full / bytes of a user in a roll-over / overhead",
         memory / (one.rolling * m["redis_memory"])),
        (WRITER, "busy / commit / updates of a user", a.busy / (m["commit"] / 1e3) / one.updates),
        ("LMDB: the records no longer stay in memory", "memory x full / record", memory / m["record_on_disk"]),
        (CORES, "cores x busy x calls of a core / calls of a user", a.cores / one.cores),
        ("a new model in a night", "cores x gain x speed x night / events of a user", 1 / one.night_machines),
        (COMMAND, "night / its time for a user", a.night / one.command_hours),
        ("one primary, one thread", "busy / its time for a user", a.busy / one.primary_seconds),
        (DISK, "disk x full / bytes of a user in a roll-over", disk / one.rolling),
        ("network of the store", "network x busy / bytes of a user", a.network * a.busy / one.network),
    ]  # fmt: skip
    return sorted(found, key=lambda limit: limit[2])


def beyond(users: float, m: dict[str, float], a: Assumed) -> list[str]:
    """What keeps so many users from one machine with the embedded store."""
    return [what for what, _, most in limits(m, a) if what in EMBEDDED and users > most]


# -- the tables ------------------------------------------------------------------------------------------------------


def page(text: str) -> str:
    """The page with its tables written again. Raises UsageError if it lacks the place of one."""
    m, a = measured(ROOT), Assumed()
    for name, of_name in {
        "measured": measured_table(m),
        "assumed": assumed_table(a),
        "event": event_table(m, a),
        "plan": plan_table(m, a),
        "limits": table(
            ("what", "how", "users"), [[what, how, f"{_two(users):,}"] for what, how, users in limits(m, a)]
        ),
        "items": item_table(),
    }.items():
        marks = f"<!-- {name}: written by python -m tools.scale.plan -->", f"<!-- end of {name} -->"
        text, count = re.subn(
            f"{re.escape(marks[0])}.*?{re.escape(marks[1])}",
            lambda _, body=f"{marks[0]}\n\n{of_name}\n\n{marks[1]}": body,  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise UsageError(f"the page has no single place for the table {name!r}", f"write {marks[0]} {marks[1]}")
    return text


def measured_table(m: dict[str, float]) -> str:
    rows = []
    for name, one in MEASURED.items():
        found = one.arithmetic(ROOT)
        title = Path(one.page).stem
        link = Path(one.page).name if one.page.startswith("docs/") else f"../{one.page}"
        rows.append([one.what, f"{_short(m[name])} {one.unit}", found, f"[{title}]({link})"])
    return table(("measured", "value", "how", "source"), rows)


def assumed_table(a: Assumed) -> str:
    rows = []
    for one in fields(a):
        value = f"{_short(getattr(a, one.name) / one.metadata['scale'])} {one.metadata['unit']}".strip()
        rows.append([f"`{one.name}`", one.metadata["meaning"], value])
    return table(("name", "assumed", "value"), rows)


def event_table(m: dict[str, float], a: Assumed) -> str:
    """What an event costs, with its recommendations: the same for any number of users."""
    primary = a.recommends * m["redis_recommend"] + m["redis_update"]
    read = a.recommends * a.recommend_bytes + m["record"]
    rows = [
        (
            "time of a server core",
            "(1 + recommends) / calls of a core",
            f"{(1 + a.recommends) / m['calls'] * 1e3:.1f} ms",
        ),
        ("time of a primary", "recommends x recommendation + update", f"{primary:.0f} us"),
        ("read from the store", "recommends x recommend_bytes + record", f"{read / 1e3:.1f} kB"),
        ("written to it", "record x copies", f"{m['record'] * a.copies / 1e3:.1f} kB"),
        ("kept for ever", "event on disk x copies", f"{m['event_on_disk'] * a.copies:.0f} B"),
        ("encoded again by each new model", "1 / speed of a rebuild", f"{1e6 / m['rebuild']:.0f} us of a core"),
    ]
    return table(("of one event", "how", "cost"), rows)


def _embedded(plan: Plan) -> str:
    crossed = len(beyond(plan.users, plan.m, plan.a))
    return f"no: {crossed} of {len(EMBEDDED)} limits crossed" if crossed else "yes"


def _store(plan: Plan) -> str:
    if not beyond(plan.users, plan.m, plan.a):
        return "LMDB"
    return "Valkey" if plan.valkey_machines <= plan.kvrocks_machines else "Kvrocks"


ROWS: tuple[tuple[str, str, Callable[[Plan], str]], ...] = (
    ("updates/s, peak", "users x events_a_day x peak / 86,400", lambda p: _count(p.updates)),
    ("calls/s, peak", "updates x (1 + recommends)", lambda p: _count(p.calls)),
    ("**server machines**", "calls / calls of a core / busy / cores", lambda p: f"{p.servers:,}"),
    ("stored, one copy", "users x record + events x event, on disk", lambda p: _bytes(p.stored)),
    ("the same in a roll-over", "and users x record again", lambda p: _bytes(p.rolling)),
    ("with all copies", "x copies", lambda p: _bytes(p.rolling * p.a.copies)),
    ("one machine with the embedded store", "the limits below", _embedded),
    (
        "network of the store, peak",
        "updates x (recommends x recommend_bytes + record x (1 + copies))",
        lambda p: f"{_short(p.network * 8 / GIGA)} Gbit/s",
    ),
    (
        "primaries by load, p99 and Zipf users",
        "[simulated](../reports/scale.md)",
        lambda p: f"{PRIMARIES[int(p.users)].value(ROOT):,.0f}",
    ),
    (
        "machines of Valkey, all copies in memory",
        "bytes x overhead / (memory x full)",
        lambda p: _machines(p.valkey_machines),
    ),
    (
        "machines of Kvrocks, all copies on disk",
        "bytes / (disk x full), or by the network",
        lambda p: _machines(p.kvrocks_machines),
    ),
    ("**store**", "the one that takes the fewest machines", _store),
    ("events to encode for a new model", "users x events", lambda p: f"{p.events:.0e}".replace("e+", "e")),
    ("core hours", "events / speed of a rebuild", lambda p: _count(p.rebuild_hours)),
    (
        "machines to do it in a night",
        "core hours / (cores x gain) / night",
        lambda p: _machines(p.night_machines),
    ),
    (
        "hours of the command that reads and commits",
        f"users x its part x {COMMAND_EVENTS} / speed of a rebuild",
        lambda p: _short(p.command_hours),
    ),
    (
        "**hours to roll over, on the server machines**",
        "core hours / (machines x cores x gain), or those of the command",
        lambda p: _short(p.rolling_hours),
    ),
    ("records written by it", "users x record x copies", lambda p: _bytes(p.users * p.m["record"] * p.a.copies)),
)


def plan_table(m: dict[str, float], a: Assumed) -> str:
    plans = [Plan(users, m, a) for users in SIZES]
    heads = ["", "how", *(f"{users:,} users" for users in SIZES)]
    return table(heads, [[what, how, *map(text, plans)] for what, how, text in ROWS])


def item_table() -> str:
    """What an item table takes that lies whole in each process that trains."""
    rows = []
    for items in (10**5, 10**6, 10**7, 10**8):
        one = items * WIDTH * FLOAT_BYTES
        rows.append([f"{items:,}", *map(_bytes, (one, TABLES * one, (TABLES + 2) * one, one))])
    heads = (
        "items",
        f"a table of width {WIDTH}",
        "weights, two moments, average",
        "and while ranks are computed",
        "sent by each process in a step, whole table",
    )
    return table(heads, rows)


def _machines(number: float) -> str:
    return f"{ceil(number):,}"


def _count(number: float) -> str:
    return f"{_two(number):,}" if number >= 100 else _short(number)


def _two(number: float) -> int:
    """To three digits, as more would be pretence."""
    digits = 10 ** max(0, len(str(int(number))) - 3)
    return int(round(number / digits) * digits)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"


def _bytes(number: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e6:.3g} MB"


# -- the command -----------------------------------------------------------------------------------------------------


def parser() -> Parser:
    p = Parser(prog="python -m tools.scale.plan", description="Write the tables of docs/scale.md again.")
    p.add_argument("--out", type=Path, default=Path("docs/scale.md"), help="the page, which must exist")
    return p


def _main(argv: Sequence[str] | None) -> int:
    out = parser().parse_args(argv).out
    text = page(out.read_text(encoding="utf-8"))
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
