"""The way of every call through a worker: who calls, one message, limits, the handler, the reply, one status.

All methods are served as streams of raw bytes, which on the wire is the same as single messages. So nothing is received
before this module asks for it, and a message that does not parse is an answer like any other: gRPC's own deserialisers
keep memory and write a traceback for each.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from dman_runtime.access.callers import Access, role_for
from dman_runtime.access.limits import Limits
from dman_runtime.api.admission import EVENT_BYTES, SMALL_BYTES, Admission, Context, Held, Receiver
from dman_runtime.batcher import SLICE_EVENTS
from dman_runtime.errors import DmanError, RequestError, StoppedError
from dman_runtime.log_lines import RateLimited
from dman_runtime.metrics import NO_METRICS, Metrics
from dman_runtime.waiting import NO_DEADLINE

logger = logging.getLogger(__name__)
_REFUSALS = ("RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED")  # those that metrics count by cause
Tell = Callable[[Message], Awaitable[None]]
LARGE_BYTES = 64 << 10  # messages beyond are long requests, and parsed off the event loop
REST = 2.0  # times as long as a large message took to parse


def rest_since(began: float) -> None:
    """Sleeps for some time after work that kept the interpreter to itself since `began` (time.perf_counter())."""
    time.sleep(REST * (time.perf_counter() - began))


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler may know about the call it answers."""

    caller: str
    deadline: float  # of time.monotonic()
    held: Held  # what it holds in memory; a handler adds parts of a large reply
    weight: int  # of its message, as its Method weighs it
    tell: Tell  # sends a message before the reply, where the method streams


@dataclass(frozen=True)
class Method:
    """One method that takes one message and gives one reply; one that streams may send messages before it."""

    path: str  # "/package.Service/Method"
    request: type[Message]
    run: Callable[[Any, Call], Awaitable[Message | bytes]]
    weigh: Callable[[Any], int] = lambda _: 0  # events to encode, or what takes as long
    parse: Callable[[bytes], Any] | None = None  # instead of request.FromString; raises DecodeError, RequestError
    commits: bool = False  # a reply says what has been stored, so it is never refused
    streams: bool = False
    exempt: bool = False  # from all limits but the one on messages, which are small: probes reach a busy server too


class Door(grpc.GenericRpcHandler):
    """Serves methods. All of it belongs to one event loop."""

    def __init__(
        self,
        methods: Sequence[Method],
        *,
        admission: Admission,
        access: Access,
        limits: Limits,
        bulk: Executor,
        certificates: bool = False,
        saw: Callable[[Exception], None] = lambda _: None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """`bulk` parses large messages; with `certificates`, clients show them; `saw` hears of every error."""
        # Nobody is asked for anything: a caller is a connection, and may do everything.
        self._by_connection = access.open_to_all and not certificates
        self._admission, self._access, self._limits, self._metrics = admission, access, limits, metrics
        self.receiver = Receiver()
        self._bulk, self._saw = bulk, saw
        self._limited = RateLimited(logger)
        self._references: dict[str, str] = {}  # the last one that was logged, by error class
        self._running: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            method.path: (
                grpc.stream_stream_rpc_method_handler(self._streaming(method))
                if method.streams
                else grpc.stream_unary_rpc_method_handler(self._behaviour(method))
            )
            for method in methods
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._handlers.get(handler_call_details.method)

    def stop(self) -> None:
        """Ends the calls that still run, as unavailable."""
        self._stopping = True
        for task in self._running:
            task.cancel()

    def limit(self, caller: str) -> None:
        """Counts one request that takes next to nothing. Raises LimitError."""
        self._limits.admit(caller, 0)

    def caller_of(self, context: Context, path: str) -> str:
        """The name of the caller, who may call this method. Raises UnauthenticatedError, ForbiddenError."""
        role, peer = role_for(path), str(context.peer())
        if role is None or self._by_connection:
            return peer
        caller = self._access.identify(context.invocation_metadata() or (), context.auth_context(), peer)
        self._access.require(caller, role)
        return caller.name

    def _behaviour(self, method: Method) -> Callable[[Any, Context], Awaitable[bytes]]:
        name = method.path.rpartition("/")[2]

        async def behaviour(_: Any, context: Context) -> bytes:
            began, status, details = time.perf_counter(), "OK", ""
            task = asyncio.current_task()
            assert task is not None
            self._running.add(task)
            try:
                return await self._reply(method, context)
            except asyncio.CancelledError:
                status = "CANCELLED"
                if not self._stopping:
                    raise
                status, details = self.failure(StoppedError("the server is stopping", "try another one or again later"))
            except Exception as error:
                status, details = self.failure(error)
            finally:
                self._running.discard(task)
                self._metrics.call(name, status, time.perf_counter() - began)
            await context.abort(grpc.StatusCode[status], details)
            raise AssertionError  # abort raises

        return behaviour

    def _streaming(self, method: Method) -> Callable[[Any, Context], Awaitable[None]]:
        behaviour = self._behaviour(method)

        async def streaming(requests: Any, context: Context) -> None:
            await context.write(await behaviour(requests, context))

        return streaming

    async def _reply(self, method: Method, context: Context) -> bytes:
        admission = self._admission
        if self._stopping:
            raise StoppedError("the server is stopping", "try another one or again later")
        caller = self.caller_of(context, method.path)
        body = await self.receiver.receive(context)
        if body is None:
            raise RequestError("the call has no message", "send one")
        left = context.time_remaining()
        held = Held(admission, caller)
        deadline = NO_DEADLINE if left is None else time.monotonic() + left
        if method.exempt:
            return await self._exempt(method, body, Call(caller, deadline, held, 0, _tell_nobody))
        tell = _teller(context) if method.streams else _tell_nobody
        admission.enter()
        try:
            held.add(len(body))
            message = [body]
            del body  # a large message is not kept beside what it is parsed to
            sent = _serialized(await self._run(method, message, caller, deadline, held, tell))
            held.become(len(sent), always=method.commits)
        except BaseException:
            held.release()
            raise
        finally:
            admission.leave()
        context.add_done_callback(lambda _: held.release())  # type: ignore[arg-type]
        return sent

    async def _exempt(self, method: Method, body: bytes, call: Call) -> bytes:
        if len(body) > SMALL_BYTES:
            raise RequestError(f"the message has more than {SMALL_BYTES >> 10} KiB", "send a smaller one")
        request, _ = self._read(method, [body])
        return _serialized(await method.run(request, call))

    async def _run(
        self, method: Method, message: list[bytes], caller: str, deadline: float, held: Held, tell: Tell
    ) -> Message | bytes:
        """The reply to a message, which is taken out of its list."""

        def weighed(weight: int) -> Call:
            held.add(weight * EVENT_BYTES)
            self._limits.admit(caller, weight)
            return Call(caller, deadline, held, weight, tell)

        if len(message[0]) > LARGE_BYTES:
            async with self._admission.long(caller):
                loop = asyncio.get_running_loop()
                request, weight = await loop.run_in_executor(self._bulk, self._read_large, method, message)
                return await method.run(request, weighed(weight))
        request, weight = self._read(method, message)
        call = weighed(weight)
        if weight <= SLICE_EVENTS:
            return await method.run(request, call)
        async with self._admission.long(caller):
            return await method.run(request, call)

    def _read_large(self, method: Method, message: list[bytes]) -> tuple[Any, int]:
        """`_read` on the bulk thread, which then rests: parsing keeps the event loop waiting."""
        began = time.perf_counter()
        try:
            return self._read(method, message)
        finally:
            if method.parse is None:  # else that has rested
                rest_since(began)

    def _read(self, method: Method, message: list[bytes]) -> tuple[Any, int]:
        """The parsed message, and its weight. Raises RequestError."""
        kind = method.request.DESCRIPTOR.full_name
        try:
            request = (method.parse or method.request.FromString)(message.pop())
            return request, method.weigh(request)
        except DecodeError:
            self._metrics.unparsable(1)
            self._limited.warning("unparsable", "a message to %s does not parse", method.path)
            refusal = RequestError(f"the message is not a {kind}", "send what the proto file describes")
        except RequestError as error:
            refusal = error.with_traceback(None)
        request = None  # an error keeps what its frames hold, and this may be large
        raise refusal

    def failure(self, error: Exception) -> tuple[str, str]:
        """Status and details of an error. What a caller cannot mend is logged here and named by a reference only.

        Of many errors of one class the log has a few, so all of them get the reference of the one that it has.
        """
        self._saw(error)
        kind = type(error).__name__
        if isinstance(error, DmanError):
            if error.status in _REFUSALS:
                self._metrics.refused(kind)
            if error.public is None:
                return error.status, str(error)
        status, public = (
            (error.status, error.public) if isinstance(error, DmanError) else ("INTERNAL", "internal error")
        )
        reference = uuid.uuid4().hex[:12]
        traceback = None if isinstance(error, DmanError) else error
        if self._limited.error(kind, "%s, reference %s: %s", public, reference, error, exc_info=traceback):
            self._references[kind] = reference
        reference = self._references[kind]
        return status, f"{public}; the server's log has the cause under reference {reference}"


async def _tell_nobody(message: Message) -> None:
    """What a method with a single reply tells before it."""


def _teller(context: Context) -> Tell:
    return lambda message: context.write(message.SerializeToString())


def _serialized(reply: Message | bytes) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()
