"""The clients for applications. They differ only in how they open a channel, call, wait and close."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

from sdk import _calls, _history
from sdk._base import ClientBase, methods_of
from sdk._calls import Call, ReplyT, RequestT, ResultT
from sdk._exceptions import ClientClosedError, EventLoopError
from sdk._fork import FORKS, OVERDUE_SECONDS
from sdk._history import Pages
from sdk._methods import async_iterating, awaitable, blocking, iterating
from sdk._retry import Attempts
from sdk._types import Event


class _Opened(NamedTuple):
    channel: Any  # grpc.Channel or grpc.aio.Channel
    methods: dict[str, Any]


class BlockingClient(ClientBase):
    """What clients share whose methods return results. It holds a channel for each process."""

    def _prepare(self) -> None:
        self._channels: dict[int, _Opened] = {}  # by process: a forked child leaves that of its parent alone

    def close(self) -> None:
        """Closes the connection. Running calls end with ClientClosedError. Closing twice is allowed."""
        self._closed = True
        opened = self._channels.get(os.getpid())
        if opened is not None:
            with FORKS.running():
                opened.channel.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> _Opened:
        """The channel of this process."""
        opened = self._channels.get(os.getpid())
        if opened is None:
            options, credentials = self._settings.options, self._settings.access.credentials
            channel = (
                grpc.insecure_channel(self._settings.servers.address(), options)
                if credentials is None
                else grpc.secure_channel(self._settings.servers.address(), credentials, options)
            )
            FORKS.opened(channel)
            opened = self._channels.setdefault(os.getpid(), _Opened(channel, methods_of(channel)))
            if opened.channel is not channel:  # another thread was faster
                channel.close()
            if self._closed:  # meanwhile
                opened.channel.close()
        return opened

    def _send(self, call: Call[RequestT, ReplyT, ResultT], attempts: Attempts) -> ReplyT | None:
        """One attempt."""
        FORKS.check(request_id=call.request_id)
        seconds = attempts.start()
        with FORKS.running(seconds):

            def send() -> ReplyT | None:
                sent = self._open().methods[call.rpc](
                    call.request,
                    timeout=attempts.seconds_left(),
                    metadata=self._metadata_of(call),
                    wait_for_ready=self._settings.wait_for_ready,
                )
                if call.receive is None:
                    reply: ReplyT | None = sent
                    return reply
                try:
                    return call.receive(sent)
                finally:
                    sent.cancel()  # where it has not ended

            return FORKS.watched(send, seconds, call.request_id) if FORKS.unproven else send()

    def _run(self, call: Call[RequestT, ReplyT, ResultT]) -> ResultT:
        attempts = self._attempts(call)
        while True:
            self._check_open(call)
            try:
                reply = self._send(call, attempts)
            except grpc.RpcError as error:
                time.sleep(self._pause(call, attempts, error))
            except ValueError as error:  # gRPC raises it when another thread has just closed the channel
                if not self._closed:
                    raise
                raise ClientClosedError(request_id=call.request_id) from error
            else:
                return self._result(call, reply)


class Client(BlockingClient):
    """A connection to a DMAN server.

    Create one, keep it, and share it between threads. It holds one channel, which connects at the first call and
    reconnects by itself. A forked child has a channel of its own, and so has a process that it was pickled to.

        with Client("localhost:50051") as client:
            client.update(42, [2858, 260])
            for item in client.recommend(42, k=5):
                print(item.item_id, item.score, item.title)

    Every failure is a `DmanError`; its docstring shows all errors.
    """

    update = blocking(_calls.update)
    update_many = blocking(_calls.update_many)
    recommend = blocking(_calls.recommend)
    recommend_many = blocking(_calls.recommend_many)
    user = blocking(_calls.user)
    history = iterating(_history.history)
    delete_user = blocking(_calls.delete_user)
    status = blocking(_calls.status)

    def _iterate(self, pages: Pages) -> Iterator[Event]:
        while (call := pages.next_call()) is not None:
            yield from self._run(call)


class AsyncClient(ClientBase):
    """A connection to a DMAN server for asyncio: the methods of `Client` as coroutines.

    Create one for each event loop, keep it, and share it between tasks. It holds one channel, which belongs to the
    loop of the first call. In a child that was forked after the first call it raises a ForkError.

        async with AsyncClient("localhost:50051") as client:
            await client.update(42, [2858, 260])
            for item in await client.recommend(42, k=5):
                print(item.item_id, item.score, item.title)

    Every failure is a `DmanError`; its docstring shows all errors.
    """

    def _prepare(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened: _Opened | None = None
        self._pid = 0  # of the process that opened the channel

    update = awaitable(_calls.update)
    update_many = awaitable(_calls.update_many)
    recommend = awaitable(_calls.recommend)
    recommend_many = awaitable(_calls.recommend_many)
    user = awaitable(_calls.user)
    history = async_iterating(_history.history)
    delete_user = awaitable(_calls.delete_user)
    status = awaitable(_calls.status)

    async def close(self) -> None:
        """Closes the connection. Running calls end with ClientClosedError. Closing twice is allowed."""
        self._closed = True
        if self._opened is not None and self._pid == os.getpid():  # a forked child leaves that of its parent alone
            self._check_loop()
            await self._opened.channel.close()

    async def __aenter__(self) -> Self:
        self._check_open()
        with suppress(grpc.RpcError):  # the first call says it
            await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _open(self) -> _Opened:
        """The channel, which gRPC ties to the running event loop."""
        FORKS.check(aio=True)
        options, credentials = self._settings.options, self._settings.access.credentials
        address = await self._address()
        self._check_open()  # meanwhile
        if self._opened is not None:  # another task was faster
            return self._opened
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        FORKS.opened(channel, aio=True)
        self._opened = _Opened(channel, methods_of(channel))
        return self._opened

    async def _address(self) -> str:
        servers = self._settings.servers
        return await asyncio.to_thread(servers.address) if servers.several else servers.address()

    def _check_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise EventLoopError

    async def _send(self, call: Call[RequestT, ReplyT, ResultT], attempts: Attempts) -> ReplyT | None:
        """One attempt."""
        FORKS.check(aio=True, request_id=call.request_id)
        while FORKS.forking:  # in another thread, which waits for the calls under way
            await asyncio.sleep(0.001)
        with FORKS.running():
            seconds = attempts.start()
            opened = self._opened or await self._open()
            self._check_loop()
            sent = opened.methods[call.rpc](
                call.request,
                timeout=attempts.seconds_left(),
                metadata=self._metadata_of(call),
                wait_for_ready=self._settings.wait_for_ready,
            )
            if not FORKS.unproven:
                reply: ReplyT | None = await sent
                return reply
            try:
                reply = await asyncio.wait_for(sent, seconds + OVERDUE_SECONDS)
            except TimeoutError:
                raise FORKS.hung(call.request_id) from None
            FORKS.unproven = False
            return reply

    async def _run(self, call: Call[RequestT, ReplyT, ResultT]) -> ResultT:
        attempts = self._attempts(call)
        self._check_open(call)
        FORKS.check(aio=True, request_id=call.request_id)
        while True:
            self._check_open(call)
            try:
                reply = await self._send(call, attempts)
            except grpc.RpcError as error:
                await asyncio.sleep(self._pause(call, attempts, error))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not self._closed or (task is not None and task.cancelling()):
                    raise
                raise ClientClosedError(
                    request_id=call.request_id
                ) from None  # close() cancels running calls, not their tasks
            else:
                return self._result(call, reply)

    async def _iterate(self, pages: Pages) -> AsyncIterator[Event]:
        while (call := pages.next_call()) is not None:
            for event in await self._run(call):
                yield event
