"""Batch scoring: the best items of every user in a log, without a server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from dman_runtime.data.ids import INTEGER, is_integer_id
from dman_runtime.data.logs import Log
from dman_runtime.data.vocabulary import known_events
from dman_runtime.errors import InputError
from dman_runtime.jobs.parquet_output import ParquetOutput
from dman_runtime.jobs.partitions import by_length
from dman_runtime.jobs.spreading import HERE, Here, Spread
from dman_runtime.model.bundle import Bundle
from dman_runtime.model.events import KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.retrieval.base import NO_ITEMS, Hits
from dman_runtime.retrieval.exact import first_of, multiply_on_one_thread

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class ScoreResult:
    where: str
    users: int = 0  # in the log
    rows: int = 0  # written
    popular_users: int = 0  # without an event of a known item: they got the most popular items
    users_with_nothing: int = 0  # who had every item before, so nothing is left to recommend
    users_with_fewer_than_k: int = 0  # those with nothing included

    def lines(self, output: Path, k: int) -> list[str]:
        """For people."""
        lines = [f"scored {self.users} users into {output}: {self.rows} rows"]
        if self.where != Here.name:
            lines.append(f"the users were scored {self.where}")
        if self.popular_users:
            lines.append(
                f"{self.popular_users} of {self.users} users have no event of a known item: they got popular items"
            )
        if self.users_with_nothing:
            lines.append(f"{self.users_with_nothing} of {self.users} users have nothing left to recommend")
        if few := self.users_with_fewer_than_k - self.users_with_nothing:
            lines.append(f"{few} of {self.users} users have fewer than {k} items left")
        return lines


class _Users(NamedTuple):
    """A batch of B users."""

    user_ids: list[str]
    histories: list[KnownEvents]


@dataclass(frozen=True)
class Scoring:
    """What is computed of each batch: a `Work`, which opens the bundle in each process."""

    bundle: Path
    bundle_id: str
    threads: int
    k: int
    include_seen: bool
    at: int | None

    def open(self) -> Callable[[_Users], list[Hits]]:
        """Raises BundleError, EncoderError."""
        bundle_id = self.bundle_id
        return self.with_generation(
            Generation.open(self.bundle, provider="cpu", threads=self.threads, expected_bundle_id=bundle_id)
        )

    def with_generation(self, generation: Generation) -> Callable[[_Users], list[Hits]]:
        multiply_on_one_thread()  # so that scores are the same to the bit, however many processes there are
        return partial(self._best, generation)

    def _best(self, generation: Generation, users: _Users) -> list[Hits]:
        """What a server would recommend after these histories, at a moment in seconds."""
        histories, items = users.histories, generation.bundle.items
        embeddings, added = generation.asked(generation.replay(histories), [self.at] * len(histories))
        seen = [NO_ITEMS if self.include_seen else history.items for history in histories]
        hits = generation.retriever.search(embeddings, self.k, exclude=seen, added=added)
        for i, history in enumerate(histories):
            if not len(history):
                hits[i] = first_of(items.by_popularity, items.popularity, self.k)
        return hits


@dataclass(frozen=True)
class _Opened:
    """The same in this process, where the bundle is open already."""

    scoring: Scoring
    generation: Generation

    def open(self) -> Callable[[_Users], list[Hits]]:
        return self.scoring.with_generation(self.generation)


def score(
    log: Log,
    output: Path,
    generation: Generation,
    *,
    k: int,
    include_seen: bool = False,
    at: int | None = None,
    spread: Spread = HERE,
    threads: int = 1,
) -> ScoreResult:
    """Writes the k best items of every user in a log to a Parquet file.

    Columns: user_id, rank (from 1), item_id, score, source (model or popular). The answers are those of a server that
    was given the same histories and is asked at the moment `at` (seconds; None: unknown). Users have the type that the
    log was read with (`options_of_training` gives that of the bundle), items that of the bundle. Memory stays bounded
    by the partition size.

    `spread` says where users are scored, with so many `threads` in a graph run. The file is the same to the byte.
    Raises InputError, and the errors of `Spread.results`.
    """
    rows_of = _Rows(log, generation.bundle)
    written = deque[_Users]()
    path = generation.bundle.path.resolve()  # processes of a cluster have directories of their own
    scoring = Scoring(path, generation.bundle_id, threads, k=k, include_seen=include_seen, at=at)
    work, result = _Opened(scoring, generation) if isinstance(spread, Here) else scoring, ScoreResult(spread.name)

    def batches() -> Iterator[_Users]:
        for users in _batches(log, generation.bundle):
            written.append(users)
            yield users

    with (
        ParquetOutput(output, rows_of.schema) as out,
        tqdm(unit="user", desc="score", disable=None) as bar,
        closing(spread.results(work, batches())) as results,
    ):
        for hits in results:
            users = written.popleft()
            popular = np.array([not len(history) for history in users.histories])
            out.write(rows_of.table(users.user_ids, hits, popular))
            _count(result, hits, popular, k)
            bar.update(len(hits))
    return result


def _batches(log: Log, bundle: Bundle) -> Iterator[_Users]:
    for partition in log.parts():
        known = known_events(partition, bundle.items.index)
        for rows in by_length(np.diff(known.offsets), known.user_ids):
            histories = [KnownEvents(known.history(row).astype(np.int64), known.user_timestamps(row)) for row in rows]
            yield _Users([known.user_ids[row] for row in rows], histories)


def _count(result: ScoreResult, hits: list[Hits], popular: np.ndarray, k: int) -> None:
    counts = np.array([len(found.items) for found in hits])
    result.users += len(counts)
    result.rows += int(counts.sum())
    result.popular_users += int(popular.sum())
    result.users_with_nothing += int(np.count_nonzero(counts == 0))
    result.users_with_fewer_than_k += int(np.count_nonzero(counts < k))


class _Rows:
    """Turns answers into rows whose types are the same for every file that is scored with a bundle."""

    def __init__(self, log: Log, bundle: Bundle) -> None:
        import pyarrow as pa

        self._integer_users = log.options.user_ids == INTEGER
        integer_items = bundle.manifest.integer_item_ids
        self.schema = pa.schema(
            [
                ("user_id", pa.int64() if self._integer_users else pa.string()),
                ("rank", pa.int32()),
                ("item_id", pa.int64() if integer_items else pa.string()),
                ("score", pa.float32()),
                ("source", pa.string()),
            ]
        )
        item_ids = bundle.items.item_ids
        item_values = _integers(item_ids, bundle) if integer_items else item_ids
        self._items = pa.array(item_values, self.schema.field("item_id").type)

    def table(self, user_ids: list[str], hits: list[Hits], popular: np.ndarray) -> pa.Table:
        """The rows of B users, whose answers are popular items where `popular` (B) says so."""
        import pyarrow as pa

        counts = np.array([len(found.items) for found in hits])
        user_values = [int(user_id) for user_id in user_ids] if self._integer_users else user_ids
        users = pa.array(user_values, self.schema.field("user_id").type)
        columns = [
            users.take(pa.array(np.repeat(np.arange(len(hits)), counts))),
            pa.array(np.concatenate([np.arange(1, count + 1, dtype=np.int32) for count in counts])),
            self._items.take(pa.array(np.concatenate([found.items for found in hits]))),
            pa.array(np.concatenate([found.scores for found in hits]).astype(np.float32)),
            pa.array(["model", "popular"]).take(pa.array(np.repeat(popular.astype(np.int8), counts))),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)


def _integers(item_ids: list[str], bundle: Bundle) -> np.ndarray:
    """The item ids (V) of a bundle as int64. Raises InputError for one that is none."""
    if (misfit := next((text for text in item_ids if not is_integer_id(text)), None)) is not None:
        raise InputError(
            f"{bundle.path}: item id {misfit!r:.60} is no integer of 64 bits, but integers were trained on",
            "write the ids as in training, or all of them as text",
        )
    return np.array([int(text) for text in item_ids], np.int64)
