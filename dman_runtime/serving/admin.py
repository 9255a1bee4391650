"""The admin service of a server: a gRPC server of its own, on a port or a Unix socket, in one of the workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from dman_runtime.access.callers import Access
from dman_runtime.access.limits import Limits
from dman_runtime.api import admin
from dman_runtime.api.admin import AdminService
from dman_runtime.api.admission import Admission
from dman_runtime.api.door import Door
from dman_runtime.api.standard import Health, Streams
from dman_runtime.metrics import NO_METRICS, Metrics
from dman_runtime.serving.config import ServeConfig, cannot_listen
from dman_runtime.serving.job import END_SECONDS, Job
from dman_runtime.serving.unix_socket import UnixSocket

logger = logging.getLogger(__name__)
MAX_REQUESTS, MAX_BYTES = 64, 64 << 20
MAX_MESSAGE_BYTES = 64 << 10
MAX_THREADS = 64  # two for each job that runs
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_REQUESTS),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A job may take hours, so connections have no age. Both sides notice that the other one is gone.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
]


class AdminServer:
    """Serves between `start` and `stop`, which may be repeated. All of it belongs to one event loop.

    Attributes:
        address: Where it listens, "" where it does not.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        access: Access,
        credentials: grpc.ServerCredentials | None,
        rollout: Callable[[], Mapping[str, Any]],
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._config, self._access, self._credentials = config, access, credentials
        self._rollout, self._metrics = rollout, metrics
        self._server: grpc.aio.Server | None = None
        self._socket: UnixSocket | None = None
        self.address = ""

    async def start(self) -> None:
        """Raises UsageError where it cannot listen."""
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="admin")
        health = Health(("", admin.SERVICE_NAME))
        self._door = Door(
            [*self._service().methods(), *health.methods()],
            admission=Admission(max_requests=MAX_REQUESTS, max_bytes=MAX_BYTES),
            access=self._access,
            limits=Limits(0.0, 0.0),
            bulk=self._threads,
            certificates=self._config.tls_client_ca is not None,
            metrics=self._metrics,
        )
        server = grpc.aio.server(options=[*_OPTIONS, ("grpc.so_reuseport", int(self._config.share_port))])
        server.add_generic_rpc_handlers((self._door, Streams(self._door, health, (admin.SERVICE_NAME,))))
        self.address = self._bind(server)
        await server.start()
        self._server, self._health = server, health
        health.set(True)
        logger.info("admin service on %s", self.address, extra={"event": "admin", "address": self.address})

    def _service(self) -> AdminService:
        config, names = self._config, ("map_size_mib", "provider", "encoder_threads")
        state = config.state.resolve() if isinstance(config.state, Path) else config.state.url
        settings = {name: getattr(config, name) for name in names} | {"state": state}
        return AdminService(self._job, settings=settings, root=config.admin_root, rollout=self._rollout)

    def _job(self, arguments: Sequence[str]) -> Job:
        return Job(arguments, threads=self._threads, json_log=self._config.log_format == "json")

    def _bind(self, server: grpc.aio.Server) -> str:
        config = self._config.of_admin()
        if self._config.admin_socket is not None:
            self._socket = UnixSocket(self._config.admin_socket, server.add_insecure_port)
            return self._config.admin_address
        try:
            if self._credentials is None:
                port = server.add_insecure_port(config.address)
            else:
                port = server.add_secure_port(config.address, self._credentials)
        except RuntimeError:
            raise cannot_listen(config, "the port is in use or not allowed", parameter="admin_port") from None
        return config.at_port(port).address

    async def stop(self) -> None:
        """Jobs that run are ended, and their callers told that the server stops."""
        server, self._server = self._server, None
        if server is None:
            return
        self.address = ""
        self._health.stop()
        self._door.stop()
        await server.stop(END_SECONDS + 1)
        if self._socket is not None:
            self._socket.remove()
        self._threads.shutdown(wait=False)
