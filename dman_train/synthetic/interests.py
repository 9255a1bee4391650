"""Logs with long- and short-term interests, made so that a memory helps.

A catalogue consists of ordered series ("Series 12, part 3") and single items. Every user follows a few home series,
reads a part or two of one, stays away for more than two segments, and then continues where they stopped. In between
they browse singles of one genre, which changes slowly. So the next single depends on the last few events, and the next
part of a home series depends on events that no window of two segments holds. Popularity is Zipfian, lengths log-normal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from dman_train.synthetic.popularity import CheckedConfig, Popularity


@dataclass(frozen=True)
class SyntheticConfig(CheckedConfig):
    """What to generate. Raises ValueError for an impossible combination."""

    users: int = 600
    items: int = 500  # in the catalogue; unpopular ones may never occur
    mean_events: int = 120  # per user, before rounding and clipping
    length_sigma: float = 0.9  # of the logarithm of the lengths: the longest percentile is 8 times the median
    min_events: int = 5  # per user, so that leave-one-out evaluation leaves some events to learn from
    max_length_ratio: int = 20  # longest history in units of mean_events
    genres: int = 8  # short-term interests
    serial_share: float = 0.5  # of the items, in series; the others are singles
    series_length: int = 10  # parts
    home_interests: int = 8  # series a user follows at a time: their next parts fit in a top ten
    absence: int = 40  # events a user stays away from a home series, at least: two segments of 20
    return_rate: float = 0.6  # chance per turn that the user returns to a home series that is due
    max_visit: int = 2  # parts per visit, 1 to this, uniformly
    max_browse: int = 4  # singles per turn, 1 to this, uniformly
    drift_rate: float = 0.25  # chance per browsing turn that the short-term genre changes
    repeat_rate: float = 0.03  # chance that a browsed item is one from further back than `absence`
    popularity_exponent: float = 0.8  # of the Zipf laws over series, genres and the singles of a genre
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("users", 1), ("mean_events", 5), ("min_events", 1), ("max_length_ratio", 1), ("genres", 1)):
            self.require(getattr(self, name) >= low, name, f"at least {low}")
        for name in ("series_length", "home_interests", "max_visit", "max_browse"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("absence", "length_sigma", "popularity_exponent", "seed"):
            self.require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("drift_rate", "repeat_rate"):
            self.require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        self.require(0 < self.return_rate <= 1, "return_rate", "above 0 and at most 1")
        self.require(0 < self.serial_share < 1, "serial_share", "between 0 and 1, without either")
        self.require(self.min_events <= self.mean_events, "min_events", f"at most mean_events, {self.mean_events}")
        self.require(self.num_series >= 1, "items", f"enough for one series of {self.series_length} parts")
        singles = self.items - self.num_series * self.series_length
        self.require(singles >= self.genres, "items", f"enough for a single in each of {self.genres} genres")

    @property
    def num_series(self) -> int:
        return int(self.items * self.serial_share) // self.series_length

    def series_and_part(self, item_index: int) -> tuple[int, int] | None:
        """The series and the part that an item is, both from 0; None for a single."""
        series, part = divmod(item_index, self.series_length)
        return (series, part) if series < self.num_series else None

    def histories(self, rng: np.random.Generator) -> Iterator[tuple[list[int], list[int]]]:
        """Each user's items (indices into the catalogue), and the positions at which a new turn begins."""
        return _histories(self, rng)

    def item_columns(self) -> dict[str, np.ndarray]:
        """Ids, titles and attributes of the whole catalogue."""
        return _item_columns(self)


def _histories(config: SyntheticConfig, rng: np.random.Generator) -> Iterator[tuple[list[int], list[int]]]:
    catalogue = _Catalogue(config)
    mean_log = np.log(config.mean_events) - config.length_sigma**2 / 2
    drawn = rng.lognormal(mean_log, config.length_sigma, config.users)
    lengths = np.clip(drawn, config.min_events, config.max_length_ratio * config.mean_events).astype(np.int64)
    users = enumerate(lengths.tolist())
    return (_history(config, catalogue, Random(f"{config.seed}/{user}"), length) for user, length in users)


class _Catalogue:
    """Which series and singles there are and how popular each is."""

    def __init__(self, config: SyntheticConfig) -> None:
        random = Random(f"{config.seed}/catalogue")
        self.series = Popularity(list(range(config.num_series)), config.popularity_exponent, random)
        self.genres = Popularity(list(range(config.genres)), config.popularity_exponent, random)
        singles = range(config.num_series * config.series_length, config.items)
        self.singles = [
            Popularity(list(singles[genre :: config.genres]), config.popularity_exponent, random)
            for genre in range(config.genres)
        ]


def _history(
    config: SyntheticConfig, catalogue: _Catalogue, random: Random, length: int
) -> tuple[list[int], list[int]]:
    """One user's items (indices into the catalogue), and the positions at which a new turn begins."""
    homes: list[_Home] = []
    followed: set[int] = set()
    for _ in range(min(config.home_interests, config.num_series)):
        homes.append(_Home(catalogue.series.draw(random, followed)))
        followed.add(homes[-1].series)
    genre = catalogue.genres.draw(random, set())
    history: list[int] = []
    seen: set[int] = set()  # singles
    turn_starts: list[int] = []
    while len(history) < length:
        turn_starts.append(len(history))
        home = min(homes, key=lambda candidate: candidate.last_position)
        if len(history) - home.last_position > config.absence and random.random() < config.return_rate:
            _visit(config, home, random, history)
            if home.part == config.series_length:  # finished: begin another series at some later turn
                home.series, home.part = catalogue.series.draw(random, followed), 0
                followed.add(home.series)
        else:
            if random.random() < config.drift_rate:
                genre = catalogue.genres.draw(random, {genre})
            _browse(config, catalogue.singles[genre], random, history, seen)
    return history[:length], turn_starts


def _visit(config: SyntheticConfig, home: _Home, random: Random, history: list[int]) -> None:
    """Append the next parts of a home series."""
    first = home.series * config.series_length
    parts = min(1 + int(random.random() * config.max_visit), config.series_length - home.part)
    history.extend(range(first + home.part, first + home.part + parts))
    home.part += parts
    home.last_position = len(history) - 1


def _browse(config: SyntheticConfig, singles: Popularity, random: Random, history: list[int], seen: set[int]) -> None:
    """Append singles of one genre, preferably new ones, and now and then an item from long ago."""
    for _ in range(1 + int(random.random() * config.max_browse)):
        if len(history) > config.absence and random.random() < config.repeat_rate:
            history.append(history[int(random.random() * (len(history) - config.absence))])
        else:
            history.append(singles.draw(random, seen))
            seen.add(history[-1])


@dataclass
class _Home:
    """A series that a user follows: the next part, and the position of the last one seen."""

    series: int
    part: int = 0
    last_position: float = float("-inf")


def _item_columns(config: SyntheticConfig) -> dict[str, np.ndarray]:
    items = np.arange(config.items)
    series, part = np.divmod(items, config.series_length)
    serial = series < config.num_series
    single = items - config.num_series * config.series_length
    genre = np.where(serial, series, single) % config.genres
    titles = [
        f"Series {s + 1}, part {p + 1}" if in_series else f"Single {n + 1}"
        for s, p, n, in_series in zip(series, part, single, serial, strict=True)
    ]
    return {
        "item_id": items + 1,
        "title": np.array(titles, dtype=object),
        "genre": np.array([f"Genre {g + 1}" for g in genre], dtype=object),
        "series": np.array(
            [f"Series {s + 1}" if in_series else "" for s, in_series in zip(series, serial, strict=True)], dtype=object
        ),
    }
