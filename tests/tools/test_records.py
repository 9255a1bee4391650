"""What is kept of a run, the command that keeps it, and the systems that only count."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import held_out_of

from dman_runtime.data.evaluation import held_out, metrics, ranking_for
from dman_train.baselines.counts import (
    HALF_LIFE,
    RECENT,
    Scorer,
    count_ranks,
    most_popular,
    own_decayed,
    own_frequency,
    own_latest,
    transitions,
)
from dman_train.config import DataConfig
from dman_train.data import load
from dman_train.interpret import LENGTH_GROUPS
from dman_train.run import Run
from tools import records
from tools.record_file import Record, read_records
from tools.records import RANK_LIMIT

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


OWN = {
    "frequency": (own_frequency, [1, 1, 2, 2, 2, 4], [2, 1, 4]),
    "frequency, tie by popularity": (own_frequency, [4, 3, 2, 1, 0], [3, 1, 0, 2, 4]),
    "decayed": (own_decayed, [1, 1, *[2] * HALF_LIFE, 4, 4], [2, 4, 1]),
    "decayed, two older outweigh one": (own_decayed, [1, 1, *range(5, 3 + HALF_LIFE), 2], [1, 2]),
    "decayed, two much older do not": (own_decayed, [1, 1, *range(5, 4 + HALF_LIFE), 2], [2, 1]),
    "latest": (own_latest, [4, 1, 1, 1, 2], [2, 1, 4]),
}


@pytest.mark.parametrize(("system", "history", "first"), OWN.values(), ids=OWN)
def test_own_items_come_first_and_then_the_popular(
    system: Callable[..., Scorer], history: list[int], first: list[int]
) -> None:
    (scores,) = system(ITEMS, OFFSETS, 5 + 2 * HALF_LIFE)([np.array(history)])
    order = np.argsort(-scores, kind="stable").tolist()
    assert [item for item in order if item < 5][: len(first)] == first
    others = [item for item in order if item not in history]
    assert set(order[: len(set(history))]) == set(history)
    assert others == sorted(others, key=lambda item: (-np.bincount(ITEMS, minlength=item + 1)[item], item))


def test_count_ranks_are_in_the_order_of_the_data() -> None:
    histories = [np.array([user % 4]) for user in range(600)]  # more than one batch
    targets = np.array([(user + 1) % 4 for user in range(600)])
    data = held_out_of(histories, targets)
    ranks = count_ranks(lambda given: np.array([[4.0, 3, 2, 1] for _ in given]), data)
    assert ranks.seen_kept.tolist() == (targets + 1).tolist()
    assert ranks.seen_excluded.tolist() == ranks.target_kept.tolist()
    assert ranks.seen_excluded.tolist() == [
        target + 1 - (history[0] < target) for history, target in zip(histories, targets, strict=True)
    ]


# Records


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "reports" / "records.parquet"


def written(run: Path, file: Path, name: str = "one") -> Record:
    assert records.main(["--run", str(run), "--records", str(file), "--name", name]) == 0
    return next(record for record in read_records(file) if record.name == name)


def kept_run(trained_run: Path, path: Path, choice: str) -> Path:
    """A copy of the run whose configuration says that it was trained with this `seen_items`."""
    shutil.copytree(trained_run, path)
    config = json.loads((path / "config.json").read_text())
    config["train"]["seen_items"] = choice
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_record_tells_what_the_run_says(trained_run: Path, small_log: Path, file: Path) -> None:
    record, run = written(trained_run, file), Run(trained_run)
    assert run.metrics is not None
    assert record.content["metrics"] == run.metrics
    assert [list(epoch) for epoch in record.content["epochs"]] == [list(epoch) for epoch in run.epochs()]
    for kept, epoch in zip(record.content["epochs"], run.epochs(), strict=True):
        assert kept == pytest.approx(epoch, rel=5e-6, abs=0), "six significant digits"
    assert record.content["dataset"]["fingerprint"] == run.config["dataset"]["fingerprint"]
    assert record.metric("hr@10") == run.metrics["test"]["hr@10"]
    assert record.metric("ndcg@10", seen="seen_kept") == run.metrics["test"]["seen_kept"]["ndcg@10"]
    assert record.content["parameters"] == sum(p.numel() for p in run.best_model().parameters())
    lengths = [len(history) for history in held_out(load(small_log, DataConfig()), "test").histories]
    expected = [sum(length >= border for border in (50, 200, 500)) for length in lengths]
    assert record.groups.tolist() == expected


@pytest.mark.parametrize("choice", ["exclude", "exclude-from-ranking", "keep-target", "keep"])
def test_record_holds_the_ranks_of_all_users_in_the_ranking_that_chose_the_run(
    choice: str, trained_run: Path, tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = written(kept_run(trained_run, tmp_path / "run", choice), file)
    seen = ranking_for(choice)
    ranks = np.load(trained_run / "ranks.npz")[f"test_{seen}"]
    assert record.ranks.tolist() == np.minimum(ranks, RANK_LIMIT + 1).tolist()
    assert metrics(record.ranks) == pytest.approx(metrics(ranks)), "nothing that a metric sees is lost by the limit"
    result = record.content["metrics"]["test"]
    by_choice = {"keep": result["seen_kept"], "keep-target": result["target_kept"]}
    expected = by_choice.get(choice, result)["hr@10"]
    assert len({by["hr@10"] for by in (result, *by_choice.values())}) == 3, "the rankings differ"
    assert record.metric("hr@10") == expected == pytest.approx(metrics(record.ranks)["hr@10"])
    assert f"test HR@10 {expected:.4f}" in capsys.readouterr().out


def test_record_metrics_by_group_add_up_to_the_whole(trained_run: Path, file: Path) -> None:
    record = written(trained_run, file)
    sizes = [(record.groups == group).sum() for group in range(len(LENGTH_GROUPS))]
    whole = sum(size * record.group_metrics(g)["hr@10"] for g, size in enumerate(sizes) if size)
    assert whole / sum(sizes) == pytest.approx(record.metric("hr@10"))


def test_record_does_not_name_paths_of_this_machine(trained_run: Path, file: Path) -> None:
    record = written(trained_run, file)
    text = json.dumps(record.content)
    assert str(trained_run) not in text and str(trained_run.parent) not in text
    command = record.content["command"]
    assert command.startswith("python -m dman_train.train --data ../shared/data/") and "--run" not in command


def test_generated_log_is_named_by_its_file(small_log: Path, tmp_path: Path, file: Path) -> None:
    (tmp_path / "data").mkdir()
    log = tmp_path / "data" / f"puzzle{small_log.suffix}"
    log.write_bytes(small_log.read_bytes())
    assert records.main(["--counts", "popular", "--data", str(log), "--records", str(file)]) == 0
    (record,) = read_records(file)
    assert record.dataset == "puzzle"
    assert record.content["command"].endswith(f"--data data/{log.name}")


def test_record_of_counts(small_log: Path, file: Path) -> None:
    assert records.main(["--counts", "popular", "--data", str(small_log), "--records", str(file)]) == 0
    (record,) = read_records(file)
    assert record.name == "popular" and record.content["parameters"] == 0
    assert metrics(record.ranks)["hr@50"] == pytest.approx(record.metric("hr@50"))


def test_record_refuses_what_is_no_finished_run(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--run", str(tmp_path)], ["--counts", "popular"], ["--counts", "popular", "--data", "none.csv"]):
        assert records.main([*arguments, "--records", str(file)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not file.parent.exists()


# The command


@pytest.mark.slow
def test_command_adds_replaces_lists_and_drops(
    trained_run: Path, small_log: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("two", "one", "one"):
        written(trained_run, file, name)
    assert records.main(["--counts", "popular", "--data", str(small_log), "--records", str(file)]) == 0
    capsys.readouterr()
    assert records.main(["--list", "--records", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["one", "popular", "two"]
    assert lines == [records.summary(record) for record in read_records(file)]
    assert records.main(["--drop", "two", "popular", "--records", str(file)]) == 0
    assert [record.name for record in read_records(file)] == ["one"]


def test_command_without_a_name_takes_that_of_the_run(trained_run: Path, file: Path) -> None:
    assert records.main(["--run", str(trained_run), "--records", str(file)]) == 0
    assert [record.name for record in read_records(file)] == [trained_run.name]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--drop", "one", "three"], "three"),
        (["--list", "--drop", "one"], "--drop"),
        (["--counts", "popular"], "--data"),
    ],
)
def test_command_that_cannot_work_is_one_line_and_changes_nothing(
    arguments: list[str], word: str, trained_run: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(trained_run, file)
    before = file.read_bytes()
    assert records.main([*arguments, "--records", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error
    assert file.read_bytes() == before
