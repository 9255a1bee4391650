"""Topics of two brokers that are processes of their own: the real one tansu, and the mock cluster of librdkafka."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from dman_runtime.errors import SourceError, SourceUnavailableError, UsageError
from dman_runtime.ingest import broker
from dman_runtime.ingest.base import Message, Rejected
from dman_runtime.ingest.broker import Broker, producer_of, read_settings
from dman_runtime.ingest.kafka import CLOSING, KafkaSource
from tools.faults import kafka
from tools.faults.kafka import SESSION_MS, Topic, messages_of
from tools.faults.servers import wait_until

ALL = (0, 1, 2, 3)
numbers = itertools.count()


@pytest.fixture(scope="module")
def tansu() -> Iterator[str]:
    with kafka.tansu() as address:
        yield address


@pytest.fixture(scope="module")
def mock() -> Iterator[str]:
    with kafka.mock() as address:
        yield address


def new_topic(address: str, messages: int = 0) -> Topic:
    """A topic with so many messages, whose values are numbers, in turns in its partitions."""
    topic = Topic(address, f"topic{next(numbers)}")
    write(topic, range(messages))
    return topic


def write(topic: Topic, values: range) -> None:
    for number in values:
        topic.put(b"%d" % number, key=f"k{number}", partition=number % 4)
    topic.flush()


Open = Callable[..., KafkaSource]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:

        def open_one(topic: Topic, settings: dict[str, str] | None = None, **options: Any) -> KafkaSource:
            chosen: dict[str, Any] = {"group": "g", "producer": topic.name} | options
            source = KafkaSource(Broker.parse(topic.url, settings or {}), **chosen)
            return stack.enter_context(closing(source))

        yield open_one


def rest(source: KafkaSource, wanted: int = 1000) -> list[Message]:
    """What there is, until the end or until there are so many."""
    found, deadline = list[Message](), time.monotonic() + 20
    while not source.ended and len(found) < wanted and time.monotonic() < deadline:
        found += source.read(wanted, 0.05)
    return found


def committed(topic: Topic, group: str = "g") -> list[int]:
    consumer = Consumer({"bootstrap.servers": topic.url.split("/")[2], "group.id": group})
    found = consumer.committed([TopicPartition(topic.name, number) for number in ALL], timeout=10)
    consumer.close()
    return [one.offset for one in found]


def test_partitions_are_read_in_their_orders_and_gone_on_with(tansu: str, opened: Open) -> None:
    topic = new_topic(tansu, 40)
    source = opened(topic, partitions=ALL, once=True)
    found = rest(source)
    assert source.ended and sorted(int(one.value or b"") for one in found) == list(range(40))
    for message in found:
        number = int(message.value or b"")
        assert message[:5] == (f"{topic.name}/{number % 4}", number % 4, number // 4, number // 4 + 1, b"k%d" % number)
    assert source.lags() == {f"{topic.name}/{number}": 10 for number in ALL}
    source.commit({0: 10, 1: 10, 2: 10, 3: 4})
    assert source.lags()[f"{topic.name}/3"] == 6
    source.close()
    assert committed(topic) == [10, 10, 10, 4]
    again = opened(topic, partitions=(1, 3), once=True)
    assert [one.sequence for one in rest(again)] == [4, 5, 6, 7, 8, 9]
    assert again.place(found[0]) == f"topic {topic.name}, partition {found[0].partition}, offset {found[0].sequence}"


def test_group_without_an_offset_begins_at_the_latest_event_for_good(mock: str, opened: Open) -> None:
    """Of the mock: tansu does not know where partitions end, until they are read."""
    topic = new_topic(mock, 8)
    opened(topic, partitions=ALL, start="latest").close()
    write(topic, range(8, 12))
    found = rest(opened(topic, partitions=ALL, start="latest", once=True))
    assert sorted(int(one.value or b"") for one in found) == [8, 9, 10, 11]
    assert len(rest(opened(topic, partitions=ALL, group="other", once=True))) == 12


def test_dead_letters_have_reason_and_place(tansu: str, opened: Open) -> None:
    topic, letters = new_topic(tansu, 5), new_topic(tansu)
    source = opened(topic, partitions=(0,), once=True, dead_letters=letters.name)
    first, last = rest(source)
    source.reject([Rejected(last, "no such thing"), Rejected(first._replace(value=None), "é")])
    found = {headers["offset"]: (value, headers) for value, headers in messages_of(tansu, letters.name)}
    where = {"topic": topic.name, "partition": "0"}
    assert found == {
        "1": (b"4", where | {"reason": "no such thing", "offset": "1"}),
        "0": (b"", where | {"reason": "é", "offset": "0"}),
    }


def test_offset_that_is_not_there_is_an_error(mock: str, opened: Open) -> None:
    topic = new_topic(mock, 4)
    source = opened(topic, partitions=(0,))
    source.commit({0: 9999})
    source.close()
    with pytest.raises(SourceError, match="behind the group's offset is not there") as caught:
        rest(opened(topic, partitions=(0,)))
    assert caught.value.parameter == "group" and not isinstance(caught.value, SourceUnavailableError)


@pytest.mark.slow
def test_members_share_partitions_and_settle_before_they_give_them_up(tansu: str, opened: Open) -> None:
    topic = new_topic(tansu, 40)
    settings = {"session.timeout.ms": str(SESSION_MS), "heartbeat.interval.ms": "200"}
    one = opened(topic, settings)
    assert len(rest(one, 40)) == 40
    left: list[set[int]] = []

    def leaving(partitions: Collection[int]) -> None:
        left.append(set(partitions))
        one.commit(dict.fromkeys(partitions, 10))

    one.leaving = leaving
    other = opened(topic, settings)
    again = list[Message]()

    def shared() -> bool:
        one.read(100, 0.1)
        again.extend(other.read(100, 0.1))
        return bool(one.lags() and other.lags())

    assert wait_until(shared, seconds=20, pause=0)
    assert left == [set(ALL)] and not again  # what was committed then is not read by anybody else
    assert sorted([*one.lags(), *other.lags()]) == [f"{topic.name}/{number}" for number in ALL]
    other.close()
    write(topic, range(40, 44))
    new = set[bytes | None]()
    assert wait_until(lambda: len(new.update(m.value for m in one.read(9, 0.1)) or new) == 4, seconds=20, pause=0)


@pytest.mark.slow
def test_once_waits_for_the_partitions_of_other_members(mock: str, opened: Open) -> None:
    """Of the mock, as tansu does not know where partitions end."""
    topic = new_topic(mock, 40)
    settings = {"session.timeout.ms": "3000", "heartbeat.interval.ms": "200"}
    one = opened(topic, settings)
    other = opened(topic, settings, once=True)

    def shared() -> bool:
        one.read(0, 0.1)
        other.read(0, 0.1)
        return bool(one.lags() and other.lags())

    assert wait_until(lambda: one.wait(0.1) or other.wait(0.1) or shared(), seconds=20, pause=0)
    messages = rest(other, 20)
    other.commit({message.partition: message.after for message in messages})
    assert len(messages) == 20 and not other.ended
    messages = rest(one, 20)
    one.commit({message.partition: message.after for message in messages})
    assert wait_until(lambda: bool(one.read(9, 0.1) or other.read(9, 0.1) or other.ended), seconds=20, pause=0)


@pytest.mark.slow
def test_broker_that_goes_away_does_not_hold_up_the_end(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dman_runtime.ingest.kafka.CLOSE_SECONDS", 0.5)
    monkeypatch.setattr("dman_runtime.ingest.kafka.LETTER_MS", 300)
    with kafka.tansu() as address:
        topic, letters = new_topic(address, 4), new_topic(address)
        source = opened(topic, partitions=ALL, dead_letters=letters.name)
        found = rest(source, 4)
    source.commit({0: 1})
    assert source.read(10, 0.2) == []
    with pytest.raises(SourceUnavailableError, match="dead-letter topic"):
        source.reject([Rejected(found[0], "no")])
    source.close()
    assert "no broker at" in caplog.text
    (closing,) = (thread for thread in threading.enumerate() if thread.name == CLOSING)
    with kafka.tansu(int(address.rpartition(":")[2])):  # what still waits in this process must not reach other tests
        closing.join(20)
    assert not closing.is_alive()


# -- names and settings ------------------------------------------------------------------------------------------------


def test_topic_that_is_made_anew_is_another_producer(tansu: str) -> None:
    topics = [new_topic(tansu) for _ in range(2)]
    names = [Broker.parse(topic.url, {}).producer_name() for topic in topics]
    assert all(name.startswith(f"{topic.name}@") for name, topic in zip(names, topics, strict=True))
    assert names[0] != names[1] and names[0] == Broker.parse(topics[0].url, {}).producer_name()


def test_producer_has_topic_and_partition_and_fits(tansu: str) -> None:
    assert producer_of("views@id", 3) == "views@id/3"
    long = [producer_of("x" * 249, 0), producer_of("x" * 248 + "y", 0), producer_of("x" * 249, 1)]
    assert len(set(long)) == 3 and all(len(name.encode()) <= 128 for name in long)


@pytest.mark.parametrize(
    ("options", "words", "parameter"),
    [
        ({"partitions": (0, 9)}, "has no partition 9", "partitions"),
        ({"dead_letters": "nowhere"}, "topic nowhere", ""),
        ({"settings": {"no.such": "1"}}, "No such configuration property", "kafka_options"),
    ],
)
def test_source_that_cannot_be_is_a_usage_error(
    tansu: str, opened: Open, options: dict[str, Any], words: str, parameter: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        opened(new_topic(tansu), **options)
    assert caught.value.parameter == parameter


def test_topic_or_broker_that_is_not_there_is_a_usage_error(tansu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "ANSWER_SECONDS", 0.3)
    for url, words in ((f"kafka://{tansu}/nowhere", "topic nowhere"), ("kafka://127.0.0.1:1/t", "no broker at")):
        with pytest.raises(UsageError, match=words):
            KafkaSource(Broker.parse(url, {}), group="g", producer="p")
    with pytest.raises(UsageError, match="the id of topic t cannot be found out") as caught:
        Broker.parse("kafka://127.0.0.1:1/t", {}).producer_name()
    assert caught.value.parameter == "producer"


@pytest.mark.parametrize("url", ["kafka://", "kafka://host:9092", "kafka:///topic", "kafka://host/a/b", "http://h/t"])
def test_address_names_brokers_and_a_topic(url: str) -> None:
    with pytest.raises(UsageError, match="names no topic"):
        Broker.parse(url, {})
    assert Broker.parse("kafka://a:1,b:2/t", {}) == Broker("a:1,b:2", "t", {})


def test_settings_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "kafka.properties"
    path.write_text("# who we are\nsasl.username = me\n\nsasl.password=a=b\n")
    assert read_settings(path) == {"sasl.username": "me", "sasl.password": "a=b"}
    for line, words in (("nothing", "line 1 is no"), ("=x", "line 1 is no"), ("group.id=x", "is set by the ingester")):
        path.write_text(line)
        with pytest.raises(UsageError, match=words):
            read_settings(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_settings(tmp_path / "missing")
