"""What ingestion expects of every source: order, positions that are gone on from, and nothing lost or made up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import pytest
from contract.sources import HARNESSES, Harness

from dman_runtime.ingest.base import Message, Rejected, Source

Open = Callable[..., Source]


@pytest.fixture(scope="module", params=HARNESSES)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], Harness]]:
    with HARNESSES[request.param]() as made:
        yield made


@pytest.fixture
def harness(make: Callable[[Path], Harness], tmp_path: Path) -> Harness:
    return make(tmp_path)


@pytest.fixture
def opened(harness: Harness) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(harness.open(**options)))


def rest(source: Source, wanted: int = 1000) -> list[Message]:
    """What there is, until the end or until there are so many."""
    found, deadline = list[Message](), time.monotonic() + 20
    while not source.ended and len(found) < wanted and time.monotonic() < deadline:
        found += source.read(wanted - len(found), 0.05)
    return found


def values(messages: Sequence[Message]) -> list[int]:
    return sorted(int(message.value or b"") for message in messages)


def write(harness: Harness, numbers: range) -> None:
    harness.write([b"%d" % number for number in numbers])


def test_messages_come_in_the_order_of_their_partitions(harness: Harness, opened: Open) -> None:
    write(harness, range(40))
    source = opened()
    found = rest(source, 40)
    assert values(found) == list(range(40)) and not source.ended
    for partition in range(harness.partitions):
        own = [message for message in found if message.partition == partition]
        assert [int(one.value or b"") for one in own] == list(range(partition, 40, harness.partitions))
        assert len({one.producer for one in own}) == 1
        for one, following in pairwise(own):
            assert one.sequence < one.after <= following.sequence
    assert len({message.producer for message in found}) == harness.partitions
    assert len({source.place(message) for message in found}) == 40
    write(harness, range(40, 44))
    assert values(rest(source, 4)) == list(range(40, 44))


def test_position_is_gone_on_from(harness: Harness, opened: Open) -> None:
    write(harness, range(40))
    source = opened()
    found = rest(source, 40)
    assert sum(source.lags().values()) == sum(
        max(one.after for one in found if one.partition == partition) for partition in range(harness.partitions)
    )
    for message in found:
        if int(message.value or b"") < 24:
            source.commit({message.partition: message.after})
    assert sum(source.lags().values()) > 0
    source.close()
    again = opened()
    more = rest(again, 16)
    assert values(more) == list(range(24, 40))
    assert {message[:5] for message in more} <= {message[:5] for message in found}  # the same producers and sequences
    again.commit({message.partition: message.after for message in more})
    assert set(again.lags().values()) == {0}
    again.close()
    last = opened(once=True)
    assert rest(last) == [] and last.ended


def test_what_is_not_committed_is_read_again(harness: Harness, opened: Open) -> None:
    write(harness, range(8))
    first = rest(opened(), 8)
    assert sorted(rest(opened(), 8)) == sorted(first)


def test_once_ends_at_the_end_of_the_start(harness: Harness, opened: Open) -> None:
    empty = opened(once=True)
    assert rest(empty) == [] and empty.ended
    write(harness, range(8))
    source = opened(once=True)
    assert not source.ended
    assert values(rest(source)) == list(range(8)) and source.ended and list(source.read(10, 0.01)) == []


def test_read_gives_no_more_than_asked_for_and_waits_no_longer(harness: Harness, opened: Open) -> None:
    write(harness, range(12))
    source = opened()
    assert all(len(source.read(1, 0.5)) <= 1 for _ in range(12))
    began = time.monotonic()
    source.read(10, 0)
    source.read(10, 0.1)
    assert time.monotonic() - began < 5


def test_waiting_reads_nothing_and_loses_nothing(harness: Harness, opened: Open) -> None:
    write(harness, range(4))
    source = opened()
    found = rest(source, 4)
    write(harness, range(4, 40))
    source.wait(0.1)
    write(harness, range(40, 44))
    source.wait(0.05)
    found += rest(source, 40)
    assert values(found) == list(range(44))
    for partition in range(harness.partitions):
        own = [message.sequence for message in found if message.partition == partition]
        assert own == sorted(own)


def test_dead_letters_are_there_when_reject_returns(harness: Harness, opened: Open) -> None:
    write(harness, range(5))
    source = opened()
    found = rest(source, 5)
    source.reject([])
    source.reject([Rejected(message, f"reason é {message.value!r}") for message in found])
    expected = [(f"reason é {message.value!r}", message.value) for message in found]
    assert sorted(harness.rejected()) == sorted(expected)


def test_close_may_be_called_twice(opened: Open) -> None:
    source = opened()
    source.close()
    source.close()
