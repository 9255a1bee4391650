"""A log in terms of a vocabulary that is given: that of a run or of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dman_runtime.data.evaluation import UNKNOWN, HeldOut, LogKind, Split, held_out
from dman_runtime.data.filters import FILTERS
from dman_runtime.data.input_report import InputReport
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import LogOptions
from dman_runtime.data.logs import Log, filtered, open_log
from dman_runtime.errors import InputError

NO_FILTERS = dict.fromkeys(FILTERS, 0)


def known_events(interactions: Interactions, index: Mapping[str, int]) -> Interactions:
    """The same users with item indices by `index` (item id -> index); events of other items are left out."""
    events = _index_of(interactions, index)[interactions.items]
    kept = events != UNKNOWN
    ends = np.concatenate([[0], np.cumsum(kept)])[interactions.offsets]
    return replace(
        interactions,
        item_ids=list(index),
        items=events[kept],
        timestamps=interactions.timestamps[kept],
        offsets=ends.astype(np.int64),
    )


def _index_of(interactions: Interactions, index: Mapping[str, int]) -> np.ndarray:
    """(V) int32: the index of each item of the log, or UNKNOWN."""
    return np.array([index.get(item_id, UNKNOWN) for item_id in interactions.item_ids], np.int32)


@dataclass(frozen=True, eq=False)
class KnownLog:
    """A log to evaluate a model on."""

    report: InputReport
    interactions: Interactions  # the log as it is evaluated, with all its items
    index: np.ndarray  # (V) int32: the model's index of each item of the log, or UNKNOWN
    kind: LogKind
    filters: Mapping[str, int]  # the least events of a user and of an item that were asked of the log
    as_trained: bool  # the very events of the training

    def held_out(self, split: Split) -> HeldOut:
        """The inputs and targets of a split of the log, in the model's item indices. Raises InputError."""
        data = held_out(self.interactions, split)
        if not len(data.users):
            raise InputError(
                f"{self.report.path}: no user has three events, which an evaluation needs",
                "give a log with longer histories",
            )
        return data.in_terms_of(self.index)


def read_known(
    path: Path,
    index: Mapping[str, int],
    options: LogOptions,
    *,
    trained: Mapping[str, Any] | None = None,
    filters: Mapping[str, int] | None = None,
) -> KnownLog:
    """A log to evaluate a model on. Raises InputError, also when the model knows no item of the log.

    The log that the model was trained on is filtered as in training. No other log is filtered: its short histories and
    its new items are what a server meets too.

    Args:
        index: Item id -> item index of the model.
        trained: What run or bundle recorded of the training log: its filters, fingerprint and input report.
        filters: The least events of a user or an item, by name, where they were asked for.
    """
    asked, trained = filters or {}, trained or {}
    for name, limit in asked.items():
        if limit < 0:
            raise InputError(f"{name} is {limit}", "choose 0 or more", parameter=name)
    with open_log(path, options, known_items=index) as log:
        _require_a_known_event(log.report, index)
        usual = {name: _limit(trained, name) for name in FILTERS}
        kept = _as_trained(log, usual, trained)
        kind: LogKind = "another log" if kept is None else "training log"
        chosen = (NO_FILTERS if kept is None else usual) | dict(asked)
        if kept is None or chosen != usual:
            log.report.filters = {}
            kept, as_trained = filtered(log, **chosen), False
        else:
            as_trained = True
    return KnownLog(log.report, kept, _index_of(kept, index), kind, chosen, as_trained)


def _limit(trained: Mapping[str, Any], name: str) -> int:
    limit = trained.get(name)  # of a file that anybody may have written
    return limit if isinstance(limit, int) else 0


def _as_trained(log: Log, filters: Mapping[str, int], trained: Mapping[str, Any]) -> Interactions | None:
    """The log with the filters of the training, if that gives the events of the training."""
    understood, fingerprint = trained.get("input"), trained.get("fingerprint")
    if not fingerprint:
        return None  # nothing is known of the log of the training
    if isinstance(understood, dict) and understood.get("events") != log.report.events:
        return None  # the filters would also remove what has come since, such as new items
    try:
        kept = filtered(log, **filters)
    except InputError:
        return None  # nothing is left
    return kept if kept.fingerprint() == fingerprint else None


def _require_a_known_event(report: InputReport, index: Mapping[str, int]) -> None:
    if report.unknown_events == report.events:
        raise InputError(
            f"{report.path}: the model knows none of its items, such as {examples(report.unknown_examples)}; "
            f"it was trained on items such as {examples(index)}",
            "write the ids as in training",
        )


def examples(item_ids: Any) -> str:
    """The first three ids, for messages; quotes and all, so that their form shows."""
    return ", ".join(repr(item_id)[:60] for item_id, _ in zip(item_ids, range(3), strict=False))
