"""Three ways to the same metrics, also on a log whose last events are of new items."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import whole_benchmark

from dman_train import export
from tools import compare


@whole_benchmark
@pytest.mark.slow
def test_the_ways_agree_on_a_log_with_unknown_targets_and_inputs(
    small_log: Path, trained_run: Path, tmp_path: Path
) -> None:
    assert export.main(["--run", str(trained_run), "--out", str(tmp_path / "bundle")]) == 0
    lines = small_log.read_text().splitlines()
    users = sorted({line.split(",")[0] for line in lines[1:]})
    late = [f"{user},{100_000 + n},{1_750_000_000 + n}" for n, user in enumerate(users[: len(users) // 2])]
    new = [f"stranger,{200_000 + n},{n}" for n in range(3)]  # without any known event
    (tmp_path / "log.csv").write_text("\n".join([*lines, *late, *new]) + "\n")
    options = ["--run", str(trained_run), "--bundle", str(tmp_path / "bundle"), "--data", str(tmp_path / "log.csv")]
    result = compare.compare(compare.parser().parse_args(options))
    assert result["users"] == len(users)
    assert 0 < result["pytorch"]["hr@200"] <= 0.5  # half of the targets are unknown
    one_user = 1 / len(users)  # float16 states may move one of these few users across a cut-off
    for name, value in result["pytorch"].items():
        assert result["engine"][name] == pytest.approx(value, abs=one_user)
        assert result["server"][name] == pytest.approx(result["engine"][name], abs=1e-9)
