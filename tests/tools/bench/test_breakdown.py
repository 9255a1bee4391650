"""Where the time goes: stages that are known by construction."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from tools.bench import breakdown, traced
from tools.bench.traced import HANDLER, NAMES, RECEIVE, Trace

GRAPH, ENGINE = NAMES.index("graph"), NAMES.index("engine")
MILLISECOND = 1_000_000  # nanoseconds


def test_stage_has_the_time_of_its_functions_without_that_of_others_in_them() -> None:
    trace = Trace()
    graph = trace.wrap("graph", lambda: time.sleep(0.03))
    engine = trace.wrap("engine", lambda: (time.sleep(0.01), graph(), graph()))
    engine()
    (first, second, outer) = trace._noted
    assert [stage for stage, _, _ in trace._noted] == [GRAPH, GRAPH, ENGINE]
    assert first[2] >= 30 * MILLISECOND and second[2] >= 30 * MILLISECOND
    assert outer[2] >= 10 * MILLISECOND and outer[1] < first[1]
    assert outer[2] + first[2] + second[2] >= 70 * MILLISECOND
    assert outer[2] < first[2] + second[2]


def test_stage_is_noted_where_its_function_raises() -> None:
    trace = Trace()

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        trace.wrap("graph", fail)()
    trace.wrap("engine", lambda: None)()
    assert [stage for stage, _, _ in trace._noted] == [GRAPH, ENGINE]


async def test_waiting_for_a_message_has_a_stage_of_its_own() -> None:
    trace = Trace()

    async def read() -> int:
        await asyncio.sleep(0.02)
        return 7

    assert await trace.wrap_waiting(RECEIVE, read)() == 7
    ((stage, _, taken),) = trace._noted
    assert stage == NAMES.index(RECEIVE) and taken >= 20 * MILLISECOND


def test_calls_are_taken_apart_by_when_their_stages_began() -> None:
    handler = NAMES.index(HANDLER)
    trace = np.array(
        [
            (GRAPH, 110_000, 30_000),
            (GRAPH, 150_000, 10_000),
            (handler, 105_000, 60_000),
            (ENGINE, 205_000, 7000),  # between two calls, so of none of them
            (GRAPH, 310_000, 50_000),
            (handler, 305_000, 70_000),
        ]
    )
    found = breakdown._taken_apart(trace, [(100_000, 200_000), (300_000, 420_000)])
    assert found.round_trip == 110.0
    assert found.stages["graph"] == 45.0 and found.stages["engine"] == 0.0 and found.stages[HANDLER] == 65.0
    assert found.stages[breakdown.REST] == 20.0 and found.stages[breakdown.OUTSIDE] == 45.0


def test_every_function_of_a_stage_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[str] = []
    monkeypatch.setattr(traced, "_replace", lambda name, change: replaced.append(name))
    traced.install(Trace())
    monkeypatch.undo()
    for name in replaced:
        traced._replace(name, lambda function: function)
    assert len(replaced) == len({*replaced}) > sum(map(len, traced.STAGES.values())) + 2
    assert "dman_runtime.retrieval.exact:ExactRetriever.search" in replaced
    assert not any(".base:" in name for name in replaced)
