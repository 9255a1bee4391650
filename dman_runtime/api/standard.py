"""gRPC's standard services, health and reflection, behind the same limits as the product's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from dman_runtime.api.admission import SMALL_BYTES, Context
from dman_runtime.api.door import Call, Door, Method
from dman_runtime.errors import ExpiredError, RefusedError, RequestError, StoppedError

LIVE = "dman.live"  # health of this name: the process answers, whether or not it can serve
MAX_WATCHERS, MAX_REFLECTIONS = 256, 16  # streams that one worker holds
REFLECTION_SECONDS = 60.0
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class UnknownServiceError(RequestError):
    """Nobody says whether a service of this name can do its work."""

    status = "NOT_FOUND"


class Health:
    """`grpc.health.v1`. Anybody may ask.

    Not gRPC's own servicer: there, a watcher that does not read keeps the status from being changed.
    """

    def __init__(self, services: Sequence[str]) -> None:
        """`services` are ready or not, together, and not before `set` says so; LIVE is always SERVING."""
        self._statuses = {LIVE: _SERVING} | dict.fromkeys(services, _NOT_SERVING)
        self._services, self._stopping = services, False
        self._changed = asyncio.Event()  # of the next change; each has its own

    def methods(self) -> list[Method]:
        return [
            Method("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest, self._check, exempt=True),
            Method("/grpc.health.v1.Health/List", health_pb2.HealthListRequest, self._list, exempt=True),
        ]

    def set(self, ready: bool) -> None:
        """Says whether the services can do their work."""
        statuses = self._statuses | dict.fromkeys(self._services, _SERVING if ready else _NOT_SERVING)
        if statuses == self._statuses and not self._stopping:
            return
        self._statuses = statuses
        self._changed.set()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """The services cannot; those who watch are told so, and then their streams end."""
        self._stopping = True
        self.set(False)

    async def watch(self, request: Any, context: Context) -> None:
        """Writes each change to the stream until the client leaves."""
        told = None
        while True:
            changed, status = self._changed, self._statuses.get(request.service, _UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            elif self._stopping:
                raise StoppedError("the server is stopping", "try another one or again later")
            else:
                await changed.wait()

    async def _check(self, request: Any, call: Call) -> Message:
        status = self._statuses.get(request.service)
        if status is None:
            raise UnknownServiceError(f"no service {request.service!r:.80}", "an empty name asks for all of them")
        return health_pb2.HealthCheckResponse(status=status)

    async def _list(self, request: Any, call: Call) -> Message:
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)


class Streams(grpc.GenericRpcHandler):
    """The methods that send more than one message: health's Watch, and reflection."""

    def __init__(self, door: Door, health_service: Health, service_names: Sequence[str]) -> None:
        """`service_names` of the product's own services."""
        self._door, self._health = door, health_service
        names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._reflection = reflection.aio.ReflectionServicer(names)
        self._open = {"watch": 0, "reflection": 0}
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "/grpc.health.v1.Health/Watch": grpc.stream_stream_rpc_method_handler(
                self._watch, response_serializer=health_pb2.HealthCheckResponse.SerializeToString
            ),
            REFLECTION: grpc.stream_stream_rpc_method_handler(
                self._reflect, response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString
            ),
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._handlers.get(handler_call_details.method)

    async def _watch(self, _: Any, context: Context) -> None:
        async with self._stream("watch", MAX_WATCHERS, context):
            request = await self._message(health_pb2.HealthCheckRequest, context)
            await self._health.watch(request or health_pb2.HealthCheckRequest(), context)

    async def _reflect(self, _: Any, context: Context) -> None:
        async with self._stream("reflection", MAX_REFLECTIONS, context), asyncio.timeout(REFLECTION_SECONDS):
            caller = self._door.caller_of(context, REFLECTION)
            async for reply in self._reflection.ServerReflectionInfo(self._requests(caller, context), context):
                await context.write(reply)

    async def _requests(self, caller: str, context: Context) -> AsyncIterator[Any]:
        while (request := await self._message(reflection_pb2.ServerReflectionRequest, context)) is not None:
            self._door.limit(caller)
            yield request

    async def _message(self, kind: type[Message], context: Context) -> Any:
        body = await self._door.receiver.receive(context)
        if body is not None and len(body) > SMALL_BYTES:  # streams stay open, and keep it
            raise RequestError(f"the message has more than {SMALL_BYTES >> 10} KiB", "send a smaller one")
        try:
            return None if body is None else kind.FromString(body)
        except DecodeError:
            raise RequestError(f"the message is not a {kind.DESCRIPTOR.full_name}", "send one") from None

    @asynccontextmanager
    async def _stream(self, kind: str, most: int, context: Context) -> AsyncIterator[None]:
        """Counts a stream while it is open, and ends it with a status where that fails."""
        self._open[kind] += 1
        try:
            if self._open[kind] > most:
                raise RefusedError(f"{most} streams of this kind are open", "close some, or try again later")
            yield
        except TimeoutError:
            await self._end(ExpiredError("the stream was open for too long", "open a new one"), context)
        except Exception as error:
            await self._end(error, context)
        finally:
            self._open[kind] -= 1

    async def _end(self, error: Exception, context: Context) -> None:
        status, details = self._door.failure(error)
        await context.abort(grpc.StatusCode[status], details)
