"""Scores of whole logs: the documented columns, and the answers of an engine that was given the same histories."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TIMED, TINY_ITEMS, new_store, random_model
from histories import ONLY_UNKNOWN, Histories, write_csv
from log_files import import_log, score_log, text_log
from torch_graphs import generation_of

from dman_runtime.engine import Engine
from dman_runtime.errors import InputError
from dman_runtime.jobs import partitions
from dman_runtime.jobs.spreading import Processes
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


@pytest.fixture(scope="module")
def timed() -> Generation:
    """Of a model that sees times, and counts what users come back to."""
    return generation_of(random_model(TIMED, TINY_ITEMS))


@pytest.mark.parametrize("at", [None, 12_000, 10**9])  # unknown; between the histories; after all of them
def test_score_at_a_moment_gives_the_answers_of_an_engine_at_that_moment(
    timed: Generation, log: Path, mixed_histories: Histories, tmp_path: Path, at: int | None
) -> None:
    score_log(log, tmp_path / "s.parquet", timed, k=TINY_ITEMS, include_seen=True, at=at)
    expected = {}
    with new_store("memory") as store:
        engine = Engine(timed, store)
        import_log(log, engine)
        for user in mixed_histories:
            (answer,) = engine.recommend([Query(str(user), k=TINY_ITEMS, include_seen=True, at=at)])
            item_ids = [int(timed.bundle.items.item_ids[item]) for item in answer.item_indices]
            expected[user] = list(zip(item_ids, answer.scores.tolist(), strict=True))
    assert_close_rankings(scored(tmp_path / "s.parquet"), expected)


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


def test_source_marks_popular_answers(exact: Generation, log: Path, tmp_path: Path) -> None:
    result = score_log(log, tmp_path / "s.parquet", exact, k=3)
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert {row["source"] for row in rows if row["user_id"] == ONLY_UNKNOWN} == {"popular"}
    assert {row["source"] for row in rows if row["user_id"] != ONLY_UNKNOWN} == {"model"}
    assert (result.popular_users, result.rows) == (1, len(rows))


# -- edges of the answer ---------------------------------------------------------------------------------------------

EVERYTHING = [(item, item) for item in range(1, TINY_ITEMS + 1)]


@pytest.mark.parametrize("batch", [256, 2])
def test_users_who_have_had_everything_get_no_rows_and_are_counted(
    exact: Generation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """They have the longest histories, so they fill the first batches."""
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", batch)
    histories = dict.fromkeys(range(1, 6), EVERYTHING) | {6: EVERYTHING[:-1], 7: EVERYTHING[:4]}
    result = score_log(write_csv(tmp_path / "log.csv", histories), tmp_path / "s.parquet", exact, k=10)
    rankings = scored(tmp_path / "s.parquet")
    assert {user: len(ranking) for user, ranking in rankings.items()} == {6: 1, 7: 10}
    assert rankings[6][0][0] == TINY_ITEMS
    assert pq.read_schema(tmp_path / "s.parquet").remove_metadata() == SCHEMA
    assert vars(result) == {
        "where": "in this process",
        "users": 7,
        "rows": 11,
        "popular_users": 0,
        "users_with_nothing": 5,
        "users_with_fewer_than_k": 6,
    }
    lines = result.lines(tmp_path / "s.parquet", 10)
    assert "5 of 7 users have nothing left to recommend" in lines
    assert "1 of 7 users have fewer than 10 items left" in lines


def test_a_file_without_any_row_has_the_documented_columns(exact: Generation, tmp_path: Path) -> None:
    result = score_log(write_csv(tmp_path / "log.csv", {1: EVERYTHING}), tmp_path / "s.parquet", exact, k=10)
    assert pq.read_table(tmp_path / "s.parquet").num_rows == 0
    assert pq.read_schema(tmp_path / "s.parquet").remove_metadata() == SCHEMA
    assert (result.users, result.rows) == (1, 0)


def test_a_catalogue_smaller_than_k_is_ranked_whole(exact: Generation, tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", {1: [(3, 1), (4, 2), (3, 3)]})
    result = score_log(log, tmp_path / "s.parquet", exact, k=1000)
    assert {item for item, _ in scored(tmp_path / "s.parquet")[1]} == set(range(1, TINY_ITEMS + 1)) - {3, 4}
    assert (result.users_with_nothing, result.users_with_fewer_than_k) == (0, 1)


def test_one_user_of_unknown_items_gets_popular_ones(exact: Generation, tmp_path: Path) -> None:
    result = score_log(write_csv(tmp_path / "log.csv", {1: [(999, 1)]}), tmp_path / "s.parquet", exact, k=2)
    assert scored(tmp_path / "s.parquet")[1][0][0] == TINY_ITEMS
    assert (result.users, result.popular_users) == (1, 1)
    assert "1 of 1 users have no event of a known item: they got popular items" in result.lines(tmp_path, 2)


# -- types of the ids -------------------------------------------------------------------------------------------------


def trained_on(generation: Generation, user_ids: str) -> Generation:
    """The generation as if its log had had such user ids."""
    manifest = replace(generation.bundle.manifest, data={"user_ids": user_ids})
    return replace(generation, bundle=replace(generation.bundle, manifest=manifest))


@pytest.mark.parametrize("user_ids", [("00103", "12"), ("12447", "12"), ("anna", "7")], ids=lambda ids: ids[0])
def test_text_users_of_a_bundle_are_text_in_every_file(
    exact: Generation, tmp_path: Path, user_ids: tuple[str, str]
) -> None:
    log = text_log(tmp_path, "user_id,item_id\n" + "".join(f"{user},1\n" for user in user_ids))
    score_log(log, tmp_path / "s.parquet", trained_on(exact, "text"), k=1)
    users = pq.read_table(tmp_path / "s.parquet")["user_id"]
    assert users.type == pa.string() and sorted(users.to_pylist()) == sorted(user_ids)


def test_integer_users_of_a_bundle_are_integers_or_refused_by_name(exact: Generation, tmp_path: Path) -> None:
    integers = trained_on(exact, "integer")
    score_log(text_log(tmp_path, "user_id,item_id\n-5,1\n12,1\n"), tmp_path / "s.parquet", integers, k=1)
    users = pq.read_table(tmp_path / "s.parquet")["user_id"]
    assert users.type == pa.int64() and sorted(users.to_pylist()) == [-5, 12]
    for bad in ("anna", "007", "7.0", str(2**63)):
        log = text_log(tmp_path, f"user_id,item_id\n12,1\n{bad},1\n", "bad.csv")
        with pytest.raises(InputError, match=rf"bad\.csv.*'{bad}'") as error:
            score_log(log, tmp_path / "bad.parquet", integers, k=1)
        assert error.value.parameter == "user_ids"
        assert not (tmp_path / "bad.parquet").exists()


def test_user_ids_option_wins_over_the_bundle(exact: Generation, tmp_path: Path) -> None:
    log = text_log(tmp_path, "user_id,item_id\n12,1\nanna,1\n")
    score_log(log, tmp_path / "s.parquet", trained_on(exact, "integer"), k=1, user_ids="text")
    assert sorted(pq.read_table(tmp_path / "s.parquet")["user_id"].to_pylist()) == ["12", "anna"]
    log = text_log(tmp_path, "user_id,item_id\n12,1\n13,1\n")
    score_log(log, tmp_path / "s.parquet", trained_on(exact, "text"), k=1, user_ids="integer")
    assert sorted(pq.read_table(tmp_path / "s.parquet")["user_id"].to_pylist()) == [12, 13]


def test_text_items_of_a_bundle_stay_text(exact: Generation, tmp_path: Path) -> None:
    """All of its ids look like integers, and are none."""
    manifest = replace(exact.bundle.manifest, integer_item_ids=False)
    text = replace(exact, bundle=replace(exact.bundle, manifest=manifest))
    score_log(text_log(tmp_path, "user_id,item_id\n1,1\n"), tmp_path / "s.parquet", text, k=TINY_ITEMS)
    items = pq.read_table(tmp_path / "s.parquet")["item_id"]
    assert items.type == pa.string() and set(items.to_pylist()) == {str(i) for i in range(2, TINY_ITEMS + 1)}


# -- files -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_file_is_the_same_however_many_processes_there_are(
    exact: Generation, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", 3)
    result = score_log(log, tmp_path / "1.parquet", exact, k=20, at=10**9)
    spread = score_log(log, tmp_path / "2.parquet", exact, k=20, at=10**9, spread=Processes(2))
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    assert vars(spread) == vars(result) | {"where": "by 2 processes"}
    assert "the users were scored by 2 processes" in spread.lines(tmp_path / "2.parquet", 20)
