"""The measurement of new items: what is held out, and what is compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import whole_benchmark

from dman_runtime.data.evaluation import held_out
from dman_train import train
from dman_train.config import DataConfig
from dman_train.data import load
from dman_train.run import open_run
from tools import cold

ITEMS, USERS = 80, 150
TINY = ("--preset", "tiny", "--layers", "1", "--epochs", "1", "--lanes", "16", "--threads", "1")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who walk through the items in order, from anywhere: no seen item comes back."""
    random = np.random.default_rng(0)
    rows = [
        (user, (start + step) % ITEMS, 1000 + step)
        for user, start in enumerate(random.integers(0, ITEMS, USERS).tolist())
        for step in range(int(random.integers(8, 20)))
    ]
    users, items, times = zip(*rows, strict=True)
    path = tmp_path_factory.mktemp("cold") / "log.parquet"
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path)
    return path


def trained(log: Path, run: Path) -> Path:
    assert train.main(["--data", str(log), "--run", str(run), *TINY]) == 0
    return run


def test_prepared_log_lacks_a_share_of_the_items_and_nothing_else(log: Path, tmp_path: Path) -> None:
    command = ["--data", str(log), "--prepare", str(tmp_path / "some.parquet"), "--share", "0.1"]
    assert cold.main(command) == 0
    whole, part = pq.read_table(log).to_pylist(), pq.read_table(tmp_path / "some.parquet").to_pylist()
    gone = {row["item_id"] for row in whole} - {row["item_id"] for row in part}
    assert len(gone) == round(0.1 * ITEMS)
    assert part == [row for row in whole if row["item_id"] not in gone]
    again = tmp_path / "again.parquet"
    assert cold.main([*command[:3], str(again), *command[4:]]) == 0
    assert pq.read_table(again).to_pylist() == part
    assert cold.main([*command[:3], str(again), *command[4:], "--seed", "1"]) == 0
    assert pq.read_table(again).to_pylist() != part


@whole_benchmark
@pytest.mark.slow
def test_report_compares_new_items_with_the_same_ones_trained(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, items, report = tmp_path / "part.parquet", tmp_path / "items.csv", tmp_path / "cold.md"
    assert cold.main(["--data", str(log), "--prepare", str(part), "--share", "0.2"]) == 0
    lines = [f"{n},Item {n},{'|'.join(f'g{(n // size) % 9}{size}' for size in (2, 5))}" for n in range(ITEMS)]
    items.write_text("\n".join(["item_id,title,genres", *lines]) + "\n")
    whole, partial = trained(log, tmp_path / "whole"), trained(part, tmp_path / "part")
    runs = ["--run-all", str(whole), "--run-held-out", str(partial)]
    assert cold.main([*runs, "--items", str(items), "--report", str(report), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    new = set(open_run(whole).vocabulary().item_ids) - set(open_run(partial).vocabulary().item_ids)
    interactions = load(log, DataConfig())
    for split in ("valid", "test"):
        targets = [interactions.item_ids[item] for item in held_out(interactions, split).targets]  # type: ignore[arg-type]
        users = sum(target in new for target in targets)
        rows = result["rows"][split]
        assert len(rows) == 5 and all(row["users"] == users > 0 for row in rows.values())
        assert all(0 <= row["hr@10"] <= row["hr@50"] <= 1 for row in rows.values())
    assert result["new"] == len(new) == round(0.2 * ITEMS) and result["unusable"] == 0
    assert result["events"] == len(interactions) - pq.read_table(part).num_rows
    text = report.read_text()
    assert "## Test" in text and "| predicted from title and attributes | 0." in text and "25%" in text

    assert cold.main(["--run-all", str(partial), "--run-held-out", str(whole), "--items", str(items)]) == 2
    assert "the two runs are not" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--prepare", "x.parquet"], ["--run-all", "runs/none", "--items", "x.csv"]])
def test_what_is_missing_is_named(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cold.main(options) == 2
    assert "missing" in capsys.readouterr().err
