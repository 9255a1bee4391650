"""Which servers have a store open, and which bundles they have loaded.

In a state directory, one small file for each process: its process keeps it locked, so that one whose process has died
is known, from another container too. On servers, one entry for each process, which expires unless it is renewed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, cast

logger = logging.getLogger(__name__)
_DIRECTORY = "workers"
_READ_ATTEMPTS = 5


@dataclass(frozen=True)
class Present:
    """A process that serves."""

    pid: int
    bundle_id: str  # it was started with
    path: str  # of that bundle
    loaded: Sequence[str] = ()  # ids of the bundles that it could answer with
    failed: Mapping[str, str] = field(default_factory=dict)  # by id, why others could not be loaded


class Presence:
    """The file of this process. `close` removes it. A disk that takes none is noted in the log only."""

    def __init__(self, state: Path) -> None:
        """In the existing directory `state`."""
        self._path, self._said = state / _DIRECTORY / f"{uuid.uuid4().hex}.json", b""
        self._file: int | None = None

    def tell(self, present: Present) -> None:
        """Says so to whoever asks."""
        said = json.dumps(asdict(present)).encode()
        if said == self._said:
            return
        try:
            file = self._opened()
            os.pwrite(file, said, 0)
            os.ftruncate(file, len(said))
            self._said = said
        except OSError as error:
            logger.warning("cannot say in %s which bundles are loaded: %s", self._path, error)

    def _opened(self) -> int:
        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        return self._file

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


class Leases(Protocol):
    """Values of processes that a store keeps while they live."""

    def put_lease(self, name: str, value: bytes) -> None: ...

    def leases(self) -> list[bytes]: ...

    def end_lease(self, name: str) -> None: ...


class LeasedPresence:
    """As `Presence`, in a store on servers. Raises StoreError."""

    def __init__(self, leases: Leases) -> None:
        self._leases, self._name, self._said = leases, uuid.uuid4().hex, b""

    def tell(self, present: Present) -> None:
        said = json.dumps(asdict(present)).encode()
        if said != self._said:
            self._leases.put_lease(self._name, said)
            self._said = said

    def close(self) -> None:
        with suppress(Exception):  # else it expires
            self._leases.end_lease(self._name)


def presence(place: Path | object, store: object) -> Presence | LeasedPresence:
    """That of this process in a store and the place it was opened at."""
    return Presence(place) if isinstance(place, Path) else LeasedPresence(cast(Leases, store))


def present_at(place: Path | object, store: object) -> list[Present]:
    """As `present`, for a store wherever it is. Raises OSError, StoreError."""
    if isinstance(place, Path):
        return present(place)
    found = [_present(said) for said in cast(Leases, store).leases()]
    return [one for one in found if one is not None]


def _present(said: bytes) -> Present | None:
    with suppress(ValueError, TypeError):
        return Present(**json.loads(said))
    return None


def present(state: Path) -> list[Present]:
    """The processes that serve over a state directory now. Removes what dead ones have left. Raises OSError."""
    found = [_read(path) for path in sorted((state / _DIRECTORY).glob("*.json"))]
    return [one for one in found if one is not None]


def _read(path: Path) -> Present | None:
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parsed(path)
        path.unlink()
    return None


def _parsed(path: Path) -> Present | None:
    """None for a process that has said nothing yet: it has just begun to start."""
    for _ in range(_READ_ATTEMPTS):  # it may be in the middle of a word
        if (found := _present(path.read_bytes())) is not None:
            return found
        time.sleep(0.01)
    return None
