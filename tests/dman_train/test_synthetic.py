"""The synthetic log: reproducible, skewed like real logs, and with a structure that only a long memory can use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import whole_benchmark

from dman_runtime.data.evaluation import held_out, metrics, ranks_of_targets
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.items import read_items
from dman_runtime.data.logs import read_interactions
from dman_runtime.errors import InputError
from dman_train.config import ModelConfig
from dman_train.model import DMAN
from dman_train.replay import replay
from dman_train.synthetic import PlantedConfig, SyntheticConfig, generate, planted, planted_keys, write_items, write_log
from tools.generate import main

CONFIG = SyntheticConfig()
SMALL = SyntheticConfig(users=40, items=200, mean_events=60)
PUZZLE = PlantedConfig(users=40, items=200, answers=5, queries=3)


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet"])
def test_synthetic_log_survives_writing_and_reading(tmp_path: Path, log: Interactions, kind: str) -> None:
    write_log(log, tmp_path / f"log{kind}")
    again = read_interactions(tmp_path / f"log{kind}")
    assert again.fingerprint() == log.fingerprint()
    assert np.array_equal(again.timestamps, log.timestamps)
    assert (again.integer_user_ids, again.integer_item_ids) == (False, True)
    assert [path.name for path in tmp_path.iterdir()] == [f"log{kind}"]  # nothing unfinished left


@pytest.mark.slow
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
            if (found := CONFIG.series_and_part(item)) is None:
                continue
            series, part = found
            if series in last_visit and position - last_visit[series][0] > 2 * 20:
                returns += 1
                continued += part == last_visit[series][1] + 1
            last_visit[series] = (position, part)
    assert returns > 0.08 * len(log)  # enough of them to show in a metric
    assert continued > 0.9 * returns  # chance is 1 in 10 with the series known, 1 in 500 without


@pytest.mark.slow
def test_what_comes_after_a_return_is_not_in_the_last_two_segments(log: Interactions) -> None:
    """The series that a user returns to has left no trace in the window, so without memory it can only be guessed."""
    guessed = returns = 0
    popular = np.argsort(-np.bincount(log.items))[:10]
    top_ten = {int(log.item_ids[i]) - 1 for i in popular}
    for history in catalogue_histories(log):
        for position in range(200, len(history)):
            found = CONFIG.series_and_part(history[position])
            window = {CONFIG.series_and_part(item) for item in history[position - 40 : position]}
            if found and found[1] > 0 and found[0] not in {seen[0] for seen in window if seen}:
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


@pytest.mark.slow
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
    with pytest.raises(InputError, match=r"unknown extension '.json'; write a .csv, .tsv, .parquet file"):
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


@pytest.mark.slow
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


# -- planted ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_log() -> Interactions:
    return generate(PlantedConfig())


def puzzle_histories(config: PlantedConfig) -> list[list[int]]:
    return list(catalogue_histories(generate(config)))


@pytest.mark.slow
def test_planted_log_has_all_items_often_enough_and_histories_of_hundreds(planted_log: Interactions) -> None:
    config, lengths = PlantedConfig(), np.diff(planted_log.offsets)
    assert (planted_log.num_users, len(planted_log.item_ids)) == (config.users, config.items)
    assert planted_log.filtered(min_user_events=5, min_item_events=5).fingerprint() == planted_log.fingerprint()
    gap_and_answers = [config.min_gap + 3, config.max_gap + 3]
    assert 15 + 4 * gap_and_answers[0] <= lengths.min() and lengths.max() <= 15 + 4 * gap_and_answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["valid", "test"])
def test_planted_targets_are_found_at_rank_one_by_who_remembers_all(split: str, planted_log: Interactions) -> None:
    """Also with seen items excluded: were a target among them, its rank would be a miss."""
    config, data = PlantedConfig(), held_out(planted_log, split)  # every item occurs: indices are the catalogue's
    expected = [config.expected(history.tolist()) for history in data.histories[:500]]
    scores = np.zeros((500, config.items))
    scores[np.arange(500), expected] = 1
    ranks = ranks_of_targets(scores, data.targets[:500], data.histories[:500])
    assert metrics(ranks.seen_excluded)["ndcg@10"] == metrics(ranks.seen_kept)["ndcg@10"] == 1


def test_planted_answers_come_twice_a_query_and_never_again() -> None:
    for history, keys in zip(puzzle_histories(PUZZLE), planted_keys(PUZZLE).tolist(), strict=True):
        expected = [None, *(PUZZLE.expected(history[:end]) for end in range(1, len(history)))]
        answers = [(position, item) for position, item in enumerate(expected) if item is not None]
        assert len(answers) == 2 * PUZZLE.queries and answers[-1][0] == len(history) - 1
        assert all(history[position] == item and item not in history[:position] for position, item in answers)
        assert {item for _, item in answers} == {
            PUZZLE.answer(query, number, keys[number]) for query in range(PUZZLE.queries) for number in (0, 1)
        }
        assert all(history[: PUZZLE.head].count(PUZZLE.key(number, keys[number])) == 1 for number in (0, 1))


@pytest.mark.parametrize("number", [0, 1], ids=["validation", "test"])
def test_planted_last_inputs_are_the_same_whatever_the_key(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another key for everyone changes every target, and nothing in the inputs that a short memory sees."""
    histories, keys = puzzle_histories(PUZZLE), planted_keys(PUZZLE)
    keys[:, number] = (keys[:, number] + 1) % PUZZLE.answers
    monkeypatch.setattr(planted, "planted_keys", lambda _: keys)
    target, window = number - 2, PUZZLE.min_gap + 1 + number
    for one, other in zip(histories, puzzle_histories(PUZZLE), strict=True):
        assert one[target] != other[target]
        assert one[:target][-window:] == other[:target][-window:]
        assert one[:target] != other[:target]


def test_planted_keys_are_uniform_and_independent_of_each_other() -> None:
    keys = planted_keys(replace(PUZZLE, users=50_000))
    counts = np.bincount(keys @ [5, 1], minlength=25)
    assert len(counts) == 25 and ((counts - 2000) ** 2 / 2000).sum() < 52  # chi-squared, 24 degrees: p = .001


def counted_hit_rate(config: PlantedConfig, window: int) -> float:
    """HR@10 on the second answers to the last queries: naive Bayes on which items are among the last `window` inputs,
    with probabilities counted over the queries before."""
    histories = puzzle_histories(config)
    counts = np.ones((config.queries, config.answers, config.items))  # of inputs that hold the item, by answer
    totals = np.full((config.queries, config.answers, 1), 2.0)
    asked = []
    for history in histories:
        for end, item in enumerate(history):
            alphabet, value = divmod(item - config.answer(0, 0, 0), config.answers)
            query, number = divmod(alphabet, 2)
            if query < 0 or number == 0:
                continue
            inputs = list(set(history[max(0, end - window) : end]))
            if end < len(history) - 1:
                counts[query, value, inputs] += 1
                totals[query, value] += 1
            else:
                asked.append((query, value, inputs))
    present, absent = np.log(counts / totals), np.log(1 - counts / totals)
    scores = [(present - absent)[query][:, inputs].sum(1) + absent[query].sum(1) for query, _, inputs in asked]
    ranks = [(score >= score[value]).sum() for score, (_, value, _) in zip(scores, asked, strict=True)]
    return float((np.array(ranks) <= 10).mean())


@whole_benchmark
def test_planted_answers_can_be_learned_from_whole_histories_but_not_from_the_recent_part() -> None:
    config = PlantedConfig(users=2000, items=500, answers=20, queries=3)
    assert config.chance() == 0.5
    assert counted_hit_rate(config, 1000) > 0.9
    for window in (20, 40, config.min_gap + 2):
        assert abs(counted_hit_rate(config, window) - config.chance()) < 0.05  # four standard errors


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "reaches"), [("xl", False), ("dman", True)])
def test_planted_keys_are_out_of_reach_of_default_segments_without_memory(variant: str, reaches: bool) -> None:
    """The segments before feed the ones after, layer by layer; still nothing of what tells the answer gets through."""
    torch.manual_seed(0)
    model = DMAN(ModelConfig(variant=variant, width=16, memory_slots=4), PUZZLE.items).eval()
    for back in (2, 1):  # validation, test
        inputs = [np.array(history[:-back]) for history in puzzle_histories(PUZZLE)]
        erased = [np.append(np.zeros_like(one[: -PUZZLE.min_gap]), one[-PUZZLE.min_gap :]) for one in inputs]
        (users, _), (without, _) = replay(model, inputs), replay(model, erased)
        assert (users - without).abs().amax(1).gt(1e-6).tolist() == [reaches] * PUZZLE.users


def test_planted_log_is_the_same_bytes_for_the_same_config(tmp_path: Path) -> None:
    for name, config in (("one", PUZZLE), ("two", PUZZLE), ("other", replace(PUZZLE, seed=1))):
        write_log(generate(config), tmp_path / f"{name}.csv")
    one, two, other = ((tmp_path / f"{name}.csv").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


@pytest.mark.slow
@pytest.mark.parametrize("field", [field.name for field in fields(PlantedConfig)])
def test_every_field_of_the_planted_config_changes_the_log(field: str) -> None:
    value = getattr(PUZZLE, field)
    other = value / 2 if isinstance(value, float) else value + 1
    assert generate(PUZZLE).fingerprint() != generate(replace(PUZZLE, **{field: other})).fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": 1}, "answers is 1. Make it at least 2"),
        ({"head": 1}, "head is 1. Make it at least 2"),
        ({"max_gap": 79}, "max_gap is 79. Make it at least min_gap, 80"),
        ({"genres": 2}, "genres is 2. Make it at least home_genres, 3"),
        ({"items": 62}, "items is 62. Make it at least 63: an ordinary item for each genre as well"),
        ({"seed": -1}, "seed is -1. Make it 0 or more"),
    ],
)
def test_impossible_planted_config_is_refused_with_the_remedy(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        replace(PUZZLE, **change)
    assert str(raised.value) == message
    if "items" in change:
        assert replace(PUZZLE, items=63).ordinary_items == PUZZLE.genres


def test_planted_items_have_titles_and_kinds(tmp_path: Path) -> None:
    write_items(PUZZLE, tmp_path / "items.csv")
    items = list(read_items(tmp_path / "items.csv").values())
    assert len(items) == PUZZLE.items
    assert (items[PUZZLE.key(1, 2)].title, items[PUZZLE.query(2)].title) == ("Key 2: 3", "Query 3")
    assert items[PUZZLE.answer(1, 0, 4)].title == "Answer 1 to query 2: 5"
    assert {item.attributes["kind"] for item in items} == {"Ordinary", "Key", "Query", "Answer"}
