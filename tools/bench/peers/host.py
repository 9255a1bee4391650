"""`python -m tools.bench.peers.host NAME` serves our model in a peer's framework, until it is stopped."""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    importlib.import_module(f"tools.bench.peers.{sys.argv[1]}_peer").serve()
