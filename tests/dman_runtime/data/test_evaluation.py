"""The evaluation protocol against a hand-computed table and against known numbers on MovieLens-1M."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import MOVIELENS, RANKING_OF_SEEN_ITEMS
from hypothesis import given
from hypothesis import strategies as st

from dman_runtime.data.evaluation import (
    MISS,
    RANKINGS,
    UNKNOWN,
    HeldOut,
    Ranking,
    Ranks,
    format_report,
    held_out,
    metrics,
    ranking_for,
    ranks_of_targets,
    report,
    training_events,
)
from dman_runtime.data.interactions import Interactions
from dman_runtime.data.logs import read_interactions

NAN = float("nan")
#    scores of items 0..4            target  history   excluded  kept  target kept  why
TABLE = [
    ([0.9, 0.1, 0.2, 0.3, 0.4], 0, [1, 2], 1, 1, 1, "the best item"),
    ([0.9, 0.1, 0.2, 0.3, 0.4], 1, [2], 4, 5, 4, "the worst item, one better one seen"),
    ([0.9, 0.8, 0.2, 0.3, 0.4], 4, [0, 1], 1, 3, 1, "all better ones seen"),
    ([0.9, 0.8, 0.2, 0.3, 0.4], 4, [0, 0, 2, 0], 2, 3, 2, "one better one seen several times, one worse one"),
    ([0.5, 0.5, 0.5, 0.5, 0.5], 2, [4], 4, 5, 4, "ties count against the model"),
    ([0.5, 0.7, 0.5, 0.1, 0.1], 0, [2], 2, 3, 2, "a tied item that was seen does not count"),
    ([0.9, 0.1, 0.2, 0.3, 0.4], 0, [0, 1], MISS, 1, 1, "the target itself was seen, and is the best"),
    ([0.9, 0.1, 0.2, 0.3, 0.4], 2, [2, 0], MISS, 4, 3, "it was seen, as was one of three better ones"),
    ([0.9, 0.1, 0.2, 0.3, 0.4], 2, [2, 0, 2, 2], MISS, 4, 3, "it was seen three times"),
    ([0.5, 0.5, 0.5, 0.5, 0.1], 1, [1, 1, 3], MISS, 4, 3, "it was seen and ties with two unseen and one seen item"),
    ([0.5, 0.5, 0.5, 0.5, 0.5], 1, [0, 1, 2, 3, 4], MISS, 5, 1, "all items were seen, so only the target is left"),
    ([0.9, 0.1, 0.2, 0.3, 0.4], 3, [], 3, 3, 3, "nothing seen"),
    ([NAN, 0.1, 0.2, 0.3, 0.4], 0, [1], 4, 5, 4, "a target without a score is last"),
    ([NAN, 0.1, 0.2, 0.3, 0.4], 0, [0, 1], MISS, 5, 4, "also one that was seen"),
    ([NAN, 0.9, 0.2, 0.3, 0.4], 1, [2], 2, 2, 2, "another item without a score is first"),
    ([NAN, 0.9, 0.2, 0.3, 0.4], 1, [0], 1, 2, 1, "unless it was seen"),
    ([-np.inf, np.inf, 0.2, 0.3, 0.4], 1, [2], 1, 1, 1, "infinite scores are scores"),
    ([0.1, np.inf, np.inf, 0.3, 0.4], 1, [0], 2, 2, 2, "and tie"),
]


def as_lists(ranks: Ranks) -> tuple[list[int], ...]:
    return ranks.seen_excluded.tolist(), ranks.seen_kept.tolist(), ranks.target_kept.tolist()


@pytest.mark.parametrize(("scores", "target", "history", "excluded", "kept", "target_kept", "why"), TABLE)
def test_ranks_equal_hand_computation(
    scores: list[float], target: int, history: list[int], excluded: int, kept: int, target_kept: int, why: str
) -> None:
    ranks = ranks_of_targets(np.array([scores]), np.array([target]), [np.array(history, np.int64)])
    assert as_lists(ranks) == ([excluded], [kept], [target_kept]), why


def test_ranks_of_a_batch_equal_those_of_its_rows() -> None:
    ranks = ranks_of_targets(
        np.array([row[0] for row in TABLE], np.float32),
        np.array([row[1] for row in TABLE]),
        [np.array(row[2], np.int64) for row in TABLE],
    )
    assert as_lists(ranks) == tuple([row[column] for row in TABLE] for column in (3, 4, 5))
    assert {ranks.of(ranking).dtype for ranking in RANKINGS} == {np.dtype(np.int64)}


def test_a_target_that_the_model_does_not_know_is_a_miss_in_all_rankings_and_changes_no_other_rank() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.1, 0.2, 0.3]])
    ranks = ranks_of_targets(scores, np.array([2, UNKNOWN, 2]), [np.array([0]), np.array([1]), np.array([], np.int64)])
    assert as_lists(ranks) == ([1, MISS, 1], [2, MISS, 1], [1, MISS, 1])


@pytest.mark.parametrize(("seen_items", "ranking"), RANKING_OF_SEEN_ITEMS.items())
def test_choice_of_seen_items_decides_the_ranking(seen_items: str, ranking: Ranking) -> None:
    ranks = Ranks(np.array([MISS]), np.array([3]), np.array([2]))
    assert ranking_for(seen_items) == ranking
    assert ranks.of(ranking_for(seen_items)) is getattr(ranks, ranking)


def test_held_out_events_in_terms_of_a_model_skip_unknown_inputs_and_keep_unknown_targets() -> None:
    histories, times = (
        [np.array([0, 1, 2]), np.array([1]), np.array([3, 3])],
        [np.array([7, 8, 9]), np.array([3]), np.array([1, 2])],
    )
    data = HeldOut(np.array([0, 4, 9]), histories, np.array([3, 0, 1]), times, np.array([20, 30, 40]))
    known = data.in_terms_of(np.array([7, UNKNOWN, 5, 6], np.int32))
    assert known.users.tolist() == [0, 4, 9]
    assert [history.tolist() for history in known.histories] == [[7, 5], [], [6, 6]]
    assert [moments.tolist() for moments in known.times] == [[7, 9], [], [1, 2]]
    assert (known.targets.tolist(), known.target_times.tolist()) == ([6, 7, UNKNOWN], [20, 30, 40])
    assert (data.unknown_targets, known.unknown_targets) == (0, 1)
    last = known.rows(np.array([2]))
    assert (last.users.tolist(), last.histories[0].tolist(), last.targets.tolist()) == ([9], [6, 6], [UNKNOWN])


def test_ranks_concatenate_and_return_to_order() -> None:
    parts = [
        Ranks(np.array([3, MISS]), np.array([4, 2]), np.array([3, 5])),
        Ranks(np.array([MISS]), np.array([1]), np.array([7])),
    ]
    back = Ranks.concatenate(parts).reordered(np.array([2, 0, 1]))
    assert as_lists(back) == ([MISS, MISS, 3], [2, 1, 4], [5, 7, 3])
    assert as_lists(Ranks.concatenate([])) == ([], [], [])


def test_metrics_equal_hand_computation() -> None:
    """Ranks 1, 10, 11, 100, 200, 201, 500, 501 and a miss."""
    found = metrics(np.array([1, 10, 11, 100, 200, 201, 500, 501, MISS]))
    gains = {rank: 1 / np.log2(1 + rank) for rank in (1, 10, 11, 100)}
    assert gains[1] == 1.0
    assert found == pytest.approx(
        {
            "hr@10": 2 / 9,
            "hr@50": 3 / 9,
            "hr@100": 4 / 9,
            "hr@200": 5 / 9,
            "hr@500": 7 / 9,
            "ndcg@10": (1 + 0.28906482631788) / 9,  # 1 / log2(11)
            "ndcg@50": (1 + gains[10] + gains[11]) / 9,
            "ndcg@100": (1 + gains[10] + gains[11] + gains[100]) / 9,
        }
    )
    assert metrics(np.zeros(0, np.int64)) == {}


def test_report_has_seen_excluded_first_and_the_other_rankings_beside_it() -> None:
    result = report(Ranks(np.array([MISS, 1]), np.array([1, 60]), np.array([101, 101])), "valid")
    assert (result["users"], result["split"], result["hr@10"]) == (2, "valid", 0.5)
    assert result["seen_kept"]["hr@50"] == 0.5
    assert (result["target_kept"]["hr@100"], result["target_kept"]["hr@200"]) == (0.0, 1.0)
    lines = format_report(result).splitlines()
    assert lines[0].startswith("valid split, 2 users")
    assert [line.split() for line in lines if "hr@100" in line] == [["hr@100", "0.5000", "1.0000", "0.0000"]]
    assert [" ".join(line.split()) for line in lines if "kept" in line] == ["seen excluded seen kept target kept"]
    assert len({len(line) for line in lines[3:]}) == 1, "the columns are aligned"
    assert format_report(report(Ranks.concatenate([]), "test"))


def test_report_says_which_log_it_is_about_what_was_left_out_and_how_many_targets_are_unknown() -> None:
    ranks = Ranks(np.array([1, MISS]), np.array([1, MISS]), np.array([1, MISS]))
    lines = format_report(report(ranks, "test", unknown_targets=1, log="another log")).splitlines()
    assert lines[1] == "another log than that of the training, not filtered"
    assert lines[2] == "1 of 2 targets are items that the model does not know: they count as misses"
    result = report(ranks, "test", filters={"min_user_events": 5, "min_item_events": 2})
    assert (result["log"], result["unknown_targets"]) == ("training log", 0)
    lines = format_report(result).splitlines()
    assert lines[1:3] == [
        "the log of the training, without users of fewer than 5 events and items of fewer than 2", ""
    ]  # fmt: skip


def log_of(*lengths: int) -> Interactions:
    """Users with these many events, all of distinct items in ascending order."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    count = int(offsets[-1])
    return Interactions(
        user_ids=[f"u{i}" for i in range(len(lengths))],
        item_ids=[str(i) for i in range(count)],
        offsets=offsets,
        items=np.arange(count, dtype=np.int32),
        timestamps=100 + 7 * np.arange(count),
        integer_user_ids=False,
        integer_item_ids=True,
    )


def test_held_out_events_are_the_last_two() -> None:
    log = log_of(4, 2, 3)  # items 0-3, 4-5, 6-8; two events hold nothing out
    valid, test = held_out(log, "valid"), held_out(log, "test")
    assert valid.users.tolist() == test.users.tolist() == [0, 2]
    assert (valid.targets.tolist(), test.targets.tolist()) == ([2, 7], [3, 8])
    assert [h.tolist() for h in valid.histories] == [[0, 1], [6]]
    assert [h.tolist() for h in test.histories] == [[0, 1, 2], [6, 7]]  # the validation item is an input when testing
    items, offsets, times = training_events(log)
    assert items.tolist() == [0, 1, 4, 5, 6]
    assert offsets.tolist() == [0, 2, 4, 5]
    assert times.tolist() == log.timestamps[[0, 1, 4, 5, 6]].tolist()
    assert [h.tolist() for h in test.times] == [log.timestamps[:3].tolist(), log.timestamps[6:8].tolist()]
    assert test.target_times.tolist() == log.timestamps[[3, 8]].tolist()


@pytest.mark.slow
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_training_and_held_out_events_are_disjoint_and_complete(lengths: list[int]) -> None:
    log = log_of(*lengths)
    items, offsets, _ = training_events(log)
    parts = [set(items.tolist()), *(set(held_out(log, split).targets.tolist()) for split in ("valid", "test"))]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(log)
    assert offsets[0] == 0
    assert offsets[-1] == len(items)
    data = held_out(log, "valid")  # the input of validation is what was trained on
    for user, history in zip(data.users, data.histories, strict=True):
        assert items[offsets[user] : offsets[user + 1]].tolist() == history.tolist()


@pytest.mark.slow
@pytest.mark.skipif(not MOVIELENS.is_dir(), reason="MovieLens-1M is not here")
def test_most_popular_on_movielens_equals_known_result() -> None:
    """Popularity is counted in the training events.

    The known NDCG@100 is that of popularity with ties by item index, .05378; ties against the model give .05374.
    """
    log = read_interactions(MOVIELENS / "interactions.parquet", min_user_events=5, min_item_events=5)
    assert (log.num_users, len(log.item_ids), len(log)) == (6040, 3416, 999_611)
    counts = np.bincount(training_events(log)[0], minlength=len(log.item_ids)).astype(np.float32)
    data = held_out(log, "test")
    parts = []
    for start in range(0, len(data.users), 1024):
        rows = slice(start, start + 1024)
        targets = data.targets[rows]
        scores = np.broadcast_to(counts, (len(targets), len(counts)))
        parts.append(ranks_of_targets(scores, targets, data.histories[rows]))
    found = metrics(Ranks.concatenate(parts).seen_excluded)
    known = {"hr@10": 0.0369, "hr@50": 0.1391, "ndcg@100": 0.0538}
    assert {name: found[name] for name in known} == pytest.approx(known, abs=1e-4)
