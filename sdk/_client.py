"""The two clients. They differ only in how they open a channel, call, wait and close.

Each public method is made from a function of `_calls`: it has that function's signature and docstring, and sends the
call that the function builds with the client's `_run`.
"""

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc

from protos.dman.v1.dman_pb2_grpc import OperationsStub, RecommenderStub
from sdk import _calls, _history
from sdk._access import Pem, access
from sdk._calls import Call, ReplyT, RequestT, ResultT
from sdk._exceptions import ClientClosedError, DmanError, EventLoopError, error_from_status
from sdk._history import Pages
from sdk._proxy import proxy_remedy
from sdk._retry import Attempts
from sdk._settings import ARGUMENTS, DEFAULT_RETRIES, DEFAULT_TARGET, DEFAULT_TIMEOUT, positive_seconds, settings
from sdk._types import Event

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)


def _blocking(build: Callable[P, Call[Any, Any, R]]) -> Callable[Concatenate["Client", P], R]:
    """A method of Client from the function that builds its call."""

    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(build(*args, **kwargs))

    _copy_signature(method, build, "Client")
    return method


def _awaitable(
    build: Callable[P, Call[Any, Any, R]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, R]]:
    """A method of AsyncClient from the function that builds its call."""

    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._run(build(*args, **kwargs))

    _copy_signature(method, build, "AsyncClient")
    return method


def _iterating(build: Callable[P, Pages]) -> Callable[Concatenate["Client", P], Iterator[Event]]:
    """A method of Client from the function that plans its calls."""

    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Event]:
        return self._iterate(build(*args, **kwargs))

    _copy_signature(method, build, "Client", Iterator[Event])
    return method


def _async_iterating(build: Callable[P, Pages]) -> Callable[Concatenate["AsyncClient", P], AsyncIterator[Event]]:
    """A method of AsyncClient from the function that plans its calls."""

    def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[Event]:
        return self._iterate(build(*args, **kwargs))

    _copy_signature(method, build, "AsyncClient", AsyncIterator[Event])
    return method


def _copy_signature(method: Any, build: Callable[..., Any], owner: str, result_type: Any = None) -> None:
    """Makes help() and inspect show `method` as if it were written by hand: the parameters of `build` after self."""
    functools.update_wrapper(method, build, assigned=("__name__", "__doc__"))
    del method.__wrapped__
    method.__qualname__ = f"{owner}.{build.__name__}"
    result_type = result_type or build.__annotations__["return"].__args__[-1]  # of Call[request, reply, result]
    method.__annotations__ = {**build.__annotations__, "return": result_type}
    signature = inspect.signature(build)
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = signature.replace(
        parameters=[self_parameter, *signature.parameters.values()], return_annotation=result_type
    )


def _methods(channel: Any) -> dict[str, Any]:
    """What invokes each RPC, by its name."""
    methods: dict[str, Any] = vars(RecommenderStub(channel)) | vars(OperationsStub(channel))
    return methods


class _ClientBase:
    """What both clients share: settings, the closed flag, and what happens after a failed attempt."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        wait_for_ready: bool = False,
        token: str | None = None,
        tls: bool | None = None,
        ca_certificate: Pem | None = None,
        client_certificate: Pem | None = None,
        client_key: Pem | None = None,
        insecure: bool = False,
        channel_credentials: grpc.ChannelCredentials | None = None,
        metadata: Iterable[tuple[str, str | bytes]] = (),
        options: Iterable[tuple[str, Any]] = (),
    ) -> None:
        checked_access = access(
            target,
            token=token,
            tls=tls,
            ca_certificate=ca_certificate,
            client_certificate=client_certificate,
            client_key=client_key,
            insecure=insecure,
            channel_credentials=channel_credentials,
            metadata=metadata,
        )
        self._settings = settings(
            target,
            timeout=timeout,
            retries=retries,
            wait_for_ready=wait_for_ready,
            access=checked_access,
            options=options,
        )
        self._metadata = checked_access.metadata or None
        self._closed = False
        self._prepare()

    __init__.__doc__ = ARGUMENTS

    def _prepare(self) -> None:
        """Sets up what one kind of client needs."""
        raise NotImplementedError

    @property
    def target(self) -> str:
        """The address of the server."""
        return self._settings.target

    def __repr__(self) -> str:
        state = " (closed)" if self._closed else ""
        return f"<{type(self).__name__} of {self.target}{state}>"

    def _check_open(self, call: Call[Any, Any, Any] | None = None) -> None:
        if self._closed:
            raise ClientClosedError(request_id=call.request_id if call else None)

    def _attempts(self, call: Call[Any, Any, Any]) -> Attempts:
        timeout = self._settings.timeout if call.timeout is None else positive_seconds(call.timeout, "timeout")
        return Attempts(self._settings.retries if call.repeatable else 0, timeout)

    def _pause(self, call: Call[Any, Any, Any], attempts: Attempts, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt. Raises a DmanError when there is none."""
        code, details = error.code(), error.details() or ""
        if self._closed and code is grpc.StatusCode.CANCELLED:
            raise ClientClosedError(request_id=call.request_id) from error
        delay = attempts.delay_after(code)
        if delay is None:
            raise self._error(call, code, details, attempts.count) from error
        _log.debug("%s at %s: %s; next attempt in %.3f s", call.rpc, self.target, details, delay)
        return delay

    def _result(self, call: Call[RequestT, ReplyT, ResultT], reply: ReplyT | None) -> ResultT:
        """The reply as a result. gRPC gives None when the bytes are not a message of the expected type."""
        try:
            if reply is None:
                raise ValueError("not a message of this type")
            return call.parse(reply)
        except ValueError as error:
            raise self._error(call, grpc.StatusCode.INTERNAL, f"unreadable reply: {error}") from error

    def _error(self, call: Call[Any, Any, Any], code: grpc.StatusCode, details: str, attempts: int = 1) -> DmanError:
        return error_from_status(
            code,
            method=call.rpc,
            target=self.target,
            details=details,
            attempts=attempts,
            request_id=call.request_id,
            proxy=proxy_remedy(self.target, dict(self._settings.options)),
        )


class Client(_ClientBase):
    """A connection to a DMAN server.

    Create one, keep it, and share it between threads. It holds one channel, which connects at the first call and
    reconnects by itself. If your process forks, create clients after the fork.

        with Client("localhost:50051") as client:
            client.update(42, [2858, 260])
            for item in client.recommend(42, k=5):
                print(item.item_id, item.score, item.title)

    Every failure is a `DmanError`; its docstring shows all errors.
    """

    def _prepare(self) -> None:
        options, credentials = self._settings.options, self._settings.access.credentials
        self._channel = (
            grpc.insecure_channel(self.target, options)
            if credentials is None
            else grpc.secure_channel(self.target, credentials, options)
        )
        self._methods = _methods(self._channel)

    update = _blocking(_calls.update)
    update_many = _blocking(_calls.update_many)
    recommend = _blocking(_calls.recommend)
    recommend_many = _blocking(_calls.recommend_many)
    user = _blocking(_calls.user)
    history = _iterating(_history.history)
    delete_user = _blocking(_calls.delete_user)
    status = _blocking(_calls.status)

    def close(self) -> None:
        """Closes the connection. Running calls end with ClientClosedError. Closing twice is allowed."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Call[RequestT, ReplyT, ResultT]) -> ResultT:
        attempts = self._attempts(call)
        invoke: grpc.UnaryUnaryMultiCallable[RequestT, ReplyT] = self._methods[call.rpc]
        while True:
            self._check_open(call)
            try:
                reply = invoke(
                    call.request,
                    timeout=attempts.start(),
                    metadata=self._metadata,
                    wait_for_ready=self._settings.wait_for_ready,
                )
            except grpc.RpcError as error:
                time.sleep(self._pause(call, attempts, error))
            except ValueError as error:  # gRPC raises it when another thread has just closed the channel
                if not self._closed:
                    raise
                raise ClientClosedError(request_id=call.request_id) from error
            else:
                return self._result(call, reply)

    def _iterate(self, pages: Pages) -> Iterator[Event]:
        while (call := pages.next_call()) is not None:
            yield from self._run(call)


class AsyncClient(_ClientBase):
    """A connection to a DMAN server for asyncio: the methods of `Client` as coroutines.

    Create one for each event loop, keep it, and share it between tasks. It holds one channel, which belongs to the
    loop of the first call. If your process forks, create clients after the fork.

        async with AsyncClient("localhost:50051") as client:
            await client.update(42, [2858, 260])
            for item in await client.recommend(42, k=5):
                print(item.item_id, item.score, item.title)

    Every failure is a `DmanError`; its docstring shows all errors.
    """

    def _prepare(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: grpc.aio.Channel | None = None

    update = _awaitable(_calls.update)
    update_many = _awaitable(_calls.update_many)
    recommend = _awaitable(_calls.recommend)
    recommend_many = _awaitable(_calls.recommend_many)
    user = _awaitable(_calls.user)
    history = _async_iterating(_history.history)
    delete_user = _awaitable(_calls.delete_user)
    status = _awaitable(_calls.status)

    async def close(self) -> None:
        """Closes the connection. Running calls end with ClientClosedError. Closing twice is allowed."""
        self._closed = True
        if self._channel is not None:
            self._check_loop()
            await self._channel.close()

    async def __aenter__(self) -> Self:
        self._check_open()
        self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _open(self) -> None:
        """Makes the channel. gRPC ties it to the running event loop."""
        options, credentials = self._settings.options, self._settings.access.credentials
        self._loop = asyncio.get_running_loop()
        self._channel = (
            grpc.aio.insecure_channel(self.target, options)
            if credentials is None
            else grpc.aio.secure_channel(self.target, credentials, options)
        )
        self._methods = _methods(self._channel)

    def _check_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise EventLoopError

    async def _run(self, call: Call[RequestT, ReplyT, ResultT]) -> ResultT:
        attempts = self._attempts(call)
        self._check_open(call)
        if self._channel is None:
            self._open()
        self._check_loop()
        invoke: grpc.aio.UnaryUnaryMultiCallable[RequestT, ReplyT] = self._methods[call.rpc]
        while True:
            self._check_open(call)
            try:
                reply = await invoke(
                    call.request,
                    timeout=attempts.start(),
                    metadata=self._metadata,
                    wait_for_ready=self._settings.wait_for_ready,
                )
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
