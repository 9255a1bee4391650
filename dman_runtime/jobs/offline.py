"""Batch jobs over partitions of users: backfill a state store, score, evaluate. No server involved.

Each job reads users in partitions of bounded size, replays their histories in batches of like length, and hands every
batch of states on: to the store, to a Parquet file, or to the metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from dman_runtime.data.evaluation import HeldOut, Ranks, Split, held_out, ranks_of_targets, report
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.logs import DEFAULT_COLUMNS, Columns, iter_interactions, read_interactions
from dman_runtime.errors import InputError
from dman_runtime.model.bundle import Bundle
from dman_runtime.model.recurrence import Graphs, advance, replay
from dman_runtime.model.state import StateBatch
from dman_runtime.retrieval.exact import NO_ITEMS, ExactRetriever, search_scores
from dman_runtime.store.lmdb import StateStore, Write

USERS_PER_BATCH = 256
EVENTS_PER_PARTITION = 5_000_000  # about 300 MB while a partition is read and sorted
Existing = Literal["skip", "append"]


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
    path: Path, index: Mapping[str, int], *, columns: Columns, min_user_events: int, min_item_events: int
) -> Interactions:
    """A log as training saw it: filtered, then indexed by a vocabulary. Raises InputError when nothing is left."""
    log = read_interactions(path, columns=columns, min_user_events=min_user_events, min_item_events=min_item_events)
    known = known_events(log, index)
    if not (np.diff(known.offsets) >= 3).any():
        raise InputError(f"{path}: no user has three events of known items; give the log that the model was made for")
    return known


def _by_length(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Batches of row numbers with similar lengths, longest first: the largest batch comes while memory is free."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), USERS_PER_BATCH):
        yield order[start : start + USERS_PER_BATCH]


@dataclass
class ImportResult:
    users: int = 0  # written
    events: int = 0
    skipped_users: int = 0  # already in the store
    unknown_events: int = 0  # of items that the bundle does not know


def import_histories(
    path: Path,
    *,
    bundle: Bundle,
    graphs: Graphs,
    store: StateStore,
    columns: Columns = DEFAULT_COLUMNS,
    existing: Existing = "skip",
) -> ImportResult:
    """Encodes the histories of a log into the store, one durable commit per batch of users.

    Users that are in the store already are skipped, so an interrupted import can simply be repeated; with
    existing="append" their events in the file are added instead. Raises InputError, StoreError.
    """
    result = ImportResult()
    with tqdm(unit="ev", unit_scale=True, desc="import", disable=None) as bar:
        for partition in iter_interactions(path, columns=columns, max_events=EVENTS_PER_PARTITION):
            known = known_events(partition, bundle.items.index)
            result.unknown_events += len(partition) - len(known)
            for rows in _by_length(np.diff(known.offsets)):
                _import_batch(known, rows, bundle=bundle, graphs=graphs, store=store, existing=existing, result=result)
                bar.update(sum(len(partition.history(row)) for row in rows))
    return result


def _import_batch(
    known: Interactions,
    rows: np.ndarray,
    *,
    bundle: Bundle,
    graphs: Graphs,
    store: StateStore,
    existing: Existing,
    result: ImportResult,
) -> None:
    rows = np.array([row for row in rows if len(known.history(row))], np.int64)
    users = [known.user_ids[row] for row in rows]
    stored = store.get_many(users)
    if existing == "skip":
        result.skipped_users += sum(user is not None for user in stored)
        new = [i for i, user in enumerate(stored) if user is None]
        rows, users, stored = rows[new], [users[i] for i in new], [None] * len(new)
    histories = [known.history(row).astype(np.int64) for row in rows]
    states = StateBatch.from_records(bundle, [user.record if user else None for user in stored])
    advance(states, histories, bundle=bundle, graphs=graphs)
    writes = [
        Write(
            user_id=user_id,
            expected_version=user.version if user else 0,
            record=states.to_record(i, bundle),
            items=histories[i],
            timestamps=known.user_timestamps(rows[i]),
        )
        for i, (user_id, user) in enumerate(zip(users, stored, strict=True))
    ]
    if writes and not store.commit(writes):
        raise InputError("users of this file are being updated by a server; stop it, or import into another --state")
    result.users += len(writes)
    result.events += sum(map(len, histories))


def score(
    path: Path,
    output: Path,
    *,
    bundle: Bundle,
    graphs: Graphs,
    k: int,
    include_seen: bool = False,
    columns: Columns = DEFAULT_COLUMNS,
) -> int:
    """Writes the k best items of every user in a log to a Parquet file; returns the number of users.

    Columns: user_id, rank (from 1), item_id, score. The answers are those of a server that was given the same
    histories. Memory stays bounded by the partition size. Raises InputError.
    """
    retriever = ExactRetriever(bundle.item_embeddings)
    users_done = 0
    with _ParquetOutput(output, bundle) as out, tqdm(unit="user", desc="score", disable=None) as bar:
        for partition in iter_interactions(path, columns=columns, max_events=EVENTS_PER_PARTITION):
            known = known_events(partition, bundle.items.index)
            for rows in _by_length(np.diff(known.offsets)):
                histories = [known.history(row).astype(np.int64) for row in rows]
                states = replay(histories, bundle=bundle, graphs=graphs)
                seen = [NO_ITEMS if include_seen else history for history in histories]
                answers = retriever.search_many(states.user_embeddings, k, exclude=seen)
                for i, history in enumerate(histories):
                    if not len(history):
                        answers[i] = search_scores(bundle.items.popularity, k)
                out.write([known.user_ids[row] for row in rows], answers, integer_users=partition.integer_user_ids)
                users_done += len(rows)
                bar.update(len(rows))
    return users_done


class _ParquetOutput:
    """Score rows into a Parquet file that appears under its name only when complete."""

    def __init__(self, path: Path, bundle: Bundle) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.partial")
        self._item_ids = _id_array(bundle.items.item_ids, integers=bundle.manifest.integer_item_ids)
        self._writer: Any = None

    def __enter__(self) -> _ParquetOutput:
        if self._path.is_dir():
            raise InputError(f"cannot write {self._path}: it is a directory; choose another --output")
        try:
            self._temporary.touch()
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}; choose another --output") from None
        return self

    def write(self, user_ids: list[str], answers: list[tuple[np.ndarray, np.ndarray]], *, integer_users: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        counts = [len(indices) for indices, _ in answers]
        table = pa.table(
            {
                "user_id": np.repeat(_id_array(user_ids, integers=integer_users), counts),
                "rank": np.concatenate([np.arange(1, count + 1, dtype=np.int32) for count in counts]),
                "item_id": self._item_ids[np.concatenate([indices for indices, _ in answers])],
                "score": np.concatenate([scores for _, scores in answers]).astype(np.float32),
            }
        )
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, table.schema, compression="zstd")
        self._writer.write_table(table)

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        if failure is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def _id_array(ids: list[str], *, integers: bool) -> np.ndarray:
    """Ids as a column: int64 where they were integers in the log."""
    try:
        return np.array([int(i) for i in ids], np.int64) if integers else np.array(ids, object)
    except OverflowError:
        raise InputError("an id does not fit a 64-bit integer column; write the ids as text with a letter") from None


def evaluate(
    path: Path,
    *,
    bundle: Bundle,
    graphs: Graphs,
    split: Split,
    columns: Columns = DEFAULT_COLUMNS,
    min_user_events: int,
    min_item_events: int,
) -> dict[str, object]:
    """Leave-one-out metrics (`dman_runtime.data.evaluation`) of the bundle on a log. Raises InputError."""
    interactions = read_known(
        path, bundle.items.index, columns=columns, min_user_events=min_user_events, min_item_events=min_item_events
    )
    return report(held_out_ranks(held_out(interactions, split), bundle=bundle, graphs=graphs), split)


def held_out_ranks(data: HeldOut, *, bundle: Bundle, graphs: Graphs) -> Ranks:
    """Ranks of the held-out targets by the engine, in the order of `data`."""
    retriever = ExactRetriever(bundle.item_embeddings)
    parts, order = [], []
    with tqdm(total=len(data.users), unit="user", desc="evaluate", disable=None) as bar:
        for rows in _by_length(np.array([len(history) for history in data.histories])):
            histories = [data.histories[row].astype(np.int64) for row in rows]
            states = replay(histories, bundle=bundle, graphs=graphs)
            parts.append(ranks_of_targets(retriever.scores(states.user_embeddings), data.targets[rows], histories))
            order.append(rows)
            bar.update(len(rows))
    return Ranks.concatenate(parts).reordered(np.concatenate(order))
