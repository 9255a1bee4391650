"""The evaluation protocol: leave-one-out over all items, the same for PyTorch, the engine and the server. numpy only.

A user's last event is the test target, the second last the validation target; the input is all events before the
target. All items are ranked. The main numbers exclude items that the user has already seen: the server never
recommends them, so a target that was seen is a miss. "Seen kept" ranks without this filter. Ties count against
the model. Users with fewer than three events are left out.
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
MISS = np.iinfo(np.int64).max  # rank of a target that cannot be recommended
DESCRIPTION = "leave-one-out, all items ranked, seen items excluded, ties against the model"


@dataclass(frozen=True)
class HeldOut:
    """Inputs and targets of one split, of the N users who have three events."""

    users: np.ndarray  # (N) int64 user indices of the Interactions
    histories: list[np.ndarray]  # N item index arrays, oldest first
    targets: np.ndarray  # (N) int64 item indices


def held_out(interactions: Interactions, split: Split) -> HeldOut:
    """The inputs and targets of a split."""
    from_end = {"valid": 2, "test": 1}[split]
    users = np.flatnonzero(np.diff(interactions.offsets) >= 3)
    ends = interactions.offsets[users + 1] - from_end
    histories = [interactions.items[start:end] for start, end in zip(interactions.offsets[users], ends, strict=True)]
    return HeldOut(users, histories, interactions.items[ends].astype(np.int64))


def training_events(interactions: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """Items (M) int32 and offsets (U+1) int64 of the events for training: all but the last two of each user.

    Users with fewer than three events are not evaluated, so all their events are for training.
    """
    lengths = np.diff(interactions.offsets)
    training_lengths = np.where(lengths >= 3, lengths - 2, lengths)
    offsets = np.concatenate([[0], np.cumsum(training_lengths)]).astype(np.int64)
    positions = np.arange(len(interactions)) - np.repeat(interactions.offsets[:-1], lengths)  # in the user's history
    return interactions.items[positions < np.repeat(training_lengths, lengths)], offsets


@dataclass(frozen=True)
class Ranks:
    """Ranks of N targets, from 1 for the best."""

    seen_excluded: np.ndarray  # (N) int64; MISS if the target was seen
    seen_kept: np.ndarray  # (N) int64

    @classmethod
    def concatenate(cls, parts: Iterable[Ranks]) -> Ranks:
        parts = list(parts)
        return cls(
            np.concatenate([p.seen_excluded for p in parts]) if parts else np.zeros(0, np.int64),
            np.concatenate([p.seen_kept for p in parts]) if parts else np.zeros(0, np.int64),
        )

    def reordered(self, rows: np.ndarray) -> Ranks:
        """The same ranks with rank i at index rows[i]. `rows` (N) is a permutation."""
        source = np.argsort(rows)
        return Ranks(self.seen_excluded[source], self.seen_kept[source])


def ranks_of_targets(scores: np.ndarray, targets: np.ndarray, histories: Sequence[np.ndarray]) -> Ranks:
    """Ranks of targets (N) by scores (N, V); `histories` are the N users' inputs.

    A score of NaN ranks before all others, and a target that has it ranks last.
    """
    rows = np.arange(len(targets))
    ahead = ~(scores < scores[rows, targets][:, None])  # ties and NaN count against the model
    ahead[rows, targets] = False
    kept = ahead.sum(1) + 1
    excluded = kept.copy()
    for row, history in enumerate(histories):
        seen = np.unique(history)
        excluded[row] = MISS if targets[row] in seen else kept[row] - ahead[row, seen].sum()
    return Ranks(excluded.astype(np.int64), kept.astype(np.int64))


def metrics(ranks: np.ndarray) -> dict[str, float]:
    """HR@k and NDCG@k of ranks (N), as means over users. One item is relevant, so NDCG = 1 / log2(1 + rank)."""
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
    """A report as a small table for people."""
    names = [name for name in result if "@" in name]
    kept = result["seen_kept"]
    assert isinstance(kept, dict)
    lines = [f"{result['split']} split, {result['users']} users; {result['protocol']}", ""]
    lines.append(f"{'':>10}  {'seen excluded':>13}  {'seen kept':>9}")
    lines += [f"{name:>10}  {result[name]:>13.4f}  {kept[name]:>9.4f}" for name in names]
    return "\n".join(lines)
