"""What every measurement of a bench run shares: the bundle, how much to measure, servers, and users with histories."""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dman_runtime.errors import UsageError
from dman_runtime.model.bundle import Bundle
from dman_runtime.options import Parser
from tools.bench.servers import Running, connect, counting_server
from tools.loadgen import add_events

if TYPE_CHECKING:
    from tools.bench.floor import Floor

K = 10
CLIENTS = 8  # threads where throughput is measured
BUSY_LOAD = 0.5  # processes, on average of a minute, before the run
MANY_CLIENTS = 64  # where a server is to be as fast as it gets
SINCE = 1_600_000_000  # when the histories of users begin


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 20
    calls: int = 200  # per block and thread
    users: int = 200
    events: int = 100  # in the history of an ordinary user
    import_users: int = 600
    import_events: int = 120  # mean per user
    import_repeats: int = 5
    block_seconds: float = 1.25  # of a closed loop, the first fifth of which does not count
    block_rounds: int = 5
    floor_rounds: int = 3
    clients: tuple[int, ...] = (1, 8, 64, 256)
    ks: tuple[int, ...] = (1, 10, 100, 500)
    update_clients: tuple[int, ...] = (0, 4, 16, 32, 64)  # of 64 clients, those that update
    histories: tuple[int, ...] = (100, 1000, 10_000, 100_000, 1_000_000)  # events
    catalogues: tuple[int, ...] = (1000, 10_000, 200_000, 1_000_000, 4_000_000)  # items
    rate_seconds: float = 3.0  # of an open loop at one rate
    rate_rounds: int = 3
    overload_seconds: float = 60.0
    kind_calls: int = 400  # of each kind of request whose time is taken apart
    start_repeats: int = 5
    start_repeats_of_catalogues: int = 2


QUICK = Sizes(
    rounds=3,
    calls=20,
    users=20,
    events=30,
    import_users=60,
    import_events=40,
    import_repeats=3,
    block_seconds=0.5,
    block_rounds=1,
    floor_rounds=1,
    clients=(1, 8),
    ks=(1, 10),
    update_clients=(0, 4, 8),
    histories=(30, 300),
    catalogues=(100, 200),
    rate_seconds=0.5,
    rate_rounds=1,
    overload_seconds=3.0,
    kind_calls=20,
    start_repeats=1,
    start_repeats_of_catalogues=1,
)


def measuring_parser(module: str, description: str, out: Path) -> Parser:
    """The options of every command that measures servers."""
    p = Parser(prog=f"python -m {module}", description=description)
    p.add_argument("--out", type=Path, default=out, help="the report")
    p.add_argument("--quick", action="store_true", help="few and short: does everything work? Not for quoting")
    p.add_argument(
        "--scratch", type=Path, default=Path(), help="where temporary state goes; updates are as durable as its disk"
    )
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def bench_parser(module: str, description: str, out: Path) -> Parser:
    """The same, and those of commands that measure a given bundle."""
    p = measuring_parser(module, description, out)
    p.flag("--bundle", type=Path, default=Path("bundle"), help="bundle directory")
    p.add_argument("--provider", choices=["auto", "cuda", "cpu"], default="auto", help="where servers run the graphs")
    return p


def end_with(main: Callable[[], int]) -> NoReturn:
    """Ends the process with what a command returns. After SIGTERM its servers and scratch files go, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())


@contextmanager
def scratch_directory(where: Path) -> Iterator[Path]:
    """A temporary directory in `where`. Raises UsageError."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".bench-", dir=where)
    except OSError as error:
        raise UsageError(
            f"cannot write to {where}: {error.strerror}", "choose another directory", parameter="scratch"
        ) from None
    with scratch as directory:
        yield Path(directory).resolve()


class Clock:
    """How long a bench run took, and whether the machine was quiet before."""

    def __init__(self) -> None:
        self._began, self._load_before = time.monotonic(), os.getloadavg()[0]

    def facts(self, *, quick: bool) -> dict[str, str]:
        quiet = "" if self._load_before < BUSY_LOAD else "; the machine was busy: do not quote"
        seconds = f"{time.monotonic() - self._began:.0f} s"
        return {
            "load average, before and after": f"{self._load_before:.2f}, {os.getloadavg()[0]:.2f}{quiet}",
            "duration": f"{seconds} (--quick: too short to quote)" if quick else seconds,
        }


@dataclass(frozen=True)
class Bench:
    """What every measurement needs."""

    bundle: Bundle
    scratch: Path  # an empty directory on the file system to measure
    provider: str
    sizes: Sizes
    echo: str  # address
    echoes: Mapping[str, Running] = field(default_factory=dict)  # by kind

    @functools.cached_property
    def items(self) -> list[str]:
        """A random half of the catalogue: histories never leave too little to recommend."""
        chooser = random.Random(0)
        return chooser.sample(self.bundle.items.item_ids, max(1, self.bundle.manifest.vocabulary // 2))

    @functools.cached_property
    def floor(self) -> Floor:
        """Measured when it is first asked for."""
        from tools.bench.floor import Floor

        return Floor(self)

    def echo_for(self, clients: int) -> str:
        """The address of the fastest echo for so many clients, if they are compared."""
        return self.floor.best(clients)[1].address if len(self.echoes) > 1 else self.echo

    def history(self, user: str, events: int) -> list[str]:
        return random.Random(user).choices(self.items, k=events)

    @contextmanager
    def server(self, name: str, *options: str, address: str = "") -> Iterator[Running]:
        """A server with its own state directory, or on servers at an address, which counts its answers."""
        options = ("--provider", self.provider, *options)
        with counting_server(self.bundle.path, self.scratch / name, *options, address=address) as running:
            yield running

    def ordinary_users(self, address: str) -> list[str]:
        """Users with about `sizes.events` events, all fills of the last segment alike, stored on a server."""
        segment = self.bundle.manifest.state.segment_length
        users = [f"user-{i}" for i in range(self.sizes.users)]
        histories = {user: self.history(user, self.sizes.events + i % segment) for i, user in enumerate(users)}
        with connect(address) as channel:
            add_events(channel, histories, since=SINCE)
        return users
