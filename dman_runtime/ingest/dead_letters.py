"""Where messages go that cannot be stored: a topic, or a file of JSON lines. They may come twice, and never not."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dman_runtime.errors import SourceUnavailableError
from dman_runtime.ingest.base import Rejected
from dman_runtime.ingest.broker import kafka_errors, library

FLUSH_SECONDS = 30.0  # a message that no broker has taken by then is tried again


class DeadLetterFile:
    """One JSON object a line: reason, file, the byte at which the line began, and the line: `value`, or as base64
    `value_base64` where it is not UTF-8.
    """

    def __init__(self, path: Path, source: str) -> None:
        """Raises SourceUnavailableError."""
        self._path, self._source = path, source
        self.put([])

    def put(self, rejected: Sequence[Rejected]) -> None:
        lines = b"".join(json.dumps(self._entry(one)).encode() + b"\n" for one in rejected)
        try:
            with self._path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SourceUnavailableError(
                f"the dead letters {self._path} cannot be written ({error.strerror})",
                "check the path, its permissions and the disk",
                parameter="dead_letters",
            ) from error

    def _entry(self, one: Rejected) -> dict[str, Any]:
        value = one.message.value or b""
        try:
            content = {"value": value.decode()}
        except UnicodeDecodeError:
            content = {"value_base64": base64.b64encode(value).decode()}
        return {"reason": one.reason, "file": self._source, "byte": one.message.sequence, **content}


class DeadLetterTopic:
    """The message itself, key and value, with the headers `reason`, `topic`, `partition` and `offset`."""

    def __init__(self, producer: Any, topic: str, source: str) -> None:
        """`producer` of confluent_kafka; `source` is the topic that the messages come from."""
        self._producer, self._topic, self._source = producer, topic, source

    def put(self, rejected: Sequence[Rejected]) -> None:
        failed: list[Any] = []

        def delivered(error: Any, _message: Any) -> None:
            if error is not None:
                failed.append(error)

        with kafka_errors(f"messages cannot be put into the dead-letter topic {self._topic}"):
            for one in rejected:
                self._produce(one, delivered)
            left = self._producer.flush(FLUSH_SECONDS) if rejected else 0
            if failed:
                raise library().KafkaException(failed[0])
        if left:
            raise SourceUnavailableError(
                f"the dead-letter topic {self._topic} takes no messages", "check its brokers", parameter="dead_letters"
            )

    def _produce(self, one: Rejected, delivered: Callable[[Any, Any], None]) -> None:
        message = one.message
        headers = {"reason": one.reason, "topic": self._source, "partition": message.partition}
        encoded = {name: str(value).encode() for name, value in (headers | {"offset": message.sequence}).items()}
        while True:
            try:
                self._producer.produce(
                    self._topic, key=message.key, value=message.value, headers=encoded, on_delivery=delivered
                )
                return
            except BufferError:  # its queue is full: each message in it is delivered, or fails, in time
                self._producer.poll(1.0)
