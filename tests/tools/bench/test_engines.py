"""The benchmark of several processes: its report, and on a small log all of it. Numbers are never checked for speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import whole_benchmark

from tools.bench import engines
from tools.bench.engines import ONE, TWO, Run, report


def test_report_compares_what_all_runs_left() -> None:
    runs = {
        ("score", ONE): [Run(40.0, "a"), Run(44.0, "a")],
        ("score", TWO): [
            Run(20.0, "a", 2 << 20, 1 << 20),
            Run(22.0, "a"),
            Run(30.0, "a", to_be_killed=True, killed=True),
        ],
    }
    same, gain = report(runs).claims
    assert (same.met, gain.met, gain.measured) == (True, True, "2.00 times as fast")
    for result, killed in (("b", True), ("a", False)):  # another result; nothing was killed
        other = Run(30.0, result, to_be_killed=True, killed=killed)
        runs["score", TWO][-1] = other
        assert report(runs).claims[0].met is False


@whole_benchmark
def test_all_of_it_leaves_the_same_with_a_process_killed(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bundle", str(tiny_bundle), "--scratch", str(tmp_path), "--out", str(tmp_path / "engines.md")]
    assert engines.main([*options, "--quick", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    same = [claim for claim in found["claims"] if claim["target"] == "the same"]
    assert len(same) == 3 and all(claim["met"] for claim in same)
