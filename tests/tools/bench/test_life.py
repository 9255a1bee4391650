"""The measurement of a roll-over: what it finds in replies and stores that are wrong, and one run of all of it."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import whole_benchmark

from dman_runtime.engine import Engine
from dman_runtime.model.generation import Generation
from dman_runtime.requests import Query, Update
from dman_runtime.store.lmdb import LmdbStore
from dman_train.model import DMAN
from dman_train.synthetic import SyntheticConfig, generate, write_log
from dman_train.vocabulary import Vocabulary
from tools.bench import life, life_bundles, life_checks
from tools.bench.lifecycle import Change, Course, Effort, Phase
from tools.bench.steady import RECOMMEND, UPDATE, Found, Kept, Load, Sample, SteadyLoad

AT = 1_600_000_000


def call(began: float, ended: float, bundle_id: str, *, kind: str = RECOMMEND, ms: float = 1.0) -> Sample:
    return Sample(kind, began, ended, ms, bundle_id, "")


def course(*samples: Sample) -> Course:
    """The bundle "new" was activated from second 10 to 12, and "old" again from 20 to 21."""
    changes = [Change(0.0, 0.0, "old"), Change(10.0, 12.0, "new"), Change(20.0, 21.0, "old")]
    return Course([Phase("before", 0.0, 10.0), Phase("activate", 10.0, 20.0)], changes, 0, Found(list(samples)))


# -- calls -----------------------------------------------------------------------------------------------------------


def test_either_bundle_may_answer_while_it_is_changed_and_only_one_before_and_after() -> None:
    right = [
        call(1, 2, "old"), call(9, 11, "new"), call(9, 11, "old"), call(11, 13, "old"), call(13, 14, "new"),
        call(19, 20.5, "old"), call(22, 23, "old"), call(9, 30, "new"),
    ]  # fmt: skip
    wrong = [call(1, 2, "new"), call(13, 14, "old"), call(22, 23, "new"), call(13, 14, "third")]
    unanswered = Sample(UPDATE, 13, 14, 1.0, "", "UNAVAILABLE")
    found = course(*right, *wrong, unanswered)
    assert found.wrong_bundle() == wrong
    assert found.failed() == Counter({"update: UNAVAILABLE": 1})


def test_a_phase_is_compared_with_the_first_one_by_calls_of_one_kind() -> None:
    before = [call(number / 10, 1, "old", ms=2) for number in range(50)]
    during = [call(10 + number / 10, 12, "new", ms=6) for number in range(50)]
    others = [call(11, 12, "new", kind=UPDATE, ms=100), Sample(RECOMMEND, 11, 12, 1000.0, "", "UNAVAILABLE")]
    found = course(*before, *during, *others)
    assert found.ratio(found.phases[1], RECOMMEND) == pytest.approx(3)
    assert math.isnan(found.ratio(found.phases[1], UPDATE))


@pytest.mark.slow
def test_clients_count_replies_that_are_no_full_answers(serve_fake: Callable[..., str]) -> None:
    users = [f"user {number}" for number in range(8)]
    with SteadyLoad(Load(serve_fake(), users, ["1"], {}, clients=4, per_second=400)) as steady:
        time.sleep(1)
    found = steady.found
    assert {one.error for one in found.samples if one.call == RECOMMEND} == {"not a full personalised answer"}
    assert {one.error for one in found.samples if one.call == UPDATE} == {""}
    assert found.added.total() == sum(one.call == UPDATE for one in found.samples)


# -- stores ----------------------------------------------------------------------------------------------------------


def filled(generation: Generation, state: Path, histories: dict[str, range]) -> None:
    with LmdbStore.open(state, map_size=32 << 20) as store:
        engine = Engine(generation, store)
        for user_id, items in histories.items():
            item_ids = list(map(str, items))
            engine.update([Update(user_id, item_ids, [AT + place for place in range(len(item_ids))])])


def test_replies_are_those_of_the_bundle_they_name_and_of_the_history_then(
    exact: Generation, renamed: Generation, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    filled(exact, state, {"anna": range(21, 40)})
    with LmdbStore.open(state) as store:
        (answer,) = Engine(exact, store).recommend([Query("anna", 10, at=AT)])
    item_ids = [exact.bundle.items.item_ids[item] for item in answer.item_indices]
    right = Kept("anna", AT, exact.bundle_id, 19, dict(zip(item_ids, answer.scores.tolist(), strict=True)))
    filled(exact, state, {"anna": range(41, 44)})
    wrong = [
        right._replace(event_count=18),
        right._replace(event_count=40),
        right._replace(user_id="ben"),
        right._replace(bundle_id=renamed.bundle_id),
        right._replace(bundle_id="unknown"),
        right._replace(scores={"none": 1.0}),
    ]
    generations = {one.bundle_id: one for one in (exact, renamed)}
    assert life_checks.reply_errors(state, generations, [right]) == [pytest.approx(0, abs=1e-4)]
    assert all(life_checks.reply_errors(state, generations, [one])[0] > life.TOLERANCE for one in wrong)


def test_stores_are_compared_by_histories_and_states(exact: Generation, renamed: Generation, tmp_path: Path) -> None:
    histories = {"anna": range(21, 40), "ben": range(30, 50)}
    filled(exact, tmp_path / "one", histories)
    filled(renamed, tmp_path / "same", histories)
    found = life_checks.compared(renamed, tmp_path / "one", tmp_path / "same")
    assert found.other_histories == [] and max(found.errors.values()) < 1e-4
    filled(renamed, tmp_path / "other", histories | {"ben": range(30, 51)})
    found = life_checks.compared(renamed, tmp_path / "one", tmp_path / "other")
    assert found.other_histories == ["ben"] and found.errors["ben"] > life.TOLERANCE > found.errors["anna"]


def test_events_that_are_lost_or_doubled_are_found(exact: Generation, tmp_path: Path) -> None:
    filled(exact, tmp_path / "state", {"anna": range(21, 40), "ben": range(30, 50)})
    before = {"anna": 10, "ben": 20}
    assert life_checks.wrong_counts(tmp_path / "state", before, Counter(anna=9)) == []
    assert life_checks.wrong_counts(tmp_path / "state", before, Counter(anna=8)) == ["anna"]
    assert life_checks.wrong_counts(tmp_path / "state", before, Counter(anna=9, ben=1)) == ["ben"]


# -- the command -----------------------------------------------------------------------------------------------------


def test_made_bundles_share_most_items_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[tuple[DMAN, Vocabulary, Path]] = []  # an export takes a quarter of a minute, and is tested elsewhere
    monkeypatch.setattr(life_bundles, "export_bundle", lambda *one: exported.append(one))
    log = life_bundles.few_users(generate(SyntheticConfig(users=60, items=60, mean_events=60)), 50)
    paths = life_bundles.made_pair(log, tmp_path)
    (old, before, _), (new, after, _) = exported
    assert tuple(path for _, _, path in exported) == paths
    catalogues = [set(one.item_ids) for one in (before, after)]
    retired, added = catalogues[0] - catalogues[1], catalogues[1] - catalogues[0]
    assert len(retired) == len(added) == round(0.05 * len(catalogues[0] | catalogues[1]))
    assert catalogues[0] | catalogues[1] <= set(log.item_ids)
    assert (old.vocabulary, new.vocabulary) == (len(before.item_ids), len(after.item_ids))
    assert old.config == new.config and old.config.time == "request"
    assert not (old.items[:5] == new.items[:5]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bundle", "bundle"], "give both, or none (--other)"),
        (["--workers", "1,x"], "(--workers)"),
        (["--rate", "0"], "(--rate)"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert life.main(options) == 2
    assert message in capsys.readouterr().err


@whole_benchmark
@pytest.mark.slow
def test_everything_but_speed_is_as_it_must_be(
    tiny_bundle: Path,
    renamed_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    effort = Effort(1, 1, kills=2, per_second=60, clients=4, speed_repeats=1, keep_every=3, max_share=0.05)
    monkeypatch.setattr(life, "QUICK", effort)
    log, page, scratch = tmp_path / "log.parquet", tmp_path / "reports" / "life.md", tmp_path / "scratch"
    scratch.mkdir()
    write_log(generate(SyntheticConfig(users=200, items=60, mean_events=20)), log)
    options = ["--data", log, "--bundle", tiny_bundle, "--other", renamed_bundle, "--out", page, "--scratch", scratch]
    status = life.main([*map(str, options), "--workers", "2", "--quick", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    timed = ("p99", "speed")
    broken = [claim for claim in result["claims"] if claim["met"] is False]
    assert [claim for claim in broken if not claim["claim"].startswith(timed)] == []
    assert status == bool(broken)
    assert all(f"| {claim['claim']} | {claim['measured']} |" in page.read_text() for claim in result["claims"])
    assert result["facts"]["new bundle"].endswith(": 20 of those of the old one retired, 20 new")
    phases = ["before", "rebuild", "activate", "roll back", "activate again", "after"]
    assert [phase["name"] for phase in result["sections"]["Roll-over, 2 workers"]["phases"]] == phases
    assert list(scratch.iterdir()) == []
