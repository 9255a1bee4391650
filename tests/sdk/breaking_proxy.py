"""A TCP proxy that breaks a connection when a test says so."""

import select
import socket
import struct
import threading
from types import TracebackType
from typing import Self

POLL_SECONDS = 0.01


class BreakingProxy:
    """Passes bytes between one client and a server. After `break_after` it resets the connection and takes the next."""

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._broken = threading.Event()
        self._bytes_to_break: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0

    def break_after(self, reply_bytes: int) -> None:
        """Breaks the connection after so many more bytes from the server. With 0, waits until it is broken."""
        self._bytes_to_break = reply_bytes
        if not reply_bytes:
            assert self._broken.wait(10)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with client, socket.create_connection(self._server) as server:
                self._relay(client, server)

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        while self._bytes_to_break != 0:
            readable, _, _ = select.select([client, server], [], [], POLL_SECONDS)
            for source in readable:
                data = source.recv(1 << 16)
                if not data:
                    return
                if source is server and self._bytes_to_break is not None:
                    data = data[: self._bytes_to_break]
                    self._bytes_to_break -= len(data)
                (client if source is server else server).sendall(data)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends a reset
        self._bytes_to_break = None
        client.close()
        self._broken.set()
