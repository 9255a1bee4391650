"""Leave-one-out metrics of a bundle (`dman_runtime.data.evaluation`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from dman_runtime.data.evaluation import HeldOut, Ranks, Split, held_out, ranks_of_targets, report
from dman_runtime.data.log_options import ANY_LOG, LogOptions
from dman_runtime.data.vocabulary import read_known
from dman_runtime.jobs.partitions import by_length
from dman_runtime.model.generation import Generation
from dman_runtime.retrieval.exact import ExactRetriever


def evaluate(
    path: Path,
    generation: Generation,
    *,
    split: Split,
    options: LogOptions = ANY_LOG,
    min_user_events: int,
    min_item_events: int,
) -> dict[str, object]:
    """Metrics of the bundle on a log. Raises InputError."""
    index = generation.bundle.items.index
    interactions = read_known(path, index, options, min_user_events=min_user_events, min_item_events=min_item_events)
    return report(held_out_ranks(held_out(interactions, split), generation), split)


def held_out_ranks(data: HeldOut, generation: Generation) -> Ranks:
    """Ranks of the held-out targets, in the order of `data`; by exact search, whatever serves."""
    retriever = ExactRetriever(generation.bundle.item_embeddings)
    parts, order = [], []
    with tqdm(total=len(data.users), unit="user", desc="evaluate", disable=None) as bar:
        for rows in by_length(np.array([len(history) for history in data.histories])):
            histories = [data.histories[row].astype(np.int64) for row in rows]
            users = np.stack([state.user_embedding for state in generation.replay(histories)])
            parts.append(ranks_of_targets(retriever.scores(users), data.targets[rows], histories))
            order.append(rows)
            bar.update(len(rows))
    return Ranks.concatenate(parts).reordered(np.concatenate(order))
