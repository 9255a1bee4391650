"""The servers that measurements talk to, started here and stopped by their pid.

`python -m tools.bench.servers KIND` is one of them: the empty echo, a method that takes bytes and returns them. It is
the floor of every round trip on a machine. Which kind of gRPC server answers fastest depends on the clients; `uvloop`
is the one of `dman-runtime serve`.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from dman_runtime.errors import UsageError
from dman_runtime.serving.config import MAX_MESSAGE_BYTES
from tools.faults.servers import free_port, importable

ECHO_SERVICE, ECHO_METHOD = "dman.bench.Echo", "Echo"
ECHO_KINDS = ("1 thread", "2 threads", "4 threads", "16 threads", "asyncio", "uvloop")
OWN_KIND = "uvloop"  # as `dman-runtime serve`
START_SECONDS, STOP_SECONDS = 600, 30
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Running:
    """A server that is up."""

    address: str
    pid: int
    ready_line: str
    metrics_port: int = 0  # 0: it counts nothing

    def answers(self) -> Counter[tuple[str, str]]:
        """How many calls it has answered, by method and gRPC status, of all workers."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            text = reply.read().decode()
        return Counter({(method, status): int(float(count)) for method, status, count in _COUNTS.findall(text)})


_COUNTS = re.compile(r'^dman_request_duration_seconds_count\{method="(\w+)",status="(\w+)"\} (\S+)$', re.MULTILINE)


@contextmanager
def dman_server(
    bundle: Path, state: Path, *options: str, checkout: Path = ROOT, address: str = ""
) -> Iterator[Running]:
    """A real `dman-runtime serve` on a free loopback port. Raises UsageError when it does not start.

    `address` is that of servers that have the state instead of the directory, beside which the log is all the same.
    """
    bundle, state = bundle.resolve(), state.resolve()  # the server runs in the checkout's directory
    place = address or str(state)
    arguments = ["-m", "dman_runtime", "serve", "--bundle", str(bundle), "--state", place, "--port", "0"]
    log = state.with_name(f"{state.name}.server.log")
    with _server([*arguments, *options], log=log, checkout=checkout) as running:
        yield running


@contextmanager
def counting_server(bundle: Path, state: Path, *options: str, address: str = "") -> Iterator[Running]:
    """The same, which counts its answers."""
    port = free_port()
    with dman_server(bundle, state, *options, "--metrics-port", str(port), address=address) as running:
        yield replace(running, metrics_port=port)


@contextmanager
def traced_server(bundle: Path, state: Path, trace: Path, *options: str) -> Iterator[Running]:
    """The same, which writes where its time went to `trace` when it has stopped (`tools.bench.traced`)."""
    arguments = ["serve", "--bundle", str(bundle), "--state", str(state), "--port", "0", *options]
    log = state.with_name(f"{state.name}.server.log")
    with _server(["-m", "tools.bench.traced", str(trace), *arguments], log=log) as running:
        yield running


@contextmanager
def echo_server(kind: str = OWN_KIND) -> Iterator[Running]:
    """The empty echo in a process of its own, of one of ECHO_KINDS."""
    with _server(["-m", "tools.bench.servers", kind], log=None) as running:
        yield running


@contextmanager
def _server(arguments: Sequence[str], *, log: Path | None, checkout: Path = ROOT) -> Iterator[Running]:
    errors = log.open("wb") if log else None
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=checkout,
        env=importable(checkout),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        hanging = threading.Timer(START_SECONDS, process.kill)
        hanging.start()
        line = process.stdout.readline().strip()
        hanging.cancel()
        if " on " not in line:
            process.wait(STOP_SECONDS)
            reason = log.read_text(errors="replace").strip().splitlines()[-1:] if log else []
            raise UsageError(f"a server did not start: {(reason or ['no message'])[0]}")
        yield Running(line.split(" on ")[1].split(" ")[0], process.pid, line)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, errors):
                if stream is not None:
                    stream.close()


def connect(address: str) -> grpc.Channel:
    """A channel with a connection of its own, so that several spread over the workers behind one port."""
    return grpc.insecure_channel(
        address,
        options=[
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ],
    )


_ECHO_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


def serve_echo(kind: str) -> int:
    """Serves the echo until SIGTERM, or until stdin ends because the process that started it is gone."""
    if kind.endswith(("thread", "threads")):
        _serve_echo_by_threads(int(kind.partition(" ")[0]))
        return 0
    factory = None
    if kind == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve_echo())
    return 0


def _serve_echo_by_threads(threads: int) -> None:
    server = grpc.server(ThreadPoolExecutor(threads), options=_ECHO_OPTIONS)
    server.add_generic_rpc_handlers((_echo_handler(lambda request, _: request),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"echo on 127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    server.stop(0).wait()


async def _serve_echo() -> None:
    async def echo(request: bytes, _: Any) -> bytes:
        return request

    server = grpc.aio.server(options=_ECHO_OPTIONS)
    server.add_generic_rpc_handlers((_echo_handler(echo),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"echo on 127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


def _echo_handler(echo: Any) -> grpc.GenericRpcHandler:
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(echo)
    return grpc.method_handlers_generic_handler(ECHO_SERVICE, {ECHO_METHOD: handler})


if __name__ == "__main__":
    sys.exit(serve_echo(sys.argv[1]))
