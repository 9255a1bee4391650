"""Replays whole histories through a PyTorch model: what evaluation, export and tests compare against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dman_runtime.data.evaluation import HeldOut, Ranks, ranks_of_targets
from dman_train.baselines.base import Baseline
from dman_train.model import DMAN, Encoding

Watch = Callable[[Tensor, Tensor, Encoding], None]


@torch.no_grad()
def replay(model: DMAN, histories: Sequence[np.ndarray], watch: Watch | None = None) -> tuple[Tensor, Tensor]:
    """User embeddings (N, D) and memories (N, L, m, D) after N histories of item indices, none of them empty.

    Histories of similar length should be neighbours: each segment runs the users that still have one. For each segment
    in turn, `watch` gets the rows (A) of the histories that have it, the memories (A, L, m, D) it reads, which are
    overwritten after the call, and the Encoding of its last positions.
    """
    if any(len(history) == 0 for history in histories):
        raise ValueError("an empty history has no user embedding")
    config, device = model.config, model.items.device
    T = config.segment_length
    lengths = torch.tensor([len(history) for history in histories], device=device)
    order = torch.argsort(lengths, descending=True)
    padded = torch.zeros(len(histories), int(lengths.max()), dtype=torch.int64, device=device)
    for row, user in enumerate(order.tolist()):
        padded[row, : len(histories[user])] = torch.from_numpy(histories[user].astype(np.int64))
    sorted_lengths = lengths[order]
    memory = model.initial_memory[None].repeat(len(histories), 1, 1, 1)
    context = torch.zeros(len(histories), config.layers, 0, config.width, device=device)
    users = torch.empty(len(histories), config.width, device=device)
    for start in range(0, padded.shape[1], T):
        active = int((sorted_lengths > start).sum())
        context, memory_now = context[:active], memory[:active]
        new = padded[:active, start : start + T]
        last = (sorted_lengths[:active] - start).clamp(max=T) - 1
        visible = torch.full((active,), context.shape[2] if config.recurrent else 0, device=device)
        encoding = model.encode(model.embed(new), context, visible, memory_now, last)
        users[:active] = encoding.user_embedding[:, 0]
        if watch is not None:
            watch(order[:active], memory_now, encoding)
        closed = int((sorted_lengths >= start + T).sum())
        if start and closed:
            memory[:closed] = model.abstract(memory_now[:closed], context[:closed])
        context = encoding.hidden
    unsort = torch.argsort(order)
    return users[unsort], memory[unsort]


def target_ranks(model: DMAN | Baseline, data: HeldOut, *, batch: int = 256) -> Iterator[tuple[np.ndarray, Ranks]]:
    """Yields (rows of `data`, ranks of their targets), shortest histories first."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            table = model.item_table().T.contiguous()
            order = np.argsort([len(history) for history in data.histories], kind="stable")
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                histories = [data.histories[row] for row in rows]
                users = (
                    replay(model, histories)[0]
                    if isinstance(model, DMAN)
                    else model.user_embeddings(histories, data.users[rows])
                )
                scores = (users @ table).cpu().numpy()
                yield rows, ranks_of_targets(scores, data.targets[rows], histories)
    finally:
        model.train(was_training)


def all_ranks(model: DMAN | Baseline, data: HeldOut) -> Ranks:
    """Ranks of all targets, in the order of `data`."""
    parts = list(target_ranks(model, data))
    if not parts:  # no user is long enough to hold an event out
        return Ranks.concatenate([])
    return Ranks.concatenate(ranks for _, ranks in parts).reordered(np.concatenate([rows for rows, _ in parts]))
