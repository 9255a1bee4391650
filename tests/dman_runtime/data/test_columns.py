"""Ids keep their type: one for the whole log, decided by its form, and never two users out of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from log_files import HEADER, histories, parquet_log, text_log

from dman_runtime.data.interactions import Interactions
from dman_runtime.data.log_options import LogOptions
from dman_runtime.data.logs import open_log
from dman_runtime.errors import InputError

START = 1_600_000_000


def log_of(folder: Path, ids: list[str]) -> Path:
    """A text log whose users and items have these ids."""
    rows = [f'"{one}","{one}",{START + n}' for n, one in enumerate(ids)]
    return text_log(folder, HEADER + "\n".join(rows) + "\n")


def read(path: Path, *, max_rows: int | None = None, **options: str) -> tuple[list[Interactions], dict[str, Any]]:
    with open_log(path, LogOptions(**options), max_rows=max_rows) as log:  # type: ignore[arg-type]
        parts = list(log.parts())
        return parts, log.report.as_dict()


@pytest.mark.parametrize(
    ("ids", "integer", "ordered"),
    [
        (["10", "9", "-3", "0"], True, ["-3", "0", "9", "10"]),
        (["9223372036854775807", "1"], True, ["1", "9223372036854775807"]),
        (["9223372036854775808", "1"], False, ["1", "9223372036854775808"]),
        (["18446744073709551616", "9"], False, ["18446744073709551616", "9"]),
        (["10", "9", "007"], False, ["007", "10", "9"]),
        (["1", "-0"], False, ["-0", "1"]),
        (["1", "+2"], False, ["+2", "1"]),
        (["b", "a", "NA", "null"], False, ["NA", "a", "b", "null"]),
        (["1.0", "1.5", "v2"], False, ["1.0", "1.5", "v2"]),
        (["1e5", "2"], False, ["1e5", "2"]),
        (["1_000", "2"], False, ["1_000", "2"]),
        (["٣", "2"], False, ["2", "٣"]),
    ],
)
@pytest.mark.parametrize("max_rows", [None, 1], ids=["whole", "parts"])
def test_ids_of_text_files_are_integers_only_if_all_are(
    tmp_path: Path, ids: list[str], integer: bool, ordered: list[str], max_rows: int | None
) -> None:
    parts, report = read(log_of(tmp_path, ids), max_rows=max_rows)
    assert {part.integer_user_ids for part in parts} == {part.integer_item_ids for part in parts} == {integer}
    assert sorted(id for part in parts for id in part.user_ids) == sorted(ids)
    assert report["user_ids"] == report["item_ids"] == ("integer" if integer else "text")
    if max_rows is None:
        assert (parts[0].user_ids, parts[0].item_ids) == (ids, ordered)


def test_one_text_id_late_in_a_log_makes_all_of_them_text_without_losing_any(tmp_path: Path) -> None:
    ids = [str(n) for n in range(300_000)]
    path = text_log(tmp_path, HEADER + "".join(f"{one},{one},5\n" for one in [*ids, "007"]))
    (whole,), report = read(path)
    assert not whole.integer_user_ids
    assert whole.user_ids == [*ids, "007"]
    assert any("all user ids are text, although most are integers: '007'" in text for text in report["warnings"])
    parts, _ = read(path, max_rows=50_000)
    assert sorted(id for part in parts for id in part.user_ids) == sorted([*ids, "007"])


@pytest.mark.parametrize("ids", [["7", "7.0"], ["7.0", "8"], ["7", "abc", "7.0"], ["-1.00", "5"]])
@pytest.mark.parametrize("max_rows", [None, 1], ids=["whole", "parts"])
def test_whole_numbers_in_two_forms_are_refused_by_name(tmp_path: Path, ids: list[str], max_rows: int | None) -> None:
    with pytest.raises(InputError, match=r"user_id holds -?\d+ and -?\d+\.0+: whole numbers in two forms"):
        read(log_of(tmp_path, ids), max_rows=max_rows)


def test_integers_that_became_floats_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"user_id holds numbers such as 1\.0; write the ids as integers or text"):
        read(log_of(tmp_path, ["1.0", "2.0"]))
    with pytest.raises(InputError, match=r"column 'user_id' has type double; write the ids as integers or text"):
        read(parquet_log(tmp_path, user_id=[1.0], item_id=[1]))


@pytest.mark.parametrize("blank", [" {}", "{} ", "  {}  ", "\u00a0{}", "{}\u3000", "\u2028{}", "{}\t"])
def test_blanks_around_ids_never_make_a_second_user(tmp_path: Path, blank: str) -> None:
    (whole,), report = read(log_of(tmp_path, ["a", blank.format("a"), "a"]))
    assert whole.user_ids == ["a"]
    assert report["trimmed_ids"] == 2
    assert "blanks around user ids were removed: 1" in report["warnings"]
    (whole,), _ = read(log_of(tmp_path, ["5", blank.format("5"), "7"]))
    assert (whole.user_ids, whole.integer_user_ids) == (["5", "7"], True)


@pytest.mark.parametrize(
    ("bad", "problem", "cause"),
    [
        ("", "user_id has no value", "without user id"),
        ("   ", "user_id has no value", "without user id"),
        ("a\x07", r"user_id 'a\x07' holds control characters", "with an unusable user id"),
        ("a\x1f", r"user_id 'a\x1f' holds control characters", "with an unusable user id"),
        ("\u0085a\u0085b", "holds control characters", "with an unusable user id"),
        ("é" * 201, "is longer than 400 bytes", "with an unusable user id"),
    ],
)
def test_unusable_ids_are_bad_rows(tmp_path: Path, bad: str, problem: str, cause: str) -> None:
    path = text_log(tmp_path, HEADER + f"a,1,{START}\n{bad},2,{START}\nb,3,{START}\n")
    with pytest.raises(InputError) as raised:
        read(path)
    assert f"line 3: {problem}" in raised.value.cause or (
        "line 3: " in raised.value.cause and problem in raised.value.cause
    )
    assert raised.value.parameter == "bad_rows"
    (whole,), report = read(path, bad_rows="skip")
    assert whole.user_ids == ["a", "b"]
    assert (report["rows"], report["events"], report["left_out"]) == (3, 2, {cause: 1})
    assert "line 3" in report["bad_rows"][0]["place"]
    assert any("cannot be used: 1 of 3 rows (33.3%)" in text for text in report["warnings"])


def test_a_log_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    path = text_log(tmp_path, HEADER + ",1,5\n,2,5\n")
    with pytest.raises(InputError, match="no row can be used"):
        read(path, bad_rows="skip")


# -- files with types ------------------------------------------------------------------------------------------------


def test_strings_of_parquet_stay_strings(tmp_path: Path) -> None:
    digits = ["1000", "2"]
    for column in (pa.array(digits), pa.array(digits, pa.large_string()), pa.array(digits).dictionary_encode()):
        (whole,), report = read(parquet_log(tmp_path, user_id=column, item_id=[1, 2]))
        assert (whole.user_ids, whole.integer_user_ids, whole.integer_item_ids) == (digits, False, True)
        assert report["user_ids"] == "text"


@pytest.mark.parametrize("kind", ["int8", "int32", "uint32", "int64"])
def test_integers_of_any_width_are_integers(tmp_path: Path, kind: str) -> None:
    (whole,), _ = read(parquet_log(tmp_path, user_id=pa.array([9, 1], kind), item_id=pa.array([7, 3], kind)))
    assert (whole.user_ids, whole.item_ids, whole.integer_user_ids) == (["9", "1"], ["3", "7"], True)


def test_integers_beyond_64_bits_are_text(tmp_path: Path) -> None:
    (whole,), _ = read(parquet_log(tmp_path, user_id=pa.array([2**64 - 1, 5], pa.uint64()), item_id=[1, 2]))
    assert (whole.user_ids, whole.integer_user_ids) == ([str(2**64 - 1), "5"], False)


def test_missing_ids_of_parquet_are_bad_rows(tmp_path: Path) -> None:
    for ids in (pa.array([1, None, 3]), pa.array(["1", None, "3"])):
        path = parquet_log(tmp_path, user_id=ids, item_id=[1, 2, 3])
        with pytest.raises(InputError, match="row 2: user_id has no value"):
            read(path)
        (whole,), report = read(path, bad_rows="skip")
        assert whole.user_ids == ["1", "3"]
        assert report["left_out"] == {"without user id": 1}


# -- what a bundle decided ---------------------------------------------------------------------------------------------


def test_ids_follow_what_was_decided_before_in_every_file(tmp_path: Path) -> None:
    for ids in (["00103", "00104"], ["12447", "12448"]):
        path = log_of(tmp_path, ids)
        (whole,), _ = read(path, user_ids="text")
        assert (whole.user_ids, whole.integer_user_ids, whole.integer_item_ids) == (
            ids,
            False,
            ids == ["12447", "12448"],
        )
    (whole,), _ = read(parquet_log(tmp_path, user_id=["7"], item_id=["8"]), user_ids="integer", item_ids="integer")
    assert (whole.user_ids, whole.item_ids, whole.integer_user_ids, whole.integer_item_ids) == (
        ["7"],
        ["8"],
        True,
        True,
    )
    (whole,), _ = read(parquet_log(tmp_path, user_id=[7], item_id=[8]), user_ids="text", item_ids="text")
    assert (whole.user_ids, whole.item_ids, whole.integer_user_ids, whole.integer_item_ids) == (
        ["7"],
        ["8"],
        False,
        False,
    )


@pytest.mark.parametrize("bad", ["u7", "007", "7.0", str(2**63)])
def test_ids_that_contradict_what_was_decided_are_refused_by_name(tmp_path: Path, bad: str) -> None:
    with pytest.raises(
        InputError, match=rf"line 3: user_id '{bad}' is no integer of 64 bits, and user ids are"
    ) as raised:
        read(log_of(tmp_path, ["5", bad]), user_ids="integer")
    assert raised.value.parameter == "user_ids"


# -- exact repeats -----------------------------------------------------------------------------------------------------

REPEATS = [("a", "1", 5), ("a", "2", 5), ("a", "1", 5), ("b", "1", 5), ("a", "1", 6), ("a", "1", 5)]


def repeats_log(folder: Path, factor: int = 1) -> Path:
    return text_log(folder, HEADER + "".join(f"{u},{i},{START + t * factor}\n" for u, i, t in REPEATS))


@pytest.mark.parametrize("max_rows", [None, 1], ids=["whole", "parts"])
def test_exact_repeats_are_left_out_and_counted(tmp_path: Path, max_rows: int | None) -> None:
    parts, report = read(repeats_log(tmp_path), max_rows=max_rows)
    found = {user: history for part in parts for user, history in histories(part).items()}
    assert found == {"a": [("1", START + 5), ("2", START + 5), ("1", START + 6)], "b": [("1", START + 5)]}
    assert (report["rows"], report["events"], report["left_out"]) == (6, 4, {"exact repeats": 2})
    if max_rows is None:
        assert any(text.endswith("(--exact-repeats)") for text in report["warnings"])


def test_exact_repeats_are_kept_on_request_and_where_times_are_dates(tmp_path: Path) -> None:
    (whole,), report = read(repeats_log(tmp_path), exact_repeats="keep")
    assert len(whole) == report["events"] == 6
    path = text_log(tmp_path, HEADER + "a,1,2020-01-01\na,1,2020-01-01\n")
    assert len(read(path)[0][0]) == 2
    assert len(read(path, exact_repeats="drop")[0][0]) == 1
    assert len(read(text_log(tmp_path, "user_id,item_id\na,1\na,1\n"))[0][0]) == 2  # no time: nothing to tell by


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff"])
    for column in (broken, pa.StringArray.from_buffers(2, *broken.buffers()[1:])):
        with pytest.raises(InputError, match="column 'user_id' holds text that is not UTF-8"):
            read(parquet_log(tmp_path, user_id=column, item_id=[1, 2]))
