"""The model as a peer's process holds it: our graphs, our state logic and our exact search, without our server.

Runs in the environment of a peer, which has numpy, onnxruntime and lmdb, but neither gRPC nor our store. States are in
memory; an update is durable when it is answered, as with us: one commit of LMDB for all updates of a batch.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import lmdb
import numpy as np

from dman_runtime.model.events import without_times
from dman_runtime.model.generation import Generation
from dman_runtime.model.record import head_bytes
from dman_runtime.model.state import State
from dman_runtime.retrieval.base import Hits

SETTINGS = "DMAN_PEER"  # the variable that names the file with the settings
MAX_BATCH = 64
STORE_BYTES = 1 << 30


@dataclass(frozen=True)
class Settings:
    """What a peer's process is told. They go through a file, as some frameworks start processes of their own."""

    bundle: str
    histories: str  # a JSON file: item ids by user
    store: str  # directory for the durable records; each process makes one of its own in it
    port: int
    workers: int  # processes that hold the model; instances where the framework has threads

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def given(cls) -> Self:
        return cls(**json.loads(Path(os.environ[SETTINGS]).read_text(encoding="utf-8")))


@dataclass
class _User:
    state: State
    seen: np.ndarray  # item indices of the history


class HostedModel:
    """Answers batches. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._generation = Generation.open(Path(settings.bundle), provider="cpu")
        self._items = self._generation.bundle.items
        histories = json.loads(Path(settings.histories).read_text(encoding="utf-8"))
        known = [self._items.indices(items)[0] for items in histories.values()]
        states = self._generation.replay(without_times(known))
        for state in states:
            self._record(state)
        users = zip(histories, states, known, strict=True)
        self._users = {user_id: _User(state, items) for user_id, state, items in users}
        store = Path(settings.store) / str(os.getpid())
        store.mkdir(parents=True)
        self._store = lmdb.open(str(store), lib_version=0, map_size=STORE_BYTES)
        self._lock = threading.Lock()

    def recommend(self, user_ids: Sequence[str], k: int) -> list[Hits]:
        """The k best items of each user that the user has not seen: one matrix product for all."""
        with self._lock:
            users = [self._users[user_id] for user_id in user_ids]
            embeddings, added = self._generation.asked([user.state for user in users], [None] * len(users))
            return self._generation.retriever.search(embeddings, k, exclude=[user.seen for user in users], added=added)

    def item_ids(self, hits: Hits) -> list[str]:
        return [self._items.item_ids[item] for item in hits.items.tolist()]

    def update(self, events: Sequence[tuple[str, str]]) -> list[int]:
        """Appends (user id, item id) events: one run of the graph and one durable commit for all.

        Returns how many events the user of each has by then.
        """
        with self._lock:
            items, counts = dict[str, list[int]](), list[int]()
            for user_id, item_id in events:
                new = items.setdefault(user_id, [])
                new.append(self._items.index[item_id])
                counts.append(self._users[user_id].state.event_count + len(new))
            users = [self._users[user_id] for user_id in items]
            added = [np.array(new, np.int64) for new in items.values()]
            self._generation.advance([user.state for user in users], without_times(added))
            for user, more in zip(users, added, strict=True):
                user.state.history_count = user.state.event_count
                user.seen = np.concatenate([user.seen, more])
            with self._store.begin(write=True) as txn:
                for user_id, user in zip(items, users, strict=True):
                    txn.put(user_id.encode(), self._record(user.state))
            return counts

    def _record(self, state: State) -> bytes:
        """The record of a state, whose answers are kept under its head, as in our server."""
        record = self._generation.pack(state)
        state.stored = record[: head_bytes(state.shape)]
        return record

    def answer(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Replies to requests as `JsonWire` sends them: with an item they are updates, and go first."""
        replies: dict[int, dict[str, Any]] = {}
        updates = [row for row, request in enumerate(requests) if request.get("item_id")]
        if updates:
            counts = self.update([(requests[row]["user_id"], requests[row]["item_id"]) for row in updates])
            replies |= {row: {"event_count": count} for row, count in zip(updates, counts, strict=True)}
        others = [row for row in range(len(requests)) if row not in replies]
        if others:
            most = max(requests[row]["k"] for row in others)
            for row, hits in zip(
                others, self.recommend([requests[row]["user_id"] for row in others], most), strict=True
            ):
                k = requests[row]["k"]
                best = Hits(hits.items[:k], hits.scores[:k])
                replies[row] = {"item_ids": self.item_ids(best), "scores": best.scores.tolist()}
        return [replies[row] for row in range(len(requests))]
