"""Updates during what-ifs: against a fake server with a known answer, and against a real one."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from dman_runtime.engine import MAX_EVENTS
from dman_runtime.errors import UsageError
from protos.dman.v1 import dman_pb2 as pb
from protos.dman.v1.dman_pb2_grpc import RecommenderStub
from tools.bench import whatif
from tools.bench.blocks import WARM_UP_CALLS, Block
from tools.bench.servers import connect
from tools.bench.setting import QUICK, Bench, Sizes
from tools.bench.whatif import CLIENT_COUNTS, WHAT_IFS, Effort, Found

SMALL = Effort(rounds=2, calls=16, seconds=60.0, events=100)


def block(*milliseconds: float) -> Block:
    return Block(0.0, 1.0, np.array(milliseconds))


def found_of(quiet: list[Block], during: list[Block]) -> Found:
    return Found(dict.fromkeys(CLIENT_COUNTS, quiet), dict.fromkeys(CLIENT_COUNTS, during), [0.5, 1.5, 2.5])


def test_ratio_is_the_p99_of_each_round_by_the_quiet_p99_of_that_round() -> None:
    hundred_and_one = block(*range(101))  # its 99th percentile is 99
    found = found_of([hundred_and_one, block(11.0)], [block(198.0), hundred_and_one])
    assert found.ratio(1).values == (2.0, 9.0)


@pytest.mark.parametrize(("during", "met"), [(3.0, True), (3.1, False)])
def test_claims_allow_three_times_the_quiet_p99(during: float, met: bool) -> None:
    claims = whatif.claims(found_of([block(1.0)], [block(during)]), Effort(rounds=1, calls=1))
    assert [claim.met for claim in claims] == [met, met]
    assert [claim.claim.rpartition(", ")[2] for claim in claims] == ["1 client", "8 clients"]
    assert claims[0].claim.startswith("update p99 during ten what-ifs of 10,000 events")
    assert claims[0].measured == f"{during:.2f}x ({during:.1f} ms by 1.0 ms)"


def test_claims_say_when_the_time_allowed_fewer_updates_than_planned() -> None:
    claims = whatif.claims(found_of([block(1.0, 1.0)], [block(9.0)]), Effort(rounds=1, calls=2))
    assert all(claim.measured.endswith("of the 1 updates that the time allowed") for claim in claims)


def test_rows_show_both_phases_of_every_number_of_clients() -> None:
    rows = whatif.rows(found_of([block(1.0, 3.0)], [block(8.0)]))
    assert [row[:3] for row in rows] == [
        ["1", "quiet", "2"], ["1", "during what-ifs", "1"], ["8", "quiet", "2"], ["8", "during what-ifs", "1"],
    ]  # fmt: skip
    assert rows[1][3:] == ["8.00", "8.00", "8.00", "2.68 (2.68 to 2.68)"]


def test_failed_updates_are_an_error_that_names_the_phase() -> None:
    found = found_of([block(1.0)], [Block(0.0, 1.0, np.array([1.0]), Counter(UNAVAILABLE=2))])
    with pytest.raises(UsageError, match=r"update during what-ifs, 1 clients? .*UNAVAILABLE"):
        found.checked()


def test_effort_follows_the_sizes_and_plans_for_a_meaningful_p99() -> None:
    assert Effort.of(QUICK) == whatif.QUICK_EFFORT and Effort.of(Sizes()) == Effort()
    assert Effort().calls >= 300 and Effort().events == MAX_EVENTS


@pytest.mark.slow
def test_measure_finds_a_server_that_lets_updates_wait_for_what_ifs(
    bench: Bench, serve_fake: Callable[..., str]
) -> None:
    effort = Effort(rounds=1, calls=16, seconds=1.0, events=5)
    found = whatif.measure(bench, {"fake": serve_fake(what_if=0.1)}, effort)["fake"]
    for clients in CLIENT_COUNTS:
        assert found.quiet[clients][0].count == 16
        assert found.during[clients][0].milliseconds.max() >= 50
    assert [claim.met for claim in whatif.claims(found, effort)] == [False, False]
    assert len(found.what_if_seconds) >= 2 * WHAT_IFS and min(found.what_if_seconds) >= 0.1
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_measured_updates_are_stored_and_what_ifs_are_not(bench: Bench) -> None:
    with bench.server("state") as server, connect(server.address) as channel:
        stub = RecommenderStub(channel)
        found = whatif.measure(bench, {"real": server.address}, SMALL)["real"]
        counts = [stub.GetUser(pb.GetUserRequest(user_id=f"user-{i}")).event_count for i in range(QUICK.users)]
    segment = bench.bundle.manifest.state.segment_length
    before = [QUICK.events + i % segment for i in range(QUICK.users)]
    assert counts[:WHAT_IFS] == before[:WHAT_IFS]
    measured = sum(
        block.count for phase in (found.quiet, found.during) for blocks in phase.values() for block in blocks
    )
    assert measured == 2 * SMALL.rounds * SMALL.calls * len(CLIENT_COUNTS)
    assert sum(counts) - sum(before) == measured + WARM_UP_CALLS * sum(CLIENT_COUNTS)
    assert len(found.what_if_seconds) >= WHAT_IFS * SMALL.rounds * len(CLIENT_COUNTS)


@pytest.mark.slow
def test_a_refused_what_if_is_an_error_and_not_a_fast_answer(bench: Bench) -> None:
    with bench.server("state") as server:
        too_long = {"user": [bench.items[0]] * (MAX_EVENTS + 1)}
        with (
            whatif.what_if_sender(server.address, too_long) as what_ifs,
            pytest.raises(UsageError, match="what-ifs failed while measuring: INVALID_ARGUMENT"),
            what_ifs.running([]),
        ):
            pass


@pytest.mark.slow
def test_a_dead_sender_is_an_error(serve_fake: Callable[..., str]) -> None:
    with whatif.what_if_sender(serve_fake(), {"user": ["1"]}) as what_ifs:
        with what_ifs.running([]):
            pass
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        with pytest.raises(UsageError, match="has died"), what_ifs.running([]):
            pass
