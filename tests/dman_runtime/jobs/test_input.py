"""A log whose items a bundle does not know is named before a job works on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from histories import write_csv
from log_files import text_log

from dman_runtime.data.input_report import InputReport
from dman_runtime.data.logs import open_log
from dman_runtime.errors import InputError, UsageError
from dman_runtime.jobs.input import notice_differences, require_known
from dman_runtime.model.generation import Generation


def report_of(path: Path, generation: Generation) -> InputReport:
    with open_log(path, known_items=generation.bundle.items.index) as log:
        return log.report


def log_of(folder: Path, *, known: int, unknown: int) -> Path:
    """A log of one user with so many events."""
    items = [1] * known + [900 + n for n in range(unknown)]
    return write_csv(folder / "log.csv", {1: [(item, time) for time, item in enumerate(items)]})


@pytest.mark.parametrize(("known", "unknown", "limit", "passes"), [
    (5, 5, 0.5, True),
    (4, 5, 0.5, False),
    (0, 5, 0.5, False),
    (0, 5, 1.0, True),
    (9, 1, 0.0, False),
    (9, 0, 0.0, True),
    (9, 1, 0.1, True),
])  # fmt: skip
def test_a_larger_share_of_unknown_events_than_the_limit_is_refused(
    exact: Generation, tmp_path: Path, known: int, unknown: int, limit: float, passes: bool
) -> None:
    report = report_of(log_of(tmp_path, known=known, unknown=unknown), exact)
    if passes:
        require_known(report, exact.bundle, limit)
        return
    with pytest.raises(InputError, match="of the events are of items that the bundle does not know") as error:
        require_known(report, exact.bundle, limit)
    assert error.value.parameter == "max_unknown"
    assert f"{unknown / (known + unknown):.1%}" in str(error.value)


def test_error_shows_ids_of_the_log_beside_those_of_the_bundle(exact: Generation, tmp_path: Path) -> None:
    """So that "i1" for "1" is seen at once. The ids that most events have come first."""
    text = "user_id,item_id\n" + "".join(f"u,i{n}\n" * (10 - n) for n in range(1, 6))
    with pytest.raises(InputError, match="such as 'i1', 'i2', 'i3'; its items are such as '1', '2', '3'; write"):
        require_known(report_of(text_log(tmp_path, text), exact), exact.bundle)


@pytest.mark.parametrize("limit", [-0.1, 1.5, float("nan")])
def test_limit_that_is_no_share_is_refused(exact: Generation, tmp_path: Path, limit: float) -> None:
    with pytest.raises(UsageError, match="choose 0 to 1"):
        require_known(report_of(log_of(tmp_path, known=1, unknown=0), exact), exact.bundle, limit)


def test_text_items_are_noticed_where_the_bundle_has_integers(exact: Generation, tmp_path: Path) -> None:
    for text, noticed in (("u,1\nu,x\n", True), ("u,1\nu,2\n", False)):
        report = report_of(text_log(tmp_path, f"user_id,item_id\n{text}"), exact)
        notice_differences(report, exact.bundle)
        assert any("item ids are text here" in line and "(--item-ids)" in line for line in report.warnings()) is noticed


@pytest.mark.parametrize(
    ("recorded", "noticed"),
    [({"time_unit": "milliseconds"}, True), ({"time_unit": "seconds"}, False), ({}, False), (7, False)],
)
def test_another_unit_than_that_of_the_training_is_noticed(
    exact: Generation, tmp_path: Path, recorded: object, noticed: bool
) -> None:
    manifest = replace(exact.bundle.manifest, data=exact.bundle.manifest.data | {"input": recorded})
    report = report_of(text_log(tmp_path, "user_id,item_id,timestamp\nu,1,1600000000\n"), exact)
    notice_differences(report, replace(exact.bundle, manifest=manifest))
    lines = [line for line in report.warnings() if "times are seconds here, and were milliseconds" in line]
    assert bool(lines) is noticed
