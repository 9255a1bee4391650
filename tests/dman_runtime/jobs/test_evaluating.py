"""Leave-one-out metrics of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TIMED, TINY_ITEMS, events_of, random_model
from histories import Histories, make_histories, write_csv
from torch_graphs import generation_of

from dman_runtime.data.evaluation import MISS, RANKINGS, Ranks, Split, metrics, ranks_of_targets
from dman_runtime.data.log_options import ANY_LOG
from dman_runtime.data.vocabulary import KnownLog, read_known
from dman_runtime.errors import InputError
from dman_runtime.jobs import partitions
from dman_runtime.jobs.evaluating import evaluate, held_out_ranks
from dman_runtime.model.generation import Generation
from dman_train import ranking as training
from dman_train.model import DMAN
from dman_train.ranking import all_ranks


def known(path: Path, generation: Generation) -> KnownLog:
    return read_known(path, generation.bundle.items.index, ANY_LOG)


@pytest.fixture(scope="module")
def known_log(histories: Histories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of known items only."""
    return write_csv(tmp_path_factory.mktemp("evaluating") / "log.csv", histories)


@pytest.mark.parametrize("split", ["test", "valid"])
def test_ranks_of_a_model_that_sees_times_are_those_of_training(known_log: Path, split: Split) -> None:
    """At the times of the targets, with what is added for items that users come back to."""
    model = random_model(TIMED, TINY_ITEMS)
    generation = generation_of(model)
    data = known(known_log, generation).held_out(split)
    assert data.target_times.min() > 0 and len(np.unique(data.target_times)) > 1
    found, expected = held_out_ranks(data, generation), all_ranks(model, data)
    for ranking in RANKINGS:
        assert found.of(ranking).tolist() == expected.of(ranking).tolist()


@pytest.mark.parametrize(("split", "last"), [("test", 1), ("valid", 2)])
def test_ranks_are_those_of_a_replay_user_by_user(
    exact: Generation, known_log: Path, histories: Histories, split: str, last: int
) -> None:
    log = known(known_log, exact)
    data = log.held_out(split)  # type: ignore[arg-type]
    found = held_out_ranks(data, exact)
    assert len(data.users) == len(histories)
    for row, user in enumerate(data.users):
        items = [item - 1 for item, _ in histories[int(log.interactions.user_ids[user])]]
        history, target = np.array(items[:-last]), items[-last]
        (state,) = exact.replay([events_of(history)])
        scores = exact.bundle.item_embeddings @ state.user_embedding
        rank = 1 + int((scores > scores[target]).sum())
        assert found.seen_kept[row] == rank
        unseen = np.setdiff1d(np.arange(len(scores)), history)
        rank = 1 + int((scores[unseen] > scores[target]).sum())
        assert found.target_kept[row] == rank
        assert found.seen_excluded[row] == (rank if target in unseen else MISS)


def test_ranks_do_not_depend_on_batches(exact: Generation, known_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = known(known_log, exact).held_out("test")
    whole = held_out_ranks(data, exact)
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", 5)
    parts = held_out_ranks(data, exact)
    assert all((parts.of(ranking) == whole.of(ranking)).all() for ranking in RANKINGS)


@pytest.mark.parametrize("most", [1, 3 * TINY_ITEMS, 25 * TINY_ITEMS])
def test_ranks_of_training_do_not_depend_on_the_scores_that_are_held(
    tiny_model: DMAN, exact: Generation, known_log: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    data, held = known(known_log, exact).held_out("test"), list[int]()
    whole = all_ranks(tiny_model, data)

    def counting(scores: np.ndarray, *rest: Any) -> Ranks:
        held.append(scores.size)
        return ranks_of_targets(scores, *rest)

    monkeypatch.setattr(training, "MOST_SCORES", most)
    monkeypatch.setattr(training, "ranks_of_targets", counting)
    parts = all_ranks(tiny_model, data)
    assert all((parts.of(name) == whole.of(name)).all() for name in RANKINGS)
    assert sum(held) == len(data.users) * TINY_ITEMS and max(held) <= max(most, TINY_ITEMS)


def test_evaluate_reports_the_metrics_of_the_ranks(exact: Generation, known_log: Path) -> None:
    log = known(known_log, exact)
    found = evaluate(log, exact, split="test")
    ranks = held_out_ranks(log.held_out("test"), exact)
    assert found["users"] == 24
    expected = metrics(ranks.seen_excluded)
    assert {name: found[name] for name in expected} == expected


def test_evaluate_skips_unknown_items_in_inputs_and_leaves_out_short_histories(
    exact: Generation, known_log: Path, log: Path, tmp_path: Path
) -> None:
    """The same users, targets and events but for unknown items, which serving skips too."""
    found, expected = (evaluate(known(path, exact), exact, split="test") for path in (log, known_log))
    for ranking in ("seen_kept", "target_kept"):
        assert found.pop(ranking) == pytest.approx(expected.pop(ranking))  # sums in another order of users
    assert found == pytest.approx(expected)
    histories = make_histories(9, seed=1) | {50: [(1, 1), (2, 2)]}
    short = write_csv(tmp_path / "short.csv", histories)
    assert evaluate(known(short, exact), exact, split="test")["users"] == 9


def test_evaluate_counts_unknown_targets_as_misses_and_says_how_many(
    exact: Generation, known_log: Path, histories: Histories, tmp_path: Path
) -> None:
    """Half of the users end with a new item; the targets of the others, and all inputs, stay."""
    changed = {
        user: [*events[:-1], (events[-1][0] if user % 2 else 900, events[-1][1])] for user, events in histories.items()
    }
    log = known(write_csv(tmp_path / "log.csv", changed), exact)
    found = evaluate(log, exact, split="test")
    assert (found["users"], found["unknown_targets"], found["log"]) == (24, 12, "another log")
    users = [int(user) for user in log.interactions.user_ids]
    before = known(known_log, exact)
    ranks = held_out_ranks(before.held_out("test"), exact)
    triples = zip(*(ranks.of(ranking) for ranking in RANKINGS), strict=True)
    by_user = dict(zip(map(int, before.interactions.user_ids), triples, strict=True))
    expected = [by_user[user] if user % 2 else (MISS, MISS, MISS) for user in users]
    all_three = Ranks(*(np.array(column) for column in zip(*expected, strict=True)))
    main = metrics(all_three.seen_excluded)
    assert {name: found[name] for name in main} == pytest.approx(main)
    assert found["seen_kept"] == pytest.approx(metrics(all_three.seen_kept))
    assert found["target_kept"] == pytest.approx(metrics(all_three.target_kept))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_users_without_a_known_event_before_the_target_are_ranked_by_popularity(
    exact: Generation, tmp_path: Path, split: str
) -> None:
    """As serving does: item i was trained on i times, so item 60 ranks first and item 1 last."""
    events = {user: [(900, 1), (901, 2), (902, 3), (target, 4)] for user, target in {1: 60, 2: 58, 3: 1}.items()}
    if split == "valid":
        events = {user: [*one, (5, 5)] for user, one in events.items()}
    data = known(write_csv(tmp_path / "log.csv", events), exact).held_out(split)  # type: ignore[arg-type]
    assert [len(history) for history in data.histories] == [0, 0, 0]
    ranks = held_out_ranks(data, exact)
    by_target = dict(zip((data.targets + 1).tolist(), ranks.seen_excluded.tolist(), strict=True))
    assert by_target == {60: 1, 58: 3, 1: 60}


def test_evaluate_of_a_log_of_other_items_is_refused(exact: Generation, tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", {1: [(900 + n, n) for n in range(9)]})
    with pytest.raises(InputError, match=r"knows none of its items, such as '900', '901', '902'; .* such as '1', '2'"):
        known(log, exact)


def test_evaluate_of_a_log_without_three_events_of_a_user_is_refused(exact: Generation, tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", {user: [(1, 1), (2, 2)] for user in range(5)})
    with pytest.raises(InputError, match="no user has three events"):
        evaluate(known(log, exact), exact, split="test")
