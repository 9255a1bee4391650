"""A store that is divided among primaries, simulated: who is busy, who waits, and what a primary's death costs.

Each primary serves one command at a time, in the order of arrival. Calls arrive at random (Poisson). Whose they are
follows Zipf's law; users are spread over 16,384 slots by a hash, and the primaries share the slots in ranges, as in a
cluster of the Redis protocol. A recommendation is one command. An update is two: it reads, and writes what was encoded
meanwhile. Times are in seconds, those of a call are what it spends at the store. The same seed gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SLOTS = 16_384
_EXACT_RANKS = 1_000_000  # of users; beyond, Zipf's law is as good as smooth
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """Who calls, and how often."""

    calls: float  # a second, of all users
    users: int
    updates: float = 0.2  # share of the calls
    exponent: float = 0.8  # the r-th busiest user calls r^-exponent times as often as the busiest; 0: all alike


@dataclass(frozen=True)
class Costs:
    """Seconds that a command keeps its primary busy. The defaults are measured: docs/experiments.md, 2026-11-28."""

    recommend: float = 48e-6
    read: float = 50e-6  # of an update
    commit: float = 219e-6  # with one replica and WAIT
    encode: float = 5e-3  # from the read of an update to its commit; at the server, not at the primary
    spread: float = 0.5  # standard deviation by mean, of a log-normal law; 0: always the mean

    def of_calls(self, load: Load) -> float:
        """Mean seconds of a primary for a call of any kind."""
        return (1 - load.updates) * self.recommend + load.updates * (self.read + self.commit)


@dataclass(frozen=True)
class Death:
    """The primary with most to do dies, and its replica takes over."""

    at: float
    failover: float = 7.6  # seconds until it serves; docs/experiments.md, 2026-11-28, node timeout 5 s
    slower: float = 1.0  # what it takes longer while its caches are cold; 1: it keeps all in memory
    cold: float = 10.0  # seconds
    patience: float = 1.0  # after which a caller gives up


@dataclass(frozen=True)
class Outcome:
    """What became of each call, and of each primary."""

    arrival: Floats  # (calls,)
    shard: NDArray[np.int64]  # (calls,)
    is_update: NDArray[np.bool_]  # (calls,)
    latency: Floats  # (calls,); infinite for those that were given up before a primary took them
    busy: Floats  # (primaries,), shares of the time

    def percentiles(self, of: NDArray[np.bool_], *shares: float) -> list[float]:
        """Of the latencies of some calls, NaN if there are none."""
        values = self.latency[of]
        return [float(np.quantile(values, share, method="higher")) if values.size else np.nan for share in shares]

    @property
    def p99(self) -> float:
        """That of recommendations or updates, whichever is longer."""
        return float(np.nanmax([self.percentiles(of, 0.99)[0] for of in (self.is_update, ~self.is_update)]))


def zipf_ranks(random: np.random.Generator, users: int, exponent: float, size: int) -> NDArray[np.int64]:
    """Ranks 0..users-1, drawn with probabilities in proportion to (rank + 1)^-exponent."""
    weights, rest = _weights(users, exponent)
    exact, low, power = len(weights), len(weights) + 0.5, 1 - exponent
    drawn = random.random(size) * (weights[-1] + rest)
    ranks = np.searchsorted(weights, drawn, side="right").astype(np.int64)
    beyond = drawn >= weights[-1]
    over = drawn[beyond] - weights[-1]
    position = low * np.exp(over) if power == 0 else (low**power + power * over) ** (1 / power)
    ranks[beyond] = np.clip(np.rint(position).astype(np.int64) - 1, exact, users - 1)
    return np.minimum(ranks, users - 1)


def _weights(users: int, exponent: float) -> tuple[Floats, float]:
    """Summed up by rank as far as they are exact, and the sum of the rest."""
    exact = min(users, _EXACT_RANKS)
    weights = np.cumsum(np.arange(1, exact + 1, dtype=np.float64) ** -exponent)
    low, high, power = exact + 0.5, users + 0.5, 1 - exponent
    return weights, float(np.log(high / low) if power == 0 else (high**power - low**power) / power)


def busiest_share(users: int, exponent: float) -> float:
    """Of all calls, that of the busiest user."""
    weights, rest = _weights(users, exponent)
    return 1 / (float(weights[-1]) + rest)


def shards_of(ranks: NDArray[np.int64], primaries: int) -> NDArray[np.int64]:
    """The primary of each user, by a hash (SplitMix64) over slots."""
    mixed = ranks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    slots = ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(SLOTS)).astype(np.int64)
    return slots * primaries // SLOTS


def finish_times(arrival: Floats, service: Floats) -> Floats:
    """When one server is done with each job, which come in this order and are served in it."""
    done = np.cumsum(service)
    return np.maximum.accumulate(arrival - (done - service)) + done


def simulate(
    load: Load, costs: Costs, *, primaries: int, seconds: float, seed: int = 0, death: Death | None = None
) -> Outcome:
    """`seconds` of calls, and all commands that they cause."""
    random = np.random.default_rng(seed)
    calls = int(random.poisson(load.calls * seconds))
    arrival = np.sort(random.random(calls) * seconds)
    shard = shards_of(zipf_ranks(random, load.users, load.exponent, calls), primaries)
    is_update = random.random(calls) < load.updates
    updates = np.flatnonzero(is_update)
    call = np.concatenate([np.arange(calls), updates])  # of each command
    came = np.concatenate([arrival, arrival[updates] + costs.encode])
    first = np.where(is_update, costs.read, costs.recommend)
    service = np.concatenate([first, np.full(len(updates), costs.commit)]) * _noise(random, costs.spread, len(call))
    order = np.lexsort((came, shard[call]))
    borders = np.searchsorted(shard[call][order], np.arange(primaries + 1))
    work = np.add.reduceat(np.append(service[order], 0.0), borders[:-1]) * (np.diff(borders) > 0)
    victim = int(work.argmax()) if death else -1
    spent = np.empty(len(call))
    for number in np.flatnonzero(work):
        these = order[borders[number] : borders[number + 1]]
        if death is not None and number == victim:
            spent[these] = _around_a_death(came[these], service[these], call[these], death)
        else:
            spent[these] = finish_times(came[these], service[these]) - came[these]
    latency: Floats = np.bincount(call, weights=spent, minlength=calls).astype(np.float64)
    return Outcome(arrival, shard, is_update, latency, work / seconds)


def _noise(random: np.random.Generator, spread: float, size: int) -> Floats:
    """Factors with mean 1 and this standard deviation."""
    if not spread:
        return np.ones(size)
    variance = np.log1p(spread**2)
    return random.lognormal(-variance / 2, np.sqrt(variance), size)


def _around_a_death(came: Floats, service: Floats, call: NDArray[np.int64], death: Death) -> Floats:
    """Seconds of each command of the primary that dies, infinite for what its caller gives up. Commands that it did
    not finish are sent again to its successor."""
    back = death.at + death.failover
    done = finish_times(came, service)
    fine = done <= death.at
    given_up = ~fine & (back - came > death.patience)
    given_up |= np.isin(call, call[given_up])  # what was not read is not written
    given_up &= ~fine
    left = np.flatnonzero(~fine & ~given_up)
    ready = np.maximum(came[left], back)
    order = np.argsort(ready, kind="stable")
    cold = np.where(ready < back + death.cold, death.slower, 1.0)
    times = np.where(given_up, np.inf, done - came)
    later = left[order]
    times[later] = finish_times(ready[order], (service[left] * cold)[order]) - came[later]
    return times


def primaries_needed(
    load: Load, costs: Costs, *, p99: float, busiest: float, seconds: float, seed: int = 0
) -> tuple[int, Outcome]:
    """The fewest primaries with which the 99th percentile is at most `p99` and none is busy for more than `busiest` of
    the time, and what they do. Raises ValueError if no number is enough: the busiest user alone is too much."""
    low = 0  # too few
    high = max(1, int(np.ceil(load.calls * costs.of_calls(load) / busiest)))
    while not (found := _enough(load, costs, high, p99, busiest, seconds, seed)):
        low, high = high, high * 2
        if high > SLOTS:
            raise ValueError("no number of primaries is enough")
    while high - low > max(1, high // 25):
        middle = (low + high) // 2
        if outcome := _enough(load, costs, middle, p99, busiest, seconds, seed):
            high, found = middle, outcome
        else:
            low = middle
    return high, found


def _enough(
    load: Load, costs: Costs, primaries: int, p99: float, busiest: float, seconds: float, seed: int
) -> Outcome | None:
    outcome = simulate(load, costs, primaries=primaries, seconds=seconds, seed=seed)
    return outcome if outcome.p99 <= p99 and outcome.busy.max() <= busiest else None


def years_between_losses(primaries: int, replicas: int, *, deaths: float, hours: float) -> float:
    """Mean years until a primary and all its replicas are dead at once. Machines die `deaths` times a year, each on its
    own, and a new copy takes `hours`. Machines that share a rack, a release or an operator do worse."""
    rate, chance = primaries * deaths * (replicas + 1), 1.0
    for others in range(replicas, 0, -1):
        chance *= others * deaths * hours / (365 * 24)
    return 1 / (rate * chance)
