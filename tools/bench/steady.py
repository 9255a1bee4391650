"""Recommendations and updates at a constant rate, in a process of their own, until they are stopped.

Each client has a connection and users of its own, and calls without retries: what fails is seen. A call is timed from
when it was sent, or, if the client was still waiting for the call before, from when it was due: a server that stands
still for a second delays all calls of that second.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple, Self

import grpc

from dman_runtime.errors import UsageError
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench.servers import connect

CALL_SECONDS, START_SECONDS, END_SECONDS = 30.0, 60.0, 120.0
RECOMMEND, UPDATE = "recommend", "update"


@dataclass(frozen=True)
class Load:
    """What is sent; picklable."""

    address: str
    users: Sequence[str]
    items: Sequence[str]  # that all bundles know: of the events
    catalogues: Mapping[str, frozenset[str]]  # item ids by the id of each bundle that may answer
    clients: int
    per_second: float  # calls, of all clients together
    updates: float = 0.2  # share of the calls
    k: int = 10
    keep_every: int = 20  # recommendations of a client: of so many, one reply is kept


class Sample(NamedTuple):
    """One call; times as time.monotonic() says."""

    call: str
    began: float
    ended: float
    milliseconds: float
    bundle_id: str  # that the reply names
    error: str  # a gRPC status, or what is wrong with the reply; "" for none


class Kept(NamedTuple):
    """A reply to be computed again."""

    user_id: str
    at: int  # the moment of the request
    bundle_id: str
    event_count: int
    scores: Mapping[str, float]  # by item id


@dataclass
class Found:
    """What the clients saw."""

    samples: list[Sample] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    added: Counter[str] = field(default_factory=Counter)  # acknowledged events by user


class SteadyLoad:
    """The load while the block lasts; `found` has everything afterwards."""

    def __init__(self, load: Load) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(load, theirs), daemon=True)
        self._theirs = theirs
        self.found = Found()

    def __enter__(self) -> Self:
        self._process.start()
        self._theirs.close()  # so that the pipe ends when the process does
        if not self._pipe.poll(START_SECONDS) or self._pipe.recv() != "ready":
            raise UsageError("the clients did not start")
        return self

    def __exit__(self, *_: object) -> None:
        if not self._process.is_alive():
            raise UsageError("the clients died")
        self._pipe.send("enough")
        if self._pipe.poll(END_SECONDS):
            self.found = self._pipe.recv()
        self._process.join(END_SECONDS)
        self._process.kill()


def _run(load: Load, pipe: Connection) -> None:
    gc.disable()  # it would look at all samples again and again, with all clients waiting
    over, parts = threading.Event(), [Found() for _ in range(load.clients)]
    began = time.monotonic() + 0.5
    threads = [
        threading.Thread(target=_client, args=(load, number, began, over, part)) for number, part in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    pipe.send("ready")
    pipe.recv()
    over.set()
    for thread in threads:
        thread.join()
    pipe.send(
        Found(
            sorted((sample for part in parts for sample in part.samples), key=lambda sample: sample.began),
            [kept for part in parts for kept in part.kept],
            sum((part.added for part in parts), Counter()),
        )
    )


def _client(load: Load, number: int, begin: float, over: threading.Event, found: Found) -> None:
    chooser, users = random.Random(number), load.users[number :: load.clients]
    pause = load.clients / load.per_second
    with ExitStack() as stack:
        stub = RecommenderStub(stack.enter_context(connect(load.address)))
        due, free = begin + pause * number / load.clients, 0.0
        while not over.wait(max(0.0, due - time.monotonic())):
            user, sent = chooser.choice(users), time.monotonic()
            began = due if free > due else sent
            if chooser.random() < load.updates:
                call, bundle_id, error = UPDATE, *_update(stub, load, user, chooser, found)
            else:
                call, bundle_id, error = RECOMMEND, *_recommend(stub, load, user, chooser, found)
            free = time.monotonic()
            found.samples.append(Sample(call, sent, free, 1000 * (free - began), bundle_id, error))
            due += pause


def _update(stub: RecommenderStub, load: Load, user: str, chooser: random.Random, found: Found) -> tuple[str, str]:
    """The bundle of the reply, and what is wrong with it."""
    event = pb.Event(item_id=chooser.choice(load.items), timestamp=int(time.time()))
    request = pb.UpdateRequest(user_id=user, events=[event], request_id=uuid.uuid4().hex)
    try:
        reply = stub.Update(request, timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        return "", str(error.code().name)
    found.added[user] += reply.applied
    return reply.bundle_id, "" if reply.applied == 1 else "an event was not applied"


def _recommend(stub: RecommenderStub, load: Load, user: str, chooser: random.Random, found: Found) -> tuple[str, str]:
    """The bundle of the reply, and what is wrong with it."""
    request = pb.RecommendRequest(user_id=user, k=load.k, at=int(time.time()))
    try:
        reply = stub.Recommend(request, timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        return "", str(error.code().name)
    scores = {item.item_id: item.score for item in reply.items}
    if chooser.randrange(load.keep_every) == 0:
        found.kept.append(Kept(user, request.at, reply.bundle_id, reply.event_count, scores))
    if reply.source != pb.SOURCE_PERSONALIZED or len(scores) != load.k:
        return reply.bundle_id, "not a full personalised answer"
    if not scores.keys() <= load.catalogues.get(reply.bundle_id, frozenset()):
        return reply.bundle_id, "items of another catalogue"
    return reply.bundle_id, ""
