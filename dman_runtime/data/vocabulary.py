"""A log in terms of a vocabulary that is given: that of a run or of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import LogOptions
from dman_runtime.data.logs import read_interactions
from dman_runtime.errors import InputError


def known_events(interactions: Interactions, index: Mapping[str, int]) -> Interactions:
    """The same users with item indices by `index` (item id -> index); events of other items are left out."""
    new_index = np.array([index.get(item_id, -1) for item_id in interactions.item_ids], np.int32)
    events = new_index[interactions.items]
    kept = events >= 0
    ends = np.concatenate([[0], np.cumsum(kept)])[interactions.offsets]
    return replace(
        interactions,
        item_ids=list(index),
        items=events[kept],
        timestamps=interactions.timestamps[kept],
        offsets=ends.astype(np.int64),
    )


def read_known(
    path: Path, index: Mapping[str, int], options: LogOptions, *, min_user_events: int, min_item_events: int
) -> Interactions:
    """A log as training saw it: filtered, then indexed by a vocabulary. Raises InputError when nothing is left."""
    log = read_interactions(path, options, min_user_events=min_user_events, min_item_events=min_item_events)
    known = known_events(log, index)
    if not (np.diff(known.offsets) >= 3).any():
        raise InputError(f"{path}: no user has three events of known items", "give the log that the model was made for")
    return known
