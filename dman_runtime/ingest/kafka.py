"""A topic of Kafka, read by a consumer group that shares out its partitions, or by partitions that are named.

Offsets are committed after the state, so a crash only has messages read again, which the store recognises. The same
holds where two processes read one partition for a moment, as in a rebalance.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dman_runtime.errors import SourceError, SourceUnavailableError, UsageError
from dman_runtime.ingest.base import Message, Rejected
from dman_runtime.ingest.broker import ANSWER_SECONDS, Broker, kafka_errors, library, producer_of, source_error
from dman_runtime.ingest.dead_letters import DeadLetterTopic
from dman_runtime.log_lines import RateLimited

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, TopicPartition

logger = logging.getLogger(__name__)
QUEUED_KIB = 16 << 10  # that the library reads ahead
READ_BYTES = 16 << 20  # taken from there at a time
LETTER_MS = 20_000  # for a dead letter to be taken
CLOSE_SECONDS, CLOSING = 10.0, "closing a consumer"
LOOK_SECONDS = 0.5  # between looks at what others have read
LARGEST_LETTER = 20_000_000  # bytes; the brokers may take less


class KafkaSource:
    """A `Source`. Raises UsageError, SourceError."""

    unit = "events"

    def __init__(
        self,
        broker: Broker,
        *,
        group: str,
        partitions: Sequence[int] = (),
        start: str = "earliest",
        producer: str = "",
        once: bool = False,
        dead_letters: str = "",
    ) -> None:
        """`partitions`: those to read; none: what the group gives. `start`: where partitions begin of which the group
        has no offset. With `once`, it ends when its partitions are read, up to where they ended when they were first
        read, and other members of the group have settled the others.
        """
        self.leaving: Callable[[Collection[int]], None] = lambda _partitions: None
        self._broker, self._start, self._once = broker, start, once
        self._limited = RateLimited(logger)
        self._failed: SourceError | None = None
        self._settled: dict[int, int] = {}  # of the partitions that are ours: committed to
        self._ends: dict[int, int] = {}  # with `once`, of those that are read: where they end
        self._open: set[int] | None = None  # those that have not ended; None before there were any
        self._elsewhere: dict[int, int] = {}  # with `once`, where those end that others may have, as of the start
        self._looked = 0.0  # at those
        self._held: list[Message] = []  # read, and not given out
        self._paused = False
        self._closing: threading.Thread | None = None
        self._consumer: Consumer = broker.client(
            library().Consumer,
            {
                "group.id": group,
                "client.id": "dman-ingest",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "enable.partition.eof": once,
                "queued.max.messages.kbytes": QUEUED_KIB,
                "error_cb": self._note,
                "on_commit": self._committed,
            },
        )
        there = broker.partitions(self._consumer, broker.topic)
        self._dead_letters = self._letters(dead_letters) if dead_letters else None
        self._name = producer or broker.producer_name()
        self._begin(partitions, there)

    def _letters(self, topic: str) -> DeadLetterTopic:
        settings = {"acks": "all", "message.timeout.ms": LETTER_MS, "message.max.bytes": LARGEST_LETTER}
        self._broker.partitions(self._consumer, topic)  # which makes none, as a producer might
        producer = self._broker.client(library().Producer, settings | {"error_cb": self._note})
        return DeadLetterTopic(producer, topic, self._broker.topic)

    def _begin(self, partitions: Sequence[int], there: Sequence[int]) -> None:
        if not partitions:
            if self._once:
                with kafka_errors(f"the ends of {self._broker.topic} cannot be found out"):
                    self._elsewhere = {number: self._watermarks(self._partition(number))[1] for number in there}
            self._consumer.subscribe([self._broker.topic], on_assign=self._assigned, on_revoke=self._revoked)
            return
        if missing := sorted(set(partitions) - set(there)):
            raise UsageError(
                f"topic {self._broker.topic} has no partition {missing[0]}",
                f"it has {len(there)}, from 0 on",
                parameter="partitions",
            )
        with kafka_errors(f"the offsets of {self._broker.topic} cannot be found out"):
            self._consumer.assign(self._starts([self._partition(number) for number in partitions]))
        logger.info("reads %s", self._names(partitions))

    def _partition(self, number: int, offset: int | None = None) -> TopicPartition:
        found: TopicPartition = library().TopicPartition(self._broker.topic, number)
        if offset is not None:
            found.offset = offset
        return found

    def _starts(self, partitions: Iterable[TopicPartition]) -> list[TopicPartition]:
        """Partitions with the offsets at which they begin. Where the group has none, it gets one now, so that a start
        at the latest event is the same one after a crash.
        """
        found = self._consumer.committed(list(partitions), timeout=ANSWER_SECONDS)
        if failed := [one.error for one in found if one.error is not None]:
            raise library().KafkaException(failed[0])
        new = [one for one in found if one.offset < 0]
        for one in new:
            low, high = self._watermarks(one)
            one.offset = low if self._start == "earliest" else high
        self._settled |= {one.partition: one.offset for one in found}
        self._open = {*(self._open or ()), *(one.partition for one in found)}
        self._commit({one.partition for one in new})
        return found

    def _watermarks(self, partition: TopicPartition) -> tuple[int, int]:
        found = self._consumer.get_watermark_offsets(partition, timeout=ANSWER_SECONDS)
        if found is None:
            kafka = library()
            raise kafka.KafkaException(kafka.KafkaError(kafka.KafkaError._TIMED_OUT))
        return found

    # -- what the library says ---------------------------------------------------------------------------------------

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """After an exception here the library would go on by itself."""
        try:
            with kafka_errors(f"the offsets of {self._broker.topic} cannot be found out"):
                self._assign(self._starts(partitions))
        except SourceError as error:
            self._failed = SourceError(error.cause, error.remedy)
            return
        logger.info("reads %s", self._names(one.partition for one in partitions))

    def _assign(self, partitions: list[TopicPartition]) -> None:
        """Has the library read from these offsets: in addition, or instead, as its way to share out partitions asks."""
        kafka = library()
        try:
            self._consumer.incremental_assign(partitions)
        except kafka.KafkaException as error:
            if error.args[0].code() != kafka.KafkaError._STATE:
                raise
            self._consumer.assign(partitions)

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = {one.partition for one in partitions}
        self.leaving(numbers)
        self._commit(numbers)  # also where nothing was read
        self._held = [message for message in self._held if message.partition not in numbers]
        for number in numbers:
            self._settled.pop(number, None)
            self._ends.pop(number, None)
        self._open = (self._open or set()) - numbers
        if numbers:
            logger.info("gave up %s", self._names(numbers))

    def _names(self, numbers: Iterable[int]) -> str:
        return f"partitions {', '.join(map(str, sorted(numbers))) or 'none'} of topic {self._broker.topic}"

    def _note(self, error: KafkaError) -> None:
        """Of what concerns no message: the library connects again by itself."""
        kafka = library().KafkaError
        if error.fatal() or error.code() in (kafka._AUTHENTICATION, kafka._SSL):
            self._failed = source_error(f"the brokers at {self._broker.servers} refuse this client", error)
        else:
            self._limited.warning(error.name(), "%s: %s", self._broker.servers, error.str())

    def _bad(self, message: Any) -> None:
        """Of a message that is an error."""
        kafka, error = library().KafkaError, message.error()
        where = f"topic {self._broker.topic}, partition {message.partition()}"
        if error.code() == kafka._PARTITION_EOF:
            if self._open is not None:
                self._open.discard(message.partition())
        elif error.code() in (kafka._AUTO_OFFSET_RESET, kafka.OFFSET_OUT_OF_RANGE, kafka._LOG_TRUNCATION):
            raise SourceError(
                f"{where}: what comes behind the group's offset is not there ({error.str()})",
                "find out whether events were deleted before they were read; then take another group, which begins at "
                "the oldest event: what is stored already is recognised",
                parameter="group",
            )
        elif isinstance(failed := source_error(where, error), SourceUnavailableError):
            self._limited.warning(error.name(), "%s", failed)
        else:
            raise failed

    # -- a source ----------------------------------------------------------------------------------------------------

    def read(self, count: int, seconds: float) -> Sequence[Message]:
        """One by one: of several at a time, some could be of partitions that go away at that moment."""
        if self._paused:
            self._consumer.resume(self._consumer.assignment())
            self._paused = False
        size, deadline = 0, time.monotonic() + seconds
        while len(self._held) < count and size < READ_BYTES and not self._all_read:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if (message := self._next(left)) is not None:
                self._held.append(message)
                size += len(message.value or b"")
        found, self._held = self._held[:count], self._held[count:]
        return found

    def _next(self, seconds: float) -> Message | None:
        """None also where something else happened."""
        with kafka_errors(f"topic {self._broker.topic} cannot be read"):
            message = self._consumer.poll(seconds)
        if self._failed is not None:
            raise self._failed
        if message is None:
            return None
        if message.error() is not None:
            self._bad(message)
            return None
        number, offset = message.partition(), message.offset()
        assert number is not None and offset is not None  # only of messages to be produced
        if self._once:
            self._note_end(number, offset + 1)
        return Message(producer_of(self._name, number), number, offset, offset + 1, message.key(), message.value())

    def _note_end(self, number: int, after: int) -> None:
        """With `once`, the end is what the broker said with the first messages."""
        if number not in self._ends:
            _, high = self._consumer.get_watermark_offsets(self._partition(number), cached=True)
            if high < 0:  # not said yet
                return
            self._ends[number] = high
        if self._open is not None and after >= self._ends[number]:
            self._open.discard(number)

    def wait(self, seconds: float) -> None:
        """The group takes a consumer that does not ask for messages for dead; this one asks, of paused partitions."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._consumer.pause(self._consumer.assignment())  # also those that came meanwhile
            self._paused = True
            if (message := self._next(left)) is not None:
                self._held.append(message)

    def reject(self, rejected: Sequence[Rejected]) -> None:
        if self._dead_letters is not None:
            self._dead_letters.put(rejected)

    def commit(self, positions: Mapping[int, int]) -> None:
        """Does not wait for the answer, which may take for ever; before partitions are given up, and in `close`, what
        was sent comes first.
        """
        self._settled |= positions
        self._commit(positions)

    def _commit(self, numbers: Iterable[int]) -> None:
        offsets = [self._partition(number, self._settled[number]) for number in numbers if number in self._settled]
        if offsets:
            with kafka_errors(f"the offsets of {self._broker.topic} cannot be committed"):
                self._consumer.commit(offsets=offsets, asynchronous=True)

    def _committed(self, error: KafkaError | None, _partitions: object) -> None:
        if error is None or error.code() == library().KafkaError._NO_OFFSET:
            return
        failed = source_error(f"the offsets of {self._broker.topic} cannot be committed", error)
        if isinstance(failed, SourceUnavailableError):
            self._limited.warning("commit", "%s; they are committed with the next ones", failed)
        else:
            self._failed = failed

    def place(self, message: Message) -> str:
        return f"topic {self._broker.topic}, partition {message.partition}, offset {message.sequence}"

    def lags(self) -> Mapping[str, int]:
        found = {}
        for number, settled in sorted(self._settled.items()):
            _, high = self._consumer.get_watermark_offsets(self._partition(number), cached=True)
            if high >= 0:  # else nothing was read yet
                found[f"{self._broker.topic}/{number}"] = max(0, high - settled)
        return found

    @property
    def _all_read(self) -> bool:
        return self._once and self._open is not None and not self._open and self._others_have_read()

    def _others_have_read(self) -> bool:
        """Whether the group has settled the partitions that are not ours. One whose reader was killed comes to us."""
        left = [self._partition(number) for number in self._elsewhere if number not in self._settled]
        if not left:
            return True
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        with suppress(library().KafkaException):  # asked again
            for one in self._consumer.committed(left, timeout=ANSWER_SECONDS):
                if one.error is None and one.offset >= self._elsewhere[one.partition]:
                    del self._elsewhere[one.partition]
        return not any(one.partition in self._elsewhere for one in left)

    @property
    def ended(self) -> bool:
        return self._all_read and not self._held

    def close(self) -> None:
        """The library waits for brokers that have gone, for ever; this does for a while."""
        if self._closing is not None:
            return
        self._closing = threading.Thread(target=self._consumer.close, name=CLOSING, daemon=True)
        self._closing.start()
        self._closing.join(CLOSE_SECONDS)
        if self._closing.is_alive():
            logger.warning("no broker at %s answers: what was not committed is read again", self._broker.servers)
