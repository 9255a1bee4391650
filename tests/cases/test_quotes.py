"""A reader that trusts quotes and counts nothing swallows rows. Each row of a file is an event, or is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from cases.commands import Commands, Read, case, log_file, read, refused, stored

from dman_runtime.data.log_options import ANY_LOG, LogOptions
from dman_runtime.errors import InputError

START = {"q0": 1_600_000_000 - 1, "q1": 1_600_000_100 - 1}
ROWS = [(user, str(item), start + item) for user, start in START.items() for item in range(1, 7)]
EXPECTED = {user: [(item, time) for u, item, time in ROWS if u == user] for user in ("q0", "q1")}
COLUMNS = ["user_id", "item_id", "title", "timestamp"]
NO_QUOTES = replace(ANY_LOG, quote="none")


def text_of(titles: dict[int, str], separator: str = "\t", columns: list[str] = COLUMNS, newline: str = "\n") -> str:
    """The rows with some titles in their lines, which count from 2."""
    lines = [columns]
    for line, (user, item, time) in enumerate(ROWS, 2):
        values = {"user_id": user, "item_id": item, "timestamp": str(time), "title": titles.get(line, f"song {item}")}
        lines.append([values[name] for name in columns])
    return "".join(separator.join(line) + newline for line in lines)


def assert_nothing_is_swallowed(path: Path, lines: set[int]) -> None:
    """All rows are read; or one of these lines is named, with the option that reads them all."""
    try:
        found, report = read(path)
    except InputError as error:
        named = {int(number) for number in re.findall(r"\blines? (\d+)", error.cause)}
        assert named & lines, error
        assert error.parameter == "quote"
        found, report = read(path, NO_QUOTES)
    assert found == EXPECTED
    assert report.rows == 12


# -- the cases ---------------------------------------------------------------------------------------------------------


def test_two_lone_quotes_leave_twelve_events_of_two_users(
    commands: Commands, tiny_bundle: Path, tmp_path: Path
) -> None:
    path, state = case("quote-swallows-rows/log.tsv"), tmp_path / "state"
    commands.done("import", "--bundle", tiny_bundle, "--state", state, "--input", path)
    assert stored(state) == EXPECTED


@pytest.mark.parametrize("name", ["quote-swallows-rows/ring_titles.tsv", "malformed-line-number-wrong/titles.tsv"])
def test_a_lone_quote_in_a_column_that_nobody_reads_costs_no_row(commands: Commands, name: str) -> None:
    report = commands.dry_train(case(name), "--min-user-events", 1, "--min-item-events", 1)
    assert (report["rows"], report["events"], report["users"], report["items"]) == (1920, 1920, 120, 40)


# -- quotes ------------------------------------------------------------------------------------------------------------

LONE = {
    "two that open": {3: '"Heroes', 11: '"Heroes'},
    "one in the first row": {2: '"Heroes'},
    "one in the last row": {13: '"Heroes'},
    "inches": {4: '7" single', 9: '12" mix'},
    "one that closes": {5: 'Heroes"'},
    "nothing else": {6: '"'},
    "words in quotes": {3: '"Heroes" live', 12: 'the "best" of'},
    "a doubled one": {7: '""Heroes'},
}


@pytest.mark.parametrize("titles", LONE.values(), ids=LONE.keys())
@pytest.mark.parametrize("name", ["log.tsv", "log.csv", "log.txt"])
def test_lone_quotes_in_titles_swallow_nothing(tmp_path: Path, titles: dict[int, str], name: str) -> None:
    separator = {"tsv": "\t", "csv": ",", "txt": "|"}[name[-3:]]
    assert_nothing_is_swallowed(log_file(tmp_path, text_of(titles, separator), name), set(titles))


@pytest.mark.parametrize("place", range(4))
def test_lone_quotes_in_any_column_swallow_nothing(tmp_path: Path, place: int) -> None:
    columns = [name for name in COLUMNS if name != "title"]
    columns.insert(place, "title")
    path = log_file(tmp_path, text_of({3: '"Heroes', 11: '"Heroes'}, "\t", columns), "log.tsv")
    assert_nothing_is_swallowed(path, {3, 11})


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\t", ","])
def test_quotes_that_open_and_close_over_rows_swallow_none_silently(
    tmp_path: Path, separator: str, newline: str
) -> None:
    """Here the text is also a table whose title holds whole rows."""
    titles = {4: '"Heroes', 9: 'Heroes"'}
    path = log_file(tmp_path, text_of(titles, separator, newline=newline), "log.txt")
    assert_nothing_is_swallowed(path, {4, 9})


def test_blanks_separate_where_another_character_leaves_quotes_without_a_meaning(tmp_path: Path) -> None:
    text = '"2020-09-13 12:26:40" i1 a|b\n"2020-09-13 12:26:41" i2 a|b\n'
    by_number = LogOptions(header=False, user_column="3", item_column="2", time_column="1", quote="double")
    found = read(log_file(tmp_path, text, "log.txt"), by_number)[0]
    assert found == {"a|b": [("i1", 1_600_000_000), ("i2", 1_600_000_001)]}


def test_a_lone_quote_in_one_of_many_files_swallows_nothing(tmp_path: Path) -> None:
    header, *lines = text_of({3: '"Heroes', 11: '"Heroes'}).splitlines(keepends=True)
    folder = tmp_path / "log"
    for n in range(3):
        log_file(folder, header + "".join(lines[4 * n : 4 * n + 4]), f"part-{n}.tsv")
    found, report = read(folder)
    assert found == EXPECTED
    assert [one["rows"] for one in report.files] == [4, 4, 4]


def test_quotes_have_one_meaning_in_all_files_of_a_log(tmp_path: Path) -> None:
    """Else "a" would be one user in one file, and a the same user in another."""
    folder = tmp_path / "log"
    header = "user_id,item_id,timestamp\n"
    log_file(folder, f'{header}"a",1,1600000000\n', "part-0.csv")
    log_file(folder, f'{header}"a",2,1600000001\n"b,2,1600000001\n', "part-1.csv")
    assert refused(folder).parameter == "quote"
    log_file(folder, f'{header}"b,2,1600000001\n', "part-1.csv")
    error = refused(folder)
    assert error.parameter == "quote"
    assert "part-0.csv" in error.cause
    assert "part-1.csv" in error.cause
    assert list(read(folder, NO_QUOTES)[0]) == ['"a"', '"b']


def test_backslashes_have_one_meaning_in_all_files_of_a_log(tmp_path: Path) -> None:
    """Nothing in the first file says that two backslashes are one."""
    folder = tmp_path / "log"
    header = "user_id,item_id,timestamp\n"
    log_file(folder, f'{header}"a\\\\b",1,1600000000\n', "part-0.csv")
    log_file(folder, f'{header}"a\\\\b",2,1600000001\n"say \\"hi\\"",2,1600000001\n', "part-1.csv")
    assert refused(folder).parameter == "quote"
    assert list(read(folder, replace(ANY_LOG, quote="backslash"))[0]) == ["a\\b", 'say "hi"']


@pytest.mark.parametrize("separator", [",", ";", "|", "\t", "::", " "])
def test_a_line_break_in_the_very_first_value_hides_no_separator(tmp_path: Path, separator: str) -> None:
    text = '"two\nlines",a,1\n"two\nlines",b,2\n"x",c,3\n'.replace(",", separator)
    by_number = LogOptions(header=False, user_column="2", item_column="3", time_column="none")
    assert read(log_file(tmp_path, text, "log.txt"), by_number)[0] == {
        user: [(item, 0)] for user, item in ("a1", "b2", "c3")
    }


def test_an_id_may_hold_a_lone_quote(tmp_path: Path) -> None:
    path = log_file(tmp_path, 'user_id\titem_id\ttimestamp\n"a\t12"\t1600000000\nb\t"\t1600000001\n', "log.tsv")
    assert read(path)[0] == {'"a': [('12"', 1_600_000_000)], "b": [('"', 1_600_000_001)]}


@pytest.mark.parametrize(("quote", "written"), [("double", '"a ""b"", c"'), ("backslash", '"a \\"b\\", c"')])
def test_quotes_of_a_dialect_that_has_them_count(tmp_path: Path, quote: str, written: str) -> None:
    text = f"user_id,item_id,timestamp,title\n{written},1,1600000000,x\n{written},2,1600000001,{written}\n"
    path = log_file(tmp_path, text)
    with_option = LogOptions(quote=quote)  # type: ignore[arg-type]
    expected = {'a "b", c': [("1", 1_600_000_000), ("2", 1_600_000_001)]}
    assert read(path)[0] == read(path, with_option)[0] == expected


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ('"user_id,item_id,timestamp\na,1,1600000000\n', {"a": [("1", 1_600_000_000)]}),
        (
            'user_id,item_id,timestamp\n"a"b,1,1600000000\nc"d,2,1600000001\n',
            {'"a"b': [("1", 1_600_000_000)], 'c"d': [("2", 1_600_000_001)]},
        ),
        ('"a\n', None),
        ('user_id,item_id"\n,"timestamp\na,1,1600000000\n', None),
    ],
)
@pytest.mark.parametrize("separator", [",", "::", " "])
def test_quotes_without_a_meaning_crash_nothing(tmp_path: Path, text: str, plain: Read | None, separator: str) -> None:
    path = log_file(tmp_path, text.replace(",", separator), "log.txt")
    if plain is None:
        assert refused(path).parameter in ("quote", "user_column", "no_header", "bad_rows")
    else:
        assert read(path)[0] == plain


# -- lines of errors ---------------------------------------------------------------------------------------------------


def with_bad_row(n: int, row: str, *, before: str = "", newline: str = "\n") -> str:
    lines = text_of({}, ",", newline=newline).splitlines(keepends=True)
    return "".join([*lines[: n - 1], before, row + newline, *lines[n - 1 :]])


BAD_ROWS = {
    "too few values": "q0,1,x",
    "too many values": "q0,1,x,1600000000,5",
    "no time": "q0,1,x,yesterday",
    "no user": ",1,x,1600000000",
    "no item": "q0,,x,1600000000",
    "a separator in a title": "q0,1,hello, goodbye,1600000000",
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS.keys())
@pytest.mark.parametrize("n", [2, 7, 14])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_bad_row_is_named_by_its_line_or_left_out_and_counted(tmp_path: Path, row: str, n: int, newline: str) -> None:
    path = log_file(tmp_path, with_bad_row(n, row, newline=newline))
    error = refused(path)
    assert re.search(rf"\bline {n}\b", error.cause), error
    assert error.parameter == "bad_rows" or "line" in error.cause
    found, report = read(path, replace(ANY_LOG, bad_rows="skip"))
    assert found == EXPECTED
    assert (report.rows, report.events, sum(report.left_out.values())) == (13, 12, 1)
    assert re.search(rf"\bline {n}\b", report.bad_rows[0].place)
    assert f"line {n}" in report.table()


def test_lines_count_also_inside_of_quoted_values_and_where_they_are_blank(tmp_path: Path) -> None:
    before = '"q0",9,"three\nlines\nlong",1600000009\n\n\n'
    path = log_file(tmp_path, with_bad_row(4, "q0,1,x,never", before=before))
    assert re.search(r"\bline 9\b", refused(path).cause)


@pytest.mark.parametrize("name", ["log.tsv", "log.csv"])
def test_a_short_row_beside_lone_quotes_is_named_once_quotes_are_none(tmp_path: Path, name: str) -> None:
    separator = "\t" if name == "log.tsv" else ","
    text = text_of({3: '"Heroes', 7: '12" mix', 11: 'Heroes"'}, separator)
    path = log_file(tmp_path, f"{text}q0{separator}9\n", name)
    error = refused(path)
    assert error.parameter == "quote"
    assert re.search(r"\bline (3|7|11)\b", error.cause)
    assert re.search(r"\bline 14\b", refused(path, NO_QUOTES).cause)
    found, report = read(path, replace(NO_QUOTES, bad_rows="skip"))
    assert found == EXPECTED
    assert (report.rows, report.events) == (13, 12)


def test_the_first_five_bad_rows_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    text = text_of({}, ",") + "".join(f"q0,1,x,never{n}\n" for n in range(8))
    report = read(log_file(tmp_path, text), replace(ANY_LOG, bad_rows="skip"))[1]
    assert sum(report.left_out.values()) == 8
    assert [row.place.split()[-1] for row in report.bad_rows] == ["14", "15", "16", "17", "18"]


def test_a_bad_row_is_named_in_its_file_of_many(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    log_file(folder, text_of({}, ","), "part-0.csv")
    log_file(folder, with_bad_row(5, "q0,1,x,never"), "part-1.csv")
    assert re.search(r"part-1\.csv.*\bline 5\b", refused(folder).cause)


@pytest.mark.parametrize(
    "row", ['{"user_id": "q0", "item_id": "1", "timestamp"', '{"user_id": "q0"}', "[1]", "nothing"]
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, row: str) -> None:
    good = ['{"user_id": "%s", "item_id": "%s", "timestamp": %s}' % one for one in ROWS]  # noqa: UP031
    path = log_file(tmp_path, "\n".join([*good[:5], row, *good[5:]]) + "\n", "log.jsonl")
    assert re.search(r"\bline 6\b", refused(path).cause)
    found, report = read(path, replace(ANY_LOG, bad_rows="skip"))
    assert found == EXPECTED
    assert sum(report.left_out.values()) == 1
