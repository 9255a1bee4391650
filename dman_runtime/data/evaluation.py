"""The evaluation protocol: leave-one-out over all items, the same for PyTorch, the engine and the server. numpy only.

A user's last event is the test target, the second last the validation target; the input is all events before the
target. All items are ranked, in three ways. The main numbers exclude items that the user has already seen: the server
never recommends them, so a target that was seen is a miss. "Seen kept" ranks all items. "Target kept" ranks the target,
seen or not, against the items that the user has not seen: the protocol of the paper ("Evaluation metrics"). Ties count
against the model. Users with fewer than three events are left out.

The split is taken on the log as it is. A target that the model does not know cannot be recommended, so it is a miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from dman_runtime.data.filters import FILTERS
from dman_runtime.data.interactions import Interactions

Split = Literal["valid", "test"]
LogKind = Literal["training log", "another log"]
Ranking = Literal["seen_excluded", "seen_kept", "target_kept"]  # the fields of Ranks
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
CUTOFFS_HR = (10, 50, 100, 200, 500)
CUTOFFS_NDCG = (10, 50, 100)
MISS = np.iinfo(np.int64).max  # rank of a target that cannot be recommended
UNKNOWN = -1  # index of an item that the model does not know
DESCRIPTION = "leave-one-out, all items ranked, seen items excluded, ties against the model"


@dataclass(frozen=True)
class HeldOut:
    """Inputs and targets of one split, of the N users who have three events."""

    users: np.ndarray  # (N) int64 user indices of the Interactions
    histories: list[np.ndarray]  # N item index arrays, oldest first
    targets: np.ndarray  # (N) int64 item indices, UNKNOWN for an item that the model does not know
    times: list[np.ndarray]  # N int64 arrays, seconds, of the events of the histories; 0 if the log has no times
    target_times: np.ndarray  # (N) int64 seconds

    @property
    def unknown_targets(self) -> int:
        return int(np.count_nonzero(self.targets == UNKNOWN))

    def rows(self, rows: np.ndarray) -> HeldOut:
        """Only these users."""
        return HeldOut(
            self.users[rows],
            [self.histories[row] for row in rows],
            self.targets[rows],
            [self.times[row] for row in rows],
            self.target_times[rows],
        )

    def in_terms_of(self, index: np.ndarray) -> HeldOut:
        """The same with items renumbered by `index` (V), which has UNKNOWN for those that the model does not know.

        Their events are left out of the inputs, as serving skips them; their targets stay, as UNKNOWN.
        """
        renumbered = [index[history] for history in self.histories]
        known = [history != UNKNOWN for history in renumbered]
        return HeldOut(
            self.users,
            [history[of] for history, of in zip(renumbered, known, strict=True)],
            index[self.targets],
            [times[of] for times, of in zip(self.times, known, strict=True)],
            self.target_times,
        )


def held_out(interactions: Interactions, split: Split) -> HeldOut:
    """The inputs and targets of a split."""
    from_end = {"valid": 2, "test": 1}[split]
    users = np.flatnonzero(np.diff(interactions.offsets) >= 3)
    ends = interactions.offsets[users + 1] - from_end
    borders = list(zip(interactions.offsets[users], ends, strict=True))
    return HeldOut(
        users,
        [interactions.items[start:end] for start, end in borders],
        interactions.items[ends].astype(np.int64),
        [interactions.timestamps[start:end] for start, end in borders],
        interactions.timestamps[ends],
    )


def training_events(interactions: Interactions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items (M) int32, offsets (U+1) int64 and times (M) int64 for training: all but the last two of each user.

    Users with fewer than three events are not evaluated, so all their events are for training.
    """
    lengths = np.diff(interactions.offsets)
    training_lengths = np.where(lengths >= 3, lengths - 2, lengths)
    offsets = np.concatenate([[0], np.cumsum(training_lengths)]).astype(np.int64)
    positions = np.arange(len(interactions)) - np.repeat(interactions.offsets[:-1], lengths)  # in the user's history
    kept = positions < np.repeat(training_lengths, lengths)
    return interactions.items[kept], offsets, interactions.timestamps[kept]


@dataclass(frozen=True)
class Ranks:
    """Ranks of N targets, from 1 for the best, in each ranking."""

    seen_excluded: np.ndarray  # (N) int64; MISS if the target was seen
    seen_kept: np.ndarray  # (N) int64
    target_kept: np.ndarray  # (N) int64; equal to seen_excluded for a target that was not seen

    def of(self, ranking: Ranking) -> np.ndarray:
        """(N) int64 ranks in one ranking."""
        ranks: np.ndarray = getattr(self, ranking)
        return ranks

    @classmethod
    def concatenate(cls, parts: Iterable[Ranks]) -> Ranks:
        parts, none = list(parts), np.zeros(0, np.int64)
        return cls(*(np.concatenate([none, *(part.of(ranking) for part in parts)]) for ranking in RANKINGS))

    def reordered(self, rows: np.ndarray) -> Ranks:
        """The same ranks with rank i at index rows[i]. `rows` (N) is a permutation."""
        source = np.argsort(rows)
        return Ranks(*(self.of(ranking)[source] for ranking in RANKINGS))


def ranking_for(seen_items: str) -> Ranking:
    """The ranking by which a run with this `seen_items` (`dman_train.config.TrainConfig`) is validated and chosen."""
    by_choice: dict[str, Ranking] = {"keep": "seen_kept", "keep-target": "target_kept"}
    return by_choice.get(seen_items, "seen_excluded")


def ranks_of_targets(scores: np.ndarray, targets: np.ndarray, histories: Sequence[np.ndarray]) -> Ranks:
    """Ranks of targets (N) by scores (N, V); `histories` are the N users' inputs.

    A score of NaN ranks before all others, and a target that has it ranks last. An UNKNOWN target has rank MISS.
    """
    unknown = targets == UNKNOWN
    rows, targets = np.arange(len(targets)), np.where(unknown, 0, targets)
    ahead = ~(scores < scores[rows, targets][:, None])  # ties and NaN count against the model
    ahead[rows, targets] = False
    kept = ahead.sum(1) + 1
    target_kept, excluded = kept.copy(), kept.copy()
    for row, history in enumerate(histories):
        seen = np.unique(history)
        target_kept[row] -= ahead[row, seen].sum()  # the target is never ahead of itself
        excluded[row] = MISS if targets[row] in seen else target_kept[row]
    excluded[unknown] = kept[unknown] = target_kept[unknown] = MISS
    return Ranks(excluded.astype(np.int64), kept.astype(np.int64), target_kept.astype(np.int64))


def metrics(ranks: np.ndarray) -> dict[str, float]:
    """HR@k and NDCG@k of ranks (N), as means over users. One item is relevant, so NDCG = 1 / log2(1 + rank)."""
    if len(ranks) == 0:
        return {}
    gain = 1 / np.log2(1 + ranks.astype(np.float64))
    hit_rates = {f"hr@{k}": float((ranks <= k).mean()) for k in CUTOFFS_HR}
    return hit_rates | {f"ndcg@{k}": float(np.where(ranks <= k, gain, 0).mean()) for k in CUTOFFS_NDCG}


def report(
    ranks: Ranks,
    split: Split,
    *,
    unknown_targets: int = 0,
    log: LogKind = "training log",
    filters: Mapping[str, int] | None = None,
) -> dict[str, object]:
    """The JSON object that every `evaluate` command prints.

    Args:
        unknown_targets: How many targets the model does not know.
        filters: What FILTERS were applied to the log; 0 for those that are not given.
    """
    return {
        "split": split,
        "users": len(ranks.seen_excluded),
        **metrics(ranks.seen_excluded),
        "seen_kept": metrics(ranks.seen_kept),
        "target_kept": metrics(ranks.target_kept),
        "unknown_targets": unknown_targets,
        "log": log,
        **dict.fromkeys(FILTERS, 0),
        **(filters or {}),
        "protocol": DESCRIPTION,
    }


def format_report(result: Mapping[str, Any]) -> str:
    """A report as a small table for people."""
    names = [name for name in result if "@" in name]
    lines = [f"{result['split']} split, {result['users']} users; {result['protocol']}", _about_log(result)]
    if result["unknown_targets"]:
        lines.append(
            f"{result['unknown_targets']:,} of {result['users']:,} targets are items that the model does not know: "
            "they count as misses"
        )
    columns = {"seen excluded": result, "seen kept": result["seen_kept"], "target kept": result["target_kept"]}
    lines += ["", "  ".join([" " * 10, *columns])]
    for name in names:
        lines.append("  ".join([f"{name:>10}", *(f"{found[name]:>{len(head)}.4f}" for head, found in columns.items())]))
    return "\n".join(lines)


def _about_log(result: Mapping[str, Any]) -> str:
    which = "the log of the training" if result["log"] == "training log" else "another log than that of the training"
    of_user, of_item = (result[name] for name in FILTERS)
    if of_user <= 1 and of_item <= 1:
        return f"{which}, not filtered"
    return f"{which}, without users of fewer than {of_user} events and items of fewer than {of_item}"
