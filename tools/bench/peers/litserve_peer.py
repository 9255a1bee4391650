"""Our model in LitServe. Runs in its environment.

Without a wait its worker polls all the time, and takes a core from the others; five times as long was no faster.
It looks at annotations, so they are no texts here: with this one it parses JSON itself.
"""

from typing import Any

import litserve
from fastapi import Request

from tools.bench.peers.hosted import MAX_BATCH, HostedModel, Settings

WAIT_SECONDS = 0.001


class Peer(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = HostedModel(Settings.given())

    def decode_request(self, request: Request) -> Any:
        return request  # by now its content

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.model.answer(inputs)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def serve() -> None:
    settings = Settings.given()
    api = Peer(max_batch_size=MAX_BATCH, batch_timeout=WAIT_SECONDS)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=settings.workers, fast_queue=True)
    server.run(host="127.0.0.1", port=settings.port, generate_client_file=False, log_level="warning")
