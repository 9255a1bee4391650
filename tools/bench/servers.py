"""The servers that measurements talk to, started here and stopped by their pid.

`python -m tools.bench.servers` is one of them: the empty echo, a method that takes bytes and returns them through the
same kind of gRPC server as that of `dman-runtime serve`. It is the floor of every round trip on a machine.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from dman_runtime.errors import UsageError
from dman_runtime.serving.config import MAX_MESSAGE_BYTES
from tools.faults.servers import importable

ECHO_SERVICE, ECHO_METHOD = "dman.bench.Echo", "Echo"
START_SECONDS, STOP_SECONDS = 120, 30
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Running:
    """A server that is up."""

    address: str
    pid: int
    ready_line: str


@contextmanager
def dman_server(bundle: Path, state: Path, *options: str, checkout: Path = ROOT) -> Iterator[Running]:
    """A real `dman-runtime serve` on a free loopback port. Raises UsageError when it does not start."""
    bundle, state = bundle.resolve(), state.resolve()  # the server runs in the checkout's directory
    arguments = ["-m", "dman_runtime", "serve", "--bundle", str(bundle), "--state", str(state), "--port", "0"]
    log = state.with_name(f"{state.name}.server.log")
    with _server([*arguments, *options], log=log, checkout=checkout) as running:
        yield running


@contextmanager
def echo_server() -> Iterator[Running]:
    """The empty echo in a process of its own."""
    with _server(["-m", "tools.bench.servers"], log=None) as running:
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


def serve_echo() -> int:
    """Serves the echo until SIGTERM, or until stdin ends because the process that started it is gone."""
    asyncio.run(_serve_echo())
    return 0


async def _serve_echo() -> None:
    """On the same kind of gRPC server as the product's."""

    async def echo(request: bytes, _: Any) -> bytes:
        return request

    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ],
    )
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(ECHO_SERVICE, {ECHO_METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"echo on 127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    sys.exit(serve_echo())
