"""A topic of Kafka and how to reach it: address, settings, what its brokers say of it, and their errors.

The one module that imports confluent_kafka, when a topic is asked for.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dman_runtime.errors import SourceError, SourceUnavailableError, UsageError
from dman_runtime.requests import MAX_PRODUCER_BYTES

SCHEME = "kafka://"
ANSWER_SECONDS = 10.0  # for a broker to answer a question
_NO_TOPIC_ID = "AAAAAAAAAAAAAAAAAAAAAA"  # of brokers that give topics none
_RESERVED = {  # exactly once depends on them, or options set them
    "bootstrap.servers", "metadata.broker.list", "group.id", "enable.auto.commit", "enable.auto.offset.store",
    "auto.offset.reset", "enable.partition.eof", "message.timeout.ms", "delivery.timeout.ms", "acks",
    "request.required.acks",
}  # fmt: skip
logger = logging.getLogger(__name__)


def library() -> Any:
    """confluent_kafka. Raises UsageError."""
    try:
        import confluent_kafka
    except ModuleNotFoundError:
        raise UsageError(
            "the library confluent-kafka is not installed", "install dman[kafka]", parameter="from"
        ) from None
    return confluent_kafka


@contextmanager
def kafka_errors(doing: str) -> Iterator[None]:
    """Turns what the library raises into a SourceError: `doing` begins its text."""
    kafka = library()
    try:
        yield
    except kafka.KafkaException as error:
        raise source_error(doing, error.args[0]) from error


def source_error(doing: str, error: Any) -> SourceError:
    """The error for a KafkaError. Brokers that cannot be reached, or that change places, are so for now."""
    passes = not error.fatal() and (error.retriable() or error.code() in _passing())
    kind = SourceUnavailableError if passes else SourceError
    return kind(f"{doing}: {error.str()}", "check the brokers, the topic and what this client may do there")


def _passing() -> set[int]:
    errors = library().KafkaError
    names = "_TRANSPORT _ALL_BROKERS_DOWN _TIMED_OUT _TIMED_OUT_QUEUE _MSG_TIMED_OUT _WAIT_COORD _RESOLVE _IN_PROGRESS "
    names += "REQUEST_TIMED_OUT COORDINATOR_NOT_AVAILABLE NOT_COORDINATOR COORDINATOR_LOAD_IN_PROGRESS _STATE "
    names += "LEADER_NOT_AVAILABLE NOT_LEADER_FOR_PARTITION NETWORK_EXCEPTION REBALANCE_IN_PROGRESS ILLEGAL_GENERATION "
    names += "UNKNOWN_MEMBER_ID _ASSIGNMENT_LOST _WAIT_CACHE _MAX_POLL_EXCEEDED THROTTLING_QUOTA_EXCEEDED"
    return {getattr(errors, name) for name in names.split() if hasattr(errors, name)}


@dataclass(frozen=True)
class Broker:
    """Where a topic is. Raises UsageError where that cannot be, or where no broker answers."""

    servers: str  # host:port, with commas between
    topic: str
    settings: dict[str, str]  # of librdkafka, beside ours

    @classmethod
    def parse(cls, text: str, settings: dict[str, str]) -> Broker:
        """`kafka://host:port[,host:port]/topic`."""
        servers, _, topic = text.removeprefix(SCHEME).partition("/")
        if not text.startswith(SCHEME) or not servers or not topic or "/" in topic:
            raise UsageError(f"{text!r:.200} names no topic", "write kafka://host:9092/topic", parameter="from")
        return cls(servers, topic, settings)

    def client(self, kind: Any, ours: dict[str, Any] | None = None) -> Any:
        """A Consumer, Producer or AdminClient. Its log is off, as error callbacks say the same less often."""
        base: dict[str, Any] = {"bootstrap.servers": self.servers, "log_level": 2}
        try:
            return kind(base | self.settings | (ours or {}), logger=logger)
        except library().KafkaException as error:
            raise UsageError(
                f"these settings of librdkafka cannot be: {error.args[0].str()}", "correct them",
                parameter="kafka_options",
            ) from None  # fmt: skip

    def partitions(self, client: Any, topic: str) -> list[int]:
        """Those of a topic, ascending."""
        kafka = library()
        try:
            found = client.list_topics(topic, timeout=ANSWER_SECONDS).topics[topic]
        except kafka.KafkaException as error:
            raise UsageError(
                f"no broker at {self.servers} answers ({error.args[0].str()})",
                "check the address, and that the broker runs",
                parameter="from",
            ) from None
        if found.error is not None:
            raise UsageError(f"topic {topic}: {found.error.str()}", "make the topic, or name another one")
        return sorted(found.partitions)

    def producer_name(self) -> str:
        """By which repeats are recognised: name and id of the topic, as one that is made anew has other events."""
        from confluent_kafka.admin import AdminClient

        admin = self.client(AdminClient)
        try:
            asked = admin.describe_topics(library().TopicCollection([self.topic]), request_timeout=ANSWER_SECONDS)
            topic_id = str(asked[self.topic].result().topic_id)
        except library().KafkaException as error:
            raise UsageError(
                f"the id of topic {self.topic} cannot be found out ({error.args[0].str()})",
                "name the producer, and use another name if the topic is made anew",
                parameter="producer",
            ) from None
        return self.topic if topic_id == _NO_TOPIC_ID else f"{self.topic}@{topic_id}"


def producer_of(name: str, partition: int) -> str:
    """The producer of a partition; of a long name, its hash."""
    text = f"{name}/{partition}"
    if len(text.encode()) <= MAX_PRODUCER_BYTES:
        return text
    return f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}/{partition}"


def read_settings(path: Path) -> dict[str, str]:
    """Settings of librdkafka from a file with `name=value` a line; lines that begin with # are comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error})", "check the path", parameter="kafka_options") from None
    found = {}
    for number, line in enumerate(lines, 1):
        name, separator, value = (part.strip() for part in line.partition("="))
        if not line.strip() or name.startswith("#"):
            continue
        if not separator or not name:
            raise UsageError(f"{path}, line {number} is no `name=value`", "correct it", parameter="kafka_options")
        if name in _RESERVED:
            raise UsageError(
                f"{path}, line {number}: {name} is set by the ingester", "remove it", parameter="kafka_options"
            )
        found[name] = value
    return found
