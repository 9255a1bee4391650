"""A TCP proxy between clients and a server that loses replies: the server did the work, the client never hears."""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

_HEADERS, _FRAME_HEAD = 1, 9  # HTTP/2: type of the frame that begins a reply; bytes before each frame's content
_POLL_SECONDS = 0.05


class LossyProxy:
    """Passes bytes on. It asks `lose` before each reply and before its end; for True, it resets that connection."""

    def __init__(self, server: str, lose: Callable[[], bool]) -> None:
        host, _, port = server.rpartition(":")
        self._server, self._lose = (host, int(port)), lose
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_POLL_SECONDS)
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.lost = 0

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in list(self._threads):
            thread.join()
        self._listener.close()

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._start(self._relay, client)

    def _relay(self, client: socket.socket) -> None:
        frames = _Frames()
        with client, suppress(OSError), socket.create_connection(self._server) as server:
            # A blocking send could wait for ever once this proxy is to stop.
            client.settimeout(10)
            server.settimeout(10)
            with selectors.DefaultSelector() as selector:
                selector.register(client, selectors.EVENT_READ, server)
                selector.register(server, selectors.EVENT_READ, client)
                while not self._over.is_set():
                    for key, _ in selector.select(_POLL_SECONDS):
                        source, target = key.fileobj, key.data
                        data = source.recv(1 << 16)  # type: ignore[union-attr]
                        if not data:
                            return
                        if source is server and self._is_lost(frames.headers_in(data)):
                            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                            return  # close() now sends a reset
                        target.sendall(data)
        # The client's next attempt comes over a new connection.

    def _is_lost(self, chances: int) -> bool:
        lost = any(self._lose() for _ in range(chances))
        self.lost += lost
        return lost


class _Frames:
    """Counts the HEADERS frames in a stream of bytes that arrives in pieces."""

    def __init__(self) -> None:
        self._head = b""
        self._skip = 0

    def headers_in(self, data: bytes) -> int:
        """How many frames that begin or end a reply start in `data`."""
        found = 0
        while data:
            if self._skip:
                skipped = min(self._skip, len(data))
                self._skip -= skipped
                data = data[skipped:]
                continue
            taken = _FRAME_HEAD - len(self._head)
            self._head, data = self._head + data[:taken], data[taken:]
            if len(self._head) == _FRAME_HEAD:
                self._skip = int.from_bytes(self._head[:3], "big")
                found += self._head[3] == _HEADERS
                self._head = b""
        return found


def share_of(share: float, *, seed: int) -> Callable[[], bool]:
    """Loses this share of all replies, half of them before they begin and half before they end."""
    chooser = random.Random(seed)
    return lambda: chooser.random() < share / 2


class Trap:
    """A `lose` that does nothing until it is set, then loses one reply."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self.sprung = threading.Event()

    def set(self) -> None:
        self.sprung.clear()
        self._set.set()

    def __call__(self) -> bool:
        if not self._set.is_set():
            return False
        self._set.clear()
        self.sprung.set()
        return True
