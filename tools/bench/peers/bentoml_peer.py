"""Our model in BentoML. Runs in its environment, where `bentoml serve` imports it."""

from __future__ import annotations

import sys
from typing import Any

import bentoml

from tools.bench.peers.hosted import MAX_BATCH, HostedModel, Settings

LATENCY_MS = 1000  # beyond it, its dispatcher refuses requests


@bentoml.service(
    workers=Settings.given().workers,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Peer:
    def __init__(self) -> None:
        self.model = HostedModel(Settings.given())

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=LATENCY_MS)
    def answer(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.model.answer(requests)


def serve() -> None:
    from bentoml_cli.cli import cli

    settings = Settings.given()
    where = ["--host", "127.0.0.1", "--port", str(settings.port)]
    sys.argv = ["bentoml", "serve", "tools.bench.peers.bentoml_peer:Peer", *where]
    cli()
