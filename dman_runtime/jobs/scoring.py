"""Batch scoring: the best items of every user in a log, without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from dman_runtime.data.logs import Log
from dman_runtime.data.vocabulary import known_events
from dman_runtime.errors import InputError
from dman_runtime.jobs.parquet_output import ParquetOutput
from dman_runtime.jobs.partitions import by_length
from dman_runtime.model.bundle import Bundle
from dman_runtime.model.generation import Generation
from dman_runtime.retrieval.base import NO_ITEMS, Hits
from dman_runtime.retrieval.exact import search_scores


def score(
    log: Log,
    output: Path,
    generation: Generation,
    *,
    k: int,
    include_seen: bool = False,
) -> int:
    """Writes the k best items of every user in a log to a Parquet file; returns the number of users.

    Columns: user_id, rank (from 1), item_id, score. The answers are those of a server that was given the same
    histories. Memory stays bounded by the partition size. Raises InputError.
    """
    bundle, users_done = generation.bundle, 0
    with _ParquetOutput(output, bundle) as out, tqdm(unit="user", desc="score", disable=None) as bar:
        for partition in log.parts():
            known = known_events(partition, bundle.items.index)
            for rows in by_length(np.diff(known.offsets)):
                histories = [known.history(row).astype(np.int64) for row in rows]
                users = np.stack([state.user_embedding for state in generation.replay(histories)])
                seen = [NO_ITEMS if include_seen else history for history in histories]
                hits = generation.retriever.search(users, k, exclude=seen)
                for i, history in enumerate(histories):
                    if not len(history):
                        hits[i] = search_scores(bundle.items.popularity, k)
                out.write([known.user_ids[row] for row in rows], hits, integer_users=partition.integer_user_ids)
                users_done += len(rows)
                bar.update(len(rows))
    return users_done


class _ParquetOutput(ParquetOutput):
    """Score rows into a Parquet file."""

    def __init__(self, path: Path, bundle: Bundle) -> None:
        super().__init__(path)
        self._item_ids = _id_array(bundle.items.item_ids, integers=bundle.manifest.integer_item_ids)

    def write(self, user_ids: list[str], hits: list[Hits], *, integer_users: bool) -> None:
        import pyarrow as pa

        counts = [len(found.items) for found in hits]
        table = pa.table(
            {
                "user_id": np.repeat(_id_array(user_ids, integers=integer_users), counts),
                "rank": np.concatenate([np.arange(1, count + 1, dtype=np.int32) for count in counts]),
                "item_id": self._item_ids[np.concatenate([found.items for found in hits])],
                "score": np.concatenate([found.scores for found in hits]).astype(np.float32),
            }
        )
        self.write_table(table)


def _id_array(ids: list[str], *, integers: bool) -> np.ndarray:
    """Ids as a column: int64 where they were integers in the log."""
    try:
        return np.array([int(i) for i in ids], np.int64) if integers else np.array(ids, object)
    except OverflowError:
        raise InputError("an id does not fit a 64-bit integer column", "write the ids as text with a letter") from None
