"""A log in terms of a model: which events it knows, whether it is the log of the training, and what is filtered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from log_files import Row, write

from dman_runtime.data.evaluation import UNKNOWN
from dman_runtime.data.log_options import ANY_LOG
from dman_runtime.data.logs import read_interactions
from dman_runtime.data.vocabulary import known_events, read_known
from dman_runtime.errors import InputError

ROWS: list[Row] = [(user, item, time) for user in "abcde" for time, item in enumerate("123")]
RARE: list[Row] = [("a", "rare", 9), ("f", "1", 9)]  # an item and a user of one event
FILTERS = {"min_user_events": 2, "min_item_events": 2}
INDEX = {"3": 0, "1": 1, "2": 2}  # not in the order of the log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "log.csv", [*ROWS, *RARE])


def trained(log: Path) -> dict[str, Any]:
    events = len(ROWS) + len(RARE)
    return FILTERS | {"fingerprint": read_interactions(log, **FILTERS).fingerprint(), "input": {"events": events}}


def test_known_events_keep_users_and_order(log: Path) -> None:
    known = known_events(read_interactions(log), INDEX)
    assert known.item_ids == ["3", "1", "2"]
    assert [known.history(user).tolist() for user in range(known.num_users)] == [[1, 2, 0]] * 5 + [[1]]


def test_log_of_the_training_is_filtered_as_in_training(log: Path) -> None:
    known = read_known(log, INDEX, ANY_LOG, trained=trained(log))
    assert (known.kind, known.filters, known.as_trained) == ("training log", FILTERS, True)
    assert known.interactions.fingerprint() == trained(log)["fingerprint"]
    assert known.report.filters["users"] == 1 and known.report.filters["items"] == 1
    assert known.held_out("test").targets.tolist() == [0] * 5


def test_any_other_log_is_not_filtered_and_keeps_its_unknown_targets(log: Path, tmp_path: Path) -> None:
    """One more event makes it another log, although the filters of the training would remove just that."""
    other = write(tmp_path / "other.csv", [*ROWS, *RARE, ("a", "new", 10)])
    known = read_known(other, INDEX, ANY_LOG, trained=trained(log))
    assert (known.kind, known.filters, known.as_trained) == ("another log", dict.fromkeys(FILTERS, 0), False)
    assert known.report.filters == {}
    data = known.held_out("test")
    assert [history.tolist() for history in data.histories] == [[1, 2, 0]] + [[1, 2]] * 4  # without "rare"
    assert data.targets.tolist() == [UNKNOWN, 0, 0, 0, 0]
    assert known.held_out("valid").targets.tolist() == [UNKNOWN, 2, 2, 2, 2]


def test_log_of_an_older_bundle_is_recognised_by_its_fingerprint_alone(log: Path) -> None:
    older = {name: value for name, value in trained(log).items() if name != "input"}
    assert read_known(log, INDEX, ANY_LOG, trained=older).kind == "training log"


def test_without_a_fingerprint_every_log_is_another_log(log: Path) -> None:
    assert read_known(log, INDEX, ANY_LOG, trained=FILTERS).kind == "another log"
    assert read_known(log, INDEX, ANY_LOG).kind == "another log"


@pytest.mark.parametrize("asked", [{"min_user_events": 1}, {"min_user_events": 1, "min_item_events": 0}])
def test_filters_that_are_asked_for_win(log: Path, asked: dict[str, int]) -> None:
    known = read_known(log, INDEX, ANY_LOG, trained=trained(log), filters=asked)
    assert (known.kind, known.filters, known.as_trained) == ("training log", FILTERS | asked, False)
    assert known.interactions.num_users == 6
    assert len(known.interactions.item_ids) == (3 if len(asked) == 1 else 4)


def test_filters_that_are_asked_for_apply_to_any_log(log: Path) -> None:
    known = read_known(log, INDEX, ANY_LOG, filters={"min_item_events": 2})
    assert (known.kind, known.filters) == ("another log", {"min_user_events": 0, "min_item_events": 2})
    assert known.report.filters["items"] == 1


def test_bad_filters_and_logs_of_other_items_are_refused(log: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="min_item_events is -1") as error:
        read_known(log, INDEX, ANY_LOG, filters={"min_item_events": -1})
    assert error.value.parameter == "min_item_events"
    floats = write(tmp_path / "floats.csv", [("a", f"{item}.0", 0) for item in range(1, 4)] + [("a", "x", 0)])
    with pytest.raises(InputError, match=r"none of its items, such as '1\.0', .*; it was trained on .* '3', '1', '2'"):
        read_known(floats, INDEX, ANY_LOG)


@pytest.mark.parametrize("recorded", ["5", None, [5], {}])
def test_filters_of_a_bundle_that_are_no_numbers_count_as_none(log: Path, recorded: object) -> None:
    """A manifest is a file that anybody may have written."""
    known = read_known(
        log, INDEX, ANY_LOG, trained=dict.fromkeys(("min_user_events", "fingerprint", "input"), recorded)
    )
    assert known.kind == "another log"
