"""What states answer, kept until they change: people ask more often than they act."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from dman_runtime.retrieval.base import Added

KEPT_ANSWERS = 8192  # at the default sizes about 20 MB


class PersonalAnswer(NamedTuple):
    """What a search needs of a user, for a request at one moment."""

    embedding: np.ndarray  # (D) float32
    added: Added | None  # to the scores of items that the user had before; None for a model without that term


class KeptAnswers:
    """Those that were asked for last, by `State.stored` and moment. Thread-safe."""

    def __init__(self, most: int = KEPT_ANSWERS) -> None:
        self._most, self._lock = most, threading.Lock()
        self._answers: OrderedDict[tuple[bytes, int | None], PersonalAnswer] = OrderedDict()

    def get(self, stored: bytes, moment: int | None) -> PersonalAnswer | None:
        """Always None for a state that is not stored."""
        with self._lock:
            if (found := self._answers.get((stored, moment))) is not None:
                self._answers.move_to_end((stored, moment))
            return found

    def put(self, stored: bytes, moment: int | None, answer: PersonalAnswer) -> None:
        if not stored:
            return
        with self._lock:
            self._answers[stored, moment] = answer
            if len(self._answers) > self._most:
                self._answers.popitem(last=False)
