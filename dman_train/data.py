"""The log as training uses it: item indices of the training events, and the held-out events of the validation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from dman_runtime.data.evaluation import HeldOut, held_out, training_events
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import LogOptions
from dman_runtime.data.logs import Log, filtered, open_log
from dman_train.config import DataConfig


@dataclass(frozen=True)
class TrainingData:
    """Item indices only; the run directory keeps the ids."""

    items: np.ndarray  # (N) int32 training events, user after user
    offsets: np.ndarray  # (U+1) int64
    times: np.ndarray  # (N) int64 seconds; 0 if the log has no times
    item_counts: np.ndarray  # (V) int64 training events per item
    validation: HeldOut


def load(path: Path, config: DataConfig) -> Interactions:
    """The filtered interactions of a log. Raises InputError."""
    return load_log(path, config)[1]


def load_log(path: Path, config: DataConfig) -> tuple[Log, Interactions]:
    """The log, with its report and its options as they were found, and its filtered interactions. Raises InputError."""
    with open_log(path, config) as log:
        kept = filtered(log, min_user_events=config.min_user_events, min_item_events=config.min_item_events)
    return log, kept


def as_found(config: DataConfig, log: Log) -> DataConfig:
    """The config with what was found in the log in place of "auto": another log is then read in the same way."""
    return replace(config, **{field.name: getattr(log.options, field.name) for field in fields(LogOptions)})


KNOWN_GAPS = 100  # a gap is known to training if so many events came after one that was as long or longer


def longest_gap(data: TrainingData) -> int:
    """Seconds: the longest time between two events of a user that training knows well."""
    users = np.repeat(np.arange(len(data.offsets) - 1), np.diff(data.offsets))
    since_last = np.diff(data.times)[users[1:] == users[:-1]]
    if not len(since_last):
        return 0
    place = max(0, len(since_last) - KNOWN_GAPS)
    return max(0, int(np.partition(since_last, place)[place]))


def training_data(interactions: Interactions) -> TrainingData:
    """What training may see of a log: all but the last two events of each user, and the validation targets."""
    items, offsets, times = training_events(interactions)
    counts = np.bincount(items, minlength=len(interactions.item_ids)).astype(np.int64)
    return TrainingData(items, offsets, times, counts, held_out(interactions, "valid"))
