"""Leave-one-out metrics of a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from histories import Histories, make_histories, write_csv

from dman_runtime.data.evaluation import MISS, held_out, metrics
from dman_runtime.data.log_options import ANY_LOG
from dman_runtime.data.vocabulary import read_known
from dman_runtime.errors import InputError
from dman_runtime.jobs import partitions
from dman_runtime.jobs.evaluating import evaluate, held_out_ranks
from dman_runtime.model.generation import Generation

NO_FILTER = {"min_user_events": 0, "min_item_events": 0}


@pytest.fixture(scope="module")
def known_log(histories: Histories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of known items only."""
    return write_csv(tmp_path_factory.mktemp("evaluating") / "log.csv", histories)


@pytest.mark.parametrize(("split", "last"), [("test", 1), ("valid", 2)])
def test_ranks_are_those_of_a_replay_user_by_user(
    exact: Generation, known_log: Path, histories: Histories, split: str, last: int
) -> None:
    log = read_known(known_log, exact.bundle.items.index, ANY_LOG, **NO_FILTER)
    data = held_out(log, split)  # type: ignore[arg-type]
    found = held_out_ranks(data, exact)
    assert len(data.users) == len(histories)
    for row, user in enumerate(data.users):
        items = [item - 1 for item, _ in histories[int(log.user_ids[user])]]
        history, target = np.array(items[:-last]), items[-last]
        (state,) = exact.replay([history])
        scores = exact.bundle.item_embeddings @ state.user_embedding
        rank = 1 + int((scores > scores[target]).sum())
        assert found.seen_kept[row] == rank
        unseen = np.setdiff1d(np.arange(len(scores)), history)
        rank = 1 + int((scores[unseen] > scores[target]).sum()) if target in unseen else MISS
        assert found.seen_excluded[row] == rank


def test_ranks_do_not_depend_on_batches(exact: Generation, known_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = read_known(known_log, exact.bundle.items.index, ANY_LOG, **NO_FILTER)
    data = held_out(log, "test")
    whole = held_out_ranks(data, exact)
    monkeypatch.setattr(partitions, "USERS_PER_BATCH", 5)
    parts = held_out_ranks(data, exact)
    assert (parts.seen_kept == whole.seen_kept).all() and (parts.seen_excluded == whole.seen_excluded).all()


def test_evaluate_reports_the_metrics_of_the_ranks(exact: Generation, known_log: Path) -> None:
    found = evaluate(known_log, exact, split="test", **NO_FILTER)
    log = read_known(known_log, exact.bundle.items.index, ANY_LOG, **NO_FILTER)
    ranks = held_out_ranks(held_out(log, "test"), exact)
    assert found["users"] == 24
    expected = metrics(ranks.seen_excluded)
    assert {name: found[name] for name in expected} == expected


def test_evaluate_leaves_out_unknown_items_and_short_histories(
    exact: Generation, known_log: Path, log: Path, tmp_path: Path
) -> None:
    """The same users and events but for unknown items, which nothing can be said about."""
    found, expected = (evaluate(path, exact, split="test", **NO_FILTER) for path in (log, known_log))
    assert found.pop("seen_kept") == pytest.approx(expected.pop("seen_kept"))  # sums in another order of users
    assert found == pytest.approx(expected)
    histories = make_histories(9, seed=1) | {50: [(1, 1), (2, 2)]}
    short = write_csv(tmp_path / "short.csv", histories)
    assert evaluate(short, exact, split="test", **NO_FILTER)["users"] == 9


def test_evaluate_of_a_log_of_other_items_is_refused(exact: Generation, tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", {1: [(900 + n, n) for n in range(9)]})
    with pytest.raises(InputError, match="no user has three events of known items"):
        evaluate(log, exact, split="test", **NO_FILTER)
