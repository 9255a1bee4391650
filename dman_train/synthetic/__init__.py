"""Generated logs: long- and short-term interests (`SyntheticConfig`), or a puzzle for the memory (`PlantedConfig`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dman_runtime.data.interactions import Interactions
from dman_train.synthetic.files import write_columns
from dman_train.synthetic.interests import SyntheticConfig
from dman_train.synthetic.planted import PlantedConfig, planted_keys

__all__ = ["PlantedConfig", "SyntheticConfig", "generate", "planted_keys", "write_items", "write_log"]

_EPOCH = 1_577_836_800  # 2020-01-01 UTC, in seconds: when the first users may appear
_YEAR = 365 * 86_400  # seconds; users appear during the first year
_LONGEST = 4 * _YEAR  # seconds from a user's first event to the last, at most


def generate(config: SyntheticConfig | PlantedConfig) -> Interactions:
    """The log: users "u0001", ... in order of their first event, integer item ids from 1. Same config, same log."""
    rng = np.random.default_rng(config.seed)
    histories = config.histories(rng)
    first_times = _EPOCH + np.sort(rng.integers(0, _YEAR, config.users))
    items, timestamps = [], []
    for first_time, (history, turn_starts) in zip(first_times.tolist(), histories, strict=True):
        items.append(np.array(history, dtype=np.int32))
        timestamps.append(_times(rng, first_time, turn_starts, len(history)))
    digits = max(4, len(str(config.users)))
    everything = Interactions(
        user_ids=[f"u{user + 1:0{digits}}" for user in range(config.users)],
        item_ids=[str(item + 1) for item in range(config.items)],
        offsets=np.cumsum([0, *map(len, items)], dtype=np.int64),
        items=np.concatenate(items),
        timestamps=np.concatenate(timestamps),
        integer_user_ids=False,
        integer_item_ids=True,
    )
    return everything.filtered(min_user_events=1, min_item_events=1)  # without the items that never occur


def _times(rng: np.random.Generator, first: int, turn_starts: list[int], length: int) -> np.ndarray:
    """Seconds since the epoch, non-decreasing, (length,) int64: minutes within a turn, about a day between turns."""
    gaps = rng.lognormal(np.log(900), 0.8, length)
    starts = np.array(turn_starts)
    gaps[starts] = rng.lognormal(np.log(50_000), 1.0, len(starts))
    gaps[0] = 0
    elapsed = np.cumsum(gaps)
    elapsed *= min(1.0, _LONGEST / max(elapsed[-1], 1.0))  # denser if very long, so that none reaches into the future
    return first + elapsed.astype(np.int64)


def write_log(interactions: Interactions, path: str | Path) -> None:
    """Write user_id, item_id, timestamp as CSV, TSV or Parquet by extension, in order of time (stable).

    The file appears complete or not at all. Raises InputError for another extension, OSError if it cannot be written.
    """
    users = np.repeat(np.arange(interactions.num_users), np.diff(interactions.offsets))
    rows = np.argsort(interactions.timestamps, kind="stable")
    columns = {
        "user_id": _id_array(interactions.user_ids, interactions.integer_user_ids)[users[rows]],
        "item_id": _id_array(interactions.item_ids, interactions.integer_item_ids)[interactions.items[rows]],
        "timestamp": interactions.timestamps[rows],
    }
    write_columns(columns, Path(path))


def write_items(config: SyntheticConfig | PlantedConfig, path: str | Path) -> None:
    """Write item_id, title and attributes of the whole catalogue; otherwise as `write_log`.

    Attributes are genre and series (empty for a single), or the kind of the item in a planted puzzle.
    """
    write_columns(config.item_columns(), Path(path))


def _id_array(ids: list[str], integers: bool) -> np.ndarray:
    return np.array([int(text) for text in ids], dtype=np.int64) if integers else np.array(ids, dtype=object)
