"""A generation over a store: what it makes of the users there. One of each pair; the engine has one or several."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from dman_runtime.assortment import Assortment
from dman_runtime.errors import StateError
from dman_runtime.model.attributes import Attributes
from dman_runtime.model.events import NO_EVENTS, KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.model.state import State
from dman_runtime.store.base import Events, Head, Snapshot, StateStore

logger = logging.getLogger(__name__)


class ReadState(NamedTuple):
    """What a generation knows of a stored user."""

    state: State  # of the record; empty where there is none
    left: KnownEvents  # what it has yet to be advanced by, up to the end of the stored history
    lags: bool  # the record does not cover the stored history


class Projection:
    """Turns histories, which are item numbers, into states of one generation, and back into records."""

    def __init__(self, generation: Generation, store: StateStore, *, reads_only: bool = False) -> None:
        """Gives the bundle's items their numbers, and the bundle its generation, where the store lacks them.

        One that `reads_only` gives no numbers: items that the store lacks are in no history.
        """
        self.generation, self.bundle = generation, generation.bundle
        item_ids = self.bundle.items.item_ids
        numbers = store.find_items(item_ids)
        if (numbers < 0).any() and not reads_only:
            numbers = store.add_items(item_ids).astype(np.int64)
        self._numbers = numbers.astype(np.uint32)  # (V)
        # Item index by item number; -1, also at the end, for numbers that the bundle does not know.
        self._indices = np.full(int(numbers.max(initial=0)) + 2, -1, np.int64)
        self._indices[numbers[numbers >= 0]] = np.flatnonzero(numbers >= 0)
        self._store, self._assortment = store, Assortment(Attributes(self.bundle.items.attributes))
        known = store.generations()
        self.number = known.get(self.bundle.bundle_id) or store.add_generation(self.bundle.bundle_id)

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """The item numbers (N) uint32 of item indices."""
        return self._numbers[indices]

    def known_indices(self, numbers: np.ndarray) -> np.ndarray:
        """Item indices (int64) of the item numbers that the bundle knows, in order."""
        indices = self._indices.take(numbers, mode="clip")  # the last one is -1
        return indices[indices >= 0]

    def knows(self, numbers: np.ndarray) -> np.ndarray:
        """Which item numbers (N) the bundle knows."""
        known: np.ndarray = self._indices.take(numbers, mode="clip") >= 0
        return known

    def assortment(self, revision: int) -> Assortment:
        """Which items may be recommended, at this revision of the catalogue or a later one. Raises StoreError."""
        found = self._assortment
        if found.revision < revision:
            catalogue = self._store.catalogue()
            off = self.known_indices(catalogue.off)
            found = self._assortment = Assortment(found.attributes, revision=catalogue.revision, off=off)
        return found

    def known_events(self, events: Events) -> KnownEvents:
        """Those of items that the bundle knows, in order."""
        known = (indices := self._indices.take(events[0], mode="clip")) >= 0
        return KnownEvents(indices[known], events[1][known])

    def empty(self) -> State:
        """The state of a user without history."""
        return self.generation.unpack(None)

    def read(self, snapshot: Snapshot, user_id: str, head: Head, record: bytes | None) -> ReadState:
        """The state of a user as stored; a damaged record counts as missing."""
        try:
            state = self.generation.unpack(record)
            lags = state.history_count != head.history_count
            if state.history_count > head.history_count:
                raise StateError("a state record covers more than the history")
        except StateError as error:
            logger.warning("%s; making the record of user %r anew from the history", error.cause, user_id)
            state, lags = self.empty(), True
        left = NO_EVENTS
        if lags:
            left = self.known_events(snapshot.history(user_id, state.history_count, head.history_count))
        return ReadState(state, left, lags)
