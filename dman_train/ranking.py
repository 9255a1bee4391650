"""Ranks of held-out items, for any model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dman_runtime.data.evaluation import HeldOut, Ranks, ranks_of_targets
from dman_train.families import Model, family_of

MOST_USERS = 256  # that are ranked together
MOST_SCORES = 1 << 26  # of them for all items: up to 700 MB. With more than 262,144 items, fewer users go together


def target_ranks(
    model: Model, data: HeldOut, *, popularity: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, Ranks]]:
    """Yields (rows of `data`, ranks of their targets), shortest histories first.

    At most MOST_SCORES are held at a time, however many items there are.
    `popularity` (V) ranks the items for users with an empty history, as a server does. Training has no such users.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            table = model.item_table().T.contiguous()
            batch = max(1, min(MOST_USERS, MOST_SCORES // table.shape[1]))
            order = np.argsort([len(history) for history in data.histories], kind="stable")
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                part = data.rows(rows)
                yield rows, ranks_of_targets(_scores(model, table, part, popularity), part.targets, part.histories)
    finally:
        model.train(was_training)


def _scores(model: Model, table: Tensor, data: HeldOut, popularity: np.ndarray | None) -> np.ndarray:
    """(N, V) scores of all items for the N users of `data`."""
    known = np.array([len(history) > 0 for history in data.histories])
    scores = np.zeros((len(known), table.shape[1]), np.float32)
    if popularity is not None:
        scores[~known] = popularity
    if known.any():
        some = data if known.all() else data.rows(np.flatnonzero(known))
        scores[known] = family_of(model.config).scores(model, table, some).cpu().numpy()
    return scores


def all_ranks(model: Model, data: HeldOut, *, popularity: np.ndarray | None = None) -> Ranks:
    """Ranks of all targets, in the order of `data`. `popularity` as in `target_ranks`."""
    parts = list(target_ranks(model, data, popularity=popularity))
    if not parts:  # no user has enough events to hold one out
        return Ranks.concatenate([])
    return Ranks.concatenate(ranks for _, ranks in parts).reordered(np.concatenate([rows for rows, _ in parts]))
