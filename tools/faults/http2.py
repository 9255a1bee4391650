"""An HTTP/2 client that breaks habits: it opens requests without a body, and leaves replies unread."""

from __future__ import annotations

import socket
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.settings

RECOMMEND = "/dman.v1.Recommender/Recommend"
BATCH_RECOMMEND = "/dman.v1.Recommender/BatchRecommend"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
FRAME_BYTES = 5  # before a message of gRPC: whether it is compressed, and its length
_SECONDS = 10.0  # for one read or write


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class RawConnection:
    """One connection to a gRPC server, by hand. It reads only when it needs room to send."""

    def __init__(self, address: str, *, receive_bytes: int | None = None, window: int | None = None) -> None:
        """`receive_bytes` is the kernel's buffer for what is not read; `window`, what a stream may send unread."""
        host, _, port = address.rpartition(":")
        self._authority = address
        self._socket = socket.socket()
        if receive_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.settimeout(_SECONDS)
        self._socket.connect((host, int(port)))
        self._http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        if window is not None:
            self._http2.local_settings = h2.settings.Settings(
                client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
            )
        self._http2.initiate_connection()
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves without a word."""
        self._socket.close()

    def open_request(self, path: str) -> int:
        """Sends the headers of a request. Returns the number of its stream."""
        stream = self._http2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", self._authority),
            (":path", path),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        self._http2.send_headers(stream, headers)
        self._flush()
        return stream

    def send_message(self, stream: int, message: bytes) -> None:
        """Sends a whole message and ends the request. Raises OSError where the server has left or takes nothing."""
        data = framed(message)
        while data:
            room = min(self._http2.local_flow_control_window(stream), self._http2.max_outbound_frame_size, len(data))
            if room:
                self._http2.send_data(stream, data[:room], end_stream=room == len(data))
                data = data[room:]
                self._flush()
            else:
                self._read()

    def settle(self) -> None:
        """Reads the settings of the server and answers them, so that it takes more than the default at once."""
        self._read()

    def closed_within(self, seconds: float) -> bool:
        """Whether the server closes the connection within so many seconds of silence."""
        self._socket.settimeout(seconds)
        try:
            while self._socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def _read(self) -> list[h2.events.Event]:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        events = self._http2.receive_data(data)
        if any(isinstance(event, (h2.events.StreamReset, h2.events.ConnectionTerminated)) for event in events):
            raise ConnectionResetError("the server refused the request")
        self._flush()
        return events

    def _flush(self) -> None:
        self._socket.sendall(self._http2.data_to_send())
