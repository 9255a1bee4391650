"""Ranks of held-out items, for any model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dman_runtime.data.evaluation import HeldOut, Ranks, ranks_of_targets
from dman_train.families import Model, family_of


def target_ranks(model: Model, data: HeldOut, *, batch: int = 256) -> Iterator[tuple[np.ndarray, Ranks]]:
    """Yields (rows of `data`, ranks of their targets), shortest histories first."""
    user_embeddings, was_training = family_of(model.config).user_embeddings, model.training
    model.eval()
    try:
        with torch.no_grad():
            table = model.item_table().T.contiguous()
            order = np.argsort([len(history) for history in data.histories], kind="stable")
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                histories = [data.histories[row] for row in rows]
                scores = (user_embeddings(model, histories, data.users[rows]) @ table).cpu().numpy()
                yield rows, ranks_of_targets(scores, data.targets[rows], histories)
    finally:
        model.train(was_training)


def all_ranks(model: Model, data: HeldOut) -> Ranks:
    """Ranks of all targets, in the order of `data`."""
    parts = list(target_ranks(model, data))
    if not parts:  # no user has enough events to hold one out
        return Ranks.concatenate([])
    return Ranks.concatenate(ranks for _, ranks in parts).reordered(np.concatenate([rows for rows, _ in parts]))
