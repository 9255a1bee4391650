"""Our model in mosec. Runs in its environment.

Dynamic batching with the shortest wait that it takes, 1 ms. Its default writes JSON with indents: msgspec, which it
depends on, writes it compactly and faster.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from mosec import Server, Worker

from tools.bench.peers.hosted import MAX_BATCH, HostedModel, Settings

WAIT_MS = 1


class Peer(Worker):
    def __init__(self) -> None:
        self.model = HostedModel(Settings.given())

    def deserialize(self, data: bytes) -> Any:
        return msgspec.json.decode(data)

    def serialize(self, data: Any) -> bytes:
        return msgspec.json.encode(data)

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.model.answer(data)


def serve() -> None:
    settings = Settings.given()
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(settings.port), "--log-level", "warning"]
    server = Server()
    server.append_worker(Peer, num=settings.workers, max_batch_size=MAX_BATCH, max_wait_time=WAIT_MS)
    server.run()
