"""What a grouped log offers: shapes, filtering, the share of repeated items, and its fingerprint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from log_files import as_tuple, histories, write

from dman_runtime.data.logs import read_interactions


def test_interactions_have_the_documented_shapes_and_types(tmp_path: Path) -> None:
    log = read_interactions(write(tmp_path / "log.csv", [("b", "5", 1), ("a", "4", 1), ("b", "4", 2)]))
    assert (len(log), log.num_users, log.offsets.tolist(), log.items.tolist()) == (3, 2, [0, 2, 3], [1, 0, 0])
    assert (log.offsets.dtype, log.items.dtype, log.timestamps.dtype) == (np.int64, np.int32, np.int64)
    assert np.shares_memory(log.history(0), log.items)


def test_filter_drops_items_first_and_repeats_until_nothing_changes(tmp_path: Path) -> None:
    # z is rare, so c is left with one event, so y becomes rare, so b falls too; a and d share w and x.
    rows = [("c", "z", 0), ("c", "y", 1), ("b", "y", 0), ("b", "w", 1)]
    rows += [(user, item, time) for user in "ad" for time, item in enumerate("wx")]
    log = read_interactions(write(tmp_path / "log.csv", rows), min_user_events=2, min_item_events=2)
    assert histories(log) == {"a": [("w", 0), ("x", 1)], "d": [("w", 0), ("x", 1)]}
    assert log.item_ids == ["w", "x"]


def test_filter_may_leave_nothing_of_interactions(tmp_path: Path) -> None:
    log = read_interactions(write(tmp_path / "log.csv", [("a", "1", 0)]))
    empty = log.filtered(min_user_events=2, min_item_events=0)
    assert as_tuple(empty) == ([], [], [0], [], [], False, True)


def test_repeated_share_counts_items_the_same_user_has_already_seen(tmp_path: Path) -> None:
    rows = [("a", "1", 0), ("b", "1", 1), ("a", "2", 2), ("a", "1", 3), ("a", "1", 4)]
    assert read_interactions(write(tmp_path / "log.csv", rows)).repeated_share() == pytest.approx(2 / 5)


def test_fingerprint_is_stable_and_sees_ids_order_and_items(tmp_path: Path) -> None:
    rows = [("a", "1", 0), ("b", "2", 0), ("a", "2", 1)]
    fingerprint = read_interactions(write(tmp_path / "log.csv", rows)).fingerprint()
    assert fingerprint == "2f757641a7f80e4ea732747e1e7fe2b14c7f060aab3e4fc34216ace961000b75"
    for other in ([("A", "1", 0), *rows[1:]], [*rows[1:], rows[0]], [("a", "1", 2), *rows[1:]], rows[:2]):
        assert read_interactions(write(tmp_path / "log.csv", other)).fingerprint() != fingerprint
