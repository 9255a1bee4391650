"""The synthetic log: reproducible, skewed like real logs, and with a structure that only a long memory can use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dman_runtime.interactions import InputError, Interactions, read_interactions, read_items
from dman_train.synthetic import SyntheticConfig, generate, write_items, write_log
from tools.generate import main

CONFIG = SyntheticConfig()
SMALL = SyntheticConfig(users=40, items=200, mean_events=60)


@pytest.fixture(scope="module")
def log() -> Interactions:
    return generate(CONFIG)


def catalogue_histories(log: Interactions) -> Iterator[list[int]]:
    """Every user's history as indices into the catalogue."""
    catalogue_index = np.array([int(item_id) - 1 for item_id in log.item_ids])
    return (catalogue_index[log.history(user)].tolist() for user in range(log.num_users))


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet"])
def test_synthetic_log_is_the_same_bytes_for_the_same_config(tmp_path: Path, kind: str) -> None:
    written = []
    for name in ("one", "two"):
        write_log(generate(SMALL), tmp_path / (name + kind))
        write_items(SMALL, tmp_path / f"{name}-items{kind}")
        written.append((tmp_path / (name + kind)).read_bytes() + (tmp_path / f"{name}-items{kind}").read_bytes())
    assert written[0] == written[1]
    write_log(generate(replace(SMALL, seed=1)), tmp_path / f"other{kind}")
    assert (tmp_path / f"other{kind}").read_bytes() != (tmp_path / f"one{kind}").read_bytes()


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet"])
def test_synthetic_log_survives_writing_and_reading(tmp_path: Path, log: Interactions, kind: str) -> None:
    write_log(log, tmp_path / f"log{kind}")
    again = read_interactions(tmp_path / f"log{kind}")
    assert again.fingerprint() == log.fingerprint()
    assert np.array_equal(again.timestamps, log.timestamps)
    assert (again.integer_user_ids, again.integer_item_ids) == (False, True)
    assert [path.name for path in tmp_path.iterdir()] == [f"log{kind}"]  # nothing unfinished left


def test_synthetic_log_is_written_in_order_of_time(tmp_path: Path, log: Interactions) -> None:
    write_log(log, tmp_path / "log.csv")
    lines = (tmp_path / "log.csv").read_text().splitlines()
    times = [int(line.split(",")[2]) for line in lines[1:]]
    assert lines[0] == "user_id,item_id,timestamp"
    assert lines[1].startswith("u0001,")
    assert times == sorted(times)
    assert len(times) == len(log)


def test_synthetic_times_never_go_back_and_lie_in_the_past(log: Interactions) -> None:
    assert all(np.all(np.diff(log.user_timestamps(user)) >= 0) for user in range(log.num_users))
    assert log.timestamps.min() >= 1_577_836_800  # 2020-01-01
    very_long = generate(replace(CONFIG, users=1, mean_events=20_000))
    assert very_long.timestamps.max() < 1_577_836_800 + 6 * 365 * 86_400


def test_synthetic_lengths_are_heavy_tailed(log: Interactions) -> None:
    lengths = np.diff(log.offsets)
    assert log.num_users == CONFIG.users
    assert lengths.min() >= CONFIG.min_events
    assert CONFIG.mean_events * 0.85 < lengths.mean() < CONFIG.mean_events * 1.15
    assert np.median(lengths) < 0.75 * lengths.mean()
    assert np.percentile(lengths, 99) > 5 * np.median(lengths)


def test_synthetic_popularity_is_skewed(log: Interactions) -> None:
    counts = np.sort(np.bincount(log.items))[::-1]
    top_tenth = counts[: len(counts) // 10].sum() / counts.sum()
    assert 0.25 < top_tenth < 0.7  # uniform would be 0.1
    assert len(log.item_ids) > 0.9 * CONFIG.items


def test_returns_after_a_long_absence_continue_the_series(log: Interactions) -> None:
    returns = continued = 0
    for history in catalogue_histories(log):
        last_visit: dict[int, tuple[int, int]] = {}  # by series: position, part
        for position, item in enumerate(history):
            if (place := CONFIG.series_and_part(item)) is None:
                continue
            series, part = place
            if series in last_visit and position - last_visit[series][0] > 2 * 20:
                returns += 1
                continued += part == last_visit[series][1] + 1
            last_visit[series] = (position, part)
    assert returns > 0.08 * len(log)  # enough of them to show in a metric
    assert continued > 0.9 * returns  # chance is 1 in 10 with the series known, 1 in 500 without


def test_what_comes_after_a_return_is_not_in_the_last_two_segments(log: Interactions) -> None:
    """The series that a user returns to has left no trace in the window, so without memory it can only be guessed."""
    guessed = returns = 0
    popular = np.argsort(-np.bincount(log.items))[:10]
    top_ten = {int(log.item_ids[i]) - 1 for i in popular}
    for history in catalogue_histories(log):
        for position in range(200, len(history)):
            place = CONFIG.series_and_part(history[position])
            window = {CONFIG.series_and_part(item) for item in history[position - 40 : position]}
            if place and place[1] > 0 and place[0] not in {seen[0] for seen in window if seen}:
                returns += 1
                guessed += history[position] in top_ten
    assert returns > 1000
    assert guessed < 0.15 * returns


def test_short_term_interest_lasts_and_drifts(log: Interactions) -> None:
    same = pairs = 0
    genres_met = []
    first_single = CONFIG.num_series * CONFIG.series_length
    for history in catalogue_histories(log):
        genres = [(item - first_single) % CONFIG.genres for item in history if item >= first_single]
        same += sum(a == b for a, b in pairwise(genres))
        pairs += max(0, len(genres) - 1)
        if len(genres) > 100:
            genres_met.append(len(set(genres)))
    assert 0.75 < same / pairs < 0.97  # chance is about 1 in 8
    assert np.mean(genres_met) > 4


def test_old_items_come_back_now_and_then(log: Interactions) -> None:
    repeats = sum(len(history) - len(set(history)) for history in catalogue_histories(log))
    assert 0.02 < repeats / len(log) < 0.2


@pytest.mark.parametrize("field", [field.name for field in fields(SyntheticConfig)])
def test_every_field_of_the_config_changes_the_log(field: str) -> None:
    base = replace(SMALL, mean_events=100, max_length_ratio=2)
    value = getattr(base, field)
    other = value / 2 if isinstance(value, float) else value + 1
    if field == "min_events":
        other = 100
    log, changed = generate(base), generate(replace(base, **{field: other}))
    assert log.fingerprint() != changed.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": 0}, "users is 0. Make it at least 1"),
        ({"items": 3}, "items is 3. Make it enough for one series of 10 parts"),
        ({"items": 20, "genres": 30}, "items is 20. Make it enough for a single in each of 30 genres"),
        ({"mean_events": 4}, "mean_events is 4. Make it at least 5"),
        ({"min_events": 121}, "min_events is 121. Make it at most mean_events, 120"),
        ({"drift_rate": 1.5}, "drift_rate is 1.5. Make it from 0 to 1"),
        ({"return_rate": 0.0}, "return_rate is 0.0. Make it above 0 and at most 1"),
        ({"serial_share": 1.0}, "serial_share is 1.0. Make it between 0 and 1, without either"),
        ({"seed": -1}, "seed is -1. Make it 0 or more"),
        ({"max_browse": 0}, "max_browse is 0. Make it at least 1"),
    ],
)
def test_impossible_config_is_refused_with_the_remedy(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        replace(CONFIG, **change)
    assert str(raised.value) == message


def test_small_catalogue_works() -> None:
    log = generate(SyntheticConfig(users=5, items=20, mean_events=50))  # one series, ten singles
    assert log.num_users == 5


def test_items_have_titles_genres_and_series(tmp_path: Path) -> None:
    write_items(CONFIG, tmp_path / "items.csv")
    items = read_items(tmp_path / "items.csv")
    assert len(items) == CONFIG.items
    assert (items["12"].title, items["12"].attributes["series"]) == ("Series 2, part 2", "Series 2")
    assert items["500"].title.startswith("Single ")
    assert set(items["500"].attributes) == {"genre"}
    assert len({info.attributes["genre"] for info in items.values()}) == CONFIG.genres


def test_writing_refuses_other_extensions_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown extension '.json'. Write a .csv, .tsv, .parquet file"):
        write_log(generate(SMALL), tmp_path / "log.json")
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.csv").write_text("old")
    broken = replace(generate(SMALL), item_ids=[])
    with pytest.raises(IndexError):
        write_log(broken, tmp_path / "log.csv")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("log.csv", "old")]


def test_generate_command_writes_both_files_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--users", "30", "--num-items", "200", "--mean-events", "50", "--seed", "3"]) == 0
    log = read_interactions(Path("data/log.csv"))
    assert log.fingerprint() == generate(SyntheticConfig(users=30, items=200, mean_events=50, seed=3)).fingerprint()
    assert set(log.item_ids) <= set(read_items(Path("data/items.csv")))
    printed = capsys.readouterr()
    assert printed.out.startswith(f"wrote {len(log):,} events of 30 users")
    assert (printed.out.count("\n"), printed.err) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "0"], "error: users is 0. Make it at least 1"),
        (["--output", "log.json"], "error: log.json: unknown extension"),
        (["--users", "5", "--output", "/dev/null/log.csv"], "error: [Errno"),
    ],
)
def test_generate_command_fails_with_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert (printed.err.count("\n"), printed.out) == (1, "")
