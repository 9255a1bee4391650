"""Formats that people have: read as they are, or with the option that the error names."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases.commands import Commands, Read, case, log_file, read, refused, stored
from conftest import MOVIELENS

from dman_runtime.data.log_options import ANY_LOG, LogOptions

T = 1_600_000_000
ROWS = [(f"u{n % 3}", f"i{n}", T + n) for n in range(7)]
EXPECTED: Read = {user: [(i, t) for u, i, t in ROWS if u == user] for user in ("u0", "u1", "u2")}
NUMBERS = [(user[1:], item[1:], time) for user, item, time in ROWS]
EXPECTED_NUMBERS: Read = {u[1:]: [(i[1:], t) for i, t in events] for u, events in EXPECTED.items()}
NAMES = ("user_id", "item_id", "timestamp")
HEADER = "user_id,item_id,timestamp\n"
NO_HEADER = replace(ANY_LOG, header=False)


def csv_of(rows: list[tuple[str, str, int]] = ROWS, header: str = HEADER) -> str:
    return header + "".join(f"{user},{item},{time}\n" for user, item, time in rows)


def headerless(user: int, item: int, time: int | None = None) -> LogOptions:
    time_column = "none" if time is None else str(time)
    return replace(NO_HEADER, user_column=str(user), item_column=str(item), time_column=time_column)


# -- the cases ---------------------------------------------------------------------------------------------------------

AS_THEY_ARE = ("iso_UTC_word.csv", "iso_trailing_space.csv", "semicolon.csv", "x.csv.bz2", "x.jsonl", "x.zip")
FORMATS: dict[str, LogOptions] = dict.fromkeys((*AS_THEY_ARE, "trailing.csv", "recbole.inter"), ANY_LOG)
FORMATS |= {"emptyuser.csv": replace(ANY_LOG, bad_rows="skip"), "u.data": headerless(1, 2, 4)}
FORMATS |= {"yoo-clicks.dat": headerless(1, 3, 2), "sasrec.txt": headerless(1, 2)}
IN_NUMBERS = ("u.data", "yoo-clicks.dat", "sasrec.txt", "recbole.inter")


def base(*, numbers: bool = False, timed: bool = True) -> Read:
    """The log that all of the formats hold: its ids in text, or in numbers from 1 on."""

    def name(text: str) -> str:
        return str(int(text[1:]) + 1) if numbers else text

    lines = case("formats-not-taken/x.jsonl").read_text().splitlines()
    found: Read = {}
    for user, item, time in sorted((tuple(json.loads(line).values()) for line in lines), key=lambda row: row[2]):
        found.setdefault(name(user), []).append((name(item), time if timed else 0))
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_of_others_are_read(name: str) -> None:
    found, report = read(case(f"formats-not-taken/{name}"), FORMATS[name])
    assert found == base(numbers=name in IN_NUMBERS, timed=name != "sasrec.txt")
    assert report.events == 420


def test_titles_with_backslashes_before_their_quotes_are_read() -> None:
    found, report = read(case("formats-not-taken/backslash.csv"))
    assert {user: sorted(item for item, _ in events) for user, events in found.items()} == {
        user: sorted(item for item, _ in events) for user, events in base().items()
    }
    assert "backslash" in report.files[0]["dialect"]


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("sasrec.txt", {"--separator": "blank", "--user-column": 1, "--item-column": 2, "--time-column": "none"}),
        ("u.data", {"--user-column": 1, "--item-column": 2, "--time-column": 4}),
        ("yoo-clicks.dat", {"--user-column": 1, "--item-column": 3, "--time-column": 2}),
        ("emptyuser.csv", {"--bad-rows": "skip"}),
        ("semicolon.csv", {}),
    ],
)
def test_their_remedies_cure(
    commands: Commands, tiny_bundle: Path, tmp_path: Path, name: str, answers: dict[str, object]
) -> None:
    path = case(f"formats-not-taken/{name}")
    run = ("import", "--bundle", tiny_bundle, "--state", tmp_path / "state", "--input", path, "--max-unknown", 1)
    commands.cured(answers, *run)
    assert sum(map(len, stored(tmp_path / "state").values())) == 420


def test_a_row_without_a_user_is_named_and_can_be_skipped() -> None:
    path = case("formats-not-taken/emptyuser.csv")
    error = refused(path)
    assert "line 422" in error.cause
    assert error.parameter == "bad_rows"


# -- compression -------------------------------------------------------------------------------------------------------


def zipped(content: bytes, name: str = "inside.csv") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
    "zip": zipped,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.jsonl", "log.txt"])
def test_compressed_files_are_read_like_plain_ones(tmp_path: Path, compression: str, name: str) -> None:
    text = csv_of() if name.endswith("csv") else csv_of().replace(",", "\t")
    if name.endswith("jsonl"):
        lines = [dict(zip(NAMES, row, strict=True)) for row in ROWS]
        text = "\n".join(json.dumps(line) for line in lines)
    content = zipped(text.encode(), name) if compression == "zip" else COMPRESSIONS[compression](text.encode())
    path = tmp_path / f"{name}.{compression}"
    path.write_bytes(content)
    found, report = read(path)
    assert found == EXPECTED
    assert report.rows == len(ROWS)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_compressed_file_that_was_cut_is_refused(tmp_path: Path, compression: str) -> None:
    content = COMPRESSIONS[compression](
        csv_of([(f"u{n * 7919}", f"i{n * 104729}", T + n) for n in range(500)]).encode()
    )
    path = tmp_path / f"log.csv.{compression}"
    for size in (len(content) // 2, len(content) - 3, 5):
        path.write_bytes(content[:size])
        assert str(path) in refused(path).cause


def test_gzip_files_that_were_put_together_are_read_to_the_end(tmp_path: Path) -> None:
    lines = csv_of().splitlines(keepends=True)
    path = tmp_path / "log.csv.gz"
    path.write_bytes(b"".join(gzip.compress("".join(part).encode()) for part in (lines[:3], lines[3:])))
    assert read(path)[0] == EXPECTED


def test_an_archive_with_other_files_says_what_it_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "log.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/log.csv", csv_of())
        archive.writestr("__MACOSX/._log.csv", b"\0\1")
        archive.writestr("data/README", "about")
    found, report = read(path)
    assert found == EXPECTED
    assert any("README" in one for one in report.ignored_files)


# -- several files -----------------------------------------------------------------------------------------------------


def parts(folder: Path, *, suffix: str = ".csv", size: int = 3) -> Path:
    for n in range(0, len(ROWS), size):
        log_file(folder, csv_of(ROWS[n : n + size]), f"part-{n:05}{suffix}")
    return folder


def test_a_folder_is_one_log_in_the_order_of_its_names(tmp_path: Path) -> None:
    found, report = read(parts(tmp_path / "log"))
    assert found == EXPECTED
    assert [one["rows"] for one in report.files] == [3, 3, 1]


def test_a_glob_is_one_log(tmp_path: Path) -> None:
    parts(tmp_path / "log")
    log_file(tmp_path / "log", "other", "notes.txt")
    assert read(tmp_path / "log" / "part-*.csv")[0] == EXPECTED
    assert "no-*.csv" in refused(tmp_path / "log" / "no-*.csv").cause


def test_without_times_the_names_of_the_files_order(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    for name, item in (("b.csv", "2"), ("a.csv", "1"), ("c.csv", "3")):
        log_file(folder, f"user_id,item_id\nu,{item}\n", name)
    assert [item for item, _ in read(folder)[0]["u"]] == ["1", "2", "3"]


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "json", "snappy.parquet"])
def test_spark_output_is_read_without_its_side_files(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "log.csv"
    folder.mkdir()
    for n, rows in enumerate((ROWS[:4], [], ROWS[4:])):
        path = folder / f"part-{n:05}-5f2c-c000.{kind}"
        if kind.endswith("parquet"):
            columns = {name: [row[place] for row in rows] for place, name in enumerate(NAMES)}
            types = dict(zip(NAMES, (pa.string(), pa.string(), pa.int64()), strict=True))
            pq.write_table(pa.table({name: pa.array(columns[name], types[name]) for name in NAMES}), path)
        elif kind == "json":
            path.write_text("".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows))
        else:
            content = csv_of(rows).encode() if rows else b""
            path.write_bytes(gzip.compress(content) if kind == "csv.gz" else content)
        (folder / f".{path.name}.crc").write_bytes(b"crc\0\1\2")
    (folder / "_SUCCESS").touch()
    (folder / "._SUCCESS.crc").write_bytes(b"crc")
    found, report = read(folder)
    assert found == EXPECTED
    assert report.rows == len(ROWS)


def test_files_of_other_columns_are_refused_by_name(tmp_path: Path) -> None:
    folder = parts(tmp_path / "log")
    log_file(folder, "visitor,item_id,timestamp\nu0,i9,1600000009\n", "part-00009.csv")
    assert "part-00009.csv" in refused(folder).cause


def test_columns_may_stand_in_another_order_in_each_file(tmp_path: Path) -> None:
    folder = parts(tmp_path / "log", size=4)
    second = folder / "part-00004.csv"
    lines = [line.split(",") for line in second.read_text().splitlines()]
    second.write_text("".join(",".join((time, user, item)) + "\n" for user, item, time in lines))
    try:
        assert read(folder)[0] == EXPECTED
    except ValueError as error:
        assert "part-00004.csv" in str(error)


# -- known layouts -----------------------------------------------------------------------------------------------------


def test_typed_headers_of_recbole_are_read(tmp_path: Path) -> None:
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    text += "".join(f"{user}\t{item}\t4.0\t{time}\n" for user, item, time in ROWS)
    found, report = read(log_file(tmp_path, text, "ml.inter"))
    assert found == EXPECTED
    assert report.rows == len(ROWS)


def test_movielens_100k_is_read_by_numbers(tmp_path: Path) -> None:
    text = "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in NUMBERS)
    assert read(log_file(tmp_path, text, "u.data"), headerless(1, 2, 4))[0] == EXPECTED_NUMBERS


def test_movielens_1m_is_read_with_double_colons(tmp_path: Path) -> None:
    text = "".join(f"{user}::{item}::5::{time}\n" for user, item, time in NUMBERS)
    path = log_file(tmp_path, text, "ratings.dat")
    assert read(path, headerless(1, 2, 4))[0] == EXPECTED_NUMBERS


@pytest.mark.slow
def test_all_of_movielens_1m_is_read() -> None:
    path = MOVIELENS / "ratings.dat"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    report = read(path)[1]
    assert (report.rows, report.users, report.items) == (1_000_209, 6040, 3706)


def test_pairs_of_sasrec_keep_the_order_of_the_file(tmp_path: Path) -> None:
    path = log_file(tmp_path, "".join(f"{user} {item}\n" for user, item, _ in NUMBERS), "sasrec.txt")
    found, report = read(path, headerless(1, 2))
    assert found == {user: [(item, 0) for item, _ in events] for user, events in EXPECTED_NUMBERS.items()}
    assert "file" in report.order


SEPARATORS = {";": "semicolon", "|": "pipe", "\t": "tab", " ": "blanks", "::": "::", ",": "comma"}


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("name", ["log.csv", "log.txt", "log"])
def test_the_separator_is_found_and_reported_or_given(tmp_path: Path, separator: str, name: str) -> None:
    path = log_file(tmp_path, csv_of().replace(",", separator), name)
    found, report = read(path)
    assert found == EXPECTED
    assert SEPARATORS[separator] in report.files[0]["dialect"].split(", ")
    option = {"\t": "tab", " ": "blank"}.get(separator, separator)
    assert read(path, replace(ANY_LOG, separator=option))[0] == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "latin-1", "cp1252"])
def test_other_encodings_are_read_and_named(tmp_path: Path, encoding: str) -> None:
    text = csv_of([("é", "ü1", T), ("é", "ß", T + 1)])
    path = tmp_path / "log.csv"
    path.write_bytes(text.encode(encoding))
    expected = {"é": [("ü1", T), ("ß", T + 1)]}
    if encoding in ("latin-1", "cp1252"):  # nothing in the bytes tells which
        error = refused(path)
        assert error.parameter == "encoding"
        assert "line 2" in error.cause
    else:
        found, report = read(path)
        assert found == expected
        assert encoding[:6].upper().rstrip("-") in report.files[0]["dialect"]
    assert read(path, replace(ANY_LOG, encoding=encoding))[0] == expected


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    assert refused(log_file(tmp_path, csv_of()), replace(ANY_LOG, encoding="utf-99")).parameter == "encoding"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_ends_of_lines_make_no_rows(tmp_path: Path, newline: str, end: str) -> None:
    text = (csv_of().rstrip("\n") + end).replace("\n", newline)
    found, report = read(log_file(tmp_path, text))
    assert found == EXPECTED
    assert report.rows == len(ROWS)


def test_an_empty_value_at_the_end_of_every_row_is_no_column(tmp_path: Path) -> None:
    for text in (
        csv_of().replace("\n", ",\n"),
        csv_of().replace("\n", ",\n").replace(HEADER.strip() + ",", HEADER.strip()),
    ):
        assert read(log_file(tmp_path, text))[0] == EXPECTED


def test_json_lines_may_hold_more_and_in_any_order(tmp_path: Path) -> None:
    lines = [{"timestamp": t, "extra": {"a": [1]}, "item_id": i, "user_id": u} for u, i, t in ROWS]
    lines[3]["other"] = None
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    assert read(log_file(tmp_path, text, "log.jsonl"))[0] == EXPECTED
    assert read(log_file(tmp_path, text, "log.ndjson"))[0] == EXPECTED


def test_a_file_without_a_suffix_or_with_the_wrong_one_is_what_it_is(tmp_path: Path) -> None:
    users, items, times = zip(*ROWS, strict=True)
    parquet = tmp_path / "log"
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), parquet)
    assert read(parquet)[0] == EXPECTED
    assert read(Path(shutil.copy(parquet, tmp_path / "log.csv")))[0] == EXPECTED


@pytest.mark.parametrize("text", ["", "\n\n", HEADER, "\ufeff"])
def test_a_log_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    path = log_file(tmp_path, text)
    assert str(path) in refused(path).cause
