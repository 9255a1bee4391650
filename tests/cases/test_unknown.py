"""What a model does not know is counted and said; nothing is left out silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases.commands import Commands, Said, case, log_file

KNOWN = [f"i{n:02}" for n in range(40)]


def log_of(events: dict[str, list[str]]) -> str:
    """Users and their items, one second after the other."""
    rows = [f"{user},{item},{1_600_000_000 + n}" for user, items in events.items() for n, item in enumerate(items)]
    return "user_id,item_id,timestamp\n" + "\n".join(rows) + "\n"


def evaluated(commands: Commands, bundle: Path, path: Path, *options: object) -> dict[str, Any]:
    return commands.done("evaluate", "--bundle", bundle, "--data", path, "--json", *options).json


# -- the cases ---------------------------------------------------------------------------------------------------------


def test_targets_that_no_training_could_know_are_misses(commands: Commands, ring_bundle: Path) -> None:
    result = evaluated(commands, ring_bundle, case("evaluate-drops-unknown-targets/newitems.csv"))
    assert (result["users"], result["unknown_targets"], result["hr@10"], result["ndcg@10"]) == (120, 120, 0, 0)
    assert result["input"]["unknown_events"] == 120


def test_an_items_file_that_fits_no_item_is_said(commands: Commands) -> None:
    items = case("items-file-matches-nothing/items.csv")
    said = commands.done("train", "--data", case("items-file-matches-nothing/ring.csv"), "--items", items, "--dry-run")
    assert_says_titles(said, 0, 40)


def test_what_the_filters_remove_is_said(commands: Commands) -> None:
    path = case("filters-drop-silently/kcore.csv")
    limits = ("--min-user-events", 5, "--min-item-events", 5)
    report = commands.dry_train(path, *limits)
    assert report["filters"] == {
        "min_user_events": 5, "min_item_events": 5, "users": 300, "items": report["items"] - 40, "events": 400,
    }  # fmt: skip
    said = commands.done("train", "--data", path, "--dry-run", *limits)
    assert "300 users" in said.out
    assert "400 events" in said.out


# -- evaluate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [0, 1, 5, 10])
def test_as_many_targets_are_misses_as_are_unknown(
    commands: Commands, ring_bundle: Path, tmp_path: Path, unknown: int
) -> None:
    events = {f"u{n}": [*KNOWN[n : n + 5], f"new{n}" if n < unknown else KNOWN[n + 5]] for n in range(10)}
    path = log_file(tmp_path, log_of(events))
    known = {user: items for user, items in events.items() if not items[-1].startswith("new")}
    result = evaluated(commands, ring_bundle, path)
    assert (result["users"], result["unknown_targets"]) == (10, unknown)
    if unknown < 10:  # the others rank as they do alone
        alone = evaluated(commands, ring_bundle, log_file(tmp_path, log_of(known), "known.csv"))
        for name in ("hr@10", "ndcg@10"):
            assert result[name] == pytest.approx(alone[name] * (10 - unknown) / 10)
    else:
        assert result["hr@10"] == result["ndcg@10"] == 0


def test_unknown_items_in_the_inputs_are_skipped_and_counted(
    commands: Commands, ring_bundle: Path, tmp_path: Path
) -> None:
    events = {f"u{n}": [*KNOWN[n : n + 5], KNOWN[n + 6]] for n in range(10)}
    mixed = {user: [items[0], "x1", *items[1:3], "x2", *items[3:]] for user, items in events.items()}
    plain = evaluated(commands, ring_bundle, log_file(tmp_path, log_of(events)))
    found = evaluated(commands, ring_bundle, log_file(tmp_path, log_of(mixed), "mixed.csv"))
    assert (found["hr@10"], found["ndcg@10"], found["users"]) == (plain["hr@10"], plain["ndcg@10"], plain["users"])
    assert (found["input"]["unknown_items"], found["input"]["unknown_events"]) == (2, 20)


def test_the_split_is_taken_before_unknown_items_go(commands: Commands, ring_bundle: Path, tmp_path: Path) -> None:
    """The last event of `u` is unknown: its last known one is no target in its place."""
    events = {"u": [*KNOWN[:5], "new"], "v": KNOWN[:6]}
    result = evaluated(commands, ring_bundle, log_file(tmp_path, log_of(events)))
    assert (result["users"], result["unknown_targets"]) == (2, 1)
    said = commands.done("evaluate", "--bundle", ring_bundle, "--data", tmp_path / "log.csv")
    assert "1 of 2 targets" in said.out


# -- items files -------------------------------------------------------------------------------------------------------


def assert_says_titles(said: Said, titles: int, items: int) -> None:
    assert any(f"{titles} of {items} items have a title" in line for line in said.out.splitlines()), said.out


@pytest.mark.parametrize(
    ("written", "titles"),
    [("{}.0", 0), ("00{}", 0), ("item {}", 0), ("{}", 10), (" {} ", 10), ("I{}", 0), ("{}", 3)],
)
@pytest.mark.parametrize("name", ["items.csv", "items.tsv"])
def test_how_many_items_have_a_title_is_said_where_few_have_one(
    commands: Commands, tmp_path: Path, written: str, titles: int, name: str
) -> None:
    separator = "\t" if name.endswith("tsv") else ","
    lines = [f"item_id{separator}title"]
    lines += [f"{written.format(n)}{separator}Title {n}" for n in range(1, (titles or 10) + 1)]
    items = log_file(tmp_path, "\n".join(lines) + "\n", name)
    path = log_file(tmp_path, log_of({f"u{u}": [str(n) for n in range(1, 11)] for u in range(6)}))
    said = commands.done("train", "--data", path, "--items", items, "--dry-run")
    if titles < 10:
        assert_says_titles(said, titles, 10)
    if titles == 0:
        assert any("items have a title" in line for line in said.warnings)


# -- filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "limits", "removed"),
    [
        ({"a": ["1", "2", "3"], "b": ["1", "2", "3"], "c": ["1"]}, (2, 1), (1, 0, 1)),
        ({"a": ["1", "2", "3"], "b": ["1", "2", "3"], "c": ["1", "2", "9"]}, (1, 2), (0, 1, 1)),
        # without its item 9, c has two events, and goes too
        ({"a": ["1", "2", "3"], "b": ["1", "2", "3"], "c": ["1", "2", "9"]}, (3, 2), (1, 1, 3)),
        ({"a": ["1", "2", "3"], "b": ["1", "2", "3"]}, (2, 2), (0, 0, 0)),
    ],
)
def test_filters_say_what_they_removed(
    commands: Commands, tmp_path: Path, events: dict[str, list[str]], limits: tuple[int, int], removed: tuple[int, ...]
) -> None:
    path = log_file(tmp_path, log_of(events))
    report = commands.dry_train(path, "--min-user-events", limits[0], "--min-item-events", limits[1])
    assert tuple(report["filters"][name] for name in ("users", "items", "events")) == removed
    assert report["events"] == sum(map(len, events.values()))  # of the file, before the filters


# -- logs of another catalogue -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["score", "import"])
@pytest.mark.parametrize("other", ["7.0", "item-7", "i007"])
def test_score_and_import_stop_where_most_events_are_unknown(
    commands: Commands, ring_bundle: Path, tmp_path: Path, command: str, other: str
) -> None:
    path = log_file(tmp_path, log_of({"a": ["i01", other, f"{other}{other}"], "b": [other]}))
    result = tmp_path / "out"
    where = ("--output", result) if command == "score" else ("--state", result)
    run = (command, "--bundle", ring_bundle, "--input", path, *where)
    said = commands.runtime(*run)
    assert said.code == 2
    assert "75.0%" in said.err
    assert repr(other) in said.err
    assert "'i00'" in said.err
    assert said.err.rstrip().endswith("(--max-unknown)")
    assert not result.exists()
    commands.cured({"--max-unknown": 0.8}, *run)
    assert result.exists()


@pytest.mark.parametrize(("unknown", "code"), [(0, 0), (2, 0), (3, 2), (4, 2)])
def test_half_of_the_events_may_be_unknown(
    commands: Commands, ring_bundle: Path, tmp_path: Path, unknown: int, code: int
) -> None:
    path = log_file(tmp_path, log_of({"a": [*(f"x{n}" for n in range(unknown)), *KNOWN[unknown:4]]}))
    run = ("score", "--bundle", ring_bundle, "--input", path, "--output", tmp_path / "out")
    assert commands.runtime(*run).code == code
