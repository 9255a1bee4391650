"""What a soak makes of the calls of honest callers."""

from __future__ import annotations

import math

import pytest

from tools.soak.callers import Sample
from tools.soak.numbers import HEADS, RowResult, by_phase, percentile


def calls(name: str, *milliseconds: float, began: float = 0.0) -> list[Sample]:
    return [Sample(name, began, value) for value in milliseconds]


def result(quiet: list[Sample], during: list[Sample], after: list[Sample]) -> RowResult:
    row = RowResult("1", "open requests", bounded=True)
    row.add({"quiet": quiet, "during": during, "after": after}, (100_000_000, 120_000_000), 2000, "16 requests")
    return row


def test_calls_belong_to_the_phase_in_which_they_began() -> None:
    samples = [Sample("update", began, 1.0) for began in (0.5, 1.0, 1.5, 2.5)]
    found = by_phase(samples, {"quiet": (0.0, 1.0), "during": (1.0, 2.0)})
    assert {name: [sample.began for sample in of_phase] for name, of_phase in found.items()} == {
        "quiet": [0.5],
        "during": [1.0, 1.5],
    }


def test_percentiles_are_of_the_successful_calls_of_one_kind() -> None:
    samples = [*calls("update", *range(101)), *calls("recommend", 1000.0), Sample("update", 0.0, 5000.0, "Error")]
    assert percentile(samples, "update", 99) == pytest.approx(99.0)
    assert math.isnan(percentile(samples, "health", 50))


def test_the_worst_ratio_is_of_all_work_during_and_after() -> None:
    row = result(
        calls("update", 1.0) + calls("recommend", 2.0) + calls("health", 1.0),
        calls("update", 1.5) + calls("recommend", 2.0) + calls("health", 50.0),
        calls("update", 1.0) + calls("recommend", 5.0) + calls("health", 1.0),
    )
    assert row.worst_ratio == pytest.approx(2.5)
    assert [claim.met for claim in row.claims()] == [True, True]


def test_a_bound_is_broken_by_slow_calls_and_by_errors() -> None:
    row = result(calls("update", 1.0), [*calls("update", 3.5), Sample("update", 0.0, 9.0, "InternalError")], [])
    errors, _ = row.claims()
    assert not errors.met and "1 update InternalError in 3" in errors.measured


def test_nothing_that_succeeded_is_no_met_bound() -> None:
    row = result(calls("update", 1.0), [Sample("update", 0.0, 9.0, "DeadlineExceededError")], calls("update", 1.0))
    assert math.isnan(row.worst_ratio) and not row.claims()[1].met


def test_every_line_of_the_report_has_all_its_columns() -> None:
    row = result(calls("update", 1.0) + calls("health", 1.0), calls("update", 2.0), calls("update", 1.0))
    lines = row.rows()
    assert [line[2] for line in lines] == ["health", "update"] and {len(line) for line in lines} == {len(HEADS)}
    assert lines[1][5:9] == ["1.0 / 1.0", "2.0 / 2.0", "1.0 / 1.0", "2.00, 1.00"]
