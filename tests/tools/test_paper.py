"""The page of the paper's tables: which records stand in it, its numbers, its sentences and its chart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dman_train.config import BaselineConfig, TrainConfig, to_dict
from dman_train.presets import PRESETS
from tools import report
from tools.bootstrap import paired_bootstrap
from tools.paper import CHART, learning_curve, paper_page
from tools.paper_figures import _PERCENT, ORDER, SYSTEMS, TABLE_3, TABLE_4, TABLE_5, VARIANTS
from tools.record_file import Record, records_bytes
from tools.report_rows import label_of, rows_of

FEW = {"loss": "negatives", "negatives": 5}
RANKS = (1, 10, 51, 501)
OF_RANKS = {"hr@10": 0.5, "hr@50": 0.5, "hr@100": 0.75, "ndcg@100": (1 + 1 / np.log2(11) + 1 / np.log2(52)) / 4}


def record(
    name: str, log: str, model: dict[str, Any], train: dict[str, Any], ranks: Sequence[int] = RANKS, limit: int = 500
) -> Record:
    metrics = {"hr@10": 0.5, "ndcg@10": 0.3, "hr@50": 0.5, "ndcg@100": 0.4}
    content: dict[str, Any] = {
        "command": f"python -m dman_train.train --data {log} --run {name}",
        "machine": "x86_64",
        "parameters": 1000,
        "state_bytes": None,
        "model": model,
        "train": train,
        "data": {},
        "dataset": {"name": log, "fingerprint": "f" * 64, "users": 4, "items": 900, "events": 5000},
        "versions": {},
        "epochs": [{"epoch": float(n + 1), "valid/hr@10": n / 10, "valid/ndcg@100": n / 20} for n in range(3)],
        "metrics": {
            split: metrics | {"seen_kept": metrics, "target_kept": metrics} for split in ("valid", "test")
        } | {"training_seconds": 1.0},
    }  # fmt: skip
    stored = np.minimum(ranks, limit + 1).astype(np.uint16)
    return Record(name, content, stored, np.zeros(len(ranks), np.uint8), limit)


def dman(
    name: str,
    log: str = "ml-1m",
    *,
    preset: str = "paper",
    ranks: Sequence[int] = RANKS,
    limit: int = 500,
    **options: Any,
) -> Record:
    """A run of a DMAN preset with these options changed."""
    model, train = to_dict(PRESETS[preset].model), to_dict(PRESETS[preset].train)
    changed = [{key: options.get(key, value) for key, value in part.items()} for part in (model, train)]
    assert options.keys() <= model.keys() | train.keys()
    return record(name, log, *changed, ranks, limit)


def baseline(
    name: str, system: str, log: str = "ml-1m", *, history: int = 200, ranks: Sequence[int] = RANKS, **train: Any
) -> Record:
    model = to_dict(BaselineConfig(system, history=history))  # type: ignore[arg-type]
    return record(name, log, model, to_dict(TrainConfig()) | train, ranks)


def page_of(records: Sequence[Record], directory: Path) -> str:
    return "\n\n".join(paper_page(records, directory, source=Path("records.parquet")))


def cells(page: str, table: str, row: str, heading: str = "") -> dict[str, str]:
    """The cells of a row by the heads of its table, below two headings."""
    part = page.partition(f"\n## {table}")[2].partition("\n## ")[0]
    part = part.partition(f"`{heading}`")[2].partition("\n### ")[0] if heading else part
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")]
    (found,) = [line for line in lines if line[0] == row]
    return dict(zip(lines[0], found, strict=True))


def sentence(page: str, log: str) -> str:
    """What Table 5 says of a log."""
    part = page.partition("\n## Table 5")[2].partition(f"`{log}`\n\n")[2]
    return part.partition("\n")[0]


def records_row(page: str, system: str) -> list[str]:
    """Settings, ranking and records of the rows of a system in the table of records."""
    part = page.partition("\n## Records")[2]
    return [line for line in part.splitlines() if f"| {system} |" in line]


# The paper's figures


def test_figures_give_the_improvements_that_the_paper_prints() -> None:
    """The last line of Table 3, and the sentence on Taobao's HR@50."""
    second = [max(values[column] for name, values in _PERCENT.items() if name != "DMAN") for column in range(9)]
    found = [100 * (best / other - 1) for best, other in zip(_PERCENT["DMAN"], second, strict=True)]
    printed = [7.51, 3.86, 7.77, 15.05, 15.53, 8.90, 9.58, 6.36, 6.05]
    assert found == pytest.approx(printed, abs=0.011)
    for name, gain in {"SASRec": 24.74, "GRU4Rec": 29.36, "Caser": 13.42}.items():
        assert 100 * (_PERCENT[name][3] / _PERCENT[f"{name}*"][3] - 1) == pytest.approx(gain, abs=0.011)


def test_figures_are_complete_and_agree_between_tables() -> None:
    assert list(_PERCENT) == list(SYSTEMS) == list(TABLE_4[0].figures)
    taobao, ablation, xlong = TABLE_3[1].figures, TABLE_5[0].figures, TABLE_5[1].figures
    assert ablation["DMAN"] == pytest.approx(taobao["DMAN"][1:], abs=1e-3)
    for figures in (ablation, xlong):
        assert set(figures) == set(VARIANTS.values())
        assert all(a > b for better, worse in ORDER for a, b in zip(figures[better], figures[worse], strict=True))
    assert all(
        max(figures, key=lambda name: figures[name][0]) == "DMAN" for figures in (taobao, xlong, TABLE_4[0].figures)
    )


# Numbers


def test_numbers_come_from_the_ranks_and_stand_beside_the_papers(tmp_path: Path) -> None:
    page = page_of([dman("one"), dman("two", seed=1, ranks=(1, 10, 10, 10))], tmp_path)
    row = cells(page, "Table 3", "DMAN", "ml-1m")
    assert row["HR@10, the paper"] == "0.2518" and row["HR@10, default"] == "-"
    assert row["HR@10, `paper`"] == "0.7500 ± 0.2500", "(.5 + 1) / 2"
    assert records_row(page, "DMAN") == ["| `ml-1m` | DMAN | DMAN `paper` | seen excluded | `one`, `two` |"]
    single = cells(page_of([dman("one")], tmp_path), "Table 3", "DMAN", "ml-1m")
    assert single["NDCG@100, `paper`"] == f"{OF_RANKS['ndcg@100']:.4f}"


def test_metric_beyond_the_stored_ranks_is_no_number(tmp_path: Path) -> None:
    for limit, expected in ((254, "-"), (500, "0.7500")):
        page = page_of([dman("one", "taobao-userbehavior-sample", limit=limit)], tmp_path)
        row = cells(page, "Table 4", "DMAN", "taobao-userbehavior-sample")
        assert (row["HR@200, `paper`"], row["HR@500, `paper`"]) == ("0.7500", expected)


def test_group_metrics_stop_at_the_stored_ranks_too() -> None:
    found = dman("one", limit=254).group_metrics(0)
    assert "hr@500" not in found and found["hr@200"] == 0.75
    assert dman("one").group_metrics(0)["hr@500"] == 0.75


# Which records count


def test_baseline_with_five_negatives_is_in_the_column_of_the_paper_and_the_star_is_the_short_history(
    tmp_path: Path,
) -> None:
    nine = (9, 9, 9, 501)
    made = [
        baseline("whole", "gru4rec"),
        baseline("latest", "gru4rec", history=20, ranks=nine),
        baseline("few", "gru4rec", ranks=(1, 1, 1, 1), **FEW),
        baseline("softmax", "caser", ranks=nine, **FEW | {"loss": "negatives-softmax"}),
        baseline("many", "sasrec", ranks=nine, **FEW | {"negatives": 50}),
        baseline("short", "shan", history=20),
    ]
    page = page_of(made, tmp_path)
    found = {
        name: [cells(page, "Table 3", name, "ml-1m")[f"HR@10, {column}"] for column in ("`paper`", "default")]
        for name in ("GRU4Rec", "GRU4Rec*", "Caser", "SASRec")
    }
    assert found == {
        "GRU4Rec": ["1.0000", "0.5000"],
        "GRU4Rec*": ["-", "0.7500"],
        "Caser": ["0.7500", "-"],
        "SASRec": ["-", "0.7500"],
    }
    assert label_of(made[2].content).startswith("gru4rec `paper`, last 200")


def test_configuration_nearest_to_the_preset_is_shown(tmp_path: Path) -> None:
    far = dman("far", dropout=0.5, layers=3, ranks=(1, 1, 1, 1))
    near = dman("near", layers=3)
    old = dman("old", preset="default", ema_decay=0.0)
    page = page_of([far, near, old], tmp_path)
    row = cells(page, "Table 3", "DMAN", "ml-1m")
    assert (row["HR@10, `paper`"], row["HR@10, default"]) == ("0.5000", "-"), "another recipe is not the default one"
    assert "| DMAN `paper`, layers=3 | seen excluded | `near` |" in records_row(page, "DMAN")[0]
    page = page_of([far, near, dman("preset", ranks=(1, 1, 1, 501))], tmp_path)
    assert cells(page, "Table 3", "DMAN", "ml-1m")["HR@10, `paper`"] == "0.7500"


def test_records_of_an_earlier_form_are_in_no_table(tmp_path: Path) -> None:
    made = [
        baseline("caser-then", "caser"),
        dman("dman-then"),
        dman("nran-then", variant="nran"),
        dman("now", layers=3),
    ]
    del made[0].content["model"]["hops"]
    for record_then in made[1:3]:
        del record_then.content["train"]["adam_beta2"]
    page = page_of([*made, baseline("sasrec-then", "sasrec")], tmp_path)
    assert cells(page, "Table 3", "Caser", "ml-1m")["HR@10, default"] == "-"
    assert "| `now` |" in records_row(page, "DMAN")[0] and "`sasrec-then`" in page, "SASRec is what it was"
    assert not re.search("`(caser|dman|nran)-then`", page)


def test_segment_length_is_said_where_it_is_not_that_of_the_paper(tmp_path: Path) -> None:
    log = "online-retail-long"
    page = page_of([dman("t20", log), dman("ml"), baseline("h50", "caser", log, history=50)], tmp_path)
    said = "**T, events per segment:** 50 in the paper; ours 20 (`paper`)"
    assert page.count(f"{said}, 50 (default).") == 1 and page.count(f"{said}. No record") == 1, "Tables 4 and 5"
    assert page.count("events per segment") == 2, "the other logs have that of the paper"
    assert "events per segment" not in page_of([dman("t50", log, segment_length=50)], tmp_path)


def test_segment_of_the_long_log_is_that_of_the_paper(tmp_path: Path) -> None:
    log = "online-retail-long"
    made = [
        dman("t20", log),
        dman("t50", log, segment_length=50, ranks=(1, 1, 1, 1)),
        baseline("h20", "caser", log, history=20),
        baseline("h50", "caser", log, history=50, ranks=(1, 1, 1, 1)),
    ]
    page = page_of(made, tmp_path)
    assert cells(page, "Table 4", "DMAN", log)["HR@200, `paper`"] == "1.0000"
    assert cells(page, "Table 4", "Caser*", log)["HR@200, default"] == "1.0000"
    assert cells(page, "Table 4", "Caser", log)["HR@200, default"] == "-"


def test_column_has_one_ranking_and_names_it(tmp_path: Path) -> None:
    log = "wikipedia-edits"
    made = [
        *(baseline(system, system, log, seen_items="keep") for system in ("gru4rec", "sasrec")),
        baseline("other", "caser", log),
        dman("kept", log, seen_items="keep-target"),
    ]
    page = page_of(made, tmp_path)
    assert "`wikipedia-edits`\n\nRanking: target kept (`paper`), seen kept (default).\n" in page
    found = [cells(page, "Table 3", name, log)["HR@10, default"] for name in ("GRU4Rec", "SASRec", "Caser")]
    assert found == ["0.5000", "0.5000", "-"]


def test_kept_target_makes_no_difference_where_nothing_was_seen_before(tmp_path: Path) -> None:
    made = [
        dman("one", seen_items="keep-target"),
        dman("two", seen_items="exclude-from-ranking", variant="xl"),
        dman("three", seen_items="exclude-from-ranking", seed=1, layers=3),
    ]
    page = page_of(made, tmp_path)
    assert cells(page, "Table 3", "DMAN", "ml-1m")["HR@10, `paper`"] == "0.5000"
    assert cells(page, "Table 5", "DMAN-XL", "ml-1m")["HR@100, `paper`"] == "0.7500"
    assert "`one`" in records_row(page, "DMAN")[0]


def test_records_of_another_version_of_a_log_are_left_out(tmp_path: Path) -> None:
    made = [baseline("one", "sdm"), dman("two"), dman("three", variant="xl")]
    other = replace(made[0], content=made[0].content | {"dataset": made[0].content["dataset"] | {"fingerprint": "0"}})
    page = page_of([other, *made[1:]], tmp_path)
    assert cells(page, "Table 3", "SDM", "ml-1m")["HR@10, default"] == "-"
    assert cells(page, "Table 3", "DMAN", "ml-1m")["HR@10, `paper`"] == "0.5000"


# Table 5


def variants(log: str, ranks: dict[str, Sequence[int]]) -> list[Record]:
    return [dman(f"{log}-{name}", log, variant=name, ranks=of) for name, of in ranks.items()]


IN_ORDER = {"dman": (1, 2, 3, 4), "fifo": (2, 3, 4, 501), "nran": (3, 4, 5, 501), "xl": (5, 6, 501, 501)}


def test_differences_have_intervals_and_the_papers_order_is_said(tmp_path: Path) -> None:
    made = variants("ml-1m", IN_ORDER)
    page = page_of(made, tmp_path)
    assert sentence(page, "ml-1m").endswith("The order is the paper's.")
    row = cells(page, "Table 5", "DMAN-XL", "ml-1m")
    for metric in ("hr@100", "ndcg@100"):
        expected = paired_bootstrap([made[0].ranks], [made[3].ranks], metric=metric)
        assert row[f"{metric.upper()}, DMAN minus"] == str(expected)
    assert cells(page, "Table 5", "DMAN", "ml-1m")["HR@100, DMAN minus"] == "-"
    assert sentence(page, "planted") == "Ranking: -. No record yet of DMAN, DMAN-XL, DMAN-FIFO, DMAN-NRAN."


def test_another_order_is_said_with_the_difference(tmp_path: Path) -> None:
    made = variants("planted", IN_ORDER | {"nran": (1, 1, 1, 1), "fifo": (501, 501, 501, 501)})
    found = sentence(page_of(made, tmp_path), "planted")
    dman_nran, fifo_xl = (
        paired_bootstrap([made[a].ranks], [made[b].ranks], metric="hr@10") for a, b in ((0, 2), (1, 3))
    )
    assert f"{dman_nran.mean:+.4f}" == "+0.0000" and f"{fifo_xl.mean:+.4f}" == "-0.5000"
    assert found.endswith(
        "**The order is not the paper's.** "
        f"DMAN is not above DMAN-NRAN in HR@10: {dman_nran}. DMAN-FIFO is not above DMAN-XL in HR@10: {fifo_xl}."
    )


def test_variants_with_other_settings_are_not_subtracted(tmp_path: Path) -> None:
    made = variants("planted", {"dman": (9, 9, 9, 9), "fifo": (501,) * 4})
    made += [dman("xl", "planted", variant="xl", epochs=77, memory_slots=3, routing_iterations=1)]
    page = page_of(made, tmp_path)
    assert cells(page, "Table 5", "DMAN-FIFO", "planted")["HR@10, DMAN minus"].startswith("+1.0000 (")
    assert cells(page, "Table 5", "DMAN-XL", "planted") == {
        "": "DMAN-XL", "HR@10, `paper`": "0.5000", "HR@10, DMAN minus": "-"
    }  # fmt: skip
    assert "DMAN-FIFO is not above DMAN-XL in HR@10: with other settings." in sentence(page, "planted")
    same = dman("xl", "planted", variant="xl", memory_slots=3, routing_iterations=1, memory_training="joint")
    page = page_of([*made[:2], same], tmp_path)
    assert cells(page, "Table 5", "DMAN-XL", "planted")["HR@10, DMAN minus"].startswith("+0.5000 ("), "xl has no memory"


# Figure 2


def test_sizes_of_one_number_of_epochs_are_charted(tmp_path: Path) -> None:
    made = [
        dman("whole"),
        *(dman(f"m{m}", memory_slots=m, epochs=77, ranks=(m, m, m, 501)) for m in (30, 2, 12, 20)),
        dman("l1", layers=1, epochs=77, patience=2),
        dman("other", memory_slots=4, epochs=77, dropout=0.5),
        dman("curve", "taobao-userbehavior-sample"),
    ]
    page = page_of(made, tmp_path)
    assert (tmp_path / CHART).read_bytes().startswith(b"\x89PNG") and f"]({CHART})" in page
    part = page.partition("(a) test metrics by m, ml-1m, 77 epochs:\n\n")[2].partition("\n\n")[0]
    assert [line.split(" | ")[:2] for line in part.splitlines()[2:]] == [
        ["| 2", "0.7500"],
        ["| 20", "0.0000"],
        ["| 30", "0.0000"],
    ]
    assert "(b) test metrics by L, ml-1m, 77 epochs:" in page and "| `l1` |" in page
    assert (
        "| 3 | 0.2000 | 0.1000 |"
        in page.partition("(c) validation by epoch, Taobao (`taobao-userbehavior-sample`):")[2]
    )
    named = [line.split("`")[-2] for line in records_row(page, "DMAN, Figure 2")]
    assert named == ["m2", "m20", "m30", "l1"], "each once, also m20, which is in both panels"


def test_point_of_a_size_is_the_better_run_by_validation(tmp_path: Path) -> None:
    better, worse = dman("better", memory_slots=2), dman("worse", memory_slots=2, patience=2, ranks=(51,) * 4)
    worse.content["metrics"]["valid"] = {
        "target_kept": worse.content["metrics"]["valid"]["target_kept"] | {"hr@10": 0.4}
    }
    for made in ([better, worse], [worse, better]):
        page = page_of([*made, dman("m4", memory_slots=4)], tmp_path)
        assert "| `better` |" in page and "`worse`" not in page


def test_learning_curve_is_the_mean_of_the_runs_that_reached_an_epoch() -> None:
    long, short = dman("long"), dman("short", seed=1)
    short = replace(
        short, content=short.content | {"epochs": [{"epoch": 1.0, "valid/hr@10": 0.4, "valid/ndcg@100": 0.2}]}
    )
    (row,) = rows_of([long, short])
    assert learning_curve(row) == {
        "HR@10": pytest.approx({1: 0.2, 2: 0.1, 3: 0.2}),
        "NDCG@100": pytest.approx({1: 0.1, 2: 0.05, 3: 0.1}),
    }
    assert learning_curve(None) == {"HR@10": {}, "NDCG@100": {}}


# The command


def test_report_writes_the_page_beside_the_other_and_names_records_whose_commands_it_holds(tmp_path: Path) -> None:
    made = [dman("one"), baseline("two", "gru4rec"), dman("unused", layers=3)]
    (tmp_path / "records.parquet").write_bytes(records_bytes(made))
    arguments = ["--records", str(tmp_path / "records.parquet"), "--out", str(tmp_path)]
    assert report.main(arguments) == 0
    commands = (tmp_path / "accuracy.md").read_text().partition("## Commands")[2]
    named = re.findall(r"`(\w+)` \|$", (tmp_path / "paper.md").read_text().partition("## Records")[2], re.MULTILINE)
    assert set(named) == {"one", "two", "unused"}, "the last is a point of Figure 2"
    assert all(f"| `{name}` | `python -m" in commands for name in named)


def test_page_without_any_record_of_its_logs_has_the_papers_figures_and_no_chart(tmp_path: Path) -> None:
    page = page_of([dman("one", "another-log")], tmp_path)
    assert cells(page, "Table 4", "SDM", "online-retail-long")["HR@500, the paper"] == "0.1290"
    assert cells(page, "Data sets", "XLong")["events"] == "-"
    assert list(tmp_path.iterdir()) == [] and "another-log" not in page
