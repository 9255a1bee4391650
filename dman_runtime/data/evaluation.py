"""The evaluation protocol: leave-one-out over all items. numpy only; one implementation for PyTorch, engine and server.

The last event of a user is the test target, the second last the validation target; the input is everything before
the target. All items are ranked. Headline numbers leave out every item that the user has interacted with
(a target that is such an item counts as a miss, as it does in service); "seen kept" ranks without that filter. Ties
count against the model. Users with fewer than three events are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dman_runtime.data.interactions import Interactions

Split = Literal["valid", "test"]
CUTOFFS_HR = (10, 50, 100, 200)
CUTOFFS_NDCG = (10, 50, 100)
MISS = np.iinfo(np.int64).max  # the rank of a target that cannot be recommended
DESCRIPTION = "leave-one-out, all items ranked, seen items excluded, ties against the model"


@dataclass(frozen=True)
class HeldOut:
    """Inputs and targets of one split; `users` indexes the Interactions they came from."""

    users: np.ndarray  # (N) int64
    histories: list[np.ndarray]  # N item index arrays, oldest first
    targets: np.ndarray  # (N) int64 item indices


def held_out(interactions: Interactions, split: Split) -> HeldOut:
    """The inputs and targets of `split`: "valid" or "test"."""
    back = {"valid": 2, "test": 1}[split]
    users = np.flatnonzero(np.diff(interactions.offsets) >= 3)
    ends = interactions.offsets[users + 1] - back
    histories = [interactions.items[start:end] for start, end in zip(interactions.offsets[users], ends, strict=True)]
    return HeldOut(users, histories, interactions.items[ends].astype(np.int64))


def training_events(interactions: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """Items and offsets of the events that may be trained on: all but each user's two held-out ones.

    Users with fewer than three events hold nothing out.
    """
    lengths = np.diff(interactions.offsets)
    kept = np.where(lengths >= 3, lengths - 2, lengths)
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    keep = np.arange(len(interactions.items)) - np.repeat(interactions.offsets[:-1], lengths) < np.repeat(kept, lengths)
    return interactions.items[keep], offsets


@dataclass(frozen=True)
class Ranks:
    """(N) int64 one-based ranks of the targets, MISS where one cannot appear."""

    seen_excluded: np.ndarray
    seen_kept: np.ndarray

    @classmethod
    def concatenate(cls, parts: Iterable[Ranks]) -> Ranks:
        parts = list(parts)
        return cls(
            np.concatenate([p.seen_excluded for p in parts]) if parts else np.zeros(0, np.int64),
            np.concatenate([p.seen_kept for p in parts]) if parts else np.zeros(0, np.int64),
        )

    def reordered(self, rows: np.ndarray) -> Ranks:
        """Puts entry i at place rows[i]; `rows` is a permutation."""
        back = np.argsort(rows)
        return Ranks(self.seen_excluded[back], self.seen_kept[back])


def ranks_of_targets(scores: np.ndarray, targets: np.ndarray, histories: Sequence[np.ndarray]) -> Ranks:
    """Ranks of targets (N) under scores (N, V), where `histories` are the N users' inputs. NaN scores rank first."""
    rows = np.arange(len(targets))
    beaten = scores < scores[rows, targets][:, None]  # NaN compares false: counts against the model
    ahead = ~beaten
    ahead[rows, targets] = False
    kept = ahead.sum(1) + 1
    excluded = kept.copy()
    for row, history in enumerate(histories):
        seen = np.unique(history)
        excluded[row] = MISS if targets[row] in seen else kept[row] - ahead[row, seen].sum()
    return Ranks(excluded.astype(np.int64), kept.astype(np.int64))


def metrics(ranks: np.ndarray) -> dict[str, float]:
    """HR@k and NDCG@k of (N) one-based ranks, means over users; one relevant item, so NDCG = 1 / log2(1 + rank)."""
    if len(ranks) == 0:
        return {}
    gain = 1 / np.log2(1 + ranks.astype(np.float64))
    hit_rates = {f"hr@{k}": float((ranks <= k).mean()) for k in CUTOFFS_HR}
    return hit_rates | {f"ndcg@{k}": float(np.where(ranks <= k, gain, 0).mean()) for k in CUTOFFS_NDCG}


def report(ranks: Ranks, split: Split) -> dict[str, object]:
    """The JSON object that every `evaluate` command prints."""
    return {
        "split": split,
        "users": len(ranks.seen_excluded),
        **metrics(ranks.seen_excluded),
        "seen_kept": metrics(ranks.seen_kept),
        "protocol": DESCRIPTION,
    }


def format_report(result: dict[str, object]) -> str:
    """The same as a small table for people."""
    names = [name for name in result if "@" in name]
    kept = result["seen_kept"]
    assert isinstance(kept, dict)
    lines = [f"{result['split']} split, {result['users']} users; {result['protocol']}", ""]
    lines.append(f"{'':>10}  {'seen excluded':>13}  {'seen kept':>9}")
    lines += [f"{name:>10}  {result[name]:>13.4f}  {kept[name]:>9.4f}" for name in names]
    return "\n".join(lines)
