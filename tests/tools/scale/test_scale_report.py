"""The report of the simulation, from its options to its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from tools.scale import __main__ as scale
from tools.scale.measured import PRIMARIES

SMALL = ["--users", "100000", "--calls", "1500", "--seconds", "0.05", "--p99-ms", "4"]


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "CALLS", 3000)
    monkeypatch.setattr(scale, "WATCHED", 3.0)


def test_report_is_the_same_for_the_same_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [tmp_path / name for name in ("a.md", "b.md")]
    for page in pages:
        assert scale.main([*SMALL, "--json", "--out", str(page)]) == 0
    first, again = (page.read_text().replace(page.name, "") for page in pages)
    assert first == again
    claims = json.loads(capsys.readouterr().out.splitlines()[-1])["claims"]
    assert [claim["measured"].isdigit() for claim in claims] == [True] * 4 + [False]


def test_committed_report_has_the_primaries_that_the_plan_takes() -> None:
    found = [one.value(ROOT) for one in PRIMARIES.values()]
    assert found == sorted(found) and found[-1] > 10 * found[0]


def test_a_load_that_no_cluster_carries_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.md"
    assert scale.main([*SMALL, "--users", "1", "--commit-us", "5000", "--out", str(out)]) == 2
    assert re.fullmatch(r"error: Load\(.*no number of primaries is enough; allow .*\n", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("option", ["--busiest", "--p99-ms", "--users"])
def test_a_number_that_cannot_be_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main([option, "0"]) == 2
    assert f"({option})" in capsys.readouterr().err
