"""Which column is what: named, by the product's own names, or by well-known names, which is then said."""

from __future__ import annotations

from pathlib import Path

import pytest
from log_files import HEADER, histories, text_log

from dman_runtime.data.log_options import LogOptions, options_of_training
from dman_runtime.data.logs import Log, open_log
from dman_runtime.errors import InputError

START = 1_600_000_000


def opened(path: Path, **options: str) -> Log:
    with open_log(path, LogOptions(**options)) as log:  # type: ignore[arg-type]
        return log


@pytest.mark.parametrize(
    "header",
    ["visitorid,event,itemid,timestamp", "userId,rating,movieId,timestamp", "customer_id,x,product_id,created_at",
     "reviewerID,overall,asin,unixReviewTime", "user,a,item,ts", "USER_ID,event_type,ITEM_ID,TIMESTAMP"],
)  # fmt: skip
def test_well_known_names_are_recognised_and_said(tmp_path: Path, header: str) -> None:
    path = text_log(tmp_path, f"{header}\na,9,2,{START + 1}\na,9,1,{START}\n")
    log = opened(path)
    assert histories(log.whole()) == {"a": [("1", START), ("2", START + 1)]}
    names = header.split(",")
    assert list(log.report.columns.values()) == [names[0], names[2], names[3], "none"]
    assert log.report.other_columns == [names[1]]
    for name in {names[0], names[2], names[3]} - {"timestamp"}:
        assert any(f"{name!r} is taken for the" in text for text in log.report.warnings())
    assert (log.options.user_column, log.options.item_column, log.options.time_column) == (names[0], names[2], names[3])


def test_own_names_win_over_well_known_ones(tmp_path: Path) -> None:
    log = opened(text_log(tmp_path, f"user_id,item_id,timestamp,date\na,1,{START},2020-01-01\n"))
    assert log.report.columns["time"] == "timestamp"
    assert log.report.warnings() == []


@pytest.mark.parametrize(("header", "role"), [("user,uid,item_id", "user"), ("user_id,item_id,date,time", "time")])
def test_two_candidates_are_refused_naming_both(tmp_path: Path, header: str, role: str) -> None:
    path = text_log(tmp_path, header + "\n" + ",".join("1" * len(header.split(","))) + "\n")
    with pytest.raises(InputError, match=f"may both hold the {role}s; name the one that does") as raised:
        opened(path)
    assert raised.value.parameter == f"{role}_column"


def test_without_any_order_the_file_orders_after_saying_so(tmp_path: Path) -> None:
    log = opened(text_log(tmp_path, "user_id,item_id,when\na,2,5\na,1,4\n"))
    assert histories(log.whole()) == {"a": [("2", 0), ("1", 0)]}
    (warning,) = log.report.warnings()
    assert "in the order of the file" in warning
    assert warning.endswith("other columns: when (--time-column)")
    assert opened(log.report.path, order_by="file").report.warnings() == []  # type: ignore[arg-type]


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = text_log(tmp_path, "who,what,when,nth\na,x,8,1\na,y,7,0\na,z,7,-1\n")
    log = opened(path, user_column="who", item_column="what", time_column="when", position_column="nth")
    assert histories(log.whole()) == {"a": [("z", 7), ("y", 7), ("x", 8)]}


@pytest.mark.parametrize("role", ["time", "position", "user", "item"])
def test_named_column_that_is_absent_is_refused(tmp_path: Path, role: str) -> None:
    path = text_log(tmp_path, HEADER + "a,1,0\n")
    with pytest.raises(InputError) as raised:
        opened(path, **{f"{role}_column": "when"})
    assert raised.value.cause == f"{path}: no column 'when'; it has: user_id, item_id, timestamp"
    assert raised.value.remedy.startswith(f"name the column that holds the {role}s")
    assert raised.value.parameter == f"{role}_column"


@pytest.mark.parametrize(
    ("options", "parameter"), [({"user_column": "item_id"}, "user_column"), ({"item_column": "user_id"}, "item_column")]
)
def test_column_named_for_two_purposes_is_refused(tmp_path: Path, options: dict[str, str], parameter: str) -> None:
    with pytest.raises(InputError, match=r"column '\w+' is named for two purposes; name another column") as raised:
        opened(text_log(tmp_path, HEADER + "a,1,0\n"), **options)
    assert raised.value.parameter == parameter


# -- order -----------------------------------------------------------------------------------------------------------

SLOTS = f"user_id,item_id,timestamp,position\na,1,{START},3\na,2,{START + 60},1\na,3,{START + 60},0\n"


@pytest.mark.parametrize(
    ("options", "order", "described"),
    [
        ({}, "132", "by timestamp, then position, then row of the file"),
        ({"position_column": "none"}, "123", "by timestamp, then row of the file"),
        ({"order_by": "position"}, "321", "by position, then row of the file"),
        ({"time_column": "none"}, "321", "by position, then row of the file"),
        ({"order_by": "file"}, "123", "by row of the file"),
    ],
)
def test_time_orders_before_position_unless_told_otherwise(
    tmp_path: Path, options: dict[str, str], order: str, described: str
) -> None:
    log = opened(text_log(tmp_path, SLOTS), **options)
    assert "".join(item for item, _ in histories(log.whole())["a"]) == order
    assert log.report.order == described


@pytest.mark.parametrize("bad", ["", "1.5", "x"])
def test_positions_that_are_no_integers_order_nothing_unless_the_column_is_named(tmp_path: Path, bad: str) -> None:
    path = text_log(tmp_path, SLOTS + f"a,4,{START},{bad}\n")
    log = opened(path)
    assert "".join(item for item, _ in histories(log.whole())["a"]) == "1423"
    assert log.options.position_column == "none"
    (warning,) = log.report.warnings()
    assert "orders nothing" in warning
    assert "line 5" in warning
    with pytest.raises(InputError, match=r"line 5: position .*; write whole numbers"):
        opened(path, position_column="position")


def test_order_that_the_log_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column of positions is known") as raised:
        opened(text_log(tmp_path, HEADER + "a,1,0\n"), order_by="position")
    assert raised.value.parameter == "position_column"


# -- what a bundle remembers -------------------------------------------------------------------------------------------


def test_found_options_read_the_next_log_alike(tmp_path: Path) -> None:
    first = opened(text_log(tmp_path, f"visitorid,itemid,timestamp\na,1,{START}000\n"))
    again = options_of_training({name: getattr(first.options, name) for name in vars(first.options)})
    assert again == LogOptions(
        user_column="visitorid", item_column="itemid", time_column="timestamp", position_column="none",
        order_by="time", user_ids="text", item_ids="integer", exact_repeats="drop",
    )  # fmt: skip
    with pytest.raises(InputError, match="no column 'visitorid'; it has: user_id"):
        opened(text_log(tmp_path, HEADER + "a,1,5\n"), user_column=again.user_column)


def test_records_of_earlier_versions_mean_their_defaults() -> None:
    old = {"user_column": "user_id", "item_column": "sku", "time_column": "timestamp", "position_column": "position"}
    assert options_of_training(old) == LogOptions(item_column="sku")
    assert options_of_training(old | {"order_by": "weeks"}) == LogOptions()
