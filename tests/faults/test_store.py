"""A state store that goes away, is replaced, or is damaged: an error, never a wrong answer or a lost update."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import grpc
import pytest

from dman_runtime.errors import UsageError
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.servers import connect
from tools.faults.attacks import Caller, Calls, KilledReader, busy_user, update
from tools.faults.honest import add_one_event, failures, health, keeps_failing, status_of, stored_events
from tools.faults.servers import FaultServer, wait_until

from .conftest import ITEMS, Start

pytestmark = pytest.mark.slow

Histories = dict[str, list[tuple[str, int]]]
DETECTION_SECONDS = 12.0  # how long a server may take to see that its store has gone


# -- a store that goes away ------------------------------------------------------------------------------------------


def test_a_removed_state_directory_ends_updates_and_health(start: Start) -> None:
    server = start()
    assert failures(server.address, add_one_event, health, rounds=3) == []
    shutil.rmtree(server.state)
    assert keeps_failing(server.address, add_one_event, seconds=DETECTION_SECONDS)
    assert wait_until(lambda: status_of(server.address, health) == "NOT_SERVING", seconds=DETECTION_SECONDS)
    assert not list(server.state.rglob("data.mdb"))  # no empty store in its place


def test_a_worker_that_starts_again_makes_no_second_store(start: Start) -> None:
    server = start("--workers 2")
    assert failures(server.address, add_one_event, rounds=3) == []
    shutil.rmtree(server.state)
    server.workers()[0].kill()
    assert keeps_failing(server.address, add_one_event, seconds=DETECTION_SECONDS)
    assert not list(server.state.rglob("data.mdb"))


def test_an_empty_data_file_is_no_new_store(start: Start) -> None:
    server = start()
    assert failures(server.address, add_one_event, rounds=3) == []
    server.stop()
    server.data_file().write_bytes(b"")
    with pytest.raises(UsageError):
        server.start()


def test_an_emptied_directory_is_no_new_store_where_one_must_exist(start: Start) -> None:
    """As where a volume is not mounted."""
    server = start()
    server.stop()
    server.state.rename(server.state.with_name("unmounted"))
    server.state.mkdir()
    with pytest.raises(UsageError):
        start(if_known=("--state-must-exist",))


def test_a_removed_lock_file_loses_no_acknowledged_update(start: Start) -> None:
    """Two servers without a common lock would overwrite each other's commits."""
    with ExitStack() as stack:
        servers = [start()]
        assert failures(servers[0].address, add_one_event, rounds=1) == []
        (servers[0].data_file().parent / "lock.mdb").unlink()
        with suppress(UsageError):  # refusing is right
            servers.append(start())
        acknowledged: dict[str, list[int]] = {}
        writers = [
            stack.enter_context(_numbered_updates(server, f"user {n % 4}", n, acknowledged))
            for n, server in enumerate(servers * 4)
        ]
        wait_until(lambda: all(sum(writer.statuses.values()) >= 150 for writer in writers), seconds=8)
    for server in servers:
        server.stop()
    checking = start()
    for key, times in acknowledged.items():
        stored = {time for _, time in stored_events(checking.address, key.partition("/")[0])}
        assert set(times) <= stored, f"{key}: {len(set(times) - stored)} of {len(times)} acknowledged updates are lost"


def _numbered_updates(server: FaultServer, user: str, writer: int, acknowledged: dict[str, list[int]]) -> Calls:
    """Updates of one user by one writer, who notes the times of those that were acknowledged."""
    times = acknowledged.setdefault(f"{user}/{writer}", [])

    def send(caller: Caller, number: int) -> None:
        time = 1_000_000 * writer + number
        caller.stub.Update(update(user, [ITEMS[number % len(ITEMS)]], first_time=time), timeout=5)
        times.append(time)

    return Calls(server.address, send, what="updates", threads=1, most=150)


def test_a_killed_reader_does_not_make_the_file_grow_for_ever(start: Start) -> None:
    server = start()
    assert failures(server.address, add_one_event, rounds=3) == []
    size = 0

    def flat() -> bool:
        nonlocal size
        with busy_user_calls(server, 150) as updates:
            updates.wait()
        assert updates.statuses == {"OK": 150}
        before, size = size, server.data_file().stat().st_size
        return size - before < 500_000  # 150 updates would leave 3.5 MB

    with KilledReader(server.data_file()):
        assert wait_until(flat, seconds=20, pause=1)


def busy_user_calls(server: FaultServer, calls: int) -> Calls:
    return Calls(
        server.address,
        lambda caller, number: caller.stub.Update(update("busy", [ITEMS[number % len(ITEMS)]]), timeout=10),
        what="updates of one user",
        threads=1,
        most=calls,
    )


# -- a damaged store -------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(start: Start) -> Iterator[tuple[FaultServer, Histories]]:
    """A stopped server with 60 users, and what each of them was sent."""
    server = start()
    chooser = random.Random(0)
    sent: Histories = {}
    with connect(server.address) as channel:
        stub = RecommenderStub(channel)
        for n in range(60):
            items = chooser.choices(ITEMS, k=20 + 3 * n)
            stub.Update(update(f"user {n}", items[:15], f"first {n}"), timeout=10)
            stub.Update(update(f"user {n}", items[15:], f"second {n}", first_time=15), timeout=10)
            sent[f"user {n}"] = [(item, time) for time, item in enumerate(items)]
    server.stop()
    yield server, sent


def test_flipped_bits_give_right_answers_or_errors(stored: tuple[FaultServer, Histories]) -> None:
    server, sent = stored
    file = server.data_file()
    whole, chooser, wrong = file.read_bytes(), random.Random(1), list[str]()
    for _ in range(4):
        file.write_bytes(_with_flipped_bits(whole, 16, chooser))
        try:
            server.start()
        except UsageError:
            continue  # refusing is right
        with connect(server.address) as channel:
            stub = RecommenderStub(channel)
            wrong += [text for user, events in sent.items() if (text := _wrong_answer(stub, user, events))]
        server.stop()
    assert wrong == []


def _with_flipped_bits(content: bytes, count: int, chooser: random.Random) -> bytes:
    """Flips bits where there is something: 90 % of a page may be empty."""
    changed = bytearray(content)
    used = [place for place in range(8192, len(content)) if content[place]]
    for place in chooser.sample(used, count):
        changed[place] ^= 1 << chooser.randrange(8)
    return bytes(changed)


def _wrong_answer(stub: RecommenderStub, user: str, events: list[tuple[str, int]]) -> str | None:
    """What is wrong with what the server says of a user, and after one more event; None for a right answer or error."""
    try:
        reply = stub.GetUser(pb.GetUserRequest(user_id=user, recent_events=10_000), timeout=5)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            return None
        return f"{user} is missing"
    if [(event.item_id, event.timestamp) for event in reply.recent_events] != events:
        return f"{user} has another history"
    if reply.event_count != len(events):
        return f"{user} has {reply.event_count} events"
    try:
        after = stub.Update(update(user, ["1"], first_time=len(events)), timeout=5).event_count
    except grpc.RpcError:
        return None
    return None if after == len(events) + 1 else f"{user} has {after} events after an update"


# -- one moment ------------------------------------------------------------------------------------------------------


def test_what_is_said_of_a_user_is_of_one_moment(start: Start) -> None:
    server, mixed, read = start(), list[str](), 0
    lock = threading.Lock()

    def look(caller: Caller, _: int) -> None:
        nonlocal read
        reply = caller.stub.GetUser(pb.GetUserRequest(user_id="busy", recent_events=10_000), timeout=5)
        counts = {reply.event_count, len(reply.recent_events), reply.history_count or reply.event_count}
        with lock:
            read += 1
            if len(counts) > 1:
                mixed.append(f"{reply.event_count=}, {reply.history_count=}, {len(reply.recent_events)=}")

    assert failures(server.address, add_one_event, rounds=1) == []
    with busy_user(server.address, "busy", ITEMS), ExitStack() as stack:
        assert wait_until(lambda: bool(stored_events(server.address, "busy")), seconds=5)
        readers = stack.enter_context(Calls(server.address, look, what="GetUser calls", threads=8))
        wait_until(lambda: bool(mixed), seconds=5)
    assert mixed == []
    assert read > 500 and readers.statuses.keys() == {"OK"}
