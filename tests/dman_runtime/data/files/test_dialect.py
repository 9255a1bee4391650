"""Dialects of text files: found where all lines agree, said in words, refused where they fit more than one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from table_files import NAMES, Written, read, rows_of, write_bytes, written_tables

from dman_runtime.data.log_options import LogOptions
from dman_runtime.data.tables import Tables, open_tables
from dman_runtime.errors import InputError


def table(folder: Path, text: str | bytes, name: str = "log.csv", **options: object) -> Tables:
    path = write_bytes(folder / name, text.encode() if isinstance(text, str) else text)
    return open_tables(path, LogOptions(**options))  # type: ignore[arg-type]


def refused(folder: Path, text: str | bytes, name: str = "log.csv", **options: object) -> InputError:
    with pytest.raises(InputError) as raised:
        rows_of(table(folder, text, name, **options))
    assert "\n" not in str(raised.value)
    return raised.value


# -- separators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("separator", "word"),
    [(",", "comma"), ("\t", "tab"), (";", "semicolon"), ("|", "pipe"), ("::", "::"), (" ", "blanks")],
)
def test_separator_is_found_and_said(tmp_path: Path, separator: str, word: str) -> None:
    rows = [("user_id", "item_id", "rating"), ("a", "1", "x"), ("b", "2", "y")]
    tables = table(tmp_path, "".join(separator.join(row) + "\n" for row in rows))
    assert rows_of(tables) == rows[1:]
    assert tables.names == list(rows[0])
    assert tables.files[0].dialect == f"text, {word}, quotes double, header, UTF-8"


def test_runs_of_blanks_are_one_separator(tmp_path: Path) -> None:
    text = "user_id   item_id\n  a \t 1\nbb      2  \n\nc 3\n"
    assert rows_of(table(tmp_path, text)) == [("a", "1"), ("bb", "2"), ("c", "3")]


def test_blanks_separate_only_where_nothing_else_does(tmp_path: Path) -> None:
    text = "a,1,2024-01-01 10:00\nb,2,2024-01-02 11:00\n"
    assert rows_of(table(tmp_path, text, header=False))[0] == ("a", "1", "2024-01-01 10:00")
    error = refused(tmp_path, text + "c,3\n" + "d,4,2024-01-03 12:00\n" * 3 + "c 3\n", header=False)
    assert "line 3 has 2 values instead of 3" in error.cause  # commas with a bad line, not blanks


def test_two_separators_that_fit_are_refused_until_one_is_named(tmp_path: Path) -> None:
    text = "a;1,5\nb;2,5\n"
    error = refused(tmp_path, text, header=False)
    assert "can be separated by comma (2 columns) and semicolon (2 columns)" in error.cause
    assert error.parameter == "separator"
    assert rows_of(table(tmp_path, text, header=False, separator=";")) == [("a", "1,5"), ("b", "2,5")]
    assert rows_of(table(tmp_path, text, header=False, separator=",")) == [("a;1", "5"), ("b;2", "5")]


def test_tsv_names_its_separator(tmp_path: Path) -> None:
    assert rows_of(table(tmp_path, "a,b\t1\nc,d\t2\n", "log.tsv", header=False)) == [("a,b", "1"), ("c,d", "2")]


def test_lines_without_a_common_separator_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, "a,b,c\na\na,b\nx\ny\n")
    assert "line 1 has 3 and line 2 has 1" in error.cause
    assert error.parameter == "separator"


def test_one_column_is_a_table(tmp_path: Path) -> None:
    assert rows_of(table(tmp_path, "user_id\na\nb\n")) == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("option", "text"), [("tab", "x\ty\n1\t2\n"), ("\\t", "x\ty\n1\t2\n"), ("blank", "x y\n1 2\n")]
)
def test_separators_can_be_named_in_words(tmp_path: Path, option: str, text: str) -> None:
    assert rows_of(table(tmp_path, text, separator=option)) == [("1", "2")]


def test_unknown_separator_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, "a,b\n1,2\n", separator="@")
    assert (error.parameter, error.remedy) == ("separator", "choose one of , ; | :: tab blank")


def test_separator_after_every_line_but_the_header_is_an_empty_column(tmp_path: Path) -> None:
    tables = table(tmp_path, "user_id,item_id\na,1,\nb,2,\n")
    assert (tables.names, rows_of(tables)) == (["user_id", "item_id"], [("a", "1"), ("b", "2")])
    assert "an empty last value in every line" in tables.files[0].dialect
    assert "line 4 has 3 values instead of 2" in refused(tmp_path, "u,i\na,1,\nb,2,\nc,3,x\nd,4,\n").cause
    assert "line 4 has no separator at its end" in refused(tmp_path, "u,i\na,1,\nb,2,\nc,3\nd,4,\n").cause


def test_control_character_that_stands_for_separators_is_refused(tmp_path: Path) -> None:
    assert "line 2 holds the control character 0x1f" in refused(tmp_path, "a::b\n1\x1f::2\n").cause


# -- quotes ----------------------------------------------------------------------------------------------------------


def test_lone_quotes_are_part_of_their_values(tmp_path: Path) -> None:
    text = 'user_id\titem_id\ttitle\nq0\t1\tsong\nq0\t2\t"Heroes\nq1\t3\tsong\nq1\t4\t"Heroes" 4\nq1\t5\tsong\n'
    tables = table(tmp_path, text, "log.tsv")
    assert [row[2] for row in rows_of(tables)] == ["song", '"Heroes', "song", '"Heroes" 4', "song"]
    assert "no quotes (a lone quote in line 3, column title)" in tables.files[0].dialect


def test_quotes_that_swallow_whole_rows_are_refused_with_their_lines(tmp_path: Path) -> None:
    text = 'user_id,item_id,title,n\na,1,x,1\na,2,"Heroes,2\na,3,x,3\na,4,Heroes",4\na,5,x,5\n'
    error = refused(tmp_path, text)
    assert "lines 3 to 5 are one row with line breaks in quotes, or a row each" in error.cause
    assert error.parameter == "quote"
    assert len(rows_of(table(tmp_path, text, quote="none"))) == 5
    assert rows_of(table(tmp_path, text, quote="double"))[1] == ("a", "2", "Heroes,2\na,3,x,3\na,4,Heroes", "4")


def test_line_breaks_in_quotes_are_read_where_they_cannot_be_rows(tmp_path: Path) -> None:
    text = 'user_id,note,item_id\r\n"a,b","two\nlines",1\r\n"say ""hi""",,2\r\n'
    tables = table(tmp_path, text)
    assert rows_of(tables) == [("a,b", "two\nlines", "1"), ('say "hi"', "", "2")]
    assert tables.files[0].places([0, 1]) == [f"{tables.path}: line 2", f"{tables.path}: line 4"]


def test_backslashes_before_quotes_are_found(tmp_path: Path) -> None:
    text = 'user_id,title,item_id\na,"The \\"Best\\" of 0, vol 0",1\nb,"back\\\\slash, \\n",2\n'
    tables = table(tmp_path, text)
    assert rows_of(tables) == [("a", 'The "Best" of 0, vol 0', "1"), ("b", "back\\slash, \\n", "2")]
    assert "quotes with backslash" in tables.files[0].dialect


def test_quotes_that_fit_two_ways_are_refused(tmp_path: Path) -> None:
    text = 'title,n\n"C:\\\\",1\n'  # one backslash or two
    error = refused(tmp_path, text)
    assert (error.parameter, "doubled or have a backslash" in error.cause) == ("quote", True)
    assert rows_of(table(tmp_path, text, quote="double")) == [("C:\\\\", "1")]
    assert rows_of(table(tmp_path, text, quote="backslash")) == [("C:\\", "1")]


def test_value_in_quotes_and_lone_quotes_contradict_each_other(tmp_path: Path) -> None:
    text = 'a\tb\n1\t"whole"\n2\t"lone\n3\tx\n'
    error = refused(tmp_path, text, "log.tsv")
    assert error.parameter == "quote"
    assert "line 2 has a value in quotes, and line 3, column b" in error.cause
    assert rows_of(table(tmp_path, text, "log.tsv", quote="none"))[0] == ("1", '"whole"')


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('a,b,title\n1,2,"x, y"\n3,4,12" mix\n', "line 3, column title: a lone quote"),
        ('a,b,title\n1,2,"x, y"\n3,"4"5,z\n', "line 3, column b: a quoted value that goes on after its closing quote"),
        ('a,b,title\n1,2,"x, y"\n\n3,4,"never\n5,6,z\n', "line 4, column title: a quote that is never closed"),
        ('a,b,title\n1,2,"two\nlines, and"\n3, "4",z\n', "line 4, column b: a lone quote"),
    ],
)
def test_bad_quote_is_named_by_the_line_and_column_where_its_value_begins(
    tmp_path: Path, text: str, place: str
) -> None:
    error = refused(tmp_path, text)
    assert place in error.cause
    assert (error.parameter, error.remedy) == ("quote", "read it without quotes (none), or correct it")


def test_empty_and_doubled_quotes_are_values(tmp_path: Path) -> None:
    text = 'a,b\n"",""""\n"""x""",""\n'
    assert rows_of(table(tmp_path, text)) == [("", '"'), ('"x"', "")]


# -- names -----------------------------------------------------------------------------------------------------------


def test_headerless_columns_are_numbered(tmp_path: Path) -> None:
    tables = table(tmp_path, "h1,1,16\nh1,2,17\n", header=False)
    assert (tables.names, len(rows_of(tables))) == (["1", "2", "3"], 2)
    assert "no header" in tables.files[0].dialect
    assert not tables.looks_headerless


@pytest.mark.parametrize(
    ("text", "headerless"),
    [
        ("h1,1,1600000000\nh1,2,1600000001\n", True),
        ("29,2020-09-13T20:22:01.000Z,3,0\n7,2020-09-13T14:05:23.000Z,8,0\n", True),
        ("u028,i02\nu006,i07\nu023,i00\n", True),
        ("1 1\n1 2\n", True),
        ("user_id,item_id\n1,2\n3,4\n", False),
        ("user1,item1\n7,8\n3,4\n", False),
        ("user_id,item_id\nalice,book\n", False),
    ],
)
def test_first_line_that_looks_like_a_row_is_told(tmp_path: Path, text: str, headerless: bool) -> None:
    tables = table(tmp_path, text)
    assert tables.looks_headerless == headerless
    assert tables.first_line == text.split("\n", maxsplit=1)[0].replace(" ", ",").split(",")


def test_types_of_recbole_are_taken_off_the_names(tmp_path: Path) -> None:
    tables = table(tmp_path, "user_id:token\titem_id:token\trating:float\n1\t2\t3\n", "ml.inter")
    assert tables.names == ["user_id", "item_id", "rating"]
    assert "types of RecBole taken off the names" in tables.files[0].dialect


@pytest.mark.parametrize(
    ("name", "line"), [("u.data", "196\t242\t3\t881250949\n"), ("ratings.dat", "1::1193::5::978300760\n")]
)
def test_movielens_files_have_known_columns(tmp_path: Path, name: str, line: str) -> None:
    tables = table(tmp_path, line * 3, name)
    assert tables.names == ["user_id", "item_id", "rating", "timestamp"]
    assert len(rows_of(tables)) == 3
    assert f"columns of MovieLens' {name}" in tables.files[0].dialect
    assert table(tmp_path, line * 3, name, header=False).names == ["1", "2", "3", "4"]
    separator = "\t" if "\t" in line else "::"
    assert table(tmp_path, separator.join("abcd") + "\n" + line, name).names == ["a", "b", "c", "d"]


def test_names_lose_the_blanks_around_them(tmp_path: Path) -> None:
    assert table(tmp_path, "user_id, item_id\na,1\n").names == ["user_id", "item_id"]


# -- everything ------------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@FUZZ
@given(written=written_tables(known=True))
def test_tables_of_any_dialect_that_is_given_come_back_exactly(tmp_path: Path, written: Written) -> None:
    tables = open_tables(written.write(tmp_path), written.options)
    assert rows_of(tables) == written.rows
    places = tables.files[0].places(range(len(written.rows)))
    assert [int(place.rpartition(" ")[2]) for place in places] == written.lines()


@pytest.mark.slow
@FUZZ
@given(written=written_tables(known=False))
def test_tables_of_any_dialect_that_is_not_given_come_back_exactly(tmp_path: Path, written: Written) -> None:
    path = written.write(tmp_path)
    assert open_tables(path).names == list(NAMES)
    assert read(path) == written.rows
