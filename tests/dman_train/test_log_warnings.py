"""What training says of a log on which its protocol cannot work, and that it says nothing of a good one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_files import Row, write

from dman_runtime.data.interactions import Interactions, ItemInfo
from dman_runtime.data.log_options import ANY_LOG, LogOptions
from dman_runtime.data.logs import filtered, open_log
from dman_train import log_warnings
from dman_train.log_warnings import seen_before, warn_of_items, warn_of_log


def warnings_of(
    folder: Path, rows: list[Row], *, seen_items: str = "exclude", limits: int = 0, options: LogOptions = ANY_LOG
) -> list[str]:
    with open_log(write(folder / "log.csv", rows), options) as log:
        kept = filtered(log, min_user_events=limits, min_item_events=limits)
    warn_of_log(log, kept, seen_items=seen_items)
    return log.report.warnings()


def good(users: int = 60, items: int = 40, events: int = 8) -> list[Row]:
    """Every user has other items at other times."""
    return [(f"u{u}", f"i{(u + 3 * n) % items}", 1000 * n + u) for u in range(users) for n in range(events)]


def test_nothing_is_said_of_a_good_log(tmp_path: Path) -> None:
    assert warnings_of(tmp_path, good()) == []


def test_repeats_and_the_targets_that_they_cost_are_said(tmp_path: Path) -> None:
    rows = [(f"u{u}", f"i{(u + n) % 4}", n) for u in range(60) for n in range(8)]  # each item twice
    (first, second) = warnings_of(tmp_path, rows)
    assert first.startswith("50 % of the events are of items that the user has already seen")
    assert "60 of 60 test targets count as misses" in first and first.endswith("(--seen-items)")
    assert second.startswith("60 of 60 users have had all 4 items: nothing is left to recommend")
    assert warnings_of(tmp_path, rows, seen_items="keep") == []
    (third, fourth) = warnings_of(tmp_path, rows, seen_items="keep-target")
    assert "60 of 60 test targets are ranked against unseen items only, as no server does; if users" in third
    assert "misses" not in third and fourth == second


def test_targets_that_were_seen_are_said_where_other_events_rarely_repeat(tmp_path: Path) -> None:
    rows = [*good(), *((f"u{u}", f"i{u % 40}", 10**6) for u in range(0, 60, 2))]  # their first item again
    assert warnings_of(tmp_path, rows) == [
        "30 of 60 test targets were seen before by their user: they count as misses (--seen-items)"
    ]
    (warning,) = warnings_of(tmp_path, rows, seen_items="keep-target")
    assert warning.endswith("their user: they are ranked against unseen items only, as no server does (--seen-items)")


def test_ties_of_held_out_events_are_said_unless_a_position_orders_them(tmp_path: Path) -> None:
    rows = [(user, item, min(time, 6000)) for user, item, time in good()]  # the last two events at one time
    (warning,) = warnings_of(tmp_path, rows)
    assert warning.startswith("the held-out events of 60 of 60 users have the same time as an event beside them")
    assert warning.endswith("(--position-column)")
    lines = ["user_id,item_id,timestamp,position", *(f"{u},{i},{t},{n}" for n, (u, i, t) in enumerate(rows))]
    (tmp_path / "positions.csv").write_text("\n".join(lines) + "\n")
    with open_log(tmp_path / "positions.csv") as log:
        warn_of_log(log, log.whole(), seen_items="exclude")
    assert log.report.warnings() == []


def test_ties_elsewhere_and_equal_times_of_two_users_are_not_ties_of_held_out_events(tmp_path: Path) -> None:
    assert warnings_of(tmp_path, [(user, item, max(time, 2000)) for user, item, time in good()]) == []
    assert warnings_of(tmp_path, [(user, item, time // 1000) for user, item, time in good()]) == []


def test_baskets_are_said(tmp_path: Path) -> None:
    rows = [(user, item, time // 4000) for user, item, time in good()]  # four events at a time
    (warning,) = warnings_of(tmp_path, rows)
    assert warning.startswith("users have 4.0 events at a time on average (baskets)")


def test_filters_that_take_much_are_said_with_their_option(tmp_path: Path) -> None:
    rows = [*good(), *((f"once{n}", "i1", n) for n in range(100))]
    assert warnings_of(tmp_path, rows, limits=2) == [
        "filters remove 100 of 160 users and 100 of 580 events (--min-user-events)"
    ]
    assert warnings_of(tmp_path, [*good(), ("once", "i1", 0)], limits=2) == []


CHANCE = "users have three events: metrics of so few users are mostly chance"


@pytest.mark.parametrize(("rows", "said"), [
    ([(f"u{n}", "i", n) for n in range(60)], "the log has one item: there is nothing to rank"),
    ([("u", f"i{n}", n) for n in range(9)], f"1 of 1 {CHANCE}"),
    (good(users=7), f"7 of 7 {CHANCE}"),
    (good(events=2), "no user has three events: no metrics can be computed, and no epoch is known to be the best"),
], ids=["one item", "one user", "few users", "short histories"])  # fmt: skip
def test_logs_that_are_too_small_are_named(tmp_path: Path, rows: list[Row], said: str) -> None:
    assert said in warnings_of(tmp_path, rows)


def test_at_most_three_are_shown_and_what_makes_all_else_pointless_comes_first(tmp_path: Path) -> None:
    rows = [(f"u{n % 5}", "i", 0) for n in range(60)]
    found = warnings_of(tmp_path, rows)
    assert len(found) == 3 and found[0].startswith("the log has one item")


def test_item_file_that_matches_little_is_named_with_ids_of_both_sides(tmp_path: Path) -> None:
    with open_log(write(tmp_path / "log.csv", good())) as log:
        item_ids = log.whole().item_ids
        infos = {f"{n}.0": ItemInfo(f"Title {n}", {}) for n in range(5)}
        warn_of_items(log.report, Path("items.csv"), infos, item_ids)
        (warning,) = log.report.warnings()
    assert warning.startswith("0 of 40 items have a title, and 5 of 5 rows of items.csv are of other items")
    assert "such as '0.0', '1.0', '2.0'" in warning and "such as 'i0', 'i1', 'i10'" in warning
    assert warning.endswith("(--items)")


@pytest.mark.parametrize(("titles", "said"), [(19, True), (20, True), (21, False), (40, False)])
def test_item_file_is_named_where_half_of_the_titles_are_missing(tmp_path: Path, titles: int, said: bool) -> None:
    with open_log(write(tmp_path / "log.csv", good())) as log:
        infos = {
            item_id: ItemInfo("" if n >= titles else "A title", {}) for n, item_id in enumerate(log.whole().item_ids)
        }
        warn_of_items(log.report, Path("items.csv"), infos, log.whole().item_ids)
    assert bool(log.report.warnings()) is said


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(1, 12))
def test_seen_before_equals_a_walk_through_each_history_in_any_blocks(histories: list[list[int]], block: int) -> None:
    items = np.array([item for history in histories for item in history], np.int32)
    log = Interactions(
        user_ids=[str(n) for n in range(len(histories))],
        item_ids=[str(n) for n in range(6)],
        offsets=np.cumsum([0, *map(len, histories)]),
        items=items,
        timestamps=np.zeros(len(items), np.int64),
        integer_user_ids=True,
        integer_item_ids=True,
    )
    expected = [item in history[:n] for history in histories for n, item in enumerate(history)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_warnings, "EVENTS_PER_BLOCK", block)
        assert seen_before(log).tolist() == expected
