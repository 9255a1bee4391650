"""What a request costs a model that keeps no state: SASRec encodes the last events again, we update a state.

Compute is CPU time of one process with one thread, user and system: a core that waits for the disk does not compute.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_runtime.engine import Engine
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query, Update
from dman_runtime.retrieval.exact import ExactRetriever
from dman_runtime.store.lmdb import LmdbStore
from dman_train import graphs
from dman_train.baselines.sasrec import SASRec
from dman_train.config import BaselineConfig
from tools.bench.blocks import Spread
from tools.bench.peers.ladder import Climb
from tools.bench.report import Claim, Section
from tools.bench.setting import Bench, K

TARGETS = {200: 20.0, 10_000: 100.0}  # events that are encoded again: how many times less compute ours should take
SHORT, LONG = TARGETS
BATCH = 64
OURS = "update and recommend"


@dataclass(frozen=True)
class Effort:
    """How often each is timed in a round."""

    rounds: int = 5
    pairs: int = 200  # of an update and a recommendation
    batches: int = 20  # of such pairs
    encodings: int = 30  # of SHORT histories, one at a time; a batch and a LONG history are encoded once


QUICK = Effort(rounds=1, pairs=10, batches=1, encodings=2)


class LastEmbedding(nn.Module):
    """SASRec as a server would run it: (B, W) item indices -> (B, D), the embedding after the last of them.

    The last block has one query, and only its row goes through the feed-forward layers: the others are never read.
    """

    def __init__(self, model: SASRec) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor) -> Tensor:
        model = self.model
        x = model.embed(items) + model.positions[: items.shape[1]] * model.input_scale
        for block in model.blocks[:-1]:
            x = block(x, x, None)
        return model.norm(_last_row(model.blocks[-1], x)) * model.output_scale


def _last_row(block: Any, x: Tensor) -> Tensor:
    """(B, W, D) -> (B, D): what a causal block makes of the last position."""
    normed, weights = block.norm_attention(x), block.project.weight.chunk(3)

    def heads(rows: Tensor, weight: Tensor) -> Tensor:
        """(B, n, D) -> (B, H, n, D/H)."""
        return F.linear(rows, weight).view(*rows.shape[:2], block.heads, -1).transpose(1, 2)

    query, keys, values = (heads(rows, w) for rows, w in zip((normed[:, -1:], normed, normed), weights, strict=True))
    read = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(1)  # (B, D)
    row = x[:, -1] + block.output(read)
    return row + block.ffn(block.norm_ffn(row))


def sasrec(vocabulary: int, length: int) -> SASRec:
    """An untrained SASRec of the default sizes that sees so many events, and no times."""
    torch.manual_seed(0)
    model = SASRec(BaselineConfig("sasrec", time="none", returns="off"), vocabulary, users=1)
    model.positions = nn.Parameter(torch.randn(length, model.config.width) * 0.02)  # more than training allows
    return model.eval()


def export(model: SASRec, length: int, path: Path) -> ort.InferenceSession:
    """The same as ONNX, in a session with one thread."""
    example, batch = torch.zeros(2, length, dtype=torch.int64), torch.export.Dim("B", min=1, max=1 << 10)
    inputs = {"items": {0: batch}}
    graphs._export_graph(LastEmbedding(model), (example,), path, inputs=inputs, outputs=["user_embedding"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


Encode = Callable[[np.ndarray], np.ndarray]  # (B, W) item indices -> (B, D)


def _in_torch(model: SASRec) -> Encode:
    last = LastEmbedding(model)

    def encode(items: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return last(torch.from_numpy(items)).numpy()

    return encode


def _in_onnx(session: ort.InferenceSession) -> Encode:
    return lambda items: session.run(["user_embedding"], {"items": items})[0]


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cpu_seconds(action: Callable[[], object], times: int) -> float:
    """Of this process, for one of so many calls."""
    began = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - began) / times


def reencoding(bench: Bench, effort: Effort, climbs: Sequence[Sequence[Climb]]) -> Section:
    """SASRec encoding 200 events and the whole history again, against an update and a recommendation of ours.

    `climbs`: of recommendations and of updates through our server.
    """
    with one_thread():
        found = _measure(bench, effort)
    claims = [
        _claim(found, SHORT, _alone(SHORT)),
        _claim(found, SHORT, _together(SHORT)),
        _claim(found, LONG, _alone(LONG)),
        *_through_server(found, climbs),
    ]
    rows = [[name, str(Spread(tuple(1e3 * value for value in spread.values)))] for name, spread in found.items()]
    data = {name: spread.values for name, spread in found.items()}
    return Section("Encoding histories again", _method(effort), claims, ("what", "CPU ms a user"), rows, data)


def _alone(length: int) -> str:
    return f"{length:,} events, one user at a time"


def _together(length: int) -> str:
    return f"{length:,} events, batches of {BATCH} users"


def _method(effort: Effort) -> str:
    config = BaselineConfig("sasrec")
    return (
        f"CPU time of one process with one thread. SASRec: our baseline, {config.layers} layers, D={config.width}, "
        f"{config.heads} heads, without times, untrained; its last block computes the last position only. It gets item "
        "indices and searches our exact top-K; nothing is read, looked up or stored. Ours: the engine, an update by "
        f"one event, committed durably to LMDB, and then a recommendation to the same user, k={K}. {effort.rounds} "
        'rounds in turns. The claims "through the server" take all CPU time of `dman-runtime serve` (one worker) for '
        "both calls, gRPC included, but SASRec's without any server."
    )


def _measure(bench: Bench, effort: Effort) -> dict[str, Spread]:
    """CPU seconds for one user, in rounds."""
    actions: dict[str, tuple[Callable[[], object], int, int]] = {}  # what, how often, for how many users
    generation = Generation.open(bench.bundle.path, provider="cpu")
    with LmdbStore.open(bench.scratch / "reencoding") as store:
        engine = Engine(generation, store)
        for length in TARGETS:
            users = [f"{length}-{number}" for number in range(BATCH if length == SHORT else 1)]
            histories = {user: bench.history(user, length) for user in users}
            engine.update([Update(user, items) for user, items in histories.items()])
            items = np.stack([bench.bundle.items.indices(history)[0] for history in histories.values()])
            model = sasrec(bench.bundle.manifest.vocabulary, length)
            session = export(model, length, bench.scratch / f"sasrec-{length}.onnx")
            forms = {"SASRec in ONNX Runtime": _in_onnx(session), "SASRec in PyTorch": _in_torch(model)}
            times = effort.encodings if length == SHORT else 1
            actions[f"{OURS}, {_alone(length)}"] = (_pairs(engine, bench, users[:1]), effort.pairs, 1)
            for form, encode in forms.items():
                actions[f"{form}, {_alone(length)}"] = (_recommend(encode, items[:1]), times, 1)
            if length == SHORT:
                actions[f"{OURS}, {_together(length)}"] = (_pairs(engine, bench, users), effort.batches, BATCH)
                for form, encode in forms.items():
                    actions[f"{form}, {_together(length)}"] = (_recommend(encode, items), 1, BATCH)
        for action, _, _ in actions.values():
            action()
        gc.collect()
        gc.freeze()  # as our server does: what the exporter leaves behind would be looked at again and again
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(effort.rounds):
            for name, (action, times, users_each) in actions.items():
                seconds[name].append(cpu_seconds(action, times) / users_each)
        gc.unfreeze()
    return {name: Spread(tuple(values)) for name, values in seconds.items()}


def _pairs(engine: Engine, bench: Bench, users: Sequence[str]) -> Callable[[], object]:
    """An update and a recommendation for each of some users; one user as the server does it, several in a batch."""
    chooser, queries = random.Random(0), [Query(user, K) for user in users]

    def pairs() -> None:
        engine.update([Update(user, [chooser.choice(bench.items)]) for user in users])
        answers = [engine.plain_answer(queries[0])] if len(users) == 1 else engine.recommend(queries)
        assert all(answer is not None and len(answer.item_indices) == K for answer in answers)

    return pairs


def _recommend(encode: Encode, items: np.ndarray) -> Callable[[], object]:
    width = BaselineConfig("sasrec").width
    table = np.random.default_rng(0).standard_normal((int(items.max()) + 1, width), np.float32)
    retriever = ExactRetriever(table)
    return lambda: retriever.search(encode(items), K, exclude=list(items))


def _claim(found: Mapping[str, Spread], length: int, how: str) -> Claim:
    ours, faster = found[f"{OURS}, {how}"], _faster(found, how)
    ratio = Spread(tuple(a / b for a, b in zip(found[faster].values, ours.values, strict=True)))
    return Claim(
        f"compute of {faster} by that of {OURS}",
        f"{ratio.median:.1f}x ({min(ratio.values):.1f} to {max(ratio.values):.1f}), "
        f"{1e3 * found[faster].median:.3g} ms by {1e3 * ours.median:.3g} ms",
        f">= {TARGETS[length]:g}x",
        bool(ratio.median >= TARGETS[length]),
    )


def _faster(found: Mapping[str, Spread], how: str) -> str:
    forms = [name for name in found if name.endswith(how) and not name.startswith(OURS)]
    return min(forms, key=lambda name: found[name].median)


def _through_server(found: Mapping[str, Spread], climbs: Sequence[Sequence[Climb]]) -> Iterator[Claim]:
    """The same with all that our server does for both calls, at one client and at the most."""
    ours = [next(one for one in of_call if one.server.ours) for of_call in climbs]
    for clients in sorted({min(ours[0].steps), max(ours[0].steps)}):
        milliseconds = sum(one.cpu_milliseconds(clients) for one in ours)
        for length in TARGETS:
            other = 1e3 * found[_faster(found, _alone(length))].median
            yield Claim(
                f"{length:,} events, ours through the server, {clients} client{'s' * (clients > 1)}",
                f"{other / milliseconds:.1f}x, {other:.3g} ms by {milliseconds:.3g} ms",
            )
