"""The log and the two bundles of a roll-over that is measured, where none are given."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dman_runtime.data.interactions import Interactions
from dman_runtime.errors import UsageError
from dman_train.config import ModelConfig
from dman_train.export import export_bundle
from dman_train.model import DMAN
from dman_train.presets import PRESETS, decided_by
from dman_train.synthetic import SyntheticConfig
from dman_train.vocabulary import Vocabulary

CHANGED_SHARE = 0.05  # of the items are retired, and as many are new
MIN_ITEM_EVENTS = 5  # of an item in a made bundle
MADE_LOG = SyntheticConfig(users=6040, items=3416, mean_events=165)  # as large as MovieLens-1M


def made_pair(interactions: Interactions, directory: Path) -> tuple[Path, Path]:
    """Two bundles of untrained models. Each lacks some of the items that the other knows."""
    counts = np.bincount(interactions.items, minlength=len(interactions.item_ids))
    items = np.random.default_rng(0).permutation(np.flatnonzero(counts >= MIN_ITEM_EVENTS))
    changed = max(1, round(CHANGED_SHARE * len(items)))
    if len(items) <= 2 * changed:
        raise UsageError(
            f"only {len(items)} items of the log have {MIN_ITEM_EVENTS} events", "take a larger log", parameter="data"
        )
    config = decided_by(interactions, PRESETS["default"]).model
    assert isinstance(config, ModelConfig)
    paths = directory / "old", directory / "new"
    catalogues = np.sort(items[changed:]), np.sort(items[:-changed])
    for seed, (path, known) in enumerate(zip(paths, catalogues, strict=True)):
        item_ids = [interactions.item_ids[item] for item in known]
        torch.manual_seed(seed)
        model = DMAN(config, len(item_ids))
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of the exporter, about its future
            export_bundle(model, Vocabulary(item_ids, interactions.integer_item_ids, counts[known], {}), path)
    return paths


def few_users(interactions: Interactions, count: int) -> Interactions:
    """The first users of a log."""
    count = min(count, interactions.num_users)
    events = slice(0, interactions.offsets[count])
    return replace(
        interactions,
        user_ids=interactions.user_ids[:count],
        offsets=interactions.offsets[: count + 1],
        items=interactions.items[events],
        timestamps=interactions.timestamps[events],
    )
