"""The peers: how each is installed, started and asked, and which of its documented settings are used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench.peers.environments import pinned, python_of
from tools.bench.peers.wire import BatchOfOneWire, JsonWire, TritonWire, Wire


@dataclass(frozen=True)
class Peer:
    """A framework that serves models."""

    name: str  # of its requirements and of its module, NAME_peer
    title: str
    package: str  # the one that names its version
    wire: Wire
    settings: str  # for the report
    interpreters: Sequence[str] = (sys.executable,)

    def command(self, cache: Path) -> list[str]:
        """What serves our model in it, installed if it is not yet. Raises UnavailableError."""
        python = python_of(self.name, cache, interpreters=self.interpreters)
        return [str(python), "-m", "tools.bench.peers.host", self.name]

    def facts(self) -> str:
        """Its version and settings."""
        return f"{self.package} {pinned(self.name)[self.package]}: {self.settings}"


PEERS = (
    Peer(
        "pytriton",
        "PyTriton",
        "nvidia-pytriton",
        TritonWire(),
        "dynamic batcher, batches of up to 64, no delay; JSON of the KServe protocol",
        ("/usr/bin/python3.11", sys.executable),
    ),
    Peer(
        "mosec",
        "mosec",
        "mosec",
        JsonWire("/inference"),
        "batches of up to 64 after at most 1 ms; JSON",
    ),
    Peer(
        "bentoml",
        "BentoML",
        "bentoml",
        BatchOfOneWire("/answer"),
        "adaptive batching, batches of up to 64; JSON",
    ),
    Peer(
        "litserve",
        "LitServe",
        "litserve",
        JsonWire("/predict"),
        "batches of up to 64 after at most 1 ms, ZeroMQ between its processes; JSON",
    ),
)
