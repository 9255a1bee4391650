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

from dman_runtime.api.admission import Context
from dman_runtime.api.door import Call, Door, Method
from dman_runtime.errors import DmanError, RefusedError, RequestError

LIVE = "dman.live"  # health of this name: the process answers, whether or not it can serve
MAX_WATCHERS, MAX_REFLECTIONS = 256, 16  # streams that one worker holds
REFLECTION_SECONDS = 60.0
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class Health:
    """`grpc.health.v1`. Anybody may ask."""

    def __init__(self, services: Sequence[str]) -> None:
        """`services` are ready or not, together; LIVE is always SERVING."""
        self._servicer, self._services = health.aio.HealthServicer(), services
        self._ready: bool | None = None

    def methods(self) -> list[Method]:
        return [Method("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest, self._check)]

    async def set(self, ready: bool) -> None:
        """Says whether the services can do their work."""
        if ready == self._ready:
            return
        if self._ready is None:
            await self._servicer.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        self._ready = ready
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._servicer.set(service, status)

    async def _check(self, request: Any, call: Call) -> Message:
        reply: Message = await self._servicer.Check(request, call.context)
        return reply

    async def watch(self, request: Any, context: Context) -> None:
        """Writes each change to the stream until the client leaves."""
        await self._servicer.Watch(request, context)


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
            self._door.caller_of(context, REFLECTION)
            async for reply in self._reflection.ServerReflectionInfo(self._requests(context), context):
                await context.write(reply)

    async def _requests(self, context: Context) -> AsyncIterator[Any]:
        while (request := await self._message(reflection_pb2.ServerReflectionRequest, context)) is not None:
            yield request

    async def _message(self, kind: type[Message], context: Context) -> Any:
        body = await self._door.receiver.receive(context)
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
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the stream was open for too long; open a new one")
        except DmanError as error:
            await context.abort(grpc.StatusCode[error.status], str(error))
        finally:
            self._open[kind] -= 1
