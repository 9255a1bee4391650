"""Our model in Triton by PyTriton. Runs in its environment.

Two models of one process, as Triton's models have tensors of fixed kinds. Its dynamic batcher takes what waits and
waits for nothing, which is its default. It is asked in JSON: gRPC was no faster.
"""

from __future__ import annotations

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from tools.bench.peers.hosted import MAX_BATCH, HostedModel, Settings


def serve() -> None:
    settings = Settings.given()
    model = HostedModel(settings)

    @batch
    def recommend(user_id: np.ndarray, k: np.ndarray) -> dict[str, np.ndarray]:
        """(B, 1) bytes and int32 -> (B, k) bytes and float32."""
        most = int(k.max())
        found = model.recommend([one.decode() for one in user_id[:, 0]], most)
        ids = [[item_id.encode() for item_id in model.item_ids(hits)] for hits in found]
        return {"item_ids": np.array(ids), "scores": np.stack([hits.scores for hits in found])}

    @batch
    def update(user_id: np.ndarray, item_id: np.ndarray) -> dict[str, np.ndarray]:
        """(B, 1) bytes each -> (B, 1) int64."""
        events = zip(user_id[:, 0], item_id[:, 0], strict=True)
        counts = model.update([(user.decode(), item.decode()) for user, item in events])
        return {"event_count": np.array(counts, np.int64)[:, None]}

    text, one = {"dtype": np.bytes_, "shape": (1,)}, (1,)
    config = ModelConfig(max_batch_size=MAX_BATCH, batcher=DynamicBatcher())
    ports = {"http_port": settings.port, "grpc_port": settings.port + 1}
    with Triton(config=TritonConfig(**ports, allow_metrics=False, http_address="127.0.0.1")) as triton:
        triton.bind(
            "recommend",
            [recommend] * settings.workers,
            inputs=[Tensor(name="user_id", **text), Tensor(name="k", dtype=np.int32, shape=one)],
            outputs=[
                Tensor(name="item_ids", dtype=np.bytes_, shape=(-1,)),
                Tensor(name="scores", dtype=np.float32, shape=(-1,)),
            ],
            config=config,
        )
        triton.bind(
            "update",
            [update] * settings.workers,
            inputs=[Tensor(name="user_id", **text), Tensor(name="item_id", **text)],
            outputs=[Tensor(name="event_count", dtype=np.int64, shape=one)],
            config=config,
        )
        triton.serve()
