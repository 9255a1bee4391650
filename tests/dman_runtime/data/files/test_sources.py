"""Where tables come from: files, folders, patterns and archives, and what is said about those that are not read."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_files import packed, read, write_bytes

from dman_runtime.data.files.sources import find_sources
from dman_runtime.data.tables import open_tables
from dman_runtime.errors import InputError

CSV = b"user_id,item_id\na,1\nb,2\n"
ROWS = [("a", "1"), ("b", "2")]


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as raised:
        read(path)
    return str(raised.value)


def write(folder: Path, **contents: bytes) -> None:
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# -- compression -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compression", "words"), [("gz", "gzip"), ("bz2", "bzip2"), ("zst", "zstd"), ("zip", "zip"), ("", "header")]
)
def test_compression_is_found_by_content_whatever_the_name(tmp_path: Path, compression: str, words: str) -> None:
    named = write_bytes(tmp_path / "log.csv", CSV, compression)
    (tmp_path / "renamed.csv").write_bytes(named.read_bytes())
    for path in (named, tmp_path / "renamed.csv"):
        assert read(path) == ROWS
        assert words in open_tables(path).files[0].dialect


@pytest.mark.parametrize("compression", ["gz", "bz2", "zst", "zip"])
def test_truncated_archive_is_an_error_and_never_fewer_rows(tmp_path: Path, compression: str) -> None:
    whole = packed(CSV + b"".join(b"user-%d,%d\n" % (n, n * n) for n in range(20_000)), compression)
    for size in (len(whole) // 2, len(whole) - 1, len(whole) - 5):
        path = tmp_path / f"log.csv.{compression}"
        path.write_bytes(whole[:size])
        assert "cannot be read" in error_of(path)
        assert "complete" in error_of(path)


@pytest.mark.parametrize("compression", ["gz", "bz2", "zst"])
def test_archives_after_each_other_are_all_read(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"log.csv.{compression}"
    path.write_bytes(packed(CSV, compression) + packed(b"c,3\n", compression))
    assert read(path) == [*ROWS, ("c", "3")]
    path.write_bytes(packed(CSV, compression) + b"garbage")
    assert "cannot be read" in error_of(path)


def test_compressed_parquet_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"user_id": ["a"], "n": [1]}), buffer)
    assert read(write_bytes(tmp_path / "log.parquet", buffer.getvalue(), "gz")) == [("a", 1)]
    assert read(zipped(tmp_path / "x.zip", {"log.parquet": buffer.getvalue()})) == [("a", 1)]


# -- zip -------------------------------------------------------------------------------------------------------------


def test_every_data_file_of_a_zip_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    members = {
        "set/part-10.csv": b"user_id,item_id\nb,2\n",
        "set/part-2.csv.gz": packed(b"user_id,item_id\na,1\n", "gz"),
        "set/README": b"hello",
        "set/logo.png": b"x",
        "set/empty.csv": b"",
        "__MACOSX/set/._part-2.csv": b"x",
    }
    path = zipped(tmp_path / "log.zip", members)
    tables = open_tables(path)
    assert read(path) == ROWS
    assert [file.path for file in tables.files] == [f"{path}: set/part-2.csv.gz", f"{path}: set/part-10.csv"]
    assert tables.ignored == [
        f"{path}: __MACOSX/set/._part-2.csv (hidden)",
        f"{path}: set/README (unknown extension)",
        f"{path}: set/empty.csv (empty)",
        f"{path}: set/logo.png (unknown extension)",
    ]
    assert "gzip in zip" in tables.files[0].dialect


def test_zip_without_data_names_its_members(tmp_path: Path) -> None:
    assert "README (unknown extension)" in error_of(zipped(tmp_path / "x.zip", {"README": b"x"}))


def test_damaged_member_is_an_error(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"log.csv": CSV * 100})
    content = bytearray(path.read_bytes())
    content[45] ^= 0xFF  # in the deflated data
    path.write_bytes(content)
    assert "cannot be read" in error_of(path)


# -- folders and patterns --------------------------------------------------------------------------------------------


def test_spark_output_is_read_in_natural_order_and_its_other_files_are_named(tmp_path: Path) -> None:
    for number, user in ((2, "a"), (10, "b")):
        day = tmp_path / f"date=2024-01-0{number // 5 + 1}"
        day.mkdir()
        write(day, **{f"part-{number}.csv": b"user_id,item_id\n" + f"{user},{number}\n".encode()})
        write(day, **{f".part-{number}.csv.crc": b"x"})
    write(tmp_path, _SUCCESS=b"", notes=b"x")
    write(tmp_path, **{"part-3.csv": b"", ".hidden.csv": b"x"})
    tables = open_tables(tmp_path)
    assert read(tmp_path) == [("a", "2"), ("b", "10")]
    assert [Path(file.path).name for file in tables.files] == ["part-2.csv", "part-10.csv"]
    assert sorted(Path(name).name for name in tables.ignored) == [
        ".hidden.csv (hidden)",
        ".part-10.csv.crc (checksum)",
        ".part-2.csv.crc (checksum)",
        "_SUCCESS (marker)",
        "notes (unknown extension)",
        "part-3.csv (empty)",
    ]


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_folders_of_each_format_are_read(tmp_path: Path, kind: str) -> None:
    for number in (1, 2, 11):
        path = tmp_path / f"part-{number}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"user_id": [f"u{number}"]}), path)
        else:
            path.write_text(f"user_id\nu{number}\n" if kind == "csv" else f'{{"user_id": "u{number}"}}\n')
    assert read(tmp_path) == [("u1",), ("u2",), ("u11",)]


def test_part_files_without_extension_are_read(tmp_path: Path) -> None:
    write(tmp_path, **{"part-00000": CSV})
    assert read(tmp_path) == ROWS


def test_patterns_name_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "day-1").mkdir()
    write(tmp_path / "day-1", **{"b.csv": b"user_id,item_id\nb,2\n"})
    write(tmp_path, **{"day-0.log": b"user_id,item_id\na,1\n", "other.csv": b"x"})
    assert read(tmp_path / "day-*") == ROWS
    assert "no file matches; check the pattern" in error_of(tmp_path / "night-*")


def test_file_whose_name_is_a_pattern_is_that_file(tmp_path: Path) -> None:
    write(tmp_path, **{"log[1].csv": CSV})
    assert read(tmp_path / "log[1].csv") == ROWS


def test_links_in_circles_end(tmp_path: Path) -> None:
    write(tmp_path, **{"log.csv": CSV})
    (tmp_path / "again").symlink_to(tmp_path)
    assert read(tmp_path) == ROWS


def test_linked_folders_are_read(tmp_path: Path) -> None:
    for name in ("data", "log"):
        (tmp_path / name).mkdir()
    write(tmp_path / "data", **{"log.csv": CSV})
    (tmp_path / "log" / "linked").symlink_to(tmp_path / "data")
    assert read(tmp_path / "log") == ROWS


def test_folder_with_nothing_to_read_is_refused(tmp_path: Path) -> None:
    assert "no file in it can be read; give text" in error_of(tmp_path)
    write(tmp_path, _SUCCESS=b"")
    assert "_SUCCESS (marker)" in error_of(tmp_path)


def test_files_with_other_columns_are_named_both(tmp_path: Path) -> None:
    write(tmp_path, **{"a.csv": CSV, "b.csv": b"item_id,user_id\n3,c\n"})
    assert read(tmp_path) == [*ROWS, ("c", "3")]  # another order is fine
    write(tmp_path, **{"c.csv": b"user_id,thing\nd,4\n"})
    message = error_of(tmp_path)
    assert f"{tmp_path / 'c.csv'}: has other columns than {tmp_path / 'a.csv'}" in message
    assert "user_id, thing instead of user_id, item_id" in message


# -- what is no table ------------------------------------------------------------------------------------------------


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.csv").endswith("no.csv: no such file; check the path")
    write(tmp_path, **{"empty.csv": b""})
    assert "the file is empty" in error_of(tmp_path / "empty.csv")
    write(tmp_path, **{"empty.csv.gz": packed(b"", "gz")})
    assert "the file is empty" in error_of(tmp_path / "empty.csv.gz")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, **{"log.csv": CSV})
    (tmp_path / "log.csv").chmod(0)
    assert "Permission denied" in error_of(tmp_path / "log.csv")


def test_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.csv")
    assert "is not a regular file" in error_of(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"\xfd7zXZ\0", "an xz file"), (b"SQLite format 3\0", "an SQLite database"), (b"7z\xbc\xaf\x27", "a 7z archive")],
)
def test_foreign_files_are_refused_by_name(tmp_path: Path, content: bytes, what: str) -> None:
    write(tmp_path, **{"log.csv": content + bytes(100)})
    assert f"is {what}" in error_of(tmp_path / "log.csv")


def test_tar_archive_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, **{"log.csv": CSV})
    with tarfile.open(tmp_path / "log.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "log.csv", "log.csv")
    assert "is a tar archive; unpack it" in error_of(tmp_path / "log.tar.gz")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"log.{kind}"
    if kind == "csv":
        path.write_bytes(CSV)
    else:
        pq.write_table(pa.table({"user_id": ["a"] * 300_000}), path)
    batches = open_tables(path).batches(["user_id"])
    if kind == "parquet":
        next(batches)
    (source,), _ = find_sources(path)
    with pytest.raises(InputError, match="changed while it was read"), source.open() as (stream, _):
        stream.read(5)
        with path.open("ab") as file:
            file.write(b"c,3\n")
    if kind == "parquet":
        with pytest.raises(InputError, match="changed while it was read"):
            list(batches)
