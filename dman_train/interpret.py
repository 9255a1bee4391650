"""What a trained model does with its users: how the gate mixes the branches (eq. 3), which memory slots the long-term
branch reads (eq. 2), and how different the slots are.

Everything is about the position that gives the user embedding: the last one of a history, or of each of its segments.
The memory is the one that this position reads, before its own segment closes; it has been written once a history is
in its third segment, and is the learned initial memory until then.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_runtime.options import UsageError
from dman_train.model import DMAN, Encoding
from dman_train.replay import replay

logger = logging.getLogger(__name__)

NEAR_IDENTICAL = 0.95  # cosine similarity above which two slots count as one
SHARE_EDGES = np.linspace(0, 1, 41)
COSINE_EDGES = np.linspace(-1, 1, 41)
LENGTH_BORDERS = (50, 200, 500)  # history lengths that part the groups of users
LENGTH_GROUPS = ("< 50", "50 to 199", "200 to 499", ">= 500")  # events
PERCENTILES = (5, 25, 50, 75, 95)


def length_group(events: np.ndarray) -> np.ndarray:
    """Which of LENGTH_GROUPS each history is in."""
    return np.searchsorted(LENGTH_BORDERS, events, side="right")


class Diversity(NamedTuple):
    """How different the m slots of a memory are; leading axes as in the memory."""

    cosine: Tensor  # (...) mean cosine similarity of two slots; 0 when there is one slot only
    near_identical: Tensor  # (...) fraction of the m(m-1)/2 pairs with a cosine above NEAR_IDENTICAL
    pairs: Tensor  # (..., 40) pairs by cosine, counted between COSINE_EDGES
    effective_rank: Tensor  # (...) exp of the entropy of the normalised singular values: 1 to min(m, D)


def slot_diversity(memory: Tensor) -> Diversity:
    """(..., m, D) memories."""
    slots = F.normalize(memory, dim=-1)
    first, second = torch.triu_indices(memory.shape[-2], memory.shape[-2], offset=1)
    cosine = (slots @ slots.transpose(-1, -2))[..., first, second].clamp(-1, 1)  # (..., m(m-1)/2)
    inner = torch.from_numpy(COSINE_EDGES[1:-1]).to(cosine)
    place = torch.bucketize(cosine, inner, right=True)
    pairs = cosine.new_zeros(*cosine.shape[:-1], len(inner) + 1).scatter_add_(-1, place, torch.ones_like(cosine))
    singular = torch.linalg.svdvals(memory)
    share = singular / singular.sum(-1, keepdim=True).clamp_min(1e-30)
    count = max(len(first), 1)
    near = (cosine > NEAR_IDENTICAL).sum(-1) / count
    return Diversity(cosine.sum(-1) / count, near, pairs, torch.special.entr(share).sum(-1).exp())


def slot_attention(model: DMAN, pulled: Sequence[Tensor], memory: Tensor) -> Tensor:
    """`Encoding.long_pulled` of one position, (B, L, m, D) memories -> (B, L, m) weights, mean over the heads."""
    weights = []
    for layer, block in enumerate(model.long_term):
        logits = pulled[layer] @ block.norm_sources(memory[:, layer]).transpose(1, 2)  # type: ignore[operator]  # (B, H, m)
        weights.append(torch.softmax(logits, dim=-1).mean(1))
    return torch.stack(weights, dim=1)


@dataclass(frozen=True)
class Observations:
    """What the model did at N positions, ordered by history and then by events."""

    history: np.ndarray  # (N) int64 index of the history
    events: np.ndarray  # (N) int64 events up to and with the position
    absorbed: np.ndarray  # (N) int64 segments that the memory it reads has absorbed
    gate: np.ndarray  # (N) share of the short-term branch (eq. 3), mean over the width
    attention: np.ndarray  # (N, L, m) as `slot_attention`
    cosine: np.ndarray  # (N, L) this and the rest as `Diversity`, of the memory it reads
    near_identical: np.ndarray  # (N, L)
    pairs: np.ndarray  # (N, L, 40)
    effective_rank: np.ndarray  # (N, L)

    @classmethod
    def concatenate(cls, parts: Sequence[Observations]) -> Observations:
        joined = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        order = np.lexsort((joined["events"], joined["history"]))
        return cls(**{name: values[order] for name, values in joined.items()})


def observe(
    model: DMAN, histories: Sequence[np.ndarray], *, every_segment: bool = False, batch: int = 256
) -> Observations:
    """Observations at the last position of each history, or of each segment of each. Raises ValueError without memory.

    None of the histories is empty.
    """
    if not model.config.has_memory:
        raise ValueError("a model without memory has nothing to observe")
    order = np.argsort([len(history) for history in histories], kind="stable")
    parts = []
    with _gate_share(model) as share:
        for start in range(0, len(order), batch):
            parts += _observe_batch(model, histories, order[start : start + batch], share, every_segment=every_segment)
    return Observations.concatenate(parts)


def _observe_batch(
    model: DMAN,
    histories: Sequence[np.ndarray],
    chosen: np.ndarray,
    share: Callable[[], Tensor],
    *,
    every_segment: bool,
) -> list[Observations]:
    """Observations of the chosen histories, one object a segment."""
    lengths = np.array([len(histories[row]) for row in chosen])
    parts: list[Observations] = []

    def watch(rows: Tensor, memory: Tensor, encoding: Encoding) -> None:
        index, before = rows.cpu().numpy(), len(parts)  # `before`: whole segments before this one
        events = np.minimum(lengths[index], (before + 1) * model.config.segment_length)
        kept = np.ones(len(index), bool) if every_segment else events == lengths[index]
        at = torch.from_numpy(np.flatnonzero(kept)).to(memory.device)
        values = (
            share()[at, 0].mean(-1),
            slot_attention(model, [pulled[at] for pulled in encoding.long_pulled], memory[at]),
            *slot_diversity(memory[at]),
        )
        absorbed = np.full(len(at), max(before - 1, 0))
        parts.append(
            Observations(
                chosen[index[kept]], events[kept], absorbed, *(value.double().cpu().numpy() for value in values)
            )
        )

    replay(model, [histories[row] for row in chosen], watch)
    return parts


@contextmanager
def _gate_share(model: DMAN) -> Iterator[Callable[[], Tensor]]:
    """Evaluation mode, and a function that gives eq. 3's share in the latest `encode`: (B, Q, D)."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs[module] = output

    was_training, gates = model.training, (model.gate_short, model.gate_long)
    hooks = [gate.register_forward_hook(keep) for gate in gates]
    model.eval()
    try:
        yield lambda: torch.sigmoid(outputs[gates[0]] + outputs[gates[1]])
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


# Summaries: the content of interpretation.json


def summarise(model: DMAN, seen: Observations) -> dict[str, Any]:
    """Gate, attention and slot diversity over the users of `seen`, one position each; plain finite numbers."""
    return {
        "users": len(seen.gate),
        "gate": {
            **_spread(seen.gate),
            "histogram": _histogram(SHARE_EDGES, np.histogram(seen.gate, SHARE_EDGES)[0]),
            "by_history_length": _by_history_length(seen),
        },
        "attention": [_attention(seen.attention[:, layer]) for layer in range(model.config.layers)],
        "slot_diversity": _diversity(model, seen),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and percentiles; nothing when there are no values."""
    if not len(values):
        return {}
    percentiles = dict(zip((f"p{p}" for p in PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))
    return {"mean": float(values.mean()), "std": float(values.std()), **percentiles}


def _histogram(edges: np.ndarray, counts: np.ndarray) -> dict[str, list[float]]:
    """Edges and the fraction of all that lies between each two."""
    return {"edges": edges.round(6).tolist(), "fraction": (counts / max(counts.sum(), 1)).tolist()}


def _by_history_length(seen: Observations) -> list[dict[str, Any]]:
    group, rows = length_group(seen.events), []
    for index, name in enumerate(LENGTH_GROUPS):
        inside = group == index
        rows.append({"events": name, "users": int(inside.sum()), **_spread(seen.gate[inside])})
    return rows


def _entropy(attention: np.ndarray) -> np.ndarray:
    """(..., m) weights -> (...) entropy in units of log m: 1 when all slots are read alike, 0 when one is."""
    safe = np.where(attention > 0, attention, 1)
    return -(safe * np.log(safe)).sum(-1) / max(math.log(attention.shape[-1]), 1e-30)


def _attention(weights: np.ndarray) -> dict[str, Any]:
    """(N, m) weights of one layer."""
    return {
        "slots": weights.mean(0).tolist(),
        "entropy": _spread(_entropy(weights)),
        "largest_slot": _spread(weights.max(-1)),
    }


def _diversity(model: DMAN, seen: Observations) -> dict[str, Any]:
    """Over the users whose memory has been written; `initial` is the memory that all of them started from."""
    written, layers = seen.absorbed > 0, range(model.config.layers)
    initial = slot_diversity(model.initial_memory.detach().cpu())
    return {
        "users": int(written.sum()),
        "layers": [
            {
                "cosine": _spread(seen.cosine[written, layer]),
                "near_identical": _spread(seen.near_identical[written, layer]),
                "pairs": _histogram(COSINE_EDGES, seen.pairs[written, layer].sum(0)),
                "effective_rank": _spread(seen.effective_rank[written, layer]),
            }
            for layer in layers
        ],
        "initial": [
            {name: float(getattr(initial, name)[layer]) for name in ("cosine", "near_identical", "effective_rank")}
            for layer in layers
        ],
    }


def trajectory(seen: Observations) -> list[dict[str, Any]]:
    """One user's observations as they are, a segment each; lists are by layer."""
    return [
        {
            "events": int(seen.events[row]),
            "absorbed_segments": int(seen.absorbed[row]),
            "gate": float(seen.gate[row]),
            "attention": seen.attention[row].tolist(),
            "entropy": _entropy(seen.attention[row]).tolist(),
            "largest_slot": seen.attention[row].max(-1).tolist(),
            "cosine": seen.cosine[row].tolist(),
            "near_identical": seen.near_identical[row].tolist(),
            "effective_rank": seen.effective_rank[row].tolist(),
        }
        for row in range(len(seen.gate))
    ]


# Files


def write_interpretation(
    model: nn.Module, histories: Sequence[np.ndarray], directory: Path, *, about: dict[str, Any], segments: bool
) -> None:
    """Writes interpretation.json, which begins with `about`, and its plots into `directory`, created if absent.

    With `segments`, also the trajectory of the first history. Raises UsageError for a model without memory and gate,
    for weights that are no numbers, and where nothing can be written.
    """
    if not isinstance(model, DMAN) or not model.config.has_memory:
        kind = "variant xl" if isinstance(model, DMAN) else "a baseline"
        raise UsageError(f"--interpret: {kind} has neither memory nor gate: nothing to interpret; choose another run")
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise UsageError("--interpret: the weights of the run are not all finite; train again")
    temporary = directory / ".interpretation.json"
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # says now, not after minutes, that nothing can be written
    result = about | {"memory_slots": model.config.memory_slots} | summarise(model, observe(model, histories))
    if segments:
        result["trajectory"] = trajectory(observe(model, histories[:1], every_segment=True))
    with _writing(directory):
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(directory / "interpretation.json")
        _write_plots(result, directory)
    logger.info("interpretation of %d users in %s", len(histories), directory)


def _write_plots(result: dict[str, Any], directory: Path) -> None:
    from dman_train import plots

    plots.plot_gate(result["gate"], directory / "gate.png")
    plots.plot_attention(result["attention"], directory / "attention.png")
    plots.plot_slots(result["slot_diversity"], directory / "slots.png")
    if "trajectory" in result:
        plots.plot_trajectory(result["trajectory"], directory / "trajectory.png")
    else:
        (directory / "trajectory.png").unlink(missing_ok=True)  # of an earlier call, about one user


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"--interpret {directory} cannot be written ({reason}); choose another directory") from None
