"""`dman-runtime`, and `python -m dman_runtime`. The SDK installs this too, but not what it needs."""

from __future__ import annotations

import os
import sys

GIVE_WAY = {"rebuild", "activate"}  # commands that encode histories beside servers, which need the processor first
NICENESS = 10


def main() -> int:
    """Runs the command; where a library is missing, one line says what to install."""
    if GIVE_WAY.intersection(sys.argv[1:3]) and hasattr(os, "nice"):
        os.nice(NICENESS)
    try:
        from dman_runtime.cli import main as run

        return run()  # each command imports what only it needs
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("dman_runtime", "protos", "sdk"):
            raise
        remedy = "install dman with its extra `runtime`, in a checkout: pip install '.[runtime]'"
        print(f"error: dman-runtime needs {error.name}; {remedy}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
