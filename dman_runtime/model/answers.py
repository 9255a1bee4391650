"""What states answer, kept until they change: people ask more often than they act."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from dman_runtime.model.recurrence import Last
from dman_runtime.retrieval.base import Added

KEPT_ANSWERS = 8192  # at the default sizes about 20 MB


class PersonalAnswer(NamedTuple):
    """What a search needs of a user, for a request at one moment."""

    embedding: np.ndarray  # (D) float32
    added: Added | None  # to the scores of items that the user had before; None for a model without that term


class KeptAnswers:
    """Those that were asked for last, by `State.stored` and moment, and what decides the moment. Thread-safe."""

    def __init__(self, most: int = KEPT_ANSWERS) -> None:
        self._most, self._lock = most, threading.Lock()
        self._answers: OrderedDict[tuple[bytes, int | None], PersonalAnswer] = OrderedDict()
        self._lasts: OrderedDict[bytes, Last] = OrderedDict()  # by `State.stored`; no more than answers

    def last(self, stored: bytes) -> Last | None:
        """What decides the moment of a request, of a state that has an answer here, or had one lately."""
        with self._lock:
            return self._lasts.get(stored)

    def get(self, stored: bytes, moment: int | None) -> PersonalAnswer | None:
        """Always None for a state that is not stored."""
        with self._lock:
            if (found := self._answers.get((stored, moment))) is not None:
                self._answers.move_to_end((stored, moment))
            return found

    def put(self, stored: bytes, moment: int | None, answer: PersonalAnswer, last: Last) -> None:
        if not stored:
            return
        with self._lock:
            self._answers[stored, moment] = answer
            self._lasts[stored] = last
            self._lasts.move_to_end(stored)
            for kept in (self._answers, self._lasts):
                if len(kept) > self._most:
                    kept.popitem(last=False)
