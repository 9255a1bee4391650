"""Puts a worker together: the one place that knows which parts there are."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc

from dman_runtime.access.callers import Access
from dman_runtime.access.limits import Limits
from dman_runtime.access.tls import server_credentials
from dman_runtime.api import operations, recommender
from dman_runtime.api.admission import Admission
from dman_runtime.api.door import Door
from dman_runtime.api.operations import OperationsService
from dman_runtime.api.recommender import RecommenderService
from dman_runtime.api.standard import Health, Streams
from dman_runtime.batcher import Batcher
from dman_runtime.engine import Engine
from dman_runtime.errors import StoreError, UsageError
from dman_runtime.id_types import remember_id_types
from dman_runtime.log_lines import RateLimited
from dman_runtime.metrics import NO_METRICS, Metrics
from dman_runtime.model.generation import Generation
from dman_runtime.presence import presence
from dman_runtime.problems import ClusterStatus, Problems
from dman_runtime.routing import Router
from dman_runtime.serving.admin import AdminServer
from dman_runtime.serving.config import MAX_MESSAGE_BYTES, ServeConfig, cannot_listen, free_port
from dman_runtime.serving.loader import Loader
from dman_runtime.serving.monitor import Monitor
from dman_runtime.store.place import directory_of

logger = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
MAX_STREAMS_PER_CONNECTION = 512
# Calls that may wait in gRPC for this worker, which takes them in order: beyond the first number more and more are
# refused, beyond the second all. Else, under overload, every call would be answered after its deadline.
PENDING_CALLS = (260, 276)
CONNECTION_AGE_MS = 600_000  # then a client connects anew, which ends what it does not read and spreads the load
CONNECTION_GRACE_MS = 60_000
HANDSHAKE_MS = 10_000


class App:
    """One worker. An async context manager: it serves inside the block, and closes in order.

    `port` is the port it listens on, `cluster` what the supervisor last said of all workers.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        expected_bundle_id: str | None = None,
        metrics: Metrics = NO_METRICS,
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """`loaded` is called, on any thread, each time that something large was loaded, which will stay.

        Raises BundleError, EncoderError, InputError, StoreError, and UsageError where the port cannot be had.
        """
        _free_ports(config)
        self._config, self._metrics, self._loaded = config, metrics, loaded
        self._access = Access.open(config.tokens)
        self._credentials = (
            server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)
            if config.tls_cert and config.tls_key
            else None
        )
        self.generation = Generation.open(
            config.bundle,
            provider=config.provider,
            threads=config.encoder_threads,
            expected_bundle_id=expected_bundle_id,
        )
        self._store = config.open_state()
        self._looked: asyncio.Future[None] | None = None  # the look under way
        self._limited = RateLimited(logger, every=60.0)
        self.problems, self.cluster, self.port = (
            Problems(),
            ClusterStatus(config.workers, 1, 0, ()),  # until the supervisor says more
            config.port,
        )
        engine = Engine(self.generation, self._store, follows=True, late_events=config.late_events)
        self._router, self._loader = engine.router, self._make_loader(engine.router)
        self._loader.load()
        self._updates = Batcher(engine, metrics=metrics)
        # On CUDA all graph runs belong on one thread.
        on_cuda = self.generation.graphs.on_cuda
        self._queries = self._updates if on_cuda else Batcher(engine, writer=self._updates, metrics=metrics)
        self._bulk = ThreadPoolExecutor(1, thread_name_prefix="bulk")
        self._service = RecommenderService(
            engine, updates=self._updates, queries=self._queries, bulk=self._bulk, metrics=metrics
        )
        self._admin = self._make_admin() if config.has_admin else None
        self._monitor = self._make_monitor()
        engine.committed = self._monitor.committed

    def _make_loader(self, router: Router) -> Loader:
        config = self._config
        return Loader(
            router,
            self._store,
            open_bundle=lambda path: Generation.open(path, provider=config.provider, threads=config.encoder_threads),
            presence=presence(config.state, self._store),
            problems=self.problems,
            pid=os.getpid(),
            loaded=self._loaded,
        )

    def _make_admin(self) -> AdminServer:
        return AdminServer(
            self._config,
            access=self._access,
            credentials=self._credentials,
            rollout=lambda: self._store.rollout()._asdict(),
            metrics=self._metrics,
        )

    def _make_monitor(self) -> Monitor:
        return Monitor(
            self.problems,
            state=directory_of(self._config.state),
            check_store=self._store.check,
            maintain_store=self._store.maintain,
            store_sizes=self._store.sizes,
            bundle_changed=self._bundles_changed,
            reload_tokens=self._access.reload,
            busy_since=(self._updates.busy_since, self._queries.busy_since),
            metrics=self._metrics,
        )

    async def __aenter__(self) -> App:
        config = self._config
        remember_id_types(self._store, self.generation.bundle.manifest)
        self._admission = Admission(max_requests=config.max_concurrent, max_bytes=config.max_in_flight_mib << 20)
        status = OperationsService(lambda: self.bundle_id, self.problems, self._admission, lambda: self.cluster)
        self._health = Health(("", recommender.SERVICE_NAME))
        self._door = Door(
            [*self._service.methods(), *status.methods(), *self._health.methods()],
            admission=self._admission,
            access=self._access,
            limits=Limits(config.caller_requests, config.caller_events),
            bulk=self._bulk,
            certificates=config.tls_client_ca is not None,
            saw=self._monitor.saw,
            metrics=self._metrics,
        )
        names = (recommender.SERVICE_NAME, operations.SERVICE_NAME)
        self._server = grpc.aio.server(options=_server_options(config))
        self._server.add_generic_rpc_handlers((self._door, Streams(self._door, self._health, names)))
        self.port = self._bind()
        await self._look()
        if not config.share_port:
            await self.administer(True)
        self._loaded()
        await self._server.start()
        self._looking = asyncio.create_task(self._look_often())
        return self

    async def administer(self, wanted: bool) -> None:
        """Whether this worker has the admin service, if the server has one. Raises UsageError only at the start."""
        if self._admin is None or wanted == bool(self._admin.address):
            return
        if not wanted:
            await self._admin.stop()
            return
        try:
            await self._admin.start()
        except UsageError as error:
            if not self._config.share_port:
                raise
            self._limited.warning("admin", "%s", error)  # the worker that had it may not be quite gone

    @property
    def admin_address(self) -> str:
        """Empty where this worker has no admin service."""
        return self._admin.address if self._admin is not None else ""

    @property
    def bundle_id(self) -> str:
        """Of the bundle that answers, trials aside."""
        return self._router.bundle_id

    def _bundles_changed(self) -> str:
        """What was changed under a bundle that is loaded, or ""."""
        return next((text for one in self._router.loaded.values() if (text := one.bundle.changed())), "")

    @property
    def requests(self) -> int:
        """Requests that this worker holds now."""
        return self._admission.requests

    async def __aexit__(self, *_: object) -> None:
        """Requests under way finish (up to the grace period), what waits is committed, the store is flushed."""
        await self.administer(False)
        self._looking.cancel()
        with suppress(asyncio.CancelledError):
            await self._looking
        if self._looked is not None:  # it uses what will be closed
            await asyncio.wait({self._looked}, timeout=LOOK_SECONDS)
        self._health.stop()
        stopping = asyncio.create_task(self._server.stop(self._config.grace + 1))
        await asyncio.wait({stopping}, timeout=self._config.grace)
        self._door.stop()
        await stopping
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._queries.close()
        self._updates.close()
        self._service.close()
        self._bulk.shutdown()
        self._loader.close()
        self._store.flush()
        self._store.close()

    def _bind(self) -> int:
        address = self._config.address
        try:
            if self._credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, self._credentials)
        except RuntimeError:
            raise cannot_listen(self._config, "the port is in use or not allowed", parameter="port") from None

    async def _look_often(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._look()

    async def _look(self) -> None:
        """Looks for problems, off the event loop, as the disk may hang; then says whether this worker can serve.

        One look at a time: where the disk hangs, the same one is waited for again.
        """
        with suppress(StoreError):  # the monitor says so
            self._loader.look()
        self._metrics.bytes_in_flight(self._admission.bytes)
        self._metrics.requests_in_flight(self._admission.requests)
        self._metrics.queue_depth(sum(batcher.queue_depth for batcher in {self._updates, self._queries}))
        if self._looked is None:
            self._looked = asyncio.ensure_future(asyncio.to_thread(self._monitor.look))
        await asyncio.wait({self._looked}, timeout=LOOK_SECONDS)
        if self._looked.done():
            if (error := self._looked.exception()) is not None:  # the next look may find out more
                self._limited.error("look", "looking for problems failed", exc_info=error)
            self._looked = None
        self._monitor.look_at_clock()
        self._health.set(not self.problems.blocking)


def _free_ports(config: ServeConfig) -> None:
    """Before the bundle is loaded, and in one line where gRPC writes several. Raises UsageError."""
    if not config.share_port:
        free_port(config)
        if config.admin_port is not None:
            free_port(config.of_admin(), parameter="admin_port")


def _server_options(config: ServeConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(config.share_port)),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        ("grpc.server.max_pending_requests", PENDING_CALLS[0]),
        ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS[1]),
        ("grpc.max_connection_idle_ms", int(config.idle_timeout * 1000)),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
        ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
