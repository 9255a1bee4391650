"""Parquet files that appear only when they are complete, with their columns also when they have no rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dman_runtime.errors import InputError
from dman_runtime.jobs.parquet_output import ParquetOutput

SCHEMA = pa.schema([("user_id", pa.string()), ("rank", pa.int32())])


def rows(*ranks: int) -> pa.Table:
    return pa.table({"user_id": [f"u{rank}" for rank in ranks], "rank": list(ranks)}, schema=SCHEMA)


def test_file_holds_all_tables_in_order_and_was_not_there_before(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with ParquetOutput(path, SCHEMA) as out:
        out.write(rows())
        out.write(rows(1, 2))
        assert not path.exists()
        out.write(rows(3))
    assert pq.read_table(path).equals(rows(1, 2, 3))
    assert [one.name for one in tmp_path.iterdir()] == ["out.parquet"]


def test_file_without_tables_has_the_columns(tmp_path: Path) -> None:
    with ParquetOutput(tmp_path / "out.parquet", SCHEMA):
        pass
    assert pq.read_table(tmp_path / "out.parquet").equals(rows())


@pytest.mark.parametrize("failure", [InputError("bad"), KeyboardInterrupt()], ids=["error", "interrupted"])
def test_failure_keeps_the_old_file_and_leaves_no_part(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "out.parquet").write_text("old")
    with pytest.raises(type(failure)), ParquetOutput(tmp_path / "out.parquet", SCHEMA) as out:
        out.write(rows(1))
        raise failure
    assert (tmp_path / "out.parquet").read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("place", ["nowhere/out.parquet", "."])
def test_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, place: str) -> None:
    with pytest.raises(InputError, match="cannot write") as error, ParquetOutput(tmp_path / place, SCHEMA):
        pytest.fail("it was opened")
    assert error.value.parameter == "output"
    assert list(tmp_path.iterdir()) == []


def test_table_of_other_columns_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema"), ParquetOutput(tmp_path / "out.parquet", SCHEMA) as out:
        out.write(pa.table({"user_id": [1], "rank": [1]}))
    assert list(tmp_path.iterdir()) == []
