"""Ids keep their type. The training decides once, and no output follows the spelling of one file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases.commands import Commands, case, log_file, read, refused, scores, stored
from cases.conftest import Rename
from conftest import TINY_ITEMS, running_server
from log_files import parquet_log

from dman_runtime.data.log_options import LogOptions
from dman_train import export
from sdk import Client

T = 1_600_000_000
DIGITS = [str(n) for n in range(1, TINY_ITEMS + 1)]


@pytest.fixture(scope="session")
def digits_bundle(bundle_of: Rename) -> Path:
    """For the text ids "1" to "60"."""
    return bundle_of(DIGITS)


def scored(commands: Commands, bundle: Path, path: Path, output: Path) -> tuple[pa.DataType, pa.DataType]:
    """The types of user and item ids in the scores of a log."""
    commands.done("score", "--bundle", bundle, "--input", path, "--output", output, "--k", 5)
    schema = pq.read_schema(output)
    return schema.field("user_id").type, schema.field("item_id").type


# -- the cases ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_text_of_digits_stays_text_from_training_to_the_client(commands: Commands, tmp_path: Path) -> None:
    source = case("text-ids-become-int/digits.parquet")
    run, bundle, output = tmp_path / "run", tmp_path / "bundle", tmp_path / "scores.parquet"
    options = ["--preset", "tiny", "--layers", 1, "--epochs", 1, "--threads", 1]
    commands.done("train", "--data", source, "--run", run, *options)
    assert export.main(["--run", str(run), "--out", str(bundle)]) == 0
    assert scored(commands, bundle, source, output) == (pa.string(), pa.string())
    state = tmp_path / "state"
    commands.done("import", "--bundle", bundle, "--state", state, "--input", source)
    catalog = {str(n): f"title {n}" for n in range(1, 41)}
    with running_server(bundle, state) as (address, _), Client(address, timeout=30) as client:
        answer = client.recommend("1102", k=3)
        assert all(item.item_id in catalog for item in answer)


def test_two_days_are_scored_with_one_type_of_user(commands: Commands, bundle_of: Rename, tmp_path: Path) -> None:
    bundle = bundle_of([f"{n:04}" for n in range(1, TINY_ITEMS + 1)])
    days = [case(f"id-type-differs-from-file-to-file/{name}.csv") for name in ("zeros", "zeros_day2")]
    outputs = [tmp_path / f"{n}.parquet" for n in range(2)]
    for day, output in zip(days, outputs, strict=True):
        assert scored(commands, bundle, day, output) == (pa.string(), pa.string())
    assert len(pa.concat_tables([pq.read_table(one) for one in outputs])) == 240 * 5


# -- the bundle decides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("users", [["1", "2"], ["001", "2"], ["a", "7"], ["12345678901234567890"]])
def test_a_bundle_of_text_ids_gives_text_for_every_file(
    commands: Commands, digits_bundle: Path, tmp_path: Path, users: list[str]
) -> None:
    path = log_file(tmp_path, "user_id,item_id\n" + "".join(f"{user},{item}\n" for user in users for item in "345"))
    output = tmp_path / "scores.parquet"
    assert scored(commands, digits_bundle, path, output) == (pa.string(), pa.string())
    assert sorted(scores(output)) == sorted(users)


@pytest.mark.parametrize("users", [["a", "b"], ["007"], ["7", "x"]])
def test_a_bundle_of_integers_names_users_that_are_none(
    commands: Commands, bundle_of: Rename, tmp_path: Path, users: list[str]
) -> None:
    bundle = bundle_of(DIGITS, user_ids="integer", item_ids="text")
    path = log_file(tmp_path, "user_id,item_id\n" + "".join(f"{user},{item}\n" for user in users for item in "345"))
    run = ("score", "--bundle", bundle, "--input", path, "--output", tmp_path / "scores.parquet")
    said = commands.runtime(*run)
    assert said.code == 2
    assert any(repr(user) in said.err for user in users if user != "7")
    _, asked = commands.cured({"--user-ids": "text"}, *run)
    assert asked == ["--user-ids"]
    assert list(scores(tmp_path / "scores.parquet")) == users


def test_training_on_the_same_ids_gives_the_type_of_the_file(commands: Commands, tmp_path: Path) -> None:
    rows = [(str(1000 + u), str(n), T + n) for u in range(6) for n in range(1, 8)]
    text = log_file(tmp_path, "user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    lines = [{"user_id": u, "item_id": int(i), "timestamp": t} for u, i, t in rows]
    mixed = log_file(tmp_path, "".join(json.dumps(line) + "\n" for line in lines), "log.jsonl")
    users, items, times = zip(*rows, strict=True)
    strings = parquet_log(tmp_path, user_id=users, item_id=items, timestamp=times)
    for path, expected in ((text, ("integer", "integer")), (mixed, ("text", "integer")), (strings, ("text", "text"))):
        report = commands.dry_train(path)
        assert (report["user_ids"], report["item_ids"]) == expected


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize(
    ("ids", "expected"),
    [(["1", "22", "-3"], "integer"), (["007", "7"], "text"), (["7", "x"], "text"), (["9223372036854775807"], "integer"),
     (["9223372036854775808"], "text"), (["12345678901234567890"], "text"), (["+7", "8"], "text"), (["-0"], "text"),
     (["1e3"], "text"), (["0x1F"], "text"), (["\uff17"], "text"), (["1_000"], "text"), (["null", "NA", "nan"], "text")],
)  # fmt: skip
def test_ids_of_text_files_are_integers_only_if_all_are(
    tmp_path: Path, column: str, ids: list[str], expected: str
) -> None:
    other = "item_id" if column == "user_id" else "user_id"
    path = log_file(tmp_path, f"{column},{other}\n" + "".join(f"{one},k\n" for one in ids))
    found, report = read(path)
    assert getattr(report, column + "s") == expected
    assert [*found] == ids if column == "user_id" else [item for item, _ in found["k"]] == ids


@pytest.mark.parametrize("columns", ["user_id,item_id", "item_id,user_id"])
@pytest.mark.parametrize("forms", [("7", "7.0"), ("7.0", "8"), ("12", "7.00"), ("7.0", "8.0")])
def test_whole_numbers_in_two_forms_are_refused_by_name(tmp_path: Path, columns: str, forms: tuple[str, str]) -> None:
    path = log_file(tmp_path, f"{columns}\n" + "".join(f"{one},k\n" for one in (*forms, *forms)))
    error = refused(path)
    assert columns.split(",", maxsplit=1)[0] in error.cause
    assert forms[1] in error.cause or forms[0] in error.cause


def test_one_column_of_two_files_is_one_column(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    log_file(folder, "user_id,item_id\n7,k\n", "a.csv")
    log_file(folder, "user_id,item_id\n7.0,k\n", "b.csv")
    assert "user_id" in refused(folder).cause


@pytest.mark.parametrize("text", [" a", "a ", "  a  ", '" a"', "\u00a0a"])
def test_blanks_around_ids_make_no_second_user_and_are_counted(tmp_path: Path, text: str) -> None:
    found, report = read(log_file(tmp_path, f"user_id,item_id,timestamp\na,1,{T}\n{text},2,{T + 1}\n"))
    assert found == {"a": [("1", T), ("2", T + 1)]}
    assert report.trimmed_ids == 1


def test_blanks_around_numbers_do_not_make_them_text(tmp_path: Path) -> None:
    found, report = read(log_file(tmp_path, f"user_id,item_id,timestamp\n7,1,{T}\n 7, 2,{T + 1}\n"))
    assert (list(found), report.user_ids, report.item_ids) == (["7"], "integer", "integer")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_text_of_digits_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    ids = pa.array(["7", "8"], kind)
    found, report = read(parquet_log(tmp_path, user_id=ids, item_id=ids, timestamp=[T, T + 1]))
    assert (report.user_ids, report.item_ids, [*found]) == ("text", "text", ["7", "8"])


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint32(), pa.int64(), pa.uint64()])
def test_parquet_integers_are_integers(tmp_path: Path, kind: pa.DataType) -> None:
    ids = pa.array([7, 8], kind)
    assert read(parquet_log(tmp_path, user_id=ids, item_id=ids))[1].user_ids == "integer"


def test_parquet_floats_are_no_ids(tmp_path: Path) -> None:
    assert "user_id" in refused(parquet_log(tmp_path, user_id=[7.0, 8.0], item_id=[1, 2])).cause


def test_json_keeps_text_and_numbers_apart(tmp_path: Path) -> None:
    lines = [json.dumps({"user_id": "7", "item_id": n, "timestamp": T + n}) for n in (1, 2)]
    report = read(log_file(tmp_path, "\n".join(lines), "log.jsonl"))[1]
    assert (report.user_ids, report.item_ids) == ("text", "integer")
    mixed = [json.dumps({"user_id": user, "item_id": 1}) for user in ("7", 7)]
    error = refused(log_file(tmp_path, "\n".join(mixed), "mixed.jsonl"))
    assert "user_id" in error.cause


@pytest.mark.parametrize("ids", ["text", "integer"])
def test_the_type_can_be_given(tmp_path: Path, ids: str) -> None:
    path = log_file(tmp_path, "user_id,item_id\n7,1\n8,2\n")
    report = read(path, LogOptions(user_ids=ids, item_ids=ids))[1]  # type: ignore[arg-type]
    assert (report.user_ids, report.item_ids) == (ids, ids)
    bad = log_file(tmp_path, "user_id,item_id\n7,1\n007,2\n", "bad.csv")
    if ids == "integer":
        error = refused(bad, LogOptions(user_ids="integer"))
        assert "'007'" in error.cause
        assert "line 3" in error.cause


def test_an_import_keeps_ids_of_twenty_digits_apart(commands: Commands, digits_bundle: Path, tmp_path: Path) -> None:
    users = ["12345678901234567890", "12345678901234567891", "1234567890123456789"]
    path = log_file(tmp_path, "user_id,item_id\n" + "".join(f"{user},5\n" for user in users))
    commands.done("import", "--bundle", digits_bundle, "--state", tmp_path / "state", "--input", path)
    assert stored(tmp_path / "state").keys() == set(users)
