"""The simulation of a divided store, against what queueing theory and Zipf's law say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tools.scale.shards import (
    SLOTS,
    Costs,
    Death,
    Load,
    finish_times,
    primaries_needed,
    shards_of,
    simulate,
    years_between_losses,
    zipf_ranks,
)

ONE_KIND = Costs(recommend=1e-3, spread=0.0)
READS = Load(calls=700.0, users=10_000, updates=0.0, exponent=0.0)


def test_finish_times_are_those_of_a_queue_by_hand() -> None:
    arrival, service = np.array([0.0, 1.0, 1.5, 9.0]), np.array([2.0, 1.0, 1.0, 0.5])
    assert finish_times(arrival, service).tolist() == [2.0, 3.0, 4.0, 9.5]


@pytest.mark.parametrize("busy", [0.5, 0.7])
def test_waits_of_constant_service_are_those_of_an_m_d_1_queue(busy: float) -> None:
    outcome = simulate(replace(READS, calls=busy * 1000), ONE_KIND, primaries=1, seconds=600)
    waits = outcome.latency - ONE_KIND.recommend
    assert waits.mean() == pytest.approx(busy / (2 * (1 - busy)) * ONE_KIND.recommend, rel=0.05)
    assert outcome.busy[0] == pytest.approx(busy, rel=0.01)


def test_waits_of_exponential_service_are_those_of_an_m_m_1_queue() -> None:
    random, busy = np.random.default_rng(0), 0.7
    arrival = np.cumsum(random.exponential(1 / busy, 400_000))
    spent = finish_times(arrival, service := random.exponential(1.0, 400_000)) - arrival
    assert (spent - service).mean() == pytest.approx(busy / (1 - busy), rel=0.06)
    assert np.quantile(spent, 0.99) == pytest.approx(np.log(100) / (1 - busy), rel=0.06)


def test_waits_of_spread_service_are_those_of_an_m_g_1_queue() -> None:
    """Pollaczek and Khinchine: the wait grows with the second moment of the service."""
    costs, busy = replace(ONE_KIND, spread=1.0), 0.6
    outcome = simulate(replace(READS, calls=busy * 1000), costs, primaries=1, seconds=1000)
    expected = (1 + busy / (1 - busy) * (1 + costs.spread**2) / 2) * costs.recommend
    assert outcome.latency.mean() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.2])
def test_users_follow_the_law_of_zipf(exponent: float) -> None:
    drawn = zipf_ranks(np.random.default_rng(0), 1000, exponent, 400_000)
    shares = np.arange(1, 1001) ** -exponent
    found = np.bincount(drawn, minlength=1000) / len(drawn)
    assert np.abs(found - shares / shares.sum()).max() < 0.003
    assert len(found) == 1000


@pytest.mark.parametrize("exponent", [0.8, 1.0])
def test_ranks_beyond_the_exact_ones_have_their_share(exponent: float) -> None:
    users = 2_000_000
    drawn = zipf_ranks(np.random.default_rng(0), users, exponent, 400_000)
    weights = np.arange(1, users + 1) ** -exponent
    for border in (1_000_000, 1_500_000):
        assert (drawn >= border).mean() == pytest.approx(weights[border:].sum() / weights.sum(), abs=0.003)
    assert drawn.max() < users


def test_users_who_are_alike_give_primaries_equal_shares() -> None:
    shards = shards_of(np.arange(200_000), 10)
    assert np.bincount(shards, minlength=10) == pytest.approx(np.full(10, 20_000), rel=0.02)
    outcome = simulate(replace(READS, calls=20_000, users=10**7), ONE_KIND, primaries=40, seconds=10)
    assert outcome.busy.max() / outcome.busy.mean() < 1.1


def test_a_user_stays_on_one_primary_and_every_slot_has_one() -> None:
    ranks = np.arange(300_000)
    assert np.array_equal(shards_of(ranks, 7), shards_of(ranks, SLOTS) * 7 // SLOTS)
    assert set(shards_of(ranks, 7)) == set(range(7))


def test_the_busiest_user_makes_one_primary_busier() -> None:
    alike, zipf = (
        simulate(replace(READS, calls=20_000, exponent=one), ONE_KIND, primaries=40, seconds=5).busy
        for one in (0.0, 1.0)
    )
    share = 1 / np.sum(1 / np.arange(1, READS.users + 1))
    assert zipf.max() > share * 20_000 * ONE_KIND.recommend > 2 * alike.max()
    assert zipf.sum() == pytest.approx(alike.sum(), rel=0.02)


def test_an_update_keeps_its_primary_busy_twice() -> None:
    costs = Costs(recommend=1.0, read=2e-4, commit=5e-4, encode=0.01, spread=0.0)
    outcome = simulate(replace(READS, updates=1.0, calls=20), costs, primaries=1, seconds=100)
    assert outcome.busy[0] == pytest.approx(20 * 7e-4, rel=0.1)
    assert outcome.percentiles(outcome.is_update, 0.5)[0] == pytest.approx(7e-4)  # without the time of encoding
    assert outcome.is_update.all()


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, again, other = (simulate(READS, ONE_KIND, primaries=3, seconds=5, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.latency, again.latency)
    assert not np.array_equal(first.arrival[:50], other.arrival[:50])


# A primary that dies

DEATH = Death(at=10.0, failover=4.0, slower=1.0, cold=0.0, patience=1.0)


def test_a_death_costs_the_calls_that_would_wait_longer_than_their_callers() -> None:
    load = replace(READS, calls=100.0)
    outcome = simulate(load, ONE_KIND, primaries=1, seconds=20, death=DEATH)
    given_up = np.isinf(outcome.latency)
    assert outcome.arrival[given_up].min() == pytest.approx(10.0, abs=0.1)
    assert outcome.arrival[given_up].max() == pytest.approx(13.0, abs=0.1)  # the last second waits, and is served
    in_between = (outcome.arrival > 10.0) & (outcome.arrival < 13.0)
    assert given_up[in_between].all() and given_up.sum() - in_between.sum() <= 2  # what was under way is lost, too
    waited = (outcome.arrival >= 13.0) & (outcome.arrival < 14.0)
    assert np.all(outcome.arrival[waited] + outcome.latency[waited] >= 14.0)
    assert outcome.latency[outcome.arrival > 14.5].max() < 0.05


def test_a_death_touches_the_users_of_one_primary_only() -> None:
    load = replace(READS, calls=2000.0, users=100_000)
    with_death, without = (simulate(load, ONE_KIND, primaries=4, seconds=20, death=death) for death in (DEATH, None))
    changed = with_death.latency != without.latency
    assert len(set(with_death.shard[changed])) == 1
    assert with_death.arrival[changed].min() > 9.9


def test_a_successor_with_cold_caches_needs_longer_until_all_is_as_before() -> None:
    load, costs = replace(READS, calls=400.0), ONE_KIND
    cold = replace(DEATH, slower=2.0, cold=5.0, patience=9.0)
    warm = replace(cold, slower=1.0)
    spent = [simulate(load, costs, primaries=1, seconds=30, death=one).latency for one in (warm, cold)]
    assert spent[1].sum() > spent[0].sum()
    assert np.isfinite(spent[1]).all()  # nobody is that impatient


def test_what_an_update_did_not_read_it_does_not_write() -> None:
    load = replace(READS, updates=1.0, calls=100.0)
    outcome = simulate(load, Costs(encode=0.5), primaries=1, seconds=20, death=replace(DEATH, patience=0.2))
    # reads before the death whose commits fall into it, and reads in it
    assert outcome.arrival[np.isinf(outcome.latency)].min() == pytest.approx(9.5, abs=0.1)
    assert np.isfinite(outcome.latency[outcome.arrival > 13.9]).all()


# How many it takes


def test_as_many_primaries_are_needed_as_the_bounds_say() -> None:
    load, bounds = replace(READS, calls=5000.0, exponent=0.0), {"p99": 0.004, "busiest": 0.6, "seconds": 5.0}
    number, outcome = primaries_needed(load, ONE_KIND, **bounds)
    assert 9 <= number <= 14  # 5,000 calls of 1 ms are 5 primaries' work; at .6 of the time, 8.3
    assert outcome.p99 <= 0.004 and outcome.busy.max() <= 0.6
    fewer = simulate(load, ONE_KIND, primaries=number - 1, seconds=5.0)
    assert fewer.p99 > 0.004 or fewer.busy.max() > 0.6


def test_a_user_who_is_too_much_for_one_primary_is_an_error() -> None:
    with pytest.raises(ValueError, match="no number of primaries"):
        primaries_needed(replace(READS, users=1), ONE_KIND, p99=1.0, busiest=0.6, seconds=0.5)


def test_years_between_losses_are_those_of_the_formula() -> None:
    year = 365 * 24
    assert years_between_losses(10, 0, deaths=2.0, hours=1.0) == pytest.approx(1 / 20)
    assert years_between_losses(10, 1, deaths=2.0, hours=1.0) == pytest.approx(1 / (10 * 2 * 2.0 * 2.0 / year))
    assert years_between_losses(10, 2, deaths=2.0, hours=1.0) == pytest.approx(
        1 / (10 * 3 * 2.0 * (2 * 2.0 / year) * (2.0 / year))
    )
