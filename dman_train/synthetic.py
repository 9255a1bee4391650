"""Synthetic logs with long histories, made so that a memory pays.

A catalogue is partly ordered series ("Series 12, part 3"), partly single items. Every user follows a few home series,
visits each for a part or two, stays away for more than two segments, and then continues where they left off. In between
they browse singles of one genre, which drifts. So the next single is a matter of the last few events, while the next
part of a home series depends on events that no two-segment window holds. Popularity is Zipfian, lengths are log-normal.

`PlantedConfig` makes another kind: a puzzle whose answers only a long memory can give, with a known chance level.
"""

from __future__ import annotations

import csv
import os
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from random import Random

import numpy as np

from dman_runtime.data.interactions import Interactions
from dman_runtime.errors import InputError

_EPOCH = 1_577_836_800  # 2020-01-01 UTC, in seconds: when the first users may appear
_YEAR = 365 * 86_400  # seconds; users appear during the first year
_LONGEST = 4 * _YEAR  # seconds from a user's first event to the last, at most
_CHUNK = 100_000  # rows turned into Python objects at a time while writing


class _Checked:
    """A config that names the field that is wrong and the remedy."""

    def _require(self, holds: bool, name: str, range_text: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)}. Make it {range_text}")


@dataclass(frozen=True)
class SyntheticConfig(_Checked):
    """What to generate. Raises ValueError for a combination that cannot be."""

    users: int = 600
    items: int = 500  # in the catalogue; unpopular ones may never occur
    mean_events: int = 120  # per user, before rounding and clipping
    length_sigma: float = 0.9  # of the logarithm of the lengths: the longest percentile is 8 times the median
    min_events: int = 5  # per user, so that leave-one-out evaluation has something to learn from
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
            self._require(getattr(self, name) >= low, name, f"at least {low}")
        for name in ("series_length", "home_interests", "max_visit", "max_browse"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("absence", "length_sigma", "popularity_exponent", "seed"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("drift_rate", "repeat_rate"):
            self._require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        self._require(0 < self.return_rate <= 1, "return_rate", "above 0 and at most 1")
        self._require(0 < self.serial_share < 1, "serial_share", "between 0 and 1, without either")
        self._require(self.min_events <= self.mean_events, "min_events", f"at most mean_events, {self.mean_events}")
        self._require(self.num_series >= 1, "items", f"enough for one series of {self.series_length} parts")
        singles = self.items - self.num_series * self.series_length
        self._require(singles >= self.genres, "items", f"enough for a single in each of {self.genres} genres")

    @property
    def num_series(self) -> int:
        return int(self.items * self.serial_share) // self.series_length

    def series_and_part(self, item_index: int) -> tuple[int, int] | None:
        """The series and the part of it that an item is, both from 0; None for a single."""
        series, part = divmod(item_index, self.series_length)
        return (series, part) if series < self.num_series else None


@dataclass(frozen=True)
class PlantedConfig(_Checked):
    """A puzzle about the first events of a history. Raises ValueError for a combination that cannot be.

    A user has two independent keys of `answers` values; an item for each stands among the first `head` events. Then
    every query item comes once, in random order, after min_gap to max_gap ordinary events each. Two answers follow it:
    the first is decided by the first key, the second by the second. Each query has two alphabets of its own, so no
    answer comes twice or is ruled out by those seen. A history ends with `query, first answer, second answer`: the
    validation and the test target of leave-one-out, and the former says nothing about the latter.

    So the last min_gap + 2 inputs before the test target (min_gap + 1 before the validation target) are independent of
    its key: ordinary events follow a user's stable genres. Beyond them the key item and the answers to earlier queries
    tell it. Without memory, L layers over segments of T reach back at most (L + 1) T inputs, 60 by default. Who
    knows the rules but not the key is at `chance`; who sees all, at `expected`.
    """

    users: int = 4000
    items: int = 800  # in the catalogue; what keys, queries and answers leave over is ordinary
    answers: int = 40  # values of a key, and items in each alphabet
    queries: int = 4  # per user
    head: int = 15  # first events of a user, which hold the keys
    min_gap: int = 60  # ordinary events before a query, at least: as far as two layers and segments of 20 reach
    max_gap: int = 100  # and at most, uniformly
    genres: int = 20  # of the ordinary items
    home_genres: int = 3  # that a user ever browses
    popularity_exponent: float = 0.8  # of the Zipf law over the items of a genre
    seed: int = 0

    def __post_init__(self) -> None:
        lows = {"users": 1, "answers": 2, "queries": 1, "head": 2, "min_gap": 1, "home_genres": 1}
        for name, low in lows.items():
            self._require(getattr(self, name) >= low, name, f"at least {low}")
        for name in ("popularity_exponent", "seed"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(self.max_gap >= self.min_gap, "max_gap", f"at least min_gap, {self.min_gap}")
        self._require(self.genres >= self.home_genres, "genres", f"at least home_genres, {self.home_genres}")
        least = self.items - self.ordinary_items + self.genres
        self._require(self.items >= least, "items", f"at least {least}: an ordinary item for each genre as well")

    @property
    def ordinary_items(self) -> int:
        """Ordinary items come first in the catalogue, then the keys, the queries and the answers."""
        return self.items - 2 * self.answers - self.queries * (1 + 2 * self.answers)

    def chance(self, k: int = 10) -> float:
        """Best HR@k, seen items excluded or kept, for who sees no more than the last min_gap inputs."""
        return min(k, self.answers) / self.answers

    def key(self, place: int, value: int) -> int:
        """The catalogue index of the item that gives the first (place 0) or second key a value."""
        return self.ordinary_items + place * self.answers + value

    def query(self, number: int) -> int:
        return self.key(2, number)

    def answer(self, query: int, place: int, value: int) -> int:
        """The first (place 0) or second answer to a query, for a value of the key of that place."""
        return self.query(self.queries) + (2 * query + place) * self.answers + value

    def expected(self, history: Sequence[int]) -> int | None:
        """The answer that follows a history of catalogue indices; None where something else does. Reads the keys."""
        asked = history[-1] - self.query(0)  # a query, or an answer
        query, place = (asked, 0) if asked < self.queries else divmod((asked - self.queries) // self.answers, 2)
        place += asked >= self.queries  # after a first answer comes the second
        if asked < 0 or place > 1:
            return None
        value = next(item - self.key(place, 0) for item in history if 0 <= item - self.key(place, 0) < self.answers)
        return self.answer(query, place, value)


def generate(config: SyntheticConfig | PlantedConfig) -> Interactions:
    """The log: users "u0001", ... in order of their first event, integer item ids from 1. Same config, same log."""
    rng = np.random.default_rng(config.seed)
    histories = _planted_histories(config) if isinstance(config, PlantedConfig) else _interest_histories(config, rng)
    first_times = _EPOCH + np.sort(rng.integers(0, _YEAR, config.users))
    items, timestamps = [], []
    for first_time, (history, turn_starts) in zip(first_times.tolist(), histories, strict=True):
        items.append(np.array(history, dtype=np.int32))
        timestamps.append(_times(rng, first_time, turn_starts, len(history)))
    digits = max(4, len(str(config.users)))
    everything = Interactions(
        user_ids=[f"u{user + 1:0{digits}}" for user in range(config.users)],
        item_ids=[str(item + 1) for item in range(config.items)],
        offsets=np.cumsum([0, *map(len, items)], dtype=np.int64),
        items=np.concatenate(items),
        timestamps=np.concatenate(timestamps),
        integer_user_ids=False,
        integer_item_ids=True,
    )
    return everything.filtered(min_user_events=1, min_item_events=1)  # without the items that never occur


def _interest_histories(config: SyntheticConfig, rng: np.random.Generator) -> Iterator[tuple[list[int], list[int]]]:
    """Each user's items (indices into the catalogue), and at which positions a new turn begins."""
    catalogue = _Catalogue(config)
    mean_log = np.log(config.mean_events) - config.length_sigma**2 / 2
    drawn = rng.lognormal(mean_log, config.length_sigma, config.users)
    lengths = np.clip(drawn, config.min_events, config.max_length_ratio * config.mean_events).astype(np.int64)
    users = enumerate(lengths.tolist())
    return (_history(config, catalogue, Random(f"{config.seed}/{user}"), length) for user, length in users)


def planted_keys(config: PlantedConfig) -> np.ndarray:
    """Both keys of every user: (users, 2) int64, uniform and independent of each other and of everything else."""
    return np.random.default_rng((config.seed, 1)).integers(0, config.answers, (config.users, 2))


def _planted_histories(config: PlantedConfig) -> Iterator[tuple[list[int], list[int]]]:
    """As `_interest_histories`."""
    random, ordinary = Random(f"{config.seed}/catalogue"), range(config.ordinary_items)
    genres = [
        _Popularity(list(ordinary[genre :: config.genres]), config.popularity_exponent, random)
        for genre in range(config.genres)
    ]
    for user, keys in enumerate(planted_keys(config).tolist()):
        random = Random(f"{config.seed}/{user}")  # draws the same whatever the keys are
        homes = random.sample(genres, config.home_genres)
        history = [random.choice(homes).draw(random, set()) for _ in range(config.head)]
        for place, position in enumerate(random.sample(range(config.head), 2)):
            history[position] = config.key(place, keys[place])
        for query in random.sample(range(config.queries), config.queries):
            gap = random.randint(config.min_gap, config.max_gap)
            history += [random.choice(homes).draw(random, set()) for _ in range(gap)]
            history += [config.query(query), *(config.answer(query, place, keys[place]) for place in range(2))]
        yield history, list(range(0, len(history), 10))


class _Catalogue:
    """Which series and singles there are and how popular each is."""

    def __init__(self, config: SyntheticConfig) -> None:
        random = Random(f"{config.seed}/catalogue")
        self.series = _Popularity(list(range(config.num_series)), config.popularity_exponent, random)
        self.genres = _Popularity(list(range(config.genres)), config.popularity_exponent, random)
        singles = range(config.num_series * config.series_length, config.items)
        self.singles = [
            _Popularity(list(singles[genre :: config.genres]), config.popularity_exponent, random)
            for genre in range(config.genres)
        ]


class _Popularity:
    """Zipf's law over some values, in a random order of popularity."""

    def __init__(self, values: list[int], exponent: float, random: Random) -> None:
        random.shuffle(values)
        self.values = values
        self.cumulative = list(accumulate((rank + 1) ** -exponent for rank in range(len(values))))

    def draw(self, random: Random, avoid: set[int]) -> int:
        """A value by popularity and not in `avoid`, unless that holds all."""
        for _ in range(8):
            value = self.values[bisect(self.cumulative, random.random() * self.cumulative[-1])]
            if value not in avoid:
                return value
        return next((other for other in self.values if other not in avoid), value)


def _history(
    config: SyntheticConfig, catalogue: _Catalogue, random: Random, length: int
) -> tuple[list[int], list[int]]:
    """One user's items (indices into the catalogue), and at which positions a new turn begins."""
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
            if home.part == config.series_length:  # finished: take up another series, at some later turn
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


def _browse(config: SyntheticConfig, singles: _Popularity, random: Random, history: list[int], seen: set[int]) -> None:
    """Append singles of one genre, new ones by preference, and now and then something from long ago."""
    for _ in range(1 + int(random.random() * config.max_browse)):
        if len(history) > config.absence and random.random() < config.repeat_rate:
            history.append(history[int(random.random() * (len(history) - config.absence))])
        else:
            history.append(singles.draw(random, seen))
            seen.add(history[-1])


@dataclass
class _Home:
    """A series that a user follows: where they left off, and when."""

    series: int
    part: int = 0
    last_position: float = float("-inf")


def _times(rng: np.random.Generator, first: int, turn_starts: list[int], length: int) -> np.ndarray:
    """Seconds since the epoch, non-decreasing, (length,) int64: minutes within a turn, about a day between turns."""
    gaps = rng.lognormal(np.log(900), 0.8, length)
    starts = np.array(turn_starts)
    gaps[starts] = rng.lognormal(np.log(50_000), 1.0, len(starts))
    gaps[0] = 0
    elapsed = np.cumsum(gaps)
    elapsed *= min(1.0, _LONGEST / max(elapsed[-1], 1.0))  # very long histories are dense, not from the future
    return first + elapsed.astype(np.int64)


def write_log(interactions: Interactions, path: str | Path) -> None:
    """Write user_id, item_id, timestamp as CSV, TSV or Parquet by extension, in order of time (ties as they are).

    The file appears complete or not at all. Raises InputError for another extension, OSError when it cannot be written.
    """
    users = np.repeat(np.arange(interactions.num_users), np.diff(interactions.offsets))
    rows = np.argsort(interactions.timestamps, kind="stable")
    columns = {
        "user_id": _id_array(interactions.user_ids, interactions.integer_user_ids)[users[rows]],
        "item_id": _id_array(interactions.item_ids, interactions.integer_item_ids)[interactions.items[rows]],
        "timestamp": interactions.timestamps[rows],
    }
    _write(columns, Path(path))


def write_items(config: SyntheticConfig | PlantedConfig, path: str | Path) -> None:
    """Write item_id, title and attributes of the whole catalogue; otherwise as `write_log`.

    Attributes are genre and series (empty for a single), or for a planted puzzle the kind of the item.
    """
    _write(_planted_items(config) if isinstance(config, PlantedConfig) else _interest_items(config), Path(path))


def _planted_items(config: PlantedConfig) -> dict[str, np.ndarray]:
    values, numbers = range(1, config.answers + 1), range(1, config.queries + 1)
    titles = [f"Ordinary {n + 1}" for n in range(config.ordinary_items)]
    titles += [f"Key {place}: {value}" for place in (1, 2) for value in values]
    titles += [f"Query {n}" for n in numbers]
    titles += [f"Answer {place} to query {n}: {value}" for n in numbers for place in (1, 2) for value in values]
    kinds = [title.partition(" ")[0] for title in titles]
    texts = {"title": np.array(titles, dtype=object), "kind": np.array(kinds, dtype=object)}
    return {"item_id": np.arange(config.items) + 1} | texts


def _interest_items(config: SyntheticConfig) -> dict[str, np.ndarray]:
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


def _id_array(ids: list[str], integers: bool) -> np.ndarray:
    return np.array([int(text) for text in ids], dtype=np.int64) if integers else np.array(ids, dtype=object)


def _write(columns: dict[str, np.ndarray], path: Path) -> None:
    writers: dict[str, Callable[[dict[str, np.ndarray], Path], None]] = {
        ".csv": partial(_write_text, separator=","),
        ".tsv": partial(_write_text, separator="\t"),
        ".parquet": _write_parquet,
    }
    if path.suffix.lower() not in writers:
        raise InputError(f"{path}: unknown extension {path.suffix!r}. Write a {', '.join(writers)} file")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writers[path.suffix.lower()](columns, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_text(columns: dict[str, np.ndarray], path: Path, *, separator: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerow(columns)
        for begin in range(0, len(next(iter(columns.values()))), _CHUNK):
            writer.writerows(zip(*(c[begin : begin + _CHUNK].tolist() for c in columns.values()), strict=True))


def _write_parquet(columns: dict[str, np.ndarray], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), str(path))
