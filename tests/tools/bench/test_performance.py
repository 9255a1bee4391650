"""The benchmark as a whole: every part against real servers; numbers are checked for sense, never for speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import WHOLE_BENCHMARKS

from tools.bench import __main__ as command
from tools.bench import h2load
from tools.bench.__main__ import PARTS
from tools.bench.servers import ROOT

TITLES = {
    "floor": "The floor: an empty gRPC echo",
    "closed": "Closed loops",
    "mix": "Reads to updates",
    "k": "Items asked for",
    "open": "Open loop",
    "overload": "Overload",
    "updates": "Durable updates by one client",
    "breakdown": "Where the time goes",
    "history": "History length",
    "catalogue": "Catalogue size",
    "workers": "A further worker",
    "what-ifs": "Updates during what-ifs",
    "import": "Import",
    "cuda": "CUDA",
}
WITH_PICTURES = {"floor", "closed", "k", "open", "history", "catalogue"}


MEASURED = PARTS if WHOLE_BENCHMARKS else ("breakdown",)


@pytest.mark.slow
@pytest.mark.parametrize("part", MEASURED)
def test_part_writes_its_section_and_leaves_nothing_behind(
    part: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if PARTS[part].by_h2load and not h2load.is_here():
        pytest.skip(h2load.HOW_TO_GET_IT)
    scratch, report = tmp_path / "scratch", tmp_path / "reports" / "performance.md"
    scratch.mkdir()
    options = ["--bundle", str(tiny_bundle), "--out", str(report), "--scratch", str(scratch), "--provider", "cpu"]
    assert command.main([*options, "--quick", "--json", "--only", part]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["sections"]) == [TITLES[part]]
    text = report.read_text()
    for claim in result["claims"]:
        assert f"| {claim['claim']} | {claim['measured']} |" in text
    pictures = sorted(path.name for path in report.parent.glob("*.png"))
    assert len(pictures) == (part in WITH_PICTURES) and all(f"]({name})" in text for name in pictures)
    assert sorted(path.name for path in report.parent.iterdir()) == sorted([report.name, *pictures])
    assert list(scratch.iterdir()) == [] and str(tmp_path) not in text.replace(str(report.parent.parent), "")
    CHECKS.get(part, lambda data: None)(result["sections"][TITLES[part]])


def check_breakdown(data: dict[str, Any]) -> None:
    """What must take time does, and nothing takes more than the client saw."""
    for stage, kinds in {"search": ("recommend",), "graph": ("update",), "commit": ("update",)}.items():
        assert all(data[kind][stage] > 0 for kind in kinds)
    assert data["recommend"]["commit"] == 0
    for kind in data.values():
        assert max(value for name, value in kind.items() if name != "round_trip") < kind["round_trip"]


def check_workers(data: dict[str, Any]) -> None:
    assert 20e6 < data["private"] < data["resident"] and min(data["starts"]) > 0


def check_overload(data: dict[str, Any]) -> None:
    assert sum(data["statuses"].values()) > 0 and data["slices"][0]["megabytes"] > 20


CHECKS = {"breakdown": check_breakdown, "workers": check_workers, "overload": check_overload}


def test_guide_says_what_every_part_measures() -> None:
    text = (ROOT / "docs" / "measuring.md").read_text()
    assert [part for part in PARTS if f"| `{part}` |" not in text] == []


def test_only_refuses_a_part_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "everything"]) == 2
    error = capsys.readouterr().err
    assert "'everything' (choose from 'floor'" in error and error.count("\n") == 1
