"""Users who have had everything, batches full of them, and catalogues of next to nothing: right, typed and said."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases.commands import Commands, case, log_file, scores
from cases.conftest import SMALL_ITEMS

from dman_runtime.jobs import partitions

pytestmark = pytest.mark.slow  # the bundle of few items is exported for them
COLUMNS = {"user_id": pa.string(), "rank": pa.int32(), "item_id": pa.string(), "score": pa.float32()}
COLUMNS["source"] = pa.string()


def log_of(lengths: list[int]) -> str:
    """One user for each length, who had so many of the small items."""
    rows = [
        f"c{user:03},{item},{1_600_000_000 + n}"
        for user, length in enumerate(lengths)
        for n, item in enumerate(SMALL_ITEMS[:length])
    ]
    return "user_id,item_id,timestamp\n" + "\n".join(rows) + "\n"


def assert_typed(path: Path) -> None:
    assert {field.name: field.type for field in pq.read_schema(path)} == COLUMNS


# -- the case ----------------------------------------------------------------------------------------------------------


def test_users_who_had_everything_come_first_and_the_others_are_scored(
    commands: Commands, small_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores.parquet"
    path = case("score-crashes-when-heavy-users-saw-all/smallcat.csv")
    said = commands.done("score", "--bundle", small_bundle, "--input", path, "--output", output)
    found, had = scores(output), defaultdict(set)
    for line in path.read_text().splitlines()[1:]:
        user, item, _ = line.split(",")
        had[user].add(item)
    assert sorted(found) == [f"c{n:04}" for n in range(300, 360)]
    assert all(sorted({*items, *had[user]}) == SMALL_ITEMS and len(items) == 6 for user, items in found.items())
    assert_typed(output)
    assert "300 of 360 users have nothing left to recommend" in said.out


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths", [[12, 12, 3], [3, 12, 12], [12, 3, 12], [12], [12] * 5, [1], [11, 12, 11], [3, 12, 5, 12, 12, 7]]
)
@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_any_batch_may_be_full_of_users_who_had_everything(
    commands: Commands,
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    batch: int,
) -> None:
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", batch)
    output = tmp_path / "scores.parquet"
    path = log_file(tmp_path, log_of(lengths))
    said = commands.done("score", "--bundle", small_bundle, "--input", path, "--output", output, "--k", 5, "--json")
    assert_typed(output)
    found = scores(output)
    left = {f"c{n:03}": set(SMALL_ITEMS[length:]) for n, length in enumerate(lengths) if length < 12}
    assert found.keys() == left.keys()
    for user, items in found.items():
        assert len(items) == min(5, len(left[user])) == len(set(items))
        assert set(items) <= left[user]
    assert said.json["users"] == len(lengths)
    assert said.json["users_with_nothing"] == lengths.count(12)
    assert ("nothing left" in said.out) == (12 in lengths)


def test_with_seen_items_everybody_gets_everything(commands: Commands, small_bundle: Path, tmp_path: Path) -> None:
    output, path = tmp_path / "scores.parquet", log_file(tmp_path, log_of([12, 3]))
    options = ("--include-seen", "--k", 50)
    said = commands.done("score", "--bundle", small_bundle, "--input", path, "--output", output, *options)
    assert {user: sorted(items) for user, items in scores(output).items()} == {
        "c000": SMALL_ITEMS, "c001": SMALL_ITEMS,
    }  # fmt: skip
    assert "2 of 2 users have fewer than 50 items left" in said.out


def test_users_of_unknown_items_get_popular_ones_and_are_marked(
    commands: Commands, small_bundle: Path, tmp_path: Path
) -> None:
    output, path = tmp_path / "scores.parquet", log_file(tmp_path, log_of([3, 4, 5]) + "new,x,1600000000\n")
    said = commands.done("score", "--bundle", small_bundle, "--input", path, "--output", output, "--k", 2)
    rows = pq.read_table(output).to_pylist()
    assert {row["user_id"]: row["source"] for row in rows} == {
        "c000": "model", "c001": "model", "c002": "model", "new": "popular",
    }  # fmt: skip
    assert scores(output)["new"] == ["p11", "p10"]  # the n-th item was trained on n times
    assert "1 of 4 users have no event of a known item" in said.out


def test_evaluation_works_where_everything_was_seen(commands: Commands, small_bundle: Path, tmp_path: Path) -> None:
    path = log_file(tmp_path, log_of([12, 12, 12]))
    result = commands.done("evaluate", "--bundle", small_bundle, "--data", path, "--json").json
    assert result["users"] == 3
