"""How the contract suite handles each source: the only place here that knows what is behind the interface.

A new implementation joins the suite with one class more in `HARNESSES`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from dman_runtime.ingest.base import Source
from dman_runtime.ingest.broker import Broker
from dman_runtime.ingest.file import FileSource
from dman_runtime.ingest.kafka import KafkaSource
from tools.faults import kafka
from tools.faults.kafka import PARTITIONS, Topic, messages_of

_names = itertools.count()


class Harness(Protocol):
    """One place that events come from, empty at first."""

    partitions: int

    def write(self, values: Sequence[bytes]) -> None:
        """Appends messages, to the partitions in turns."""
        ...

    def open(self, *, once: bool = False) -> Source:
        """A source that goes on where the last one committed, and has a place for dead letters."""
        ...

    def rejected(self) -> list[tuple[str, bytes]]:
        """Reason and value of each dead letter."""
        ...


class FileHarness:
    partitions = 1

    def __init__(self, directory: Path) -> None:
        self._path, self._letters = directory / "events", directory / "letters"
        self._path.touch()

    def write(self, values: Sequence[bytes]) -> None:
        with self._path.open("ab") as file:
            file.writelines(value + b"\n" for value in values)

    def open(self, *, once: bool = False) -> Source:
        return FileSource(
            self._path, position=self._path.with_suffix(".position"), once=once, dead_letters=self._letters
        )

    def rejected(self) -> list[tuple[str, bytes]]:
        found = [json.loads(line) for line in self._letters.read_text().splitlines()]
        return [(one["reason"], one["value"].encode()) for one in found]


class KafkaHarness:
    partitions = PARTITIONS

    def __init__(self, address: str) -> None:
        self._address, self._written = address, itertools.count()
        self._topic, self._letters = (Topic(address, f"{kind}{next(_names)}") for kind in ("events", "letters"))

    def write(self, values: Sequence[bytes]) -> None:
        for value in values:
            self._topic.put(value, partition=next(self._written) % PARTITIONS)
        self._topic.flush()

    def open(self, *, once: bool = False) -> Source:
        return KafkaSource(
            Broker.parse(self._topic.url, {}),
            group="g",
            partitions=range(PARTITIONS),
            producer=self._topic.name,
            once=once,
            dead_letters=self._letters.name,
        )

    def rejected(self) -> list[tuple[str, bytes]]:
        return [(headers["reason"], value) for value, headers in messages_of(self._address, self._letters.name)]


@contextmanager
def _files() -> Iterator[Callable[[Path], Harness]]:
    yield FileHarness


@contextmanager
def _topics(broker: Callable[[], AbstractContextManager[str]]) -> Iterator[Callable[[Path], Harness]]:
    with broker() as address:
        yield lambda _directory: KafkaHarness(address)


HARNESSES: dict[str, Callable[[], AbstractContextManager[Callable[[Path], Harness]]]] = {
    "file": _files,
    "tansu": lambda: _topics(kafka.tansu),  # a real broker
    "mock": lambda: _topics(kafka.mock),  # the cluster inside of librdkafka
}
