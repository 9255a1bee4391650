"""Import merges: the same events twice change nothing, and later files go to their places."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from cases.commands import Commands, Read, case, log_file, stored
from conftest import running_server

from sdk import Client, Event

T = 1_600_000_000
ROWS = [(f"u{n % 3}", str(n * 7 % 13 + 1), T + 10 * n) for n in range(40)]


def csv_of(rows: list[tuple[str, str, int]]) -> str:
    return "user_id,item_id,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows)


def expected_of(rows: list[tuple[str, str, int]]) -> Read:
    return {user: [(i, t) for u, i, t in sorted(rows, key=lambda row: row[2]) if u == user] for user, _, _ in rows}


class Stores:
    """Imports into named stores, and compares what they hold to the last state."""

    def __init__(self, commands: Commands, bundle: Path, folder: Path) -> None:
        self.commands, self.bundle, self.folder = commands, bundle, folder

    def add(self, state: str, rows: list[tuple[str, str, int]], *options: object) -> dict[str, Any]:
        path = log_file(self.folder, csv_of(rows), "some.csv")
        where = ("--state", self.folder / state, "--bundle", self.bundle, "--input", path)
        return self.commands.done("import", *where, "--json", *options).json

    def histories(self, state: str) -> Read:
        return stored(self.folder / state)

    def answers(self, state: str) -> dict[str, Any]:
        """What a user's state gives, for each user."""
        found = {}
        for user in self.histories(state):
            where = ("--state", self.folder / state, "--bundle", self.bundle)
            shown = self.commands.done("inspect", *where, "--user", user, "--json").json
            found[user] = {name: value for name, value in shown.items() if "version" not in name}
        return found


@pytest.fixture
def stores(commands: Commands, exact_bundle: Path, tmp_path: Path) -> Stores:
    return Stores(commands, exact_bundle, tmp_path)


def test_the_ring_imported_twice_is_there_once(commands: Commands, ring_bundle: Path, tmp_path: Path) -> None:
    path, state = case("import-append-twice-doubles/ring.csv"), tmp_path / "state"
    run = ("import", "--bundle", ring_bundle, "--state", state, "--input", path, "--json")
    assert commands.done(*run).json["events"] == 1920
    once = stored(state)
    assert {len(events) for events in once.values()} == {16}
    assert commands.done(*run).json["events"] == 0
    assert stored(state) == once


@pytest.mark.parametrize("times", [2, 3])
def test_importing_again_changes_nothing(stores: Stores, times: int) -> None:
    stores.add("state", ROWS)
    before = stores.answers("state")
    for _ in range(times - 1):
        result = stores.add("state", ROWS)
        assert (result["events"], result["recognised_events"], result["rebuilt_users"]) == (0, 40, 0)
    assert stores.histories("state") == expected_of(ROWS)
    assert stores.answers("state") == before


@pytest.mark.parametrize(
    "parts",
    [
        [ROWS[:25], ROWS[15:]],  # overlapping
        [ROWS[20:], ROWS[:20]],  # the older ones later
        [ROWS[::2], ROWS[1::2]],  # between one another
        [ROWS[10:20], ROWS[:5], ROWS[25:], ROWS],
        [ROWS[n : n + 1] for n in reversed(range(0, 40, 4))] + [ROWS],
        [[row for row in ROWS if row[0] != "u1"], ROWS],  # a new user
    ],
)
def test_files_in_any_order_give_the_store_of_one_import(
    stores: Stores, parts: list[list[tuple[str, str, int]]]
) -> None:
    stores.add("at-once", ROWS)
    events = sum(stores.add("in-parts", part)["events"] for part in parts)
    assert events == len(ROWS)
    assert stores.histories("in-parts") == stores.histories("at-once") == expected_of(ROWS)
    assert_same_answers(stores.answers("in-parts"), stores.answers("at-once"))


def assert_same_answers(found: Any, expected: Any) -> None:
    """Equal, but for the last digits of floats: histories are encoded in other pieces."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same_answers(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_answers(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    else:
        assert found == expected


def test_repeats_that_are_real_can_be_kept_and_are_still_recognised(stores: Stores) -> None:
    rows = [("a", "1", T), ("a", "2", T), ("a", "1", T), ("a", "1", T + 5)]
    result = stores.add("kept", rows, "--exact-repeats", "keep")
    assert result["events"] == 4
    assert stores.histories("kept") == {"a": [("1", T), ("2", T), ("1", T), ("1", T + 5)]}
    assert stores.add("kept", rows, "--exact-repeats", "keep")["events"] == 0
    result = stores.add("dropped", rows)
    assert result["events"] == 3
    assert stores.histories("dropped") == {"a": [("1", T), ("2", T), ("1", T + 5)]}


def test_another_time_of_the_same_item_is_another_event(stores: Stores) -> None:
    stores.add("state", [("a", "1", T)])
    assert stores.add("state", [("a", "1", T + 1)])["events"] == 1
    assert stores.histories("state") == {"a": [("1", T), ("1", T + 1)]}


def test_random_slices_of_a_log_merge_to_the_log(stores: Stores) -> None:
    generator = random.Random(14)
    for number in range(2):
        slices = [generator.sample(ROWS, generator.randint(1, 40)) for _ in range(4)]
        for rows in [*slices, ROWS]:
            stores.add(f"state-{number}", rows)
        assert stores.histories(f"state-{number}") == expected_of(ROWS)


def test_an_exported_log_imports_to_the_same_store(commands: Commands, stores: Stores) -> None:
    stores.add("state", ROWS)
    output = stores.folder / "exported.parquet"
    commands.done("export-log", "--state", stores.folder / "state", "--output", output)
    for state, events in (("new", len(ROWS)), ("state", 0)):
        where = ("--state", stores.folder / state, "--bundle", stores.bundle, "--input", output)
        assert commands.done("import", *where, "--json").json["events"] == events
        assert stores.histories(state) == expected_of(ROWS)
    report = commands.dry_train(output, "--min-user-events", 1, "--min-item-events", 1)
    assert (report["rows"], report["users"]) == (len(ROWS), 3)


@pytest.mark.slow
def test_a_backfill_behind_live_events_is_put_in_its_place(commands: Commands, stores: Stores) -> None:
    live = [("u0", "5", T + 1000), ("u0", "6", T + 1010), ("new", "7", T + 1000)]
    with running_server(stores.bundle, stores.folder / "live") as (address, _), Client(address, timeout=30) as client:
        for user, item, time in live:
            client.update(user, [Event(int(item), time)])
        stores.add("live", ROWS)
        after = {user: [one.item_id for one in client.recommend(user, k=10)] for user in ("u0", "u1", "new")}
    stores.add("at-once", [*ROWS, *live])
    assert stores.histories("live") == stores.histories("at-once") == expected_of([*ROWS, *live])
    assert_same_answers(stores.answers("live"), stores.answers("at-once"))
    with (
        running_server(stores.bundle, stores.folder / "at-once") as (address, _),
        Client(address, timeout=30) as client,
    ):
        assert {user: [one.item_id for one in client.recommend(user, k=10)] for user in after} == after
