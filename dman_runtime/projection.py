"""A generation over a store: what it makes of the users there. One of each pair; the engine has one or several."""

from __future__ import annotations

import logging
import threading
from copy import copy
from typing import NamedTuple

import numpy as np

from dman_runtime.assortment import Assortment
from dman_runtime.errors import StateError
from dman_runtime.model.attributes import Attributes
from dman_runtime.model.events import NO_EVENTS, KnownEvents
from dman_runtime.model.generation import Generation
from dman_runtime.model.state import State
from dman_runtime.store.base import Events, Head, Snapshot, StateStore
from dman_runtime.store.catalogue import Catalogue

logger = logging.getLogger(__name__)


class ReadState(NamedTuple):
    """What a generation knows of a stored user."""

    state: State  # of the record; empty where there is none
    left: KnownEvents  # what it has yet to be advanced by, up to the end of the stored history
    lags: bool  # the record does not cover the stored history, or not with the items of now


class Projection:
    """Turns histories, which are item numbers, into states of one generation, and back into records.

    That of a bundle as it was opened is the *root* of those that know the items added since (`at`).
    """

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
        self._store, self.offered = (
            store,
            Assortment(Attributes(self.bundle.items.attributes)),
        )  # what may be recommended
        self._empty = np.zeros(0, np.int64)  # indices of added items that the bundle cannot serve
        self._newest: Projection | None = None  # with the added items; None: this one, as no object refers to itself
        self._revision, self._lock = 0, threading.Lock()
        known = store.generations()
        self.number = known.get(self.bundle.bundle_id) or store.add_generation(self.bundle.bundle_id)

    def at(self, revision: int) -> Projection:
        """This root with the items that were added by this revision of the catalogue, or a later one, and those that
        may be recommended at it.

        Raises StoreError.
        """
        if self._revision < revision:
            with self._lock:
                if self._revision < revision:
                    self._follow(self._store.catalogue())
        return self._newest or self

    def _follow(self, catalogue: Catalogue) -> None:
        newest = self._newest or self
        if len(catalogue.added) > newest.bundle.added:
            newest = self._with(catalogue)
        off = np.concatenate([newest.known_indices(catalogue.off), newest._empty])
        newest.offered = Assortment(newest.offered.attributes, off=off)  # before anybody gets it
        self._newest, self._revision = None if newest is self else newest, catalogue.revision

    def _with(self, catalogue: Catalogue) -> Projection:
        """The projection of a bundle with the added items."""
        numbers = np.array([one.number for one in catalogue.added], np.int64)
        last = {number: slot for slot, number in enumerate(numbers.tolist())}
        slots = [
            (item_id, item) if last[number] == slot else None  # else it was added again
            for slot, (item_id, (number, item)) in enumerate(
                zip(self._store.item_ids(numbers), catalogue.added, strict=True)
            )
        ]
        generation, more = self.generation.extended(slots)
        if more.unusable:
            item_id, reason = next(iter(more.unusable.items()))
            logger.warning(
                "bundle %s cannot serve %d of the added items, such as %r: %s",
                self.bundle.bundle_id, len(more.unusable), item_id, reason,
            )  # fmt: skip
        larger = copy(self)
        larger._newest = None  # not the one before, which would stay in memory
        larger.generation, larger.bundle, larger._empty = generation, generation.bundle, more.empty
        larger._numbers = np.concatenate([self._numbers, numbers.astype(np.uint32)])
        larger._indices = np.full(max(len(self._indices), int(numbers.max()) + 2), -1, np.int64)
        larger._indices[: len(self._indices)] = self._indices
        served = np.setdiff1d(np.arange(len(self._numbers), len(larger._numbers)), more.empty)
        larger._indices[larger._numbers[served]] = served
        larger.offered = Assortment(Attributes(larger.bundle.items.attributes))
        return larger

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

    def known_events(self, events: Events) -> KnownEvents:
        """Those of items that the bundle knows, in order."""
        known = (indices := self._indices.take(events[0], mode="clip")) >= 0
        return KnownEvents(indices[known], events[1][known])

    def holds_later(self, numbers: np.ndarray, vocabulary: int) -> bool:
        """Whether some of the items of a history (n) were added after a record was made with so many items.

        Such a record is no replay of the history any more, as it lacks their events.
        """
        return vocabulary < self.bundle.manifest.vocabulary and bool((self.known_indices(numbers) >= vocabulary).any())

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
            if state.vocabulary < self.bundle.manifest.vocabulary:  # seldom: the seen items are a read of their own
                lags = True  # at least to be stored as one of the items of now, so that nobody has to look again
                if self.holds_later(snapshot.seen(user_id), state.vocabulary):
                    state = self.empty()
        except StateError as error:
            logger.warning("%s; making the record of user %r anew from the history", error.cause, user_id)
            state, lags = self.empty(), True
        left = NO_EVENTS
        if lags:
            left = self.known_events(snapshot.history(user_id, state.history_count, head.history_count))
        return ReadState(state, left, lags)
