"""Times of a log: the unit is found for the whole log, words are read in many forms, and what cannot be is named."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from log_files import HEADER, histories, parquet_log, text_log

from dman_runtime.data.log_options import LogOptions
from dman_runtime.data.logs import open_log
from dman_runtime.errors import InputError

START = 1_600_000_000
NEXT_CENTURY = 4_200_000_000


def log_of(folder: Path, *times: object) -> Path:
    return text_log(folder, HEADER + "".join(f"a,{n},{time}\n" for n, time in enumerate(times)))


def read(path: Path, **options: str) -> tuple[list[int], dict[str, object]]:
    """The times in order, and the report."""
    with open_log(path, LogOptions(**options)) as log:  # type: ignore[arg-type]
        whole = log.whole()
        return whole.timestamps.tolist(), log.report.as_dict()


@pytest.mark.parametrize(
    ("unit", "factor"), [("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)]
)
def test_unit_is_found_by_plausibility_and_reported(tmp_path: Path, unit: str, factor: int) -> None:
    times, report = read(log_of(tmp_path, (START + 5) * factor, START * factor))
    assert times == [START, START + 5]
    assert report["time_unit"] == unit
    assert (report["first_time"], report["last_time"]) == (START, START + 5)


def test_milliseconds_order_events_within_a_second(tmp_path: Path) -> None:
    with open_log(log_of(tmp_path, START * 1000 + 900, START * 1000 + 100)) as log:
        assert histories(log.whole()) == {"a": [("1", START), ("0", START)]}
        assert log.options.time_unit == "ms"


@pytest.mark.parametrize("form", ["{0}.75 {0}.25", "{0}750.0 {0}250.5"])
def test_fractions_order_events(tmp_path: Path, form: str) -> None:
    with open_log(log_of(tmp_path, *form.format(START).split())) as log:
        assert histories(log.whole()) == {"a": [("1", START), ("0", START)]}


@pytest.mark.parametrize(
    "text",
    [
        "2020-09-13 12:26:40",
        "2020-09-13T12:26:40",
        "2020-09-13T12:26:40Z",
        "2020-09-13 12:26:40.000123",
        "2020-09-13 12:26:40 ",
        " 2020-09-13 12:26:40",
        "2020-09-13 12:26:40 UTC",
        "2020-09-13 12:26:40 GMT",
        "2020-09-13 14:26:40+02:00",
        "2020-09-13 14:26:40 +0200",
        "2020-09-13 10:26:40-02:00",
        "2020/09/13 12:26:40",
        "2020.09.13 12:26:40",
    ],
)
def test_words_are_read_in_many_forms(tmp_path: Path, text: str) -> None:
    times, report = read(log_of(tmp_path, text, text))
    assert times == [START, START]
    assert report["time_unit"] == "dates and times"


def test_zones_may_differ_from_row_to_row(tmp_path: Path) -> None:
    times, _ = read(log_of(tmp_path, "2020-09-13T12:26:40Z", "2020-09-13T14:26:41+02:00", "2020-09-13 12:26:42"))
    assert times == [START, START + 1, START + 2]


def test_dates_are_midnights(tmp_path: Path) -> None:
    times, _ = read(log_of(tmp_path, "2020-09-13", "2020-09-12"))
    assert times == [START - 12 * 3600 - 26 * 60 - 40 - 86_400, START - 12 * 3600 - 26 * 60 - 40]


@pytest.mark.parametrize(
    ("times", "first", "second"),
    [
        ((START, START * 1000), f"{START} in seconds (", f"{START * 1000} in milliseconds ("),
        ((START * 10**6, START * 1000, START * 1000 + 1), "in milliseconds", "in microseconds"),
        ((*[START] * 50, START * 10**9), "in seconds", "in nanoseconds"),
    ],
)
def test_mixed_units_are_refused_naming_two_rows(
    tmp_path: Path, times: tuple[int, ...], first: str, second: str
) -> None:
    with pytest.raises(InputError, match="timestamp holds times in several units") as raised:
        read(log_of(tmp_path, *times))
    assert first in raised.value.cause
    assert second in raised.value.cause
    assert raised.value.cause.count("line") == 2
    assert raised.value.parameter == "time_unit"


@pytest.mark.parametrize("time", [NEXT_CENTURY, NEXT_CENTURY * 1000, "2103-02-04 00:00:00"])
def test_time_beyond_the_next_year_is_a_bad_row(tmp_path: Path, time: object) -> None:
    good = "2020-09-13 12:26:40" if isinstance(time, str) else START
    path = log_of(tmp_path, good, time, good)
    with pytest.raises(InputError, match=r"line 3: timestamp .* is a time beyond the next year"):
        read(path)
    times, report = read(path, bad_rows="skip")
    assert times == [START, START]
    assert report["left_out"] == {"with a time beyond the next year": 1}


def test_small_numbers_only_order(tmp_path: Path) -> None:
    times, report = read(log_of(tmp_path, 3, -1, 0))
    assert times == [-1, 0, 3]
    assert report["time_unit"] == "seconds"
    assert report["warnings"] == []


def test_few_times_before_1990_are_named(tmp_path: Path) -> None:
    _, report = read(log_of(tmp_path, START, 0, START))
    assert report["warnings"] == [f"times before 1990: 1, such as 0 in {tmp_path}/log.csv: line 3 (--time-unit)"]


def test_unit_that_was_named_is_taken_and_contradiction_is_said(tmp_path: Path) -> None:
    times, report = read(log_of(tmp_path, START, START + 1), time_unit="ms")
    assert times == [START // 1000] * 2
    warning = "in milliseconds all times are before 1990, and in seconds they would be recent (--time-unit)"
    assert report["warnings"] == [warning]


@pytest.mark.parametrize("bad", ["soon", "13.09.2020", "nan", "1e400", "2020-13-01"])
def test_what_is_no_time_is_named_with_its_line(tmp_path: Path, bad: str) -> None:
    good = "2020-09-13" if "-" in bad else str(START)
    with pytest.raises(InputError, match=f"line 4: timestamp .*{bad}.* is not a time; write seconds"):
        read(log_of(tmp_path, good, good, bad, good))


def test_first_value_that_is_bad_does_not_decide(tmp_path: Path) -> None:
    times, report = read(log_of(tmp_path, "soon", START), bad_rows="skip")
    assert times == [START]
    assert report["left_out"] == {"without a time": 1}


def test_missing_time_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3: timestamp has no value"):
        read(log_of(tmp_path, START, ""))


def test_numbers_and_words_in_one_log_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    text_log(folder, HEADER + f"a,1,{START}\n", "1.csv")
    text_log(folder, HEADER + "a,2,2020-09-13\n", "2.csv")
    with pytest.raises(InputError, match=r"timestamp holds numbers from .* on and dates in words from .* on"):
        read(folder)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_parquet_timestamps_need_no_unit(tmp_path: Path, unit: str) -> None:
    import pyarrow as pa

    moments = pa.array([datetime.datetime(2020, 9, 13, 12, 26, 40)]).cast(pa.timestamp(unit))
    for values in (moments, moments.cast(pa.timestamp(unit, "Europe/Berlin")), moments.dictionary_encode()):
        assert read(parquet_log(tmp_path, user_id=["a"], item_id=["1"], timestamp=values))[0] == [START]


def test_parquet_numbers_of_any_width_are_read(tmp_path: Path) -> None:
    import pyarrow as pa

    for kind in (pa.int32(), pa.uint32(), pa.int64(), pa.float64()):
        path = parquet_log(tmp_path, user_id=["a"], item_id=["1"], timestamp=pa.array([START], kind))
        assert read(path)[0] == [START]
    path = parquet_log(tmp_path, user_id=["a"], item_id=["1"], timestamp=pa.array([True]))
    with pytest.raises(InputError, match="column 'timestamp' has type bool"):
        read(path)
