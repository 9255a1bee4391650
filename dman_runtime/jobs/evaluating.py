"""Leave-one-out metrics of a bundle (`dman_runtime.data.evaluation`)."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from dman_runtime.data.evaluation import HeldOut, Ranks, Split, ranks_of_targets, report
from dman_runtime.data.vocabulary import KnownLog
from dman_runtime.jobs.partitions import by_length
from dman_runtime.model.events import KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.retrieval.exact import SCORES_PER_BLOCK, ExactRetriever


def evaluate(log: KnownLog, generation: Generation, *, split: Split) -> dict[str, object]:
    """Metrics of the bundle on a log. Raises InputError."""
    data = log.held_out(split)
    ranks = held_out_ranks(data, generation)
    return report(ranks, split, unknown_targets=data.unknown_targets, log=log.kind, filters=log.filters)


def held_out_ranks(data: HeldOut, generation: Generation) -> Ranks:
    """Ranks of the held-out targets, in the order of `data`; by exact search, whatever serves.

    Items are ranked by popularity for users without a known event before the target, as a server ranks them.
    """
    retriever = ExactRetriever(generation.bundle.item_embeddings)
    parts, order = [], []
    with tqdm(total=len(data.users), unit="user", desc="evaluate", disable=None) as bar:
        for rows in by_length(np.array([len(history) for history in data.histories])):
            histories = [data.histories[row].astype(np.int64) for row in rows]
            events = [KnownEvents(items, data.times[row]) for items, row in zip(histories, rows, strict=True)]
            users, added = generation.asked(generation.replay(events), data.target_times[rows].tolist())
            step = max(1, SCORES_PER_BLOCK // len(generation.bundle.items.item_ids))
            for begin in range(0, len(rows), step):
                block = slice(begin, begin + step)
                scores = retriever.scores(users[block])
                for row, more in enumerate(added[block]):
                    if more is not None:
                        scores[row, more.items] += more.scores
                scores[[not len(history) for history in histories[block]]] = generation.bundle.items.popularity
                parts.append(ranks_of_targets(scores, data.targets[rows[block]], histories[block]))
            order.append(rows)
            bar.update(len(rows))
    return Ranks.concatenate(parts).reordered(np.concatenate(order))
