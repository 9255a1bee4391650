"""Recorded runs: what is kept of a run, what is told from it, and the systems that only count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dman_runtime.data.evaluation import HeldOut, held_out, metrics
from dman_train.baselines.counts import RECENT, count_ranks, most_popular, transitions
from dman_train.config import DataConfig, TrainConfig, to_dict
from dman_train.interpret import LENGTH_GROUPS
from dman_train.run import Run
from dman_train.train import load
from tools import records, report
from tools.records import RANK_LIMIT, paired_bootstrap, read_records

ITEMS = np.array([0, 1, 2, 0, 1, 3, 3], np.int32)  # users: 0 1 2 0 | 1 3 3
OFFSETS = np.array([0, 4, 7])


# Counting


def test_most_popular_scores_by_events() -> None:
    scores = most_popular(ITEMS, OFFSETS, 5)([np.array([3]), np.array([0, 2])])
    assert scores.tolist() == [[2, 2, 1, 2, 0]] * 2


def test_transitions_equal_a_plain_count() -> None:
    pairs = np.zeros((5, 5))
    for user in ([0, 1, 2, 0], [1, 3, 3]):  # no pair across users
        for first in range(len(user)):
            for second in range(first + 1, len(user)):
                pairs[user[first], user[second]] += 1 / (second - first)
    popularity = np.bincount(ITEMS, minlength=5)
    history = np.array([4, 2, 0, 1])
    expected = sum(pairs[item] / (back + 1) for back, item in enumerate(history[::-1])) / np.sqrt(popularity + 1)
    np.testing.assert_allclose(transitions(ITEMS, OFFSETS, 5)([history])[0], expected, atol=1e-9)


def test_transitions_read_the_recent_events_only_and_break_ties_by_popularity() -> None:
    scorer = transitions(ITEMS, OFFSETS, 5)
    recent = np.array([0, 1] * (RECENT // 2))
    assert np.array_equal(scorer([np.array([3, 3, *recent])]), scorer([recent]))
    unknown = scorer([np.array([4])])[0]
    assert unknown.argmax() in (0, 1, 3) and unknown[4] == 0 < unknown[2]


def test_transitions_of_a_log_without_pairs_are_popularity() -> None:
    scores = transitions(np.array([2, 0], np.int32), np.array([0, 1, 2]), 3)([np.array([2])])[0]
    assert scores[0] == scores[2] > scores[1]


def test_count_ranks_are_in_the_order_of_the_data() -> None:
    histories = [np.array([user % 4]) for user in range(600)]  # more than one batch
    targets = np.array([(user + 1) % 4 for user in range(600)])
    data = HeldOut(np.arange(600), histories, targets)
    ranks = count_ranks(lambda given: np.array([[4.0, 3, 2, 1] for _ in given]), data)
    assert ranks.seen_kept.tolist() == (targets + 1).tolist()
    assert ranks.seen_excluded.tolist() == [
        target + 1 - (history[0] < target) for history, target in zip(histories, targets, strict=True)
    ]


# Records


def written(run: Path, out: Path, name: str = "one") -> records.Record:
    assert records.main(["--run", str(run), "--out", str(out), "--name", name]) == 0
    return next(record for record in read_records(out) if record.name == name)


def test_record_tells_what_the_run_says(trained_run: Path, small_log: Path, tmp_path: Path) -> None:
    record, run = written(trained_run, tmp_path), Run(trained_run)
    assert run.metrics is not None
    assert record.content["epochs"] == run.epochs()
    assert record.content["dataset"]["fingerprint"] == run.config["dataset"]["fingerprint"]
    assert record.metric("hr@10") == run.metrics["test"]["hr@10"]
    assert record.metric("ndcg@10", seen="seen_kept") == run.metrics["test"]["seen_kept"]["ndcg@10"]
    assert record.content["parameters"] == sum(p.numel() for p in run.best_model().parameters())
    lengths = [len(history) for history in held_out(load(small_log, DataConfig()), "test").histories]
    expected = [sum(length >= border for border in (50, 200, 500)) for length in lengths]
    assert record.groups.tolist() == expected


def test_record_holds_the_ranks_of_all_users(trained_run: Path, tmp_path: Path) -> None:
    record = written(trained_run, tmp_path)
    for seen in ("seen_excluded", "seen_kept"):
        found, expected = metrics(record.ranks[seen]), metrics(np.load(trained_run / "ranks.npz")[f"test_{seen}"])
        assert found == pytest.approx(expected), "nothing that a metric sees is lost by the limit"
        assert record.ranks[seen].max() <= RANK_LIMIT
    sizes = [(record.groups == group).sum() for group in range(len(LENGTH_GROUPS))]
    whole = sum(size * record.group_metrics(g)["hr@10"] for g, size in enumerate(sizes) if size)
    assert whole / sum(sizes) == pytest.approx(record.metric("hr@10"))


@pytest.mark.parametrize("choice", ["exclude", "exclude-from-ranking", "keep"])
def test_record_reports_the_ranking_that_chose_the_run(
    choice: str, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = choice == "keep"
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    config = json.loads((run / "config.json").read_text())
    config["train"]["seen_items"] = choice
    (run / "config.json").write_text(json.dumps(config))
    record = written(run, tmp_path / "out")
    result = record.content["metrics"]["test"]
    assert result["hr@10"] != result["seen_kept"]["hr@10"]
    expected = (result["seen_kept"] if kept else result)["hr@10"]
    assert record.metric("hr@10") == expected
    assert metrics(record.test_ranks)["hr@10"] == pytest.approx(expected)
    assert f"test HR@10 {expected:.4f}" in capsys.readouterr().out


def test_record_names_no_place_of_this_machine(trained_run: Path, tmp_path: Path) -> None:
    written(trained_run, tmp_path)
    text = (tmp_path / "one.json").read_text()
    assert str(trained_run) not in text and str(trained_run.parent) not in text
    command = json.loads(text)["command"]
    assert command.startswith("python -m dman_train.train --data ../shared/data/") and "--run" not in command


def test_generated_log_is_named_by_its_file(small_log: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    log = tmp_path / "data" / f"puzzle{small_log.suffix}"
    log.write_bytes(small_log.read_bytes())
    assert records.main(["--counts", "popular", "--data", str(log), "--out", str(tmp_path)]) == 0
    (record,) = read_records(tmp_path)
    assert record.dataset == "puzzle"
    assert record.content["command"].endswith(f"--data data/{log.name}")


def test_record_of_counts(small_log: Path, tmp_path: Path) -> None:
    assert records.main(["--counts", "popular", "--data", str(small_log), "--out", str(tmp_path)]) == 0
    (record,) = read_records(tmp_path)
    assert record.name == "popular" and record.content["parameters"] == 0
    assert metrics(record.ranks["seen_excluded"])["hr@50"] == pytest.approx(record.metric("hr@50"))


def test_record_refuses_what_is_no_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--run", str(tmp_path)], ["--counts", "popular"], ["--counts", "popular", "--data", "none.csv"]):
        assert records.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format_version": 2}', '{"format_version": 1, "ranks": {"a": "!"}}']
)
def test_damaged_record_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert report.main(["--records", str(tmp_path), "--out", str(tmp_path / "out.md")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.json" in error


# Differences


def test_paired_bootstrap_of_a_system_with_itself_is_zero() -> None:
    ranks = np.random.default_rng(0).integers(1, 30, 500)
    found = paired_bootstrap([ranks], [ranks], metric="hr@10")
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_paired_bootstrap_interval_is_that_of_the_normal_approximation() -> None:
    random = np.random.default_rng(0)
    ours, theirs = random.integers(1, 21, (2, 3000))
    gain = (ours <= 10).astype(float) - (theirs <= 10)
    found = paired_bootstrap([ours], [theirs], metric="hr@10")
    assert found.mean == pytest.approx(gain.mean())
    half = 1.96 * gain.std() / np.sqrt(len(gain))
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)


def test_paired_bootstrap_means_over_seeds_and_knows_ndcg() -> None:
    ours, theirs = [np.array([1, 3]), np.array([1, 11])], [np.array([3, 3])]
    found = paired_bootstrap(ours, theirs, metric="ndcg@10", samples=100)
    assert found.mean == pytest.approx(((1 - 0.5) + (0.25 - 0.5)) / 2)


# The report


def test_report_shows_runs_seeds_and_differences(trained_run: Path, small_log: Path, tmp_path: Path) -> None:
    first = written(trained_run, tmp_path / "runs")
    content = dict(first.content, train=first.content["train"] | {"seed": 1})
    (tmp_path / "runs" / "two.json").write_text(json.dumps(content))
    assert records.main(["--counts", "popular", "--data", str(small_log), "--out", str(tmp_path / "runs")]) == 0
    out = tmp_path / "accuracy.md"
    assert report.main(["--records", str(tmp_path / "runs"), "--out", str(out)]) == 0
    text = out.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| DMAN"))
    assert "| 0, 1 |" in row and f"{first.metric('hr@10'):.4f} ± 0.0000" in row
    gain = paired_bootstrap(
        [first.ranks["seen_excluded"]], [read_records(tmp_path / "runs")[1].ranks["seen_excluded"]], metric="hr@10"
    )
    assert f"| popular | {gain}" in text
    for record in read_records(tmp_path / "runs"):
        assert f"| `{record.name}` | `{record.content['command']}` |" in text


@pytest.mark.parametrize(
    ("option", "before"), [("seen_items", "exclude-from-ranking"), ("ema_decay", 0.0)], ids=["seen-items", "average"]
)
def test_report_compares_what_has_one_recipe(
    option: str, before: object, trained_run: Path, small_log: Path, tmp_path: Path
) -> None:
    content, runs = written(trained_run, tmp_path / "made").content, tmp_path / "runs"
    runs.mkdir()
    for value in (getattr(TrainConfig(), option), before):
        for variant in ("dman", "xl"):
            changed = {"model": content["model"] | {"variant": variant}, "train": content["train"]}
            changed["train"] = changed["train"] | {option: value}
            (runs / f"{variant}-{value}.json").write_text(json.dumps(content | changed))
    assert records.main(["--counts", "popular", "--data", str(small_log), "--out", str(runs)]) == 0
    assert report.main(["--records", str(runs), "--out", str(tmp_path / "accuracy.md")]) == 0
    text = (tmp_path / "accuracy.md").read_text()
    parts = text.split("\n## Commands")[0].split("\n### ")
    compared = [part.splitlines()[0].endswith("each other row") and part for part in parts]
    ours, theirs = [part for part in compared if part]
    words = report.WORDS[option, before]
    assert words not in ours and "\n| xl" in ours and "| popular |" in ours
    assert theirs.count(words) == 2 and "\n| xl" in theirs and "popular" not in theirs
    assert parts[1].count("\n| ") == 4, "head, rule, our system and the counts"


@pytest.mark.parametrize(
    ("model", "idle", "decisive"),
    [
        ({"system": "gru4rec", "history": 200}, {"memory_training": "alternating"}, {"learning_rate": 0.5}),
        ({"variant": "xl", "memory_slots": 10}, {"abstraction_every": 1}, {"dropout": 0.5}),
        ({"variant": "fifo", "memory_slots": 10}, {"routing_iterations": 3}, {"memory_slots": 20}),
        ({"variant": "dman", "memory_slots": 10}, {"seed": 3}, {"memory_training": "alternating"}),
        ({"architecture": "paper", "variant": "dman", "long_term": "light"}, {"long_term": "gated"}, {"dropout": 0.5}),
    ],
)
def test_runs_are_told_apart_by_what_decides_them(
    model: dict[str, Any], idle: dict[str, Any], decisive: dict[str, Any]
) -> None:
    def options(changed: dict[str, Any]) -> dict[str, Any]:
        train = to_dict(TrainConfig()) | changed
        return report.decisive({"model": model | {k: train.pop(k) for k in model if k in train}, "train": train})

    assert options(idle) == options({}) != options(decisive)
    old = {name: value for name, value in to_dict(TrainConfig()).items() if name != "abstraction_every"}
    assert report.decisive({"model": model, "train": old}) == options({})


def test_report_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--records", str(tmp_path)]) == 2
    assert "holds no records" in capsys.readouterr().err


def test_report_charts_sizes_that_were_varied(trained_run: Path, tmp_path: Path) -> None:
    content = written(trained_run, tmp_path / "made").content
    standard = {
        "model": report.to_dict(report.PRESETS["default"].model),
        "train": report.to_dict(report.PRESETS["default"].train),
    }
    runs = tmp_path / "runs"
    runs.mkdir()
    for slots in (20, 5):
        model = standard["model"] | {"memory_slots": slots}
        (runs / f"m{slots}.json").write_text(json.dumps(dict(content, model=model, train=standard["train"])))
    assert report.main(["--records", str(runs), "--out", str(tmp_path / "accuracy.md")]) == 0
    (chart,) = tmp_path.glob("accuracy-*.png")
    assert chart.read_bytes().startswith(b"\x89PNG") and f"]({chart.name})" in (tmp_path / "accuracy.md").read_text()
    assert "DMAN, memory_slots=5" in (tmp_path / "accuracy.md").read_text()
