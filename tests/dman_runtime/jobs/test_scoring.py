"""Scores of whole logs: the documented columns, and the answers of an engine that was given the same histories."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY_ITEMS, new_store
from histories import ONLY_UNKNOWN, Histories
from log_files import import_log, score_log

from dman_runtime.engine import Engine
from dman_runtime.errors import InputError
from dman_runtime.jobs import partitions
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query

Ranking = list[tuple[int, float]]  # (item id, score), best first
SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("rank", pa.int32()),
        ("item_id", pa.int64()),
        ("score", pa.float32()),
        ("source", pa.string()),
    ]
)


def scored(path: Path) -> dict[int, Ranking]:
    rankings: dict[int, Ranking] = {}
    for row in pq.read_table(path).to_pylist():
        ranking = rankings.setdefault(row["user_id"], [])
        ranking.append((row["item_id"], row["score"]))
        assert row["rank"] == len(ranking)
    return rankings


def assert_close_rankings(found: dict[int, Ranking], expected: dict[int, Ranking]) -> None:
    """The same items in the same order, unless their scores are ties within the tolerance."""
    assert found.keys() == expected.keys()
    for user, ranking in found.items():
        reference = expected[user]
        assert len(ranking) == len(reference)
        margin = 1e-4 * max(abs(score) for _, score in reference)
        for (item, value), (other, other_value) in zip(ranking, reference, strict=True):
            assert abs(value - other_value) <= margin
            assert item == other or abs(dict(reference).get(item, reference[-1][1]) - value) <= margin


@pytest.mark.parametrize("include_seen", [False, True])
def test_score_gives_the_answers_of_an_engine_with_the_same_histories(
    exact: Generation, log: Path, mixed_histories: Histories, tmp_path: Path, include_seen: bool
) -> None:
    assert score_log(log, tmp_path / "s.parquet", exact, k=TINY_ITEMS, include_seen=include_seen).users == 25
    expected = {}
    with new_store("memory") as store:
        engine = Engine(exact, store)
        import_log(log, engine)
        for user in mixed_histories:
            (answer,) = engine.recommend([Query(str(user), k=TINY_ITEMS, include_seen=include_seen)])
            item_ids = [int(exact.bundle.items.item_ids[item]) for item in answer.item_indices]
            expected[user] = list(zip(item_ids, answer.scores.tolist(), strict=True))
    assert_close_rankings(scored(tmp_path / "s.parquet"), expected)


def test_score_writes_the_documented_columns_with_ranks_from_1(
    exact: Generation, log: Path, mixed_histories: Histories, tmp_path: Path
) -> None:
    score_log(log, tmp_path / "s.parquet", exact, k=7)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.schema.remove_metadata() == SCHEMA
    rankings = scored(tmp_path / "s.parquet")
    assert rankings.keys() == mixed_histories.keys()
    for user, ranking in rankings.items():
        assert len(ranking) == 7
        scores = [score for _, score in ranking]
        assert scores == sorted(scores, reverse=True)
        assert not {item for item, _ in ranking} & {item for item, _ in mixed_histories[user]}
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]  # no temporary file is left


def test_score_gives_users_without_known_items_the_popular_ones(exact: Generation, log: Path, tmp_path: Path) -> None:
    score_log(log, tmp_path / "s.parquet", exact, k=3)
    popular = scored(tmp_path / "s.parquet")[ONLY_UNKNOWN]
    assert [item for item, _ in popular] == [60, 59, 58]  # item i was trained on i times
    assert [score for _, score in popular] == pytest.approx([i / (60 * 61 / 2) for i in (60, 59, 58)])


def test_score_keeps_user_ids_that_are_text(exact: Generation, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n007,1,1\nanna,2,2\n007,3,3\n")
    assert score_log(tmp_path / "log.csv", tmp_path / "s.parquet", exact, k=1).users == 2
    assert sorted(pq.read_table(tmp_path / "s.parquet")["user_id"].to_pylist()) == ["007", "anna"]


def test_score_in_small_partitions_gives_the_same_rows(
    exact: Generation, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_log(log, tmp_path / "whole.parquet", exact, k=20)
    monkeypatch.setattr(partitions, "EVENTS_PER_PARTITION", 50)
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", 3)
    score_log(log, tmp_path / "parts.parquet", exact, k=20)
    assert_close_rankings(scored(tmp_path / "parts.parquet"), scored(tmp_path / "whole.parquet"))


def test_score_that_fails_midway_keeps_the_old_file(exact: Generation, tmp_path: Path) -> None:
    output, log = tmp_path / "s.parquet", tmp_path / "bad.csv"
    output.write_text("old")
    log.write_text("user_id,item_id,timestamp\n1,1,1\n2,2,never\n")
    with pytest.raises(InputError, match="never"):
        score_log(log, output, exact, k=3)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "s.parquet"]


def test_score_that_is_interrupted_leaves_no_part(
    exact: Generation, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", 3)
    search, calls = exact.retriever.search, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(exact.retriever, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_log(log, tmp_path / "s.parquet", exact, k=3)
    assert list(tmp_path.iterdir()) == []
