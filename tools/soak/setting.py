"""What every part of a soak shares: the bundle, a scratch directory, how much to do, and servers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.faults import bundles
from tools.faults.servers import ROOT, FaultServer, python_environment


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    minutes: float = 30.0  # of attacks in rotation
    quiet_seconds: float = 5.0  # before each attack
    attack_seconds: float = 10.0
    after_seconds: float = 5.0
    updates: int = 10_000  # acknowledged, while processes are killed
    kills: int = 100
    primary_kills: int = 5  # of a cluster
    server_kills: int = 10  # over it
    malformed: int = 1_000_000
    slow_readers: int = 60
    overhead_rounds: int = 20
    overhead_calls: int = 2000  # per round and side
    ingested: int = 100_000  # events of a topic, while
    ingester_kills: int = 20
    rebalances: int = 5


QUICK = Effort(
    minutes=0.5,
    quiet_seconds=1,
    attack_seconds=2,
    after_seconds=1,
    updates=300,
    kills=4,
    primary_kills=1,
    server_kills=2,
    malformed=5000,
    slow_readers=8,
    overhead_rounds=3,
    overhead_calls=200,
    ingested=2000,
    ingester_kills=2,
    rebalances=1,
)


@dataclass(frozen=True)
class Soak:
    bundle: Path
    scratch: Path  # an empty directory
    effort: Effort

    def server(self, name: str, *options: str, bundle: Path | None = None) -> FaultServer:
        """One that is not started yet, with a state directory of its own."""
        return FaultServer(bundle or self.bundle, self.scratch / name, *options)

    def items(self) -> list[str]:
        """The ids of the bundle's items."""
        with (self.bundle / bundles.ITEMS).open(encoding="utf-8") as lines:
            return [json.loads(line)["item_id"] for line in lines]

    def exact_bundle(self) -> Path:
        """The bundle with float32 states, so that two ways to one state differ by arithmetic only."""
        path = self.scratch / "exact-bundle"
        if not path.exists():
            shutil.copytree(self.bundle, path)
            bundles.refit(path, state=bundles.read_manifest(path)["state"] | {"dtype": "float32"})
        return path

    def other_bundle(self) -> Path:
        """The same for another catalogue: a tenth of the items is gone, and there are as many new ones."""
        path = self.scratch / "other-bundle"
        if not path.exists():
            shutil.copytree(self.exact_bundle(), path)
            bundles.rename_items(path, max(1, len(self.items()) // 10))
        return path


def demo_bundle(directory: Path) -> Path:
    """A bundle of the tiny preset, trained on generated data as `make demo` does."""
    for command in (
        ["tools.generate", "--output", "data/log.csv", "--items", "data/items.csv"],
        ["dman_train.train", "--data", "data/log.csv", "--items", "data/items.csv", "--preset", "tiny"],
        ["dman_train.export"],
    ):
        run_module(command, directory)
    return directory / "bundle"


def run_module(command: Sequence[str], directory: Path) -> None:
    """Runs a module of this checkout, quietly unless it fails."""
    subprocess.run(
        [sys.executable, "-m", *command],
        cwd=directory,
        env=python_environment(ROOT),
        check=True,
        stdout=subprocess.DEVNULL,
    )
