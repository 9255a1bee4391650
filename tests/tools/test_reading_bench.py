"""The benchmark of reading, on small logs: numbers are checked for sense, never for speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from dman_runtime.data.logs import read_interactions
from tools.bench import reading


def test_both_formats_hold_the_same_log(tmp_path: Path) -> None:
    for kind in reading.KINDS:
        reading.write_log(tmp_path / f"log.{kind}", 5000)
    logs = [read_interactions(tmp_path / f"log.{kind}") for kind in reading.KINDS]
    assert logs[0].fingerprint() == logs[1].fingerprint()
    assert logs[0].num_users <= 50


@pytest.mark.slow
def test_report_has_every_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "2000", "--rounds", "1", "--large-rows", "3000", "--other", str(ROOT)]
    out = tmp_path / "reading.md"
    assert reading.main([*arguments, "--scratch", str(tmp_path), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["claims"]) == 5
    assert set(found["sections"]) == {"csv", "parquet", "larger than memory"}
    assert all(min(seconds) > 0 for seconds in found["sections"]["csv"]["seconds"].values())
    assert str(tmp_path) not in out.read_text()
    assert [path for path in tmp_path.iterdir() if path != out] == []
