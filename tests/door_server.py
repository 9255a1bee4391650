"""A real server whose methods are made by a test: a door, health and reflection, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from conftest import running

from dman_runtime.access.callers import Access
from dman_runtime.access.limits import Limits
from dman_runtime.api.admission import Admission
from dman_runtime.api.door import Door, Method
from dman_runtime.api.standard import Health, Streams
from dman_runtime.metrics import Metrics

MESSAGE_BYTES = 32 << 20


class Counted(Metrics):
    """What was counted, as lists."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []  # method, status
        self.refusals: list[str] = []
        self.did_not_parse = 0

    def call(self, method: str, status: str, seconds: float) -> None:
        assert seconds >= 0
        self.calls.append((method, status))

    def refused(self, cause: str) -> None:
        self.refusals.append(cause)

    def unparsable(self, messages: int) -> None:
        self.did_not_parse += messages


class DoorServer:
    """An async context manager: gives itself, serving."""

    def __init__(
        self,
        *methods: Method,
        max_requests: int = 8,
        max_bytes: int = 64 << 20,
        tokens: Path | None = None,
        requests_per_second: float = 0,
    ) -> None:
        self._methods = methods
        self.admission = Admission(max_requests=max_requests, max_bytes=max_bytes)
        self.metrics, self.seen = Counted(), list[Exception]()
        self._access, self._limits = Access.open(tokens), Limits(requests_per_second, 0)

    async def __aenter__(self) -> DoorServer:
        self._bulk = ThreadPoolExecutor(1, thread_name_prefix="bulk")
        self.health = Health(("", "dman.v1.Recommender"))
        self.door = Door(
            [*self._methods, *self.health.methods()],
            admission=self.admission,
            access=self._access,
            limits=self._limits,
            bulk=self._bulk,
            saw=self.seen.append,
            metrics=self.metrics,
        )
        self.streams = Streams(self.door, self.health, ("dman.v1.Recommender", "dman.v1.Operations"))
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", MESSAGE_BYTES)])
        self._server.add_generic_rpc_handlers((self.door, self.streams))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.health.stop()
        await self._server.stop(0.2)
        self._bulk.shutdown()


@contextmanager
def serving(*methods: Method, **options: Any) -> Iterator[tuple[DoorServer, grpc.Channel]]:
    """A server of these methods, and a channel to it."""
    options_of_channel = [("grpc.max_receive_message_length", MESSAGE_BYTES)]
    with (
        running(DoorServer(*methods, **options)) as server,
        grpc.insecure_channel(server.address, options=options_of_channel) as channel,
    ):
        yield server, channel


def status_of(call: Callable[[], Any]) -> tuple[str, str]:
    """Status and details of a call that fails."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code().name, error.details()
    raise AssertionError("the call succeeded")
