"""Virtual environments of the peers: made on demand, outside the repository, with pinned versions."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
DEFAULT_CACHE = Path("~/.cache/dman-peers")
INSTALL_SECONDS = 900
_COMPLETE = "complete"


class UnavailableError(Exception):
    """A peer cannot be measured here; says why."""


def python_of(name: str, cache: Path, *, interpreters: Sequence[str] = (sys.executable,)) -> Path:
    """The interpreter of an environment with the packages of `requirements/NAME.txt`, made if there is none yet.

    `interpreters`: what may make it; the first one that is there does. Raises UnavailableError.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    base = next((found for one in interpreters if (found := shutil.which(one))), None)
    if base is None:
        raise UnavailableError(f"there is no {' or '.join(interpreters)}")
    version = hashlib.sha256(requirements.read_bytes() + base.encode()).hexdigest()[:12]
    environment = cache.expanduser().resolve() / f"{name}-{version}"
    python = environment / "bin" / "python"
    if not (environment / _COMPLETE).exists():
        shutil.rmtree(environment, ignore_errors=True)  # of an installation that was interrupted
        # Without pip of its own, which Debian's Python lacks: ours installs into it.
        _run([base, "-m", "venv", "--without-pip", str(environment)])
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-input"]
        _run([*pip, "--disable-pip-version-check", "--no-deps", "--requirement", str(requirements)])
        (environment / _COMPLETE).touch()
    return python


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"its installation took more than {INSTALL_SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or error.stdout).splitlines() if line.strip()]
        raise UnavailableError((lines or ["no message"])[-1].strip()) from None


def pinned(name: str) -> dict[str, str]:
    """Versions by package, as `requirements/NAME.txt` pins them."""
    lines = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)
