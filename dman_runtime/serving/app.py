"""Puts a server together: the one place that knows which parts there are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dman_runtime.api.recommender import RecommenderService
from dman_runtime.batcher import Batcher
from dman_runtime.engine import Engine
from dman_runtime.model.generation import Generation
from dman_runtime.serving.config import MAX_MESSAGE_BYTES, ServeConfig, cannot_listen
from dman_runtime.store.lmdb import LmdbStore
from protos.dman.v1.dman_pb2_grpc import add_RecommenderServicer_to_server

SERVICE_NAME = "dman.v1.Recommender"


class App:
    """One worker, ready to serve. Use as a context manager: it starts serving, and closes in order.

    `port` is the port it listens on.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Raises BundleError, EncoderError, StoreError, and UsageError where the port cannot be had."""
        self.generation = Generation.open(config.bundle, provider=config.provider, threads=config.encoder_threads)
        self._grace = config.grace
        self._server = _grpc_server(config)
        try:
            self.port = self._server.add_insecure_port(config.address)
        except RuntimeError:
            raise cannot_listen(config, "the port is in use or not allowed") from None
        self._store = LmdbStore.open(config.state, map_size=config.map_size_mib << 20)
        engine = Engine(self.generation, self._store)
        self._batcher = Batcher(engine)
        self._health = health.HealthServicer()
        add_RecommenderServicer_to_server(RecommenderService(engine, self._batcher), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    def __enter__(self) -> App:
        self._server.start()
        for service in ("", SERVICE_NAME):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self

    def __exit__(self, *_: object) -> None:
        """Requests under way finish (up to the grace period), what waits is committed, the store is flushed."""
        self._health.enter_graceful_shutdown()
        self._server.stop(self._grace).wait()
        self._batcher.close()
        self._store.flush()
        self._store.close()


def _grpc_server(config: ServeConfig) -> grpc.Server:
    return grpc.server(
        ThreadPoolExecutor(config.threads, thread_name_prefix="request"),
        maximum_concurrent_rpcs=config.max_concurrent,
        options=[
            ("grpc.so_reuseport", int(config.share_port)),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ],
    )
