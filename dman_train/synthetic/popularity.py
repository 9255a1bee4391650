"""What both tasks share: the popularity of items, and configs that name a wrong field."""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate
from random import Random


class CheckedConfig:
    """A config whose errors name the wrong field and the remedy."""

    def require(self, holds: bool, name: str, range_text: str) -> None:
        """Raises ValueError unless `holds`."""
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)}. Make it {range_text}")


class Popularity:
    """Zipf's law over some values, in a random order of popularity."""

    def __init__(self, values: list[int], exponent: float, random: Random) -> None:
        random.shuffle(values)
        self.values = values
        self.cumulative = list(accumulate((rank + 1) ** -exponent for rank in range(len(values))))

    def draw(self, random: Random, avoid: set[int]) -> int:
        """A value by popularity that is not in `avoid`, unless all are."""
        for _ in range(8):
            value = self.values[bisect(self.cumulative, random.random() * self.cumulative[-1])]
            if value not in avoid:
                return value
        return next((other for other in self.values if other not in avoid), value)
