"""Admission and reception, without a server: what is counted, who is refused, who waits, who is dropped."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dman_runtime.api import admission as module
from dman_runtime.api.admission import MAX_LONG, MAX_SLOW, SMALL_BYTES, SMALL_RESERVE, Admission, Held, Receiver
from dman_runtime.errors import RefusedError

MIB = 1 << 20
LIMIT = 100 * MIB


def admission(*, max_requests: int = 4) -> Admission:
    return Admission(max_requests=max_requests, max_bytes=LIMIT)


# -- counts and bytes ------------------------------------------------------------------------------------------------


def test_requests_beyond_the_limit_are_refused_until_one_leaves() -> None:
    counted = admission(max_requests=2)
    counted.enter()
    counted.enter()
    with pytest.raises(RefusedError, match="the server holds 2 requests"):
        counted.enter()
    assert counted.requests == 2  # the refused one is not counted
    counted.leave()
    counted.enter()
    assert counted.requests == 2


def test_bytes_are_counted_until_they_are_released_and_nothing_of_the_caller_stays() -> None:
    counted = admission()
    for caller, size in (("a", 5 * MIB), ("a", 0), ("b", 7)):
        counted.hold(caller, size)
    assert counted.bytes == 5 * MIB + 7
    for caller, size in (("a", 0), ("a", 5 * MIB), ("b", 7)):
        counted.release(caller, size)
    assert counted.bytes == 0
    assert not counted._held  # or each connection would leave an entry behind


def test_one_caller_gets_half_of_the_bytes_and_others_the_rest() -> None:
    counted = admission()
    counted.hold("greedy", LIMIT // 2)
    with pytest.raises(RefusedError, match="50 MiB"):
        counted.hold("greedy", MIB)
    counted.hold("other", LIMIT // 2)
    with pytest.raises(RefusedError, match="100 MiB"):
        counted.hold("third", MIB)
    assert counted.bytes == LIMIT
    assert "third" not in counted._held


def test_a_single_message_may_take_more_than_half() -> None:
    counted = admission()
    counted.hold("one", LIMIT)
    counted.release("one", LIMIT)
    counted.hold("one", SMALL_BYTES)
    with pytest.raises(RefusedError):
        counted.hold("one", LIMIT // 2)


def test_a_single_call_may_take_more_than_half_for_its_message_and_what_is_made_of_it() -> None:
    counted = admission()
    one = Held(counted, "one")
    one.add(10 * MIB)
    one.add(LIMIT // 2)
    assert counted.bytes == one.size == 10 * MIB + LIMIT // 2
    with pytest.raises(RefusedError):
        one.add(LIMIT // 2)
    with pytest.raises(RefusedError):
        Held(counted, "one").add(LIMIT // 4)  # another call of the same caller
    one.become(MIB, always=False)
    assert counted.bytes == one.size == MIB
    one.release()
    one.release()
    assert counted.bytes == 0 and not counted._held


def test_a_call_whose_reply_is_refused_holds_nothing() -> None:
    counted = admission()
    counted.hold("other", LIMIT - MIB)
    call = Held(counted, "one")
    call.add(MIB)
    with pytest.raises(RefusedError):
        call.become(2 * MIB, always=False)
    assert call.size == 0 and counted.bytes == LIMIT - MIB


def test_small_ones_have_a_reserve_that_large_ones_cannot_use() -> None:
    counted = admission()
    counted.hold("a", LIMIT // 2)
    counted.hold("b", LIMIT // 2)
    with pytest.raises(RefusedError):
        counted.hold("c", SMALL_BYTES + 1)
    for _ in range(SMALL_RESERVE // SMALL_BYTES):
        counted.hold("c", SMALL_BYTES)
    with pytest.raises(RefusedError):
        counted.hold("d", 1)


def test_what_is_always_held_is_counted_beyond_the_limit() -> None:
    counted = admission()
    counted.hold("a", LIMIT)
    counted.hold("a", MIB, always=True)
    assert counted.bytes == LIMIT + MIB
    counted.release("a", LIMIT)
    counted.release("a", MIB)
    assert counted.bytes == 0


# -- long requests ---------------------------------------------------------------------------------------------------


class LongRequests:
    """Long requests that end when they are told to."""

    def __init__(self) -> None:
        self.admission, self.order, self._ends = admission(), list[str](), dict[str, asyncio.Event]()
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, name: str, caller: str = "a") -> None:
        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._run(name, caller))
        await settle()

    async def _run(self, name: str, caller: str) -> None:
        async with self.admission.long(caller):
            self.order.append(name)
            await self._ends[name].wait()

    def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()

    async def end_all(self) -> None:
        self.end(*self._ends)
        await asyncio.wait_for(asyncio.gather(*self.tasks.values(), return_exceptions=True), 10)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_long_requests_of_a_caller_wait_in_order_and_hold_up_no_other_caller() -> None:
    long = LongRequests()
    for n in range(MAX_LONG + 2):
        await long.start(f"a{n}")
    await long.start("b0", caller="b")
    assert long.order == ["a0", "a1", "b0"]
    long.end("a1")
    await settle()
    assert long.order == ["a0", "a1", "b0", "a2"]
    await long.end_all()
    assert long.order[-1] == "a3"
    assert not long.admission._running and not long.admission._queues


async def test_a_long_request_that_is_cancelled_while_it_waits_gives_its_place_to_the_next() -> None:
    long = LongRequests()
    for n in range(MAX_LONG + 2):
        await long.start(f"a{n}")
    long.tasks["a2"].cancel()
    await settle()
    long.end("a0")
    await settle()
    assert long.order == ["a0", "a1", "a3"]
    await long.end_all()
    assert long.tasks["a2"].cancelled()
    assert not long.admission._running and not long.admission._queues


async def test_a_turn_that_comes_together_with_the_cancellation_is_passed_on() -> None:
    long = LongRequests()
    for n in range(MAX_LONG + 2):
        await long.start(f"a{n}")
    long.end("a0")
    await asyncio.sleep(0)  # a0 ends and gives its turn to a2, which has not run yet
    assert long.order == ["a0", "a1"]
    long.tasks["a2"].cancel()
    await settle()
    assert long.order == ["a0", "a1", "a3"]
    await long.end_all()
    assert not long.admission._running and not long.admission._queues


async def test_a_long_request_that_is_cancelled_while_it_runs_frees_its_place() -> None:
    long = LongRequests()
    for n in range(MAX_LONG + 1):
        await long.start(f"a{n}")
    long.tasks["a0"].cancel()
    await settle()
    assert long.order == ["a0", "a1", "a2"]
    await long.end_all()
    assert not long.admission._running and not long.admission._queues


# -- receiving -------------------------------------------------------------------------------------------------------


class Arriving:
    """A call whose message comes when the test says so."""

    def __init__(self, receiver: Receiver, peer: str) -> None:
        self._peer, self._message = peer, asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(receiver.receive(self))  # type: ignore[arg-type]

    def peer(self) -> str:
        return self._peer

    async def read(self) -> Any:
        return await self._message

    def arrive(self, message: object) -> None:
        self._message.set_result(message)

    @property
    def dropped(self) -> bool:
        return self.task.done() and isinstance(self.task.exception(), RefusedError)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps often; the first one finds everything slow."""
    monkeypatch.setattr(module, "_SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(module, "FAST_SECONDS", 0.0)


async def swept() -> None:
    await asyncio.sleep(0.1)


async def test_a_message_is_received_as_it_is_and_none_is_none() -> None:
    receiver = Receiver()
    one, nothing = Arriving(receiver, "p"), Arriving(receiver, "p")
    await settle()
    one.arrive(b"hello")
    nothing.arrive(object())  # gRPC's end of the stream
    assert (await one.task, await nothing.task) == (b"hello", None)
    assert not receiver._arriving


@pytest.mark.usefixtures("quick")
async def test_slow_messages_within_the_limit_are_waited_for() -> None:
    receiver = Receiver()
    calls = [Arriving(receiver, f"p{n}") for n in range(MAX_SLOW)]
    await swept()
    assert not any(call.dropped for call in calls)
    for call in calls:
        call.arrive(b"late")
    assert {await call.task for call in calls} == {b"late"}


@pytest.mark.usefixtures("quick")
async def test_one_slow_message_more_drops_the_oldest_of_the_greediest_connection() -> None:
    receiver = Receiver()
    modest = [Arriving(receiver, f"modest {n}") for n in range(3)]
    greedy = [Arriving(receiver, "greedy") for _ in range(MAX_SLOW)]
    await swept()
    assert not any(call.dropped for call in modest)
    assert [call.dropped for call in greedy] == [True] * 3 + [False] * (MAX_SLOW - 3)
    with pytest.raises(RefusedError, match="took too long to arrive"):
        await greedy[0].task
    for call in [*modest, *greedy[3:]]:
        call.arrive(b"x")
    await asyncio.gather(*(call.task for call in [*modest, *greedy[3:]]))
    assert not receiver._arriving


@pytest.mark.usefixtures("quick")
async def test_a_message_that_takes_too_long_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.05)
    call = Arriving(Receiver(), "p")
    with pytest.raises(RefusedError, match="took too long to arrive; send it at once"):
        await asyncio.wait_for(call.task, 10)


async def test_calls_beyond_all_that_may_be_receiving_are_dropped_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(module, "FAST_SECONDS", 60.0)
    monkeypatch.setattr(module, "MAX_RECEIVING", 5)
    receiver = Receiver()
    calls = [Arriving(receiver, f"p{n}") for n in range(7)]
    await swept()
    assert [call.dropped for call in calls] == [True] * 2 + [False] * 5
    for call in calls[2:]:
        call.arrive(b"x")
    assert {await call.task for call in calls[2:]} == {b"x"}


async def test_a_call_that_its_client_cancels_is_cancelled_and_forgotten() -> None:
    receiver = Receiver()
    call = Arriving(receiver, "p")
    await settle()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert not receiver._arriving


@pytest.mark.usefixtures("quick")
async def test_the_sweeper_rests_while_nothing_is_awaited_and_comes_back() -> None:
    receiver = Receiver()
    call = Arriving(receiver, "p")
    await settle()
    call.arrive(b"x")
    await call.task
    await swept()
    assert receiver._sweeper is None
    again = Arriving(receiver, "p")
    await settle()
    assert receiver._sweeper is not None
    again.arrive(b"y")
    assert await again.task == b"y"
    await swept()


def test_choosing_among_thousands_of_slow_messages_holds_up_nobody() -> None:
    """Each of 4,096 connections may have one; looking at all of them for each one that is dropped takes seconds."""
    slow = [module._Arriving(f"peer {n}", None) for n in range(module.MAX_RECEIVING)]
    looked = 0

    class Peer(str):
        def __hash__(self) -> int:
            nonlocal looked
            looked += 1
            return super().__hash__()

    for one in slow:
        one.peer = Peer(one.peer)
    dropped = module._of_the_greediest(slow, len(slow) - MAX_SLOW)
    assert dropped == slow[: len(slow) - MAX_SLOW]
    assert looked <= 4 * len(slow)
