"""How a trained model uses its memory: how much of what it reads is recent, which slots it reads, how the slots differ.

The *short-term share* is the value of eq. 3's gate. If one attention reads slots and events (`long_term="merged"`), it
is the attention that goes to the events.

All values are for the position that gives the user embedding: the last one of a history, or of each of its segments.
The memory is the one that this position reads, before its own segment closes. It is first written when a history is in
its third segment, or its second if the variant is `nran`; until then it is the learned initial memory.
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

from dman_runtime.errors import UsageError
from dman_train.model import DMAN, Encoding
from dman_train.replay import replay
from dman_train.timing import at_position

logger = logging.getLogger(__name__)

NEAR_IDENTICAL = 0.95  # cosine similarity above which two slots count as one
SHARE_EDGES = np.linspace(0, 1, 41)
COSINE_EDGES = np.linspace(-1, 1, 41)
LENGTH_BORDERS = (50, 200, 500)  # history lengths that separate the groups of users
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
    bucket = torch.bucketize(cosine, inner, right=True)
    pairs = cosine.new_zeros(*cosine.shape[:-1], len(inner) + 1).scatter_add_(-1, bucket, torch.ones_like(cosine))
    singular = torch.linalg.svdvals(memory)
    share = singular / singular.sum(-1, keepdim=True).clamp_min(1e-30)
    count = max(len(first), 1)
    near = (cosine > NEAR_IDENTICAL).sum(-1) / count
    return Diversity(cosine.sum(-1) / count, near, pairs, torch.special.entr(share).sum(-1).exp())


@dataclass(frozen=True)
class Observations:
    """What was observed at N positions, ordered by history and then by events."""

    history: np.ndarray  # (N) int64 index of the history
    events: np.ndarray  # (N) int64 events up to and including the position
    absorbed: np.ndarray  # (N) int64 segments that the memory it reads has absorbed
    share: np.ndarray  # (N) short-term share: mean over the width of the gate, or over heads and layers
    attention: np.ndarray  # (N, L, m) each slot's share of the attention to all slots, mean over the heads
    cosine: np.ndarray  # (N, L) this and the rest: `Diversity` of the memory it reads
    near_identical: np.ndarray  # (N, L)
    pairs: np.ndarray  # (N, L, 40)
    effective_rank: np.ndarray  # (N, L)

    @classmethod
    def concatenate(cls, parts: Sequence[Observations]) -> Observations:
        joined = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        order = np.lexsort((joined["events"], joined["history"]))
        return cls(**{name: values[order] for name, values in joined.items()})


def observe(
    model: DMAN,
    histories: Sequence[np.ndarray],
    *,
    times: Sequence[np.ndarray] | None = None,
    every_segment: bool = False,
    batch: int = 256,
) -> Observations:
    """Observations at the last position of each history, or of each segment of each. Raises ValueError without memory.

    None of the histories is empty. `times`: as in `replay`, for a model that sees times.
    """
    if not model.config.has_memory:
        raise ValueError("a model without memory has nothing to observe")
    order = np.argsort([len(history) for history in histories], kind="stable")
    parts = []
    with _recording(model) as reading:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            parts += _observe_batch(model, histories, chosen, reading, times, every_segment=every_segment)
    return Observations.concatenate(parts)


def _observe_batch(
    model: DMAN,
    histories: Sequence[np.ndarray],
    chosen: np.ndarray,
    reading: Callable[[Tensor], tuple[Tensor, Tensor]],
    times: Sequence[np.ndarray] | None,
    *,
    every_segment: bool,
) -> list[Observations]:
    """Observations of the chosen histories, one object per segment."""
    lengths = np.array([len(histories[row]) for row in chosen])
    parts: list[Observations] = []

    def record(rows: Tensor, memory: Tensor, _encoding: Encoding) -> None:
        index, earlier_segments = rows.cpu().numpy(), len(parts)
        start = earlier_segments * model.config.segment_length
        events = np.minimum(lengths[index], start + model.config.segment_length)
        kept = np.ones(len(index), bool) if every_segment else events == lengths[index]
        at = torch.from_numpy(np.flatnonzero(kept)).to(memory.device)
        share, attention = reading(torch.from_numpy(events - start - 1).to(rows))
        values = (share[at], attention[at], *slot_diversity(memory[at]))
        in_context = int(model.config.recurrent)  # the segment before this one, which is not absorbed yet
        absorbed = np.full(len(at), max(earlier_segments - in_context, 0))
        parts.append(
            Observations(
                chosen[index[kept]], events[kept], absorbed, *(value.double().cpu().numpy() for value in values)
            )
        )

    of_chosen = None if times is None else [times[row] for row in chosen]
    replay(model, [histories[row] for row in chosen], record, times=of_chosen)
    return parts


@contextmanager
def _recording(model: DMAN) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Evaluation mode. Yields a function: positions (B) -> short-term share (B) and attention to the slots (B, L, m)
    of the latest `encode`."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs[module] = output

    readers = [block.attention.dropout for block in model.memory_blocks]  # their outputs are the weights (B, Q, H, K)
    gates = [] if model.config.merged else [model.gate_short, model.gate_long]

    def weights_at(position: Tensor, reader: nn.Module) -> Tensor:
        weights = outputs[reader]  # of the last layer, and of the long-term branch, Q = 1
        return (weights if weights.shape[1] == 1 else at_position(weights, position))[:, 0]

    def latest(position: Tensor) -> tuple[Tensor, Tensor]:
        slots = torch.stack([weights_at(position, r)[..., : model.config.memory_slots] for r in readers], dim=1)
        to_memory = slots.sum(-1)  # (B, L, H)
        mixed = torch.sigmoid(outputs[gates[0]] + outputs[gates[1]])[:, 0] if gates else 1 - to_memory.flatten(1)
        return mixed.mean(-1), (slots / to_memory[..., None].clamp_min(1e-30)).mean(2)

    was_training = model.training
    hooks = [module.register_forward_hook(keep) for module in (*readers, *gates)]
    model.eval()
    try:
        yield latest
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


# Summaries: the content of interpretation.json


def summarise(model: DMAN, seen: Observations) -> dict[str, Any]:
    """What the users of `seen` read and how diverse their slots are, one position per user; only finite numbers."""
    return {
        "users": len(seen.share),
        "short_term_share": {
            **_spread(seen.share),
            "histogram": _histogram(SHARE_EDGES, np.histogram(seen.share, SHARE_EDGES)[0]),
            "by_history_length": _by_history_length(seen),
        },
        "attention": [_attention(seen.attention[:, layer]) for layer in range(model.config.layers)],
        "slot_diversity": _diversity(model, seen),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and percentiles; empty if there are no values."""
    if not len(values):
        return {}
    percentiles = dict(zip((f"p{p}" for p in PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))
    return {"mean": float(values.mean()), "std": float(values.std()), **percentiles}


def _histogram(edges: np.ndarray, counts: np.ndarray) -> dict[str, list[float]]:
    """The edges, and the fraction between each two."""
    return {"edges": edges.round(6).tolist(), "fraction": (counts / max(counts.sum(), 1)).tolist()}


def _by_history_length(seen: Observations) -> list[dict[str, Any]]:
    group, rows = length_group(seen.events), []
    for index, name in enumerate(LENGTH_GROUPS):
        inside = group == index
        rows.append({"events": name, "users": int(inside.sum()), **_spread(seen.share[inside])})
    return rows


def _entropy(attention: np.ndarray) -> np.ndarray:
    """(..., m) weights -> (...) entropy divided by log m: 1 if all slots are read equally, 0 if only one is read."""
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
    """Over the users whose memory has been written; `initial` is the memory that all of them start from."""
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
    """One user's observations, segment by segment; lists are by layer."""
    return [
        {
            "events": int(seen.events[row]),
            "absorbed_segments": int(seen.absorbed[row]),
            "short_term_share": float(seen.share[row]),
            "attention": seen.attention[row].tolist(),
            "entropy": _entropy(seen.attention[row]).tolist(),
            "largest_slot": seen.attention[row].max(-1).tolist(),
            "cosine": seen.cosine[row].tolist(),
            "near_identical": seen.near_identical[row].tolist(),
            "effective_rank": seen.effective_rank[row].tolist(),
        }
        for row in range(len(seen.share))
    ]


# Files


def write_interpretation(
    model: DMAN,
    histories: Sequence[np.ndarray],
    directory: Path,
    *,
    times: Sequence[np.ndarray] | None = None,
    about: dict[str, Any],
    segments: bool,
) -> None:
    """Writes interpretation.json, which begins with `about`, and its plots into `directory`, created if absent.

    With `segments`, also the trajectory of the first history. Raises UsageError if the model has no memory, if its
    weights are not finite, and if the directory cannot be written.
    """
    if not model.config.has_memory:
        raise UsageError("variant xl has no memory: nothing to interpret", "choose another run", parameter="interpret")
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise UsageError("the weights of the run are not all finite", "train again", parameter="interpret")
    temporary = directory / ".interpretation.json"
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # fails now if nothing can be written, not after minutes
    seen = observe(model, histories, times=times)
    result = about | {"memory_slots": model.config.memory_slots} | summarise(model, seen)
    if segments:
        result["trajectory"] = trajectory(observe(model, histories[:1], times=times and times[:1], every_segment=True))
    with _writing(directory):
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(directory / "interpretation.json")
        _write_plots(result, directory)
    logger.info("interpretation of %d users in %s", len(histories), directory)


def _write_plots(result: dict[str, Any], directory: Path) -> None:
    from dman_train import plots

    plots.plot_share(result["short_term_share"], directory / "share.png")
    plots.plot_attention(result["attention"], directory / "attention.png")
    plots.plot_slots(result["slot_diversity"], directory / "slots.png")
    if "trajectory" in result:
        plots.plot_trajectory(result["trajectory"], directory / "trajectory.png")
    else:
        (directory / "trajectory.png").unlink(missing_ok=True)  # from an earlier call for one user


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        cause = f"{directory} cannot be written ({reason})"
        raise UsageError(cause, "choose another directory", parameter="interpret") from None
