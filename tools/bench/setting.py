"""What every measurement of a bench run shares: the bundle, how much to measure, servers, and users with histories."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dman_runtime.model.bundle import Bundle
from tools.bench.servers import Running, connect, dman_server
from tools.loadgen import add_events

K = 10
CLIENTS = 8  # threads where throughput is measured


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 20
    calls: int = 200  # per block and thread
    users: int = 200
    events: int = 100  # in the history of an ordinary user
    long_history: int = 100_000  # events of the user with a long one
    import_users: int = 600
    import_events: int = 120  # mean per user
    import_repeats: int = 5
    memory_requests: int = 4000
    memory_repeats: int = 3


QUICK = Sizes(
    rounds=3,
    calls=20,
    users=20,
    events=30,
    long_history=3000,
    import_users=60,
    import_events=40,
    import_repeats=3,
    memory_requests=200,
    memory_repeats=1,
)


@dataclass(frozen=True)
class Bench:
    """What every measurement needs."""

    bundle: Bundle
    scratch: Path  # an empty directory on the file system to measure
    provider: str
    sizes: Sizes
    echo: str  # address

    @functools.cached_property
    def items(self) -> list[str]:
        """A random half of the catalogue: histories never leave too little to recommend."""
        chooser = random.Random(0)
        return chooser.sample(self.bundle.items.item_ids, max(1, self.bundle.manifest.vocabulary // 2))

    def history(self, user: str, events: int) -> list[str]:
        return random.Random(user).choices(self.items, k=events)

    @contextmanager
    def server(self, name: str) -> Iterator[Running]:
        """A fresh server with its own state directory."""
        with dman_server(self.bundle.path, self.scratch / name, "--provider", self.provider) as running:
            yield running

    def ordinary_users(self, address: str) -> list[str]:
        """Users with about `sizes.events` events, all fills of the last segment alike, stored on a server."""
        segment = self.bundle.manifest.state.segment_length
        users = [f"user-{i}" for i in range(self.sizes.users)]
        histories = {user: self.history(user, self.sizes.events + i % segment) for i, user in enumerate(users)}
        with connect(address) as channel:
            add_events(channel, histories)
        return users
