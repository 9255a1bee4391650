"""Backfills a store from a log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from dman_runtime.data.interactions import Interactions
from dman_runtime.data.logs import Log
from dman_runtime.engine import COMMIT_ATTEMPTS, Engine, conflict_pause
from dman_runtime.errors import ConflictError
from dman_runtime.jobs.partitions import by_length

Existing = Literal["skip", "append"]


@dataclass
class ImportResult:
    users: int = 0  # written
    events: int = 0  # stored
    skipped_users: int = 0  # in the store already
    unknown_events: int = 0  # of those stored: of items that the bundle does not know


def import_histories(log: Log, engine: Engine, *, existing: Existing = "skip") -> ImportResult:
    """Stores and encodes the histories of a log, one durable commit per batch of users.

    Users that are in the store already are skipped, so an interrupted import can simply be repeated; with
    existing="append" their events in the file are added instead. Raises InputError, ConflictError, StoreError.
    """
    result = ImportResult()
    with tqdm(unit="ev", unit_scale=True, desc="import", disable=None) as bar:
        for partition in log.parts():
            numbers = engine.store.add_items(partition.item_ids)[partition.items]  # of every event
            for rows in by_length(np.diff(partition.offsets)):
                _import_batch(engine, partition, numbers, rows, existing, result)
                bar.update(sum(len(partition.history(row)) for row in rows))
    return result


def _import_batch(
    engine: Engine,
    partition: Interactions,
    numbers: np.ndarray,
    rows: np.ndarray,
    existing: Existing,
    result: ImportResult,
) -> None:
    user_ids = [partition.user_ids[row] for row in rows]
    for attempt in range(COMMIT_ATTEMPTS):
        users, events, known = [], 0, 0
        for row, user in zip(rows, engine.open_users(user_ids), strict=True):
            if user.head.version and existing == "skip":
                continue
            begin, end = partition.offsets[row], partition.offsets[row + 1]
            known += engine.append(user, numbers[begin:end], partition.timestamps[begin:end])
            events += int(end - begin)
            users.append(user)
        engine.advance(users)
        if not engine.commit(users):
            result.users += len(users)
            result.events += events
            result.skipped_users += len(user_ids) - len(users)
            result.unknown_events += events - known
            return
        time.sleep(conflict_pause(attempt))
    raise ConflictError("a server keeps updating users of this file", "stop it, or import when it is quiet")
