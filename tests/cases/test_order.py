"""What orders a history is declared, recognised and said, or file order is taken with a warning; never guessed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from cases.commands import Commands, asks_about, case, log_file, order, read, refused, stored
from cases.conftest import Rename
from log_files import parquet_log

from dman_runtime.data.log_options import ANY_LOG, LogOptions

NEWEST_FIRST = [(str(item), 1_600_000_000 + 60 * item) for item in range(8, 0, -1)]
OLDEST_FIRST = [str(item) for item in range(1, 9)]


def named(columns: str, *, more: str = "") -> str:
    """A log of one user, newest first, whose header is given and whose other columns hold `more`."""
    return f"{columns}\n" + "".join(f"t1,{item},{time}{more}\n" for item, time in NEWEST_FIRST)


# -- the cases ---------------------------------------------------------------------------------------------------------


def test_event_time_is_recognised_and_said_and_stored_oldest_first(
    commands: Commands, tiny_bundle: Path, tmp_path: Path
) -> None:
    path, state = case("time-column-under-another-name/log.csv"), tmp_path / "state"
    said = commands.done("import", "--bundle", tiny_bundle, "--state", state, "--input", path)
    assert [item for item, _ in stored(state)["t1"]] == OLDEST_FIRST
    assert all(time > 0 for _, time in stored(state)["t1"])
    assert any("event_time" in line and "--time-column" in line for line in said.warnings)


def test_training_says_that_it_took_event_time(commands: Commands) -> None:
    report = commands.dry_train(case("time-column-under-another-name/ring_eventtime.csv"))
    assert report["columns"]["time"] == "event_time"
    assert any("--time-column" in text for text in report["warnings"])


def test_time_orders_before_position(commands: Commands, tiny_bundle: Path, tmp_path: Path) -> None:
    path, state = case("position-column-wins-over-time/log.csv"), tmp_path / "state"
    commands.done("import", "--bundle", tiny_bundle, "--state", state, "--input", path)
    assert [item for item, _ in stored(state)["p1"]] == OLDEST_FIRST


def test_the_list_slots_of_the_ring_do_not_order_it() -> None:
    path = case("position-column-wins-over-time/ring_slot.csv")
    assert order(path) == order(path, replace(ANY_LOG, position_column="none"))
    report = read(path)[1]
    assert (report.users, report.rows) == (120, 1920)


def test_a_position_column_with_gaps_can_be_ignored(commands: Commands, tiny_bundle: Path, tmp_path: Path) -> None:
    path, output = case("nullable-position-blocks-log/log.csv"), tmp_path / "scores.parquet"
    assert order(path, replace(ANY_LOG, position_column="none")) == {"p1": ["1", "2", "3"]}
    command = ("score", "--bundle", tiny_bundle, "--input", path, "--output", output)
    commands.done(*command, "--position-column", "none")
    _, asked = commands.cured({"--position-column": "none"}, *command)
    assert asked in ([], ["--position-column"])


# -- times under other names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["event_time", "created_at", "date", "ts", "time", "datetime", "unixReviewTime", "EventTimestamp", "Timestamp"],
)
def test_the_only_time_column_is_taken_and_said_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = log_file(tmp_path, named(f"user_id,item_id,{name}"))
    assert order(path) == {"t1": OLDEST_FIRST}
    report = read(path)[1]
    assert report.columns["time"] == name
    (text,) = asks_about(report, "time_column")
    assert name in text


@pytest.mark.parametrize(
    ("user", "item"),
    [("visitorid", "itemid"), ("userId", "movieId"), ("customer_id", "product_id"), ("reviewerID", "asin"),
     ("USER ID", "Item-Id"), ("session_user", "item_id")],
)  # fmt: skip
def test_users_and_items_are_recognised_or_asked_for(tmp_path: Path, user: str, item: str) -> None:
    path = log_file(tmp_path, named(f"{user},{item},timestamp"))
    if user == "session_user":
        error = refused(path)
        assert error.parameter == "user_column"
        assert user in error.cause
        assert order(path, replace(ANY_LOG, user_column=user)) == {"t1": OLDEST_FIRST}
    else:
        assert order(path) == {"t1": OLDEST_FIRST}
        report = read(path)[1]
        assert (report.columns["user"], report.columns["item"]) == (user, item)
        assert asks_about(report, "user_column") or asks_about(report, "item_column")


@pytest.mark.parametrize("names", [("event_time", "created_at"), ("date", "ts"), ("time", "datetime")])
def test_two_possible_time_columns_are_both_named(tmp_path: Path, names: tuple[str, str]) -> None:
    path = log_file(tmp_path, named(f"user_id,item_id,{','.join(names)}", more=",1600000000"))
    error = refused(path)
    assert error.parameter == "time_column"
    assert all(name in error.cause for name in names)
    assert order(path, replace(ANY_LOG, time_column=names[0])) == {"t1": OLDEST_FIRST}
    assert order(path, replace(ANY_LOG, time_column="none")) == {"t1": OLDEST_FIRST[::-1]}


def test_timestamp_itself_needs_no_word(tmp_path: Path) -> None:
    path = log_file(tmp_path, named("user_id,item_id,timestamp,created_at", more=",1700000000"))
    assert order(path) == {"t1": OLDEST_FIRST}
    assert not asks_about(read(path)[1], "time_column")


@pytest.mark.parametrize("columns", ["user_id,item_id,price", "user_id,item_id,clock_reading"])
def test_without_a_time_or_position_the_order_of_the_file_counts_and_one_line_says_so(
    tmp_path: Path, columns: str
) -> None:
    path = log_file(tmp_path, named(columns))
    assert order(path) == {"t1": OLDEST_FIRST[::-1]}
    report = read(path)[1]
    assert len(asks_about(report, "time_column")) == 1
    assert "file" in report.order
    assert len([line for line in report.table().splitlines() if "--time-column" in line]) == 1


def test_the_time_column_can_be_left_unread(tmp_path: Path) -> None:
    path = log_file(tmp_path, named("user_id,item_id,timestamp"))
    found, report = read(path, replace(ANY_LOG, time_column="none"))
    assert found == {"t1": [(item, 0) for item in OLDEST_FIRST[::-1]]}
    assert report.columns["time"] == "none"


# -- positions ---------------------------------------------------------------------------------------------------------


def positions(values: list[str], *, time: str = "same") -> str:
    """Items 1 to n in file order with these positions, at one time, at rising times or at none."""
    times = {"same": ["1600000000"] * len(values), "rising": [str(1_600_000_000 + n) for n in range(len(values))]}
    rows = zip(times.get(time, [""] * len(values)), range(1, len(values) + 1), values, strict=True)
    if time == "none":
        return "user_id,item_id,position\n" + "".join(f"p1,{item},{value}\n" for _, item, value in rows)
    return "timestamp,user_id,item_id,position\n" + "".join(f"{t},p1,{item},{value}\n" for t, item, value in rows)


@pytest.mark.parametrize(
    ("values", "time", "expected"),
    [
        (["3", "1", "2"], "rising", ["1", "2", "3"]),
        (["3", "1", "2"], "same", ["2", "3", "1"]),
        (["3", "1", "2"], "none", ["2", "3", "1"]),
        (["1", "0", "1", "0"], "same", ["2", "4", "1", "3"]),
        (["3.0", "1.0", "2.0"], "same", ["2", "3", "1"]),
        (["-1", "10", "9"], "none", ["1", "3", "2"]),
    ],
)
def test_time_comes_first_then_position_then_the_row(
    tmp_path: Path, values: list[str], time: str, expected: list[str]
) -> None:
    path = log_file(tmp_path, positions(values, time=time))
    if "3.0" in values and order(path) == {"p1": ["1", "2", "3"]}:  # floats may be left alone, if that is said
        assert asks_about(read(path)[1], "position_column")
    else:
        assert order(path) == {"p1": expected}
    assert order(path, replace(ANY_LOG, position_column="none")) == {"p1": [str(n + 1) for n in range(len(values))]}


@pytest.mark.parametrize("values", [["2", "", "1"], ["a", "b", "c"], ["1.5", "2", "3"], ["", "", ""]])
def test_a_position_column_that_holds_no_positions_is_left_alone_and_said(tmp_path: Path, values: list[str]) -> None:
    path = log_file(tmp_path, positions(values, time="rising"))
    assert order(path) == {"p1": ["1", "2", "3"]}
    assert asks_about(read(path)[1], "position_column")
    assert order(path, replace(ANY_LOG, position_column="none")) == {"p1": ["1", "2", "3"]}
    error = refused(path, replace(ANY_LOG, position_column="position"))  # named, so it must be usable
    assert "position" in error.cause
    assert re.search(r"\bline \d", error.cause)


def test_positions_order_where_they_are_asked_to(tmp_path: Path) -> None:
    path = log_file(tmp_path, positions(["3", "1", "2"], time="rising"))
    assert order(path, replace(ANY_LOG, order_by="position")) == {"p1": ["2", "3", "1"]}
    assert order(path, replace(ANY_LOG, order_by="file")) == {"p1": ["1", "2", "3"]}


def test_null_positions_in_parquet_are_left_alone_too(tmp_path: Path) -> None:
    path = parquet_log(tmp_path, user_id=["a"] * 3, item_id=[1, 2, 3], timestamp=[5, 6, 7], position=[3, None, 1])
    assert order(path) == {"a": ["1", "2", "3"]}
    assert asks_about(read(path)[1], "position_column")


# -- times -------------------------------------------------------------------------------------------------------------

T = 1_600_000_000


@pytest.mark.parametrize(
    ("unit", "text"),
    [("s", "1600000000"), ("ms", "1600000000123"), ("us", "1600000000123456"), ("ns", "1600000000123456789"),
     ("s", "1600000000.5"), ("ms", "1600000000123.25"), ("s", "1600000000.0"), ("s", "1.6e9")],
)  # fmt: skip
def test_the_unit_of_numbers_is_found_and_reported_with_dates(tmp_path: Path, unit: str, text: str) -> None:
    found, report = read(log_file(tmp_path, f"user_id,item_id,timestamp\na,1,{text}\n"))
    assert found == {"a": [("1", T)]}
    assert "2020-09-13 12:26:40" in report.table()
    names = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
    assert report.time_unit in (unit, names[unit])


@pytest.mark.parametrize(
    "text",
    ["2020-09-13 12:26:40", "2020-09-13T12:26:40Z", "2020-09-13 12:26:40 UTC", "2020-09-13 12:26:40 ",
     "2020-09-13T14:26:40+02:00", "2020-09-13 12:26:40.999+00:00", "2020-09-13T05:26:40-0700"],
)  # fmt: skip
def test_times_in_words_keep_their_zone(tmp_path: Path, text: str) -> None:
    assert read(log_file(tmp_path, f"user_id,item_id,timestamp\na,1,{text}\n"))[0] == {"a": [("1", T)]}


@pytest.mark.parametrize(
    "times",
    [("1600000000", "1600000000123"), ("1600000000123", "1600000001"), ("1600000000123456", "1600000000")],
)
def test_mixed_units_are_refused_with_two_rows(tmp_path: Path, times: tuple[str, str]) -> None:
    rows = [f"a,1,{times[0]}", f"a,2,{times[0]}", f"a,3,{times[1]}", f"a,4,{times[0]}"]
    error = refused(log_file(tmp_path, "user_id,item_id,timestamp\n" + "\n".join(rows) + "\n"))
    assert {int(line) for line in re.findall(r"\bline (\d+)", error.cause)} in ({2, 4}, {3, 4}), error


@pytest.mark.parametrize("times", [("1600000000", "2020-09-13 12:26:41"), ("2020-09-13", "1600000000")])
def test_numbers_and_words_do_not_mix(tmp_path: Path, times: tuple[str, str]) -> None:
    rows = [f"a,1,{times[0]}", f"a,2,{times[0]}", f"a,3,{times[1]}", f"a,4,{times[0]}"]
    error = refused(log_file(tmp_path, "user_id,item_id,timestamp\n" + "\n".join(rows) + "\n"))
    assert "line 4" in error.cause
    assert times[1] in error.cause


def test_a_date_that_was_cut_off_is_named_and_not_the_whole_one(tmp_path: Path) -> None:
    error = refused(log_file(tmp_path, "user_id,item_id,timestamp\na,1,2020-09-13T12:26:40\na,2,2020"))
    assert "line 3" in error.cause
    assert "'2020'" in error.cause


@pytest.mark.parametrize("time", ["4102444800", "2099-01-01", "99999999999999999"])
def test_times_beyond_the_next_year_are_refused(tmp_path: Path, time: str) -> None:
    error = refused(log_file(tmp_path, f"user_id,item_id,timestamp\na,1,{time}\n"))
    assert "line 2" in error.cause
    assert "next year" in error.cause


def test_the_smallest_part_of_a_second_orders(tmp_path: Path) -> None:
    rows = ["a,3,1600000000.75", "a,1,1600000000.25", "a,2,1600000000.5"]
    assert order(log_file(tmp_path, "user_id,item_id,timestamp\n" + "\n".join(rows))) == {"a": ["1", "2", "3"]}
    times = pa.array([3, 1, 2], pa.timestamp("ns"))
    assert order(parquet_log(tmp_path, user_id=["a"] * 3, item_id=[3, 1, 2], timestamp=times)) == {"a": ["1", "2", "3"]}


# -- exact repeats -----------------------------------------------------------------------------------------------------

REPEATS = "user_id,item_id,timestamp\na,1,1600000000\na,2,1600000000\na,1,1600000000\na,1,1600000005\n"


def test_exact_repeats_are_left_out_and_reported(tmp_path: Path) -> None:
    path = log_file(tmp_path, REPEATS)
    found, report = read(path)
    assert found == {"a": [("1", T), ("2", T), ("1", T + 5)]}
    assert sum(report.left_out.values()) == 1
    assert "repeat" in next(iter(report.left_out))
    assert order(path, replace(ANY_LOG, exact_repeats="keep")) == {"a": ["1", "2", "1", "1"]}


@pytest.mark.parametrize("column", ["timestamp", "price"])
def test_repeats_are_kept_where_there_are_only_dates_or_no_times(tmp_path: Path, column: str) -> None:
    path = log_file(tmp_path, f"user_id,item_id,{column}\na,1,2020-09-13\na,2,2020-09-13\na,1,2020-09-13\n")
    assert order(path) == {"a": ["1", "2", "1"]}


# -- what the bundle knows ---------------------------------------------------------------------------------------------


def test_a_bundle_brings_the_columns_of_its_training(commands: Commands, bundle_of: Rename, tmp_path: Path) -> None:
    options = {"user_column": "who", "item_column": "what", "time_column": "clock", "position_column": "none"}
    bundle = bundle_of([str(n) for n in range(1, 61)], order_by="time", **options)
    path, state = log_file(tmp_path, named("who,what,clock")), tmp_path / "state"
    commands.done("import", "--bundle", bundle, "--state", state, "--input", path)
    assert [item for item, _ in stored(state)["t1"]] == OLDEST_FIRST
    other = log_file(tmp_path, named("who,what,timestamp"), "other.csv")
    said = commands.runtime("import", "--bundle", bundle, "--state", tmp_path / "new", "--input", other)
    assert said.code == 2
    assert "clock" in said.err
    assert "(--time-column)" in said.err
    commands.cured(
        {"--time-column": "timestamp"}, "import", "--bundle", bundle, "--state", tmp_path / "new", "--input", other
    )
    assert [item for item, _ in stored(tmp_path / "new")["t1"]] == OLDEST_FIRST


def test_options_say_what_they_mean() -> None:
    with pytest.raises(ValueError, match="order_by"):
        LogOptions(order_by="price")  # type: ignore[arg-type]
