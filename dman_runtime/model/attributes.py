"""Which items have which attributes: what filters and rules ask. An index of an attribute is built at its first use."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dman_runtime.data.interactions import LIST_SEPARATOR


@dataclass(frozen=True, eq=False)
class Field:
    """One attribute of all V items, as (P) pairs of an item and one of its values."""

    vocabulary: int  # V
    values: Mapping[str, int]  # code of each of (C) values
    by_value: np.ndarray  # (P) int64 item index of each pair, ordered by code
    counts: np.ndarray  # (C) int64 how many items have each value

    @classmethod
    def of(cls, texts: Sequence[str | None]) -> Field:
        """From the texts (V) of the items, None where an item has none."""
        values: dict[str, int] = {}
        items, codes = list[int](), list[int]()
        for item, text in enumerate(texts):
            if text is not None:
                parts = dict.fromkeys(text.split(LIST_SEPARATOR)) if LIST_SEPARATOR in text else (text,)
                for value in parts:
                    items.append(item)
                    codes.append(values.setdefault(value, len(values)))
        coded = np.array(codes, np.int64)
        by_value = np.array(items, np.int64)[np.argsort(coded, kind="stable")]
        return cls(len(texts), values, by_value, np.bincount(coded, minlength=len(values)))

    @cached_property
    def numbers(self) -> np.ndarray:
        """(C) float64: the values as numbers; NaN for those that are none."""
        return np.array([_number(value) for value in self.values], np.float64)

    @cached_property
    def _by_item(self) -> tuple[np.ndarray, np.ndarray]:
        """(P) codes ordered by item, and (V + 1) where those of each item start."""
        codes = np.repeat(np.arange(len(self.values)), self.counts)
        counts = np.bincount(self.by_value, minlength=self.vocabulary)
        return codes[np.argsort(self.by_value, kind="stable")], np.concatenate([[0], np.cumsum(counts)])

    def codes_of(self, item: int) -> list[int]:
        """The codes of the values of an item."""
        codes, starts = self._by_item
        found: list[int] = codes[starts[item] : starts[item + 1]].tolist()
        return found

    def pairs_of(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of (N) items, (n) positions in them and (n) codes: one pair for each value that one has, by position."""
        codes, starts = self._by_item
        counts = starts[items + 1] - starts[items]
        positions = np.repeat(np.arange(len(items)), counts)
        within = np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts)
        return positions, codes[starts[items][positions] + within]

    def mask(self, codes: np.ndarray) -> np.ndarray:
        """(V) bool: the items that have one of some values, by (n) codes or (C) bool."""
        chosen = np.zeros(len(self.values), bool)
        chosen[codes] = True
        mask = np.zeros(self.vocabulary, bool)
        mask[self.by_value[np.repeat(chosen, self.counts)]] = True
        return mask


class Attributes:
    """Those of the items of a bundle. May be used from any thread."""

    def __init__(self, items: Sequence[Mapping[str, str]]) -> None:
        """`items` (V): the attributes of each as texts; the values of a list are joined by LIST_SEPARATOR."""
        self._items, self._lock = items, threading.Lock()
        self._fields: dict[str, Field] = {}

    @property
    def vocabulary(self) -> int:
        return len(self._items)

    @cached_property
    def names(self) -> Sequence[str]:
        """The attributes that items have, in alphabetical order."""
        return sorted({name for item in self._items for name in item})

    def field(self, name: str) -> Field | None:
        """None where no item has such an attribute."""
        if (found := self._fields.get(name)) is not None:
            return found
        if name not in self.names:
            return None
        with self._lock:
            if name not in self._fields:
                self._fields[name] = Field.of([item.get(name) for item in self._items])
        return self._fields[name]


def _number(text: str) -> float:
    """A finite number in the notation of JSON, Python and C; NaN for everything else."""
    try:
        number = float(text) if "_" not in text else np.nan
    except ValueError:
        return np.nan
    return number if np.isfinite(number) else np.nan
