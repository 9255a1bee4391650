"""`dman-runtime`, and `python -m dman_runtime`. The SDK installs this too, but not what it needs."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command; where a library is missing, one line says what to install."""
    try:
        from dman_runtime import cli

        cli.give_way(sys.argv[1:])
        return cli.main()  # each command imports what only it needs
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("dman_runtime", "protos", "sdk"):
            raise
        remedy = "install dman with its extra `runtime`, in a checkout: pip install '.[runtime]'"
        print(f"error: dman-runtime needs {error.name}; {remedy}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
