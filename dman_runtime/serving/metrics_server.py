"""Serves metrics over HTTP: `GET /metrics` and nothing else, in threads of its own."""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from http.server import HTTPServer
from socketserver import ThreadingMixIn
from typing import Any

from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import CollectorRegistry

from dman_runtime.errors import UsageError

logger = logging.getLogger(__name__)
MAX_CONNECTIONS = 32  # at a time; one more closes the oldest, so idle ones cannot keep a scraper out
PATIENCE = 10.0  # seconds that a client gets to send its request, and again to take the answer


def serve_metrics(source: CollectorRegistry, *, host: str, port: int) -> MetricsServer:
    """Starts to serve; 0 takes a free port. Raises UsageError where it cannot listen."""
    try:
        server = MetricsServer(source, host=host, port=port)
    except (OSError, OverflowError) as error:
        name = "metrics_host" if isinstance(error, socket.gaierror) else "metrics_port"
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot serve metrics on {host} port {port}: {reason}", "choose another address or port", parameter=name
        ) from None
    logger.info("metrics at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, server.port)
    return server


class _Handler(MetricsHandler):
    timeout = PATIENCE
    server_version, sys_version = "dman", ""  # nothing about what runs here

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/metrics":
            super().do_GET()
        else:
            self.send_error(404)


class MetricsServer(ThreadingMixIn, HTTPServer):
    """Serves until `stop`. `port` is the port it listens on."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, source: CollectorRegistry, *, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._open: dict[socket.socket, None] = {}  # oldest first
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler.factory(source))
        self.port: int = self.server_address[1]
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def server_bind(self) -> None:
        """As HTTPServer does it, without asking the name service for our name."""
        super(HTTPServer, self).server_bind()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError:  # no file descriptor is left: the connection stays in the queue
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = None
            if len(self._open) > MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with suppress(OSError):  # its thread finds it closed
                    oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left or was too slow is nothing to write about."""
        logger.debug("a request for metrics failed", exc_info=True)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
