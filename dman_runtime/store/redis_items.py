"""The table of items of a Redis-protocol store: it only grows, so what was read of it stays true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dman_runtime.store.history import DamagedError
from dman_runtime.store.redis_functions import call
from dman_runtime.store.redis_layout import Keys
from dman_runtime.store.redis_servers import Servers

_REMEMBERED = 200_000  # items in each direction; then they are forgotten, and read again
_PER_CALL = 1000


class ItemTable:
    """Use from any thread: at worst two read the same."""

    def __init__(self, servers: Servers, keys: Keys) -> None:
        self._servers, self._keys = servers, keys
        self._numbers: dict[str, int] = {}
        self._ids: dict[int, str] = {}
        self._count = 0  # at least so many there are

    def count(self, at_least: int = 0) -> int:
        """How many there are; read again only if they are fewer than `at_least` as far as is known."""
        if self._count < at_least or not self._count:
            self._count = int(self._servers.one(self._keys.ids, "HLEN", self._keys.ids))
        return self._count

    def find(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """The numbers (N) of items, -1 where unknown."""
        with self._servers.errors():  # closed?
            known = self._numbers
            missing = [one for one in dict.fromkeys(item_ids) if one not in known]
        found = dict[str, int]()
        for part in _parts(missing):
            values = self._servers.one(self._keys.numbers, "HMGET", self._keys.numbers, *[one.encode() for one in part])
            found |= {one: int(value) for one, value in zip(part, values, strict=True) if value is not None}
        self._remember(found)
        return np.array([known.get(one, found.get(one, -1)) for one in item_ids], np.int64)

    def add(self, item_ids: Sequence[str]) -> NDArray[np.uint32]:
        """The numbers (N) of items; unknown ones get the next ones, in the order given."""
        numbers = dict(zip(item_ids, self.find(item_ids).tolist(), strict=True))
        for part in _parts([one for one, number in numbers.items() if number < 0]):
            keys = [self._keys.numbers, self._keys.ids]
            added = self._servers.write_one(self._keys.ids, *call("items", keys, *[one.encode() for one in part]))
            new = dict(zip(part, map(int, added), strict=True))
            numbers |= new
            self._remember(new)
        return np.array([numbers[one] for one in item_ids], np.uint32)

    def ids(self, numbers: Sequence[int]) -> list[str]:
        """ValueError for a number that was never given."""
        if numbers and (min(numbers) < 0 or max(numbers) >= self.count(max(numbers) + 1)):
            raise ValueError(f"one of the items {list(numbers)[:10]} was never given a number")
        known = self._ids
        missing = [one for one in dict.fromkeys(numbers) if one not in known]
        found = dict[int, str]()
        with self._servers.errors():
            for part in _parts(missing):
                values = self._servers.one(self._keys.ids, "HMGET", self._keys.ids, *[b"%d" % one for one in part])
                for number, value in zip(part, values, strict=True):
                    found[number] = _text(value)
            self._remember({text: number for number, text in found.items()})
        return [found.get(one) or known[one] for one in numbers]

    def _remember(self, found: dict[str, int]) -> None:
        if not found:
            return
        if len(self._ids) + len(found) > _REMEMBERED:
            self._numbers, self._ids = {}, {}  # others may still read the old ones
        self._count = max(self._count, max(found.values()) + 1)
        self._numbers.update(found)
        self._ids.update((number, text) for text, number in found.items())


def _parts(items: Sequence[object]) -> list:  # type: ignore[type-arg]
    return [items[start : start + _PER_CALL] for start in range(0, len(items), _PER_CALL)]


def _text(value: bytes | None) -> str:
    """Raises DamagedError."""
    try:
        if value is not None:
            return value.decode()
    except UnicodeDecodeError:
        pass
    raise DamagedError("an item has no id")
